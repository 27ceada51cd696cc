"""What the columns of the table `growth` mean, a part of `meanings`. Demands nothing."""

from __future__ import annotations

GROWTH: dict[str, str] = {
    "growth.layer": "decoder block, counted from 0; null: the block that each set of personas picks, of its largest |ρ|",
    "size": "how many of the personas a set holds: quarter, half or all",
    "growth.n": "personas of the smallest such set",
    "growth.spearman": "mean of ρ over the sets of that size; with a null layer of |ρ|; of all personas their ρ",
    "spearman_sd": "its standard deviation over the sets; over halves, an estimate of the standard error of ρ over all personas",
    "spearman_low": "95 % range of ρ over the sets",
    "spearman_high": "its upper end",
    "picked_share": "share of the sets that pick this layer; with a null layer, that pick the one all personas do",
    "elsewhere": "mean of ρ in the set's sibling, which shares no persona with it; with a null layer at the layer that the set "
    "picked, in the direction it has there",
    "growth.change": "mean of ρ of the set and its sibling together, twice as many personas, less its own, at the same layer",
    "change_low": "95 % range of the change over the sets",
    "change_high": "its upper end",
    "growth.difference": "mean of |ρ of a set - its sibling's|",
    "growth.difference_low": "95 % range of ρ of a set - its sibling's, each taken first once",
    "growth.difference_high": "its upper end",
    "same_sign": "share of siblings that both have the sign of ρ over all personas; with a null layer, of those whose ρ has the "
    "same sign in both at the layer picked",
    "agree": "share of siblings whose difference has a 95 % interval with 0 in it: on the z scale, by the bootstrap's standard "
    "error over personas",
    "agree_reason": "why there is no such share",
    "splits": "how often the personas were dealt into quarters",
    "split_seed": "seed of the deals",
}
