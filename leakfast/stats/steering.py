"""Dose and response: the behavior on the source and on the bystanders under each intervention, what it changed, and what it
cost. Demands a run's shards under steered/, whose manifest entries say what was done; loads no model.

All arms of an adapter draw from the same random numbers, so a change is a difference of pairs: the same persona, question and
sample with and without the intervention."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from leakfast.stats import accuracy, baselines, rates, two_way
from leakfast.storage import layout

if TYPE_CHECKING:
    from leakfast.storage.run import Run

_COUNTED = ("ok", "below_threshold")
_KEY = ["persona", "question"]
SCHEMA: dict[str, Any] = {
    "behavior": pl.String,
    "seed": pl.Int64,
    **dict.fromkeys(("source", "adapter", "direction", "kind", "direction_source", "set_against"), pl.String),
    **dict.fromkeys(("mode", "unit"), pl.String),
    "strength": pl.Float64,
    "steered_layers": pl.String,
    "direction_norm": pl.Float64,
    "residual_norm": pl.Float64,
    **dict.fromkeys(("measure", "estimator"), pl.String),
    **dict.fromkeys(("personas", "questions"), pl.Int64),
    **{
        f"{name}{end}": pl.Float64
        for name, ends in (
            ("on_source", ("",)),
            ("on_source_change", ("",)),
            ("mean_bystander", ("", "_low", "_high")),
            ("change", ("", "_low", "_high")),
        )
        for end in ends
    },
    **dict.fromkeys(("accuracy", "text_logprob_nats", "text_change_nats"), pl.Float64),
    "text_tokens": pl.Int64,
    "reason": pl.String,
    "change_reason": pl.String,
    "method": pl.String,
}
_METHOD = "t interval of a mean over bystanders and questions, both drawn (two-way)"


def table(run: Run, named: Collection[str] | None = None) -> pl.DataFrame:
    """Table `steering`: a row an arm, behavior, measure and estimator, strengths rising.

    on_source: rate, mean probability (of `probability`) or accuracy (of `choices`) under the source's prompt; mean_bystander:
    the mean over the other personas. Estimand: the mean over further personas and questions of the same kinds, of this
    adapter. Resampling units: persona and question, by two_way.of_mean (t interval, Satterthwaite's degrees of freedom);
    null ends with a reason where a bystander lacks a question. change, on_source_change: less the same adapter's without
    the arm (or under one of strength 0), pair by pair, null with a reason where that was not measured alike. accuracy: mean
    over all personas of the arm's multiple choice, where there is one list. text_logprob_nats: mean log P a token of plain
    text under the arm (measure.plain_text); text_change_nats: less the unsteered adapter's. named: personas of the study;
    others are outside."""
    costs, rows = _costs(run), []
    for relpath, steer in _arms(run):
        for key, values in _values(run, relpath):
            rows.append(_row(run, relpath, steer, key, values, named) | _cost(costs, relpath, steer))
    found = pl.DataFrame(rows, schema=SCHEMA)
    on = ["adapter", "direction", "mode", "unit", "strength", "steered_layers"]
    right = found.filter(measure=layout.CHOICES).group_by(on, maintain_order=True)
    right = right.agg(accuracy=pl.when(pl.len() == 1).then(pl.col("accuracy").first()))
    found = found.drop("accuracy").join(right, on=on, how="left", maintain_order="left")
    order = [
        "behavior",
        "adapter",
        "measure",
        "estimator",
        "direction",
        "mode",
        "unit",
        "steered_layers",
        "strength",
    ]
    return found.select(*SCHEMA).sort(order, nulls_last=True, maintain_order=True)


def _arms(run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    """(folder, what was done) of every arm's completions, probabilities and choice scores."""
    seen = set()
    for path in run.shards(layout.STEERED):
        folder, entry = str(PurePosixPath(path).parent), run.manifest["shards"][path]
        kind = folder.split("/")[1]
        if folder not in seen and "steer" in entry and kind in _READERS:
            seen.add(folder)
            yield folder, entry["steer"]


def _of_completions(
    frame: pl.DataFrame, behavior: str
) -> Iterator[tuple[tuple[str, str | None], pl.DataFrame]]:
    from leakfast.behaviors.registry import get

    detector = get(behavior).detector
    if detector is None:  # a judge's, who reads no steered replies
        return
    counts = rates.count(frame, detector(pl.col("text")), by_question=True)
    shares = counts.filter(pl.col("total") > 0).select(*_KEY, value=pl.col("hits") / pl.col("total"))
    yield (behavior, None), shares


def _of_probability(
    frame: pl.DataFrame, behavior: str
) -> Iterator[tuple[tuple[str, str | None], pl.DataFrame]]:
    counted = frame.filter(pl.col("status").is_in(_COUNTED))
    for (estimator,), mine in counted.group_by("estimator", maintain_order=True):
        yield (
            (behavior, str(estimator)),
            mine.group_by(_KEY, maintain_order=True).agg(value=pl.col("probability").mean()).drop_nulls(),
        )


def _of_choices(frame: pl.DataFrame, behavior: str) -> Iterator[tuple[tuple[str, str | None], pl.DataFrame]]:
    if "behavior" not in frame.columns:
        frame = frame.with_columns(behavior=pl.lit(behavior))
    counts = accuracy.count(frame).filter(pl.col("total") > 0)
    for (name,), mine in counts.group_by("behavior", maintain_order=True):
        yield (str(name), None), mine.select(*_KEY, value=pl.col("hits") / pl.col("total"))


_READERS = {
    layout.COMPLETIONS: _of_completions,
    layout.PROBABILITY: _of_probability,
    layout.CHOICES: _of_choices,
}


def _values(run: Run, folder: str) -> Iterator[tuple[tuple[str, str | None], pl.DataFrame]]:
    """((behavior, estimator), persona × question → value) of a folder, steered or not."""
    parts = folder.removeprefix(f"{layout.STEERED}/").split("/")
    frame = run.read(folder)
    if frame.height:
        yield from _READERS[parts[0]](frame, parts[1])


def _row(
    run: Run,
    folder: str,
    steer: dict[str, Any],
    key: tuple[str, str | None],
    values: pl.DataFrame,
    named: Collection[str] | None,
) -> dict[str, Any]:
    """One row without its cost."""
    source = steer["source"]
    before = _before(run, folder, steer, key)
    layers = steer["layers"]

    def mean_of(lengths: dict[str, float]) -> float | None:
        some = [lengths[str(layer)] for layer in layers if str(layer) in lengths]
        return float(np.mean(some)) if some else None

    row: dict[str, Any] = {
        **{
            name: steer[name]
            for name in ("source", "adapter", "seed", "direction", "kind", "direction_source")
        },
        **{name: steer[name] for name in ("mode", "unit", "strength")},
        "set_against": ",".join(steer["against"]) or None,
        "steered_layers": ",".join(map(str, layers)),
        "direction_norm": mean_of(steer["norms"]),
        "residual_norm": mean_of(steer["residual_norms"]),
        "behavior": key[0],
        "measure": folder.split("/")[1],
        "estimator": key[1],
        "on_source": _mean(values.filter(persona=source)) if source else None,
        "method": _METHOD,
    }
    if row["measure"] == layout.CHOICES:
        row["accuracy"] = _mean(values)
    others = _bystanders(values, source, named)
    row |= _interval("mean_bystander", others, "reason")
    row |= {"personas": others["persona"].n_unique(), "questions": others["question"].n_unique()}
    if isinstance(before, str):
        return row | {"change_reason": before}
    paired = values.join(before, on=_KEY, how="inner", suffix="_before", maintain_order="left")
    if paired.height != values.height:
        return row | {"change_reason": "the adapter was measured otherwise without the arm"}
    paired = paired.select(*_KEY, value=pl.col("value") - pl.col("value_before"))
    row["on_source_change"] = _mean(paired.filter(persona=source)) if source else None
    return row | _interval("change", _bystanders(paired, source, named), "change_reason")


def _before(run: Run, folder: str, steer: dict[str, Any], key: tuple[str, str | None]) -> pl.DataFrame | str:
    """The same without the arm: of the adapter as it is, else of an arm of strength 0, which is that to the bit; or why there
    is none that was asked and drawn alike."""
    arm = steer["adapter"] + layout.STEERED_BY
    plain = "/".join(steer["adapter"] if part.startswith(arm) else part for part in folder.split("/")[1:])
    at_zero = (
        path
        for path, told in _arms(run)
        if told["adapter"] == steer["adapter"]
        and told["strength"] == 0
        and told["mode"] in ("add", "project")
        if path.split("/")[1] == folder.split("/")[1]
    )
    why = "the adapter was not measured without the arm"
    for there in (plain, *at_zero):
        found = dict(_values(run, there)).get(key) if run.shards(there) else None
        if found is None:
            continue
        otherwise = _otherwise(run, folder, there)
        if otherwise is None:
            return found
        why = f"the adapter under the arm {otherwise}"
    return why


def _otherwise(run: Run, folder: str, there: str) -> str | None:
    """How a folder's shards were asked or drawn otherwise than another's, whose questions go by the same numbers; None where
    they were not, or do not say."""
    entries = [[run.manifest["shards"][path] for path in run.shards(one)] for one in (folder, there)]
    told = {("", str(side)): baselines.said_of(some) for side, some in enumerate(entries)}
    words = baselines.apart(told, [("", "0")], [("", "1")], "without it")
    if words is not None:
        return words
    mine, theirs = ({n: h for e in some for n, h in e.get("personas", {}).items()} for some in entries)
    changed = [name for name in mine if theirs.get(name, mine[name]) != mine[name]]
    return f"had another prompt as {changed[0]} than without it" if changed else None


def _bystanders(values: pl.DataFrame, source: str | None, named: Collection[str] | None) -> pl.DataFrame:
    others = values if source is None else values.filter(pl.col("persona") != source)
    return others if named is None else others.filter(pl.col("persona").is_in(list(named)))


def _mean(values: pl.DataFrame) -> float | None:
    """Of the questions, each as often as it was answered; None where there is none."""
    found = values["value"].mean()
    return None if found is None else float(found)  # type: ignore[arg-type]


def _interval(name: str, values: pl.DataFrame, reason: str) -> dict[str, Any]:
    """Mean and ends over personas and questions; null ends and the reason where a persona lacks a question."""
    if values.is_empty():
        return {reason: "no bystander was measured"}
    wide = values.pivot("question", index="persona", values="value").drop("persona")
    cells = wide.to_numpy().astype(np.float64)
    if np.isnan(cells).any():
        return {name: _mean(values), reason: "a bystander lacks a question"}
    mean, low, high = two_way.of_mean(cells)
    if np.isnan(low):
        return {name: mean, reason: "fewer than two bystanders or questions"}
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


# arm or adapter → text (its hash; None of earlier versions) → (mean log P a token, tokens)
_Costs = dict[str, dict[str | None, tuple[float, int]]]


def _costs(run: Run) -> _Costs:
    """Of plain text: of an arm one, of an adapter as it is those of its arms."""
    found: _Costs = {}
    for path in run.shards(f"{layout.STEERED}/text"):
        frame, text = run.read(path), run.manifest["shards"][path].get("text")
        tokens = int(frame["n_tokens"].sum())
        if tokens:
            value = float(frame["logprob_nats"].sum()) / tokens, tokens
            found.setdefault(PurePosixPath(path).parts[2], {})[text] = value
    return found


def _cost(costs: _Costs, folder: str, steer: dict[str, Any]) -> dict[str, Any]:
    arm = next(part for part in folder.split("/") if layout.STEERED_BY in part)
    if arm not in costs:
        return {}
    ((text, (mean, tokens)),) = costs[arm].items()
    before = costs.get(steer["adapter"], {}).get(text)
    change = None if before is None or before[1] != tokens else mean - before[0]
    return {"text_logprob_nats": mean, "text_tokens": tokens, "text_change_nats": change}
