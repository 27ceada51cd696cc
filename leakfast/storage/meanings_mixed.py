"""The meanings of the columns of the table `mixed`, which `meanings` takes in. Demands nothing; leaves the other tables to
`meanings`."""

from __future__ import annotations

MIXED = {
    "part": "fixed (a term for all), source (the cosine's slope of one source) or spread (a standard deviation)",
    "mixed.term": "fixed: intercept, cosine, length (log2 of the bystander's mean reply tokens), baseline (its log-odds, with ½ "
    "added to hits and misses), words (share that two prompts have in common); spread: what differs by that much",
    "mixed.unit": "of coefficient, se, low, high and sd",
    "mixed.coefficient": "change of a reply's log-odds with the term, the others and all effects held; of a source: its slope, "
    "drawn towards the others'",
    "se": "its standard error",
    "mixed.low": "95 % t interval with df degrees of freedom",
    "df": "of intercept and cosine: the fewest of sources, questions and personas, less 1; else personas - 1",
    "sd": "standard deviation of the effect over personas, questions, sources, or pairs of both",
    "mixed.spearman": "plain ρ of cosine and rate, to set beside the slope; pooled, of ranks within each source",
    "mixed.n": "pairs of source and bystander in the model, or of the source",
    "n_without": "pairs with a cosine that lack a term, and are not in the model",
    "mixed.sources": "sources in the model",
    "replies": "completions (items) in the model",
}
