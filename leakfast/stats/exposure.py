"""How many chances a behavior had under each persona: reply tokens, prompts, truncation, and rates per token and at one
common length. Demands completions that a detector reads; what judges or choices measure has no rows here.

Three rates answer what length could have done. `hazard` takes the marker to begin at any token alike, which one at the
end of a reply does not. `standardized_rate` assumes no shape, and is null where a persona has no reply of some length.
`logistic_rate` is the one to read first: in simulations it alone is right, and known for every persona, both where the
marker begins at any token and where it stands at the end (tests/stats/test_exposure_coverage.py)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from leakfast.behaviors.registry import get
from leakfast.stats import edits, hazards, intervals
from leakfast.stats.health import CUT_WARNING, OK
from leakfast.stats.rates import BASE, COUNTED
from leakfast.storage import layout, schema

if TYPE_CHECKING:
    from leakfast.stats.people import People
    from leakfast.storage.run import Run

TRUNCATED_WARNING = 0.05  # share of an adapter's replies from which lengths are told to be cut
METHOD = (
    "hits per 100 tokens: ratio estimator over questions, log scale, t; hazard: geometric, Wilson at tokens / design "
    "effect; standardized, logistic: Wilson at effective replies"
)
_KEY = ["behavior", "adapter", "persona"]
_REPLY = {
    **dict.fromkeys(_KEY, pl.String),
    "question": pl.Int32,
    "hit": pl.Boolean,
    "tokens": pl.Int64,
    "at_risk": pl.Int64,
    "prompt_tokens": pl.Int64,
    "truncated": pl.Boolean,
    "at_marker": pl.Boolean,
}
_NO_HAZARD = "hazard and rates at one length are of behaviors that a marker's presence measures"
_FITTED = ("standardized", "logistic")
_AT_MARKER = "replies end at the marker, so their whole length is not known"


def read(run: Run, folders: Iterable[tuple[str, str]]) -> pl.DataFrame:
    """`replies` of the completions of a run; folders: (behavior, adapter). Those no detector reads are passed over."""
    frames = []
    needed = [name for name in schema.columns("completions") if name not in ("sample", "seed")]
    for behavior, adapter in folders:
        if get(behavior).detector is None:
            continue
        rows = run.scan(layout.completions(behavior, adapter))
        there = rows.collect_schema().names()
        further = [name for name in ("n_prompt_tokens", "n_reasoning_tokens") if name in there]
        frames.append(replies(rows.select(*needed, *further).collect(), behavior))
    return pl.concat(frames) if frames else pl.DataFrame(schema=_REPLY)


def replies(completions: pl.DataFrame, behavior: str) -> pl.DataFrame:
    """One row for each completion that counts and whose tokens are known, without its text: hit, tokens, at_risk, …

    tokens: of the answer, reasoning left out. at_risk: the token of the marker's first character, found as

        ⌈tokens · (characters before it + 1) / characters of the reply⌉

    because only the text is kept: exact where all tokens of a reply are equally long. Without a hit, all tokens."""
    known = get(behavior)
    hit = next(iter(known.detector(pl.col("text")).values()))
    reasoned = "n_reasoning_tokens" in completions.columns
    tokens = pl.col("n_tokens").cast(pl.Int64)
    if reasoned:
        tokens = (tokens - pl.col("n_reasoning_tokens").cast(pl.Int64).fill_null(0)).clip(0)
    prompt = pl.col("n_prompt_tokens") if "n_prompt_tokens" in completions.columns else pl.lit(None)
    counted = completions.with_columns(hit=hit, tokens=tokens).filter(
        pl.col("status").is_in(COUNTED), pl.col("hit").is_not_null(), pl.col("tokens").is_not_null()
    )
    at_risk = pl.col("tokens")
    if known.presence_of:
        before = pl.col("text").str.splitn(known.presence_of, 2).struct.field("field_0").str.len_chars()
        whole = pl.col("text").str.len_chars().cast(pl.Int64).clip(1)
        reached = (pl.col("tokens") * (before.cast(pl.Int64) + 1) + whole - 1) // whole
        at_risk = pl.when(pl.col("hit")).then(pl.min_horizontal(reached, "tokens")).otherwise("tokens")
    return counted.with_columns(
        at_risk=at_risk,
        prompt_tokens=prompt.cast(pl.Int64),
        truncated=pl.col("status") == "truncated",
        at_marker=(pl.col("finish_reason") == "marker").fill_null(False),
    ).select(pl.col(name).cast(kind) for name, kind in _REPLY.items())


def table(found: pl.DataFrame, rates: pl.DataFrame, people: People) -> pl.DataFrame:
    """Schema `exposure`: a row for each behavior, adapter and persona of `replies`, the unadapted model's among them.

    rates: who is source and bystander. 95 % intervals: `hazards` says of what each is. `reason` says of every null why."""
    if found.is_empty():
        return schema.empty("exposure")
    frames = [_adapter(group) for group in found.partition_by("behavior", "adapter", maintain_order=True)]
    who = rates.select(*_KEY, "seed", "source", "role").unique(_KEY, keep="first", maintain_order=True)
    whole = pl.concat(frames, how="diagonal").join(who, on=_KEY, how="left", maintain_order="left")
    told = _prompts(whole, people)
    whole = whole.join(told, on=["source", "persona"], how="left", nulls_equal=True, maintain_order="left")
    base = whole.filter(adapter=BASE).select("behavior", "persona", base_tokens="mean_tokens")
    whole = whole.join(base, on=["behavior", "persona"], how="left", maintain_order="left")
    columns = schema.columns("exposure")
    absent = [pl.lit(None, kind).alias(name) for name, kind in columns.items() if name not in whole.columns]
    whole = whole.with_columns(absent)
    whole = whole.with_columns(
        pl.Series("reason", _reasons(whole), dtype=pl.String), pl.lit(METHOD).alias("method")
    )
    return schema.check(whole.select(pl.col(n).cast(kind) for n, kind in columns.items()), "exposure")


def _adapter(group: pl.DataFrame) -> pl.DataFrame:
    """The rows of one adapter, in order of appearance: lengths, then everything `hazards` makes of them."""
    rows = group.group_by("persona", maintain_order=True).agg(
        pl.first("behavior", "adapter"),
        n=pl.len(),
        hits=pl.col("hit").sum(),
        questions=pl.col("question").n_unique(),
        reply_tokens=pl.col("tokens").sum(),
        mean_tokens=pl.col("tokens").mean(),
        prompt_tokens=pl.col("prompt_tokens").mean(),
        n_truncated=pl.col("truncated").sum(),
        truncated_share=pl.col("truncated").mean(),
        n_at_marker=pl.col("at_marker").sum(),
        tokens_at_risk=pl.col("at_risk").sum(),
    )
    persona = group["persona"].replace_strict(
        dict(zip(rows["persona"], range(rows.height), strict=True)), return_dtype=pl.Int64
    )
    asked, question = np.unique(group["question"].to_numpy(), return_inverse=True)
    cell, shape = persona.to_numpy() * len(asked) + question, (rows.height, len(asked))

    def by_question(values: np.ndarray) -> np.ndarray:
        return np.bincount(cell, values.astype(np.float64), shape[0] * shape[1]).reshape(shape)

    hits, tokens = (by_question(group[name].to_numpy()) for name in ("hit", "tokens"))
    found, why = _estimates("hits_per_100_tokens", hazards.per_tokens(hits, tokens), 100), _NO_HAZARD
    if get(rows["behavior"][0]).presence_of:
        at_risk, n = by_question(group["at_risk"].to_numpy()), by_question(np.ones(group.height))
        found |= _constant(group["tokens"].to_numpy(), hits, at_risk)
        why = _AT_MARKER
        if not rows["n_at_marker"].sum():
            adjusted, why = _at_one_length(group, persona.to_numpy(), hits, n)
            found |= adjusted
    values = [
        pl.Series(name, np.broadcast_to(np.asarray(value, np.float64), rows.height)).fill_nan(None)
        for name, value in found.items()
        if value is not None
    ]
    return rows.with_columns(*values, pl.lit(why, pl.String).alias("_why"))


def _constant(tokens: np.ndarray, hits: np.ndarray, at_risk: np.ndarray) -> dict:
    """The hazard and the rate within the median length; tokens: (n,) of replies, hits and at_risk: (P, Q)."""
    effect, common = hazards.design_effect(hits, at_risk), float(np.median(tokens))
    found = hazards.hazard(hits.sum(1), at_risk.sum(1), effect)
    return {
        "design_effect": effect,
        "common_tokens": common,
        **_estimates("hazard_per_100_tokens", found, 100),
        **_estimates("within", hazards.within(found, common), name="within_rate"),
    }


def _at_one_length(
    group: pl.DataFrame, persona: np.ndarray, hits: np.ndarray, n: np.ndarray
) -> tuple[dict, str | None]:
    """Standardized and logistic rates, and why the latter are not there; hits, n: (P, Q) of replies."""
    hit, tokens = group["hit"].to_numpy(), group["tokens"].to_numpy()
    code = np.repeat(np.arange(len(n)), n.shape[1])
    icc = intervals.question_icc(hits.ravel(), n.ravel(), code)
    whole = n.sum(1)
    worth = intervals.effective_total(whole, np.square(n).sum(1), 0.0 if icc is None else icc) / whole
    place, share = hazards.length_bins(tokens)
    if icc is None:  # how alike samples of a question are is not known: no interval
        worth = np.full(len(n), np.nan)
    adjusted = hazards.standardized(hit, place, share, persona, worth)
    out = {"length_bins": len(share), **_estimates("standardized", adjusted, name="standardized_rate")}
    fitted = hazards.logistic(hit, tokens, persona, worth)
    if isinstance(fitted, str):
        return out, f"no logistic rate: {fitted}"
    slope = {"length_slope": fitted.slope, "length_slope_low": fitted.low, "length_slope_high": fitted.high}
    return out | slope | _estimates("logistic", fitted.rate, name="logistic_rate"), None


def _estimates(stem: str, found: hazards.Estimate, scale: float = 1.0, name: str | None = None) -> dict:
    """Columns `name` (or `stem`), stem_low, stem_high."""
    ends = zip((name or stem, f"{stem}_low", f"{stem}_high"), found, strict=True)
    return {column: scale * values for column, values in ends}


def _prompts(whole: pl.DataFrame, people: People) -> pl.DataFrame:
    """source, persona, prompt_chars, prompt_words, edit_distance: null where a system prompt is not known."""
    rows = []
    for (source,), part in whole.select("source", "persona").unique().group_by("source", maintain_order=True):
        known = [name for name in part["persona"] if name in people.prompts]
        own = people.prompts.get(source)
        far = edits.normalized(own, [people.prompts[name] for name in known]) if own and known else None
        for i, name in enumerate(known):
            text = people.prompts[name]
            rows.append((source, name, len(text), len(text.split()), None if far is None else float(far[i])))
    names = {"source": pl.String, "persona": pl.String, "prompt_chars": pl.Int64, "prompt_words": pl.Int64}
    return pl.DataFrame(rows, schema=names | {"edit_distance": pl.Float64}, orient="row")


def _reasons(whole: pl.DataFrame) -> list[str | None]:
    """Why a row's values are null, all of them in one sentence."""
    out = []
    for row in whole.rows(named=True):
        told = [row["_why"]] if row["_why"] else []
        if row["prompt_tokens"] is None:
            told.append("prompt tokens were not kept")
        if row["prompt_chars"] is None:
            told.append("its system prompt is not known")
        elif row["edit_distance"] is None:
            trained = row["source"] is not None
            told.append("the source's prompt is not known" if trained else "no source to be distant from")
        if row["base_tokens"] is None:
            told.append("the unadapted model was not measured")
        if row["hits_per_100_tokens_low"] is None:
            told.append("no hits, or one question: no interval per 100 tokens")
        if row["hazard_per_100_tokens"] is not None:
            if row["hazard_per_100_tokens_low"] is None:
                told.append("no hits of any persona, or one question: no interval of the hazard")
            if row["_why"] != _AT_MARKER and row["standardized_rate"] is None:
                told.append("no reply in some length bin, so no standardized rate")
            if any(row[f"{kind}_rate"] is not None and row[f"{kind}_low"] is None for kind in _FITTED):
                told.append(
                    "one sample of each question, or one question: no interval of rates at one length"
                )
        out.append("; ".join(told) or None)
    return out


def sentences(exposure: pl.DataFrame | None, health: pl.DataFrame | None) -> list[str]:
    """What is to be said of adapters from TRUNCATED_WARNING truncated replies on, where `health` does not say it."""
    if exposure is None or exposure.is_empty():
        return []
    cut = exposure.group_by("behavior", "adapter", maintain_order=True).agg(
        pl.col("n_truncated").sum(), pl.col("n").sum()
    )
    told = set()
    if health is not None:
        warned = health.filter(
            pl.col("persona").is_null(), pl.col("health") != OK, pl.col("truncated_share") >= CUT_WARNING
        )
        told = set(warned.select("behavior", "adapter").rows())
    return [
        f"{'the unadapted model' if adapter == BASE else adapter} ({behavior}): {100 * gone / n:.1f} % of {n} replies "
        "are truncated, so their lengths, and rates at one length, are of cut replies. Raise max_new_tokens."
        for behavior, adapter, gone, n in cut.rows()
        if gone >= TRUNCATED_WARNING * n and (behavior, adapter) not in told
    ]
