"""What keeps a reader from taking a run for more than it is: sentences made of what was run, each with the table or the
part of the page that shows it. Demands a run and its tables; a caveat that does not hold of the run is not said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import polars as pl

from leakfast.behaviors.registry import get
from leakfast.models.adapters import card_in
from leakfast.stats import dropped, expected_rates
from leakfast.stats.correlations import POOLED
from leakfast.stats.rates import BASE
from leakfast.stats.tables import Stats
from leakfast.storage import layout
from leakfast.storage.run import Run

AGREE = 0.8  # Spearman of probability and sampled rate from which they are said to order the personas alike
TRUNCATED = 0.05  # share of an adapter's replies from which it is said


class Caveat(NamedTuple):
    """A sentence, the anchor on the page that shows its numbers, and the table they are in."""

    text: str
    anchor: str
    table: str | None


def caveats(run: Run, stats: Stats, studied: Any | None, unread: str | None = None) -> list[Caveat]:
    """Every caveat that holds of this run, the most weighty first. studied: the run's study, None where it has none, or none
    that can be read; unread: why."""
    return [
        *_seeds(stats),
        *_picked(stats),
        *_truncated(stats),
        *_probable(stats),
        *_judged(stats),
        *_left_out(run, stats),
        *_unread(run, studied, unread),
        *_data(run, stats, studied),
        *_drawn(run),
    ]


def _seeds(stats: Stats) -> Iterator[Caveat]:
    rows = stats.rates.filter(pl.col("role") != "base").select("behavior", "source", "seed").unique()
    single = rows.group_by("behavior", maintain_order=True).agg(
        most=pl.struct("source", "seed").n_unique() / pl.col("source").n_unique()
    )
    names = single.filter(pl.col("most") <= 1)["behavior"].sort().to_list()
    if names:
        yield Caveat(
            f"One training seed for each source ({_listed(names)}): how much the numbers move from one training to the "
            "next is not known, and no interval on this page includes it.",
            "provenance",
            "means",
        )


def _picked(stats: Stats) -> Iterator[Caveat]:
    for behavior in stats.behaviors():
        layer, tested = stats.best_layer(behavior), len(stats.layers())
        if layer is None or tested < 2:
            continue
        pool = "pooled " if (stats.correlations.filter(behavior=behavior)["source"] == POOLED).any() else ""
        yield Caveat(
            f"{_words(behavior)}: layer {layer} is the one of {tested} with the largest {pool}|ρ|, picked after "
            "looking. Its ρ is too large by that, and intervals in the headline table do not pay for the pick; the table "
            "picked has those that do.",
            behavior,
            "picked",
        )


def _truncated(stats: Stats) -> Iterator[Caveat]:
    if stats.health is None:
        return
    whole = stats.health.filter(pl.col("persona").is_null() & (pl.col("truncated_share") >= TRUNCATED))
    for behavior in whole["behavior"].unique(maintain_order=True):
        rows = whole.filter(behavior=behavior).sort("truncated_share", descending=True).rows(named=True)
        told = _listed([f"{_adapter(row['adapter'])} {100 * row['truncated_share']:.1f} %" for row in rows])
        yield Caveat(
            f"{_words(behavior)}: replies were cut at the token limit ({told} of them). What would have come after the cut is "
            "counted as not there.",
            f"counted-{behavior}",
            "health",
        )


def _probable(stats: Stats) -> Iterator[Caveat]:
    """Where probabilities stand in for rates, and where the two disagree: in the order of the personas (Spearman below
    AGREE), or in what ρ with the cosine each gives (the interval of the paired difference leaves out 0)."""
    if "estimator" in stats.rates.columns:
        alone = stats.rates.filter(pl.col("estimator").is_not_null()).select("behavior", "estimator").unique()
        for behavior, estimator in alone.sort("behavior").rows():
            yield Caveat(
                f"{_words(behavior)}: what stands as its rate is the probability {estimator}, asked of the model at one place; "
                "no reply of an adapter was drawn, and how often it would show is not known from it.",
                behavior,
                "probabilities",
            )
    table = stats.more.get("agreement_measures")
    if table is None:
        return
    rows = expected_rates.leading(table).filter(summary="mean_probability")
    for behavior in rows["behavior"].unique(maintain_order=True):
        mine = rows.filter(pl.col("source") != POOLED, behavior=behavior)
        order = mine.filter(pl.col("spearman") < AGREE)
        apart = mine.filter((pl.col("difference_low") > 0) | (pl.col("difference_high") < 0))
        told = []
        if order.height:
            each = [f"{_words(s)} {_signed(v)}" for s, v in order.select("source", "spearman").rows()]
            told.append(f"they order the personas differently (Spearman below {AGREE}: {_listed(each)})")
        if apart.height:
            names = ("source", "difference", "difference_low", "difference_high")
            each = [
                f"{_words(s)} {_signed(d)}, 95 % {_signed(low)} to {_signed(high)}"
                for s, d, low, high in apart.select(names).rows()
            ]
            told.append(f"ρ with the cosine differs (probability less rate: {_listed(each)})")
        if told:
            yield Caveat(
                f"{_words(behavior)}: probability ({mine['estimator'][0]}) and sampled rates disagree: {'; '.join(told)}. A "
                "claim that holds by one alone is about that one.",
                behavior,
                "agreement_measures",
            )


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _judged(stats: Stats) -> Iterator[Caveat]:
    if "n_judged" not in stats.rates.columns:
        return
    lacking = stats.rates.filter(pl.col("n_unscored").fill_null(0) > 0)
    for behavior in lacking["behavior"].unique(maintain_order=True):
        mine = stats.rates.filter(pl.col("n_judged").is_not_null(), behavior=behavior)
        without = int(mine["n_unscored"].sum())
        whole = without + int(mine["n_judged"].sum()) + int(mine["n_incoherent"].fill_null(0).sum())
        yield Caveat(
            f"{_words(behavior)}: the judge gave no score for {without:,} of {whole:,} completions, which are in no mean.",
            f"counted-{behavior}",
            "judged",
        )


def _left_out(run: Run, stats: Stats) -> Iterator[Caveat]:
    for behavior in stats.behaviors() if "n_error" in stats.rates.columns else ():
        lost = int(stats.rates.filter(behavior=behavior)["n_error"].sum())  # those without an end among them
        if lost:
            yield Caveat(
                f"{_words(behavior)}: {lost:,} completions ended in an error or in reasoning without an end, and are in no rate.",
                f"counted-{behavior}",
                "rates",
            )
    for sentence in [*stats.missing, *dropped.notes(run, stats.rates)]:
        yield Caveat(f"Not in the tables: {sentence}.", "settings", None)


def _unread(run: Run, studied: Any | None, why: str | None) -> Iterator[Caveat]:
    """That a study lies in the run and what it asked is not known from it."""
    if studied is None and why is not None and (run.path / layout.STUDY).is_file():
        yield Caveat(
            "The study of the run cannot be read, so what would be said here of its questions, and above of its model, seeds and "
            f"wordings, could not be checked: {why.removesuffix('.')}.",
            "settings",
            None,
        )


def _data(run: Run, stats: Stats, studied: Any | None) -> Iterator[Caveat]:
    """What the adapters were taught with, and whether the questions asked are of the same kind."""
    taught = {
        name: _generator(run, name)
        for name in stats.rates["adapter"].unique(maintain_order=True)
        if name != BASE
    }
    own = sorted(
        {_words(g["behavior"]) for g in taught.values() if g and g.get("replies", "model") == "model"}
    )
    if own:
        yield Caveat(
            f"Taught with the model's own replies ({_listed(own)}), given the behavior by a template, not with data of people.",
            "provenance",
            None,
        )
    pairs = sorted({_words(g["behavior"]) for g in taught.values() if g and g.get("replies") == "given"})
    if pairs:
        yield Caveat(
            f"Taught with replies written from templates ({_listed(pairs)}): they are more alike than real data.",
            "provenance",
            None,
        )
    asked = [
        b
        for b in stats.behaviors()
        if studied is not None and b in studied.behaviors and get(b).by_completions
    ]
    if asked and not stats.more.get("question_sets", pl.DataFrame()).height:
        sets = sorted({str(studied.behaviors[b].eval.questions) for b in asked})
        seen = sorted({_words(b) for b in asked if _asked_as_trained(studied.behaviors[b], b)})
        held = f"for {_listed(seen)} the very ones that were trained on" if seen else "held out from training"
        yield Caveat(
            f"Asked were the questions of {_listed(sets)} alone: {held}, and of one kind. Leakage on other tasks was not "
            "measured.",
            "settings",
            None,
        )


def _asked_as_trained(cfg: Any, behavior: str) -> bool:
    """Whether the questions that are asked are those that rows were made of; pairs and rows of one's own have others."""
    return (
        bool(get(behavior).presence_of) and cfg.data.rows is None and cfg.data.questions == cfg.eval.questions
    )


def _generator(run: Run, adapter: str) -> dict[str, Any] | None:
    """How an adapter's rows were made, as their first line says; None where the run does not have them."""
    path = run.path / layout.rows(adapter)
    card = card_in(run.path, adapter)
    if card is None or not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        made = json.loads(file.readline() or "{}").get("generator")
    return {"behavior": card.behavior, **made} if isinstance(made, dict) else None


def _drawn(run: Run) -> Iterator[Caveat]:
    """Engine and precision, as the run's log has them."""
    told = engines(run)
    if not told:
        return
    several = len(told) > 1
    yield Caveat(
        f"Completions were drawn with {_listed(told)}{': not all with one engine' if several else ''}. Another engine or "
        "precision draws other completions from the same seeds.",
        "provenance",
        None,
    )


def engines(run: Run) -> list[str]:
    """Each engine and precision that completions were drawn with, as `transformers 5.19.0 in float32`."""
    path, found = run.path / layout.JOURNAL, []
    if not path.is_file():
        return []
    for line in path.read_text(encoding="utf-8").splitlines():
        if '"event": "engine"' not in line:
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the end of a log that a kill cut off
            continue
        settings = entry.get("settings") or {}
        found.append(
            f"{entry['backend']} {entry['version']} in {settings.get('dtype', 'a precision not told')}"
        )
    return list(dict.fromkeys(found))


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _adapter(name: str) -> str:
    return "the unadapted model" if name == BASE else name
