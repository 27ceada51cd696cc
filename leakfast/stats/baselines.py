"""Whether a rate and the unadapted model's rate that it is taken from answer the same prompts, drawn alike, whether two
adapters' rates do, whether seeds are of the same bystanders, and what was not measured at all. Demands a run's manifest, counts
per question and rates; a baseline of other prompts is no baseline."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import polars as pl

from leakfast.behaviors.registry import get, is_known
from leakfast.stats.accuracy import BEHAVIOR
from leakfast.stats.rates import BASE
from leakfast.storage import layout

if TYPE_CHECKING:
    from leakfast.storage.run import Run

Key = tuple[str, str, str]  # behavior, adapter, persona
Side = tuple[str, str]  # behavior, adapter
Told = dict[Side, dict[str, set[str]]]  # what the manifest says of the shards of each
_TOLD = {
    "asked": "was asked for the probability of something else (words, beginnings, pairs or replies) than {other}",
    "questions_sha256": "was asked other questions than {other}",
    "items_sha256": "was asked other items than {other}, some of them by the same id",
    "drawn": "was drawn otherwise (temperature, nucleus, length, stop or rendering) than {other}",
}


def unlike(run: Run, asked: pl.DataFrame, tree: str = layout.COMPLETIONS) -> tuple[set[Key], list[str]]:
    """(behavior, adapter, persona) whose rates have no baseline, since the unadapted model was asked or drawn otherwise;
    a sentence for each adapter with such.

    asked: behavior, adapter, persona, question (or item), one row for each that was measured, in whatever status; tree: the
    folder that completions lie in, of a further question set sets/<behavior>/<set>. How many samples each side has may differ: a
    rate is a mean. What earlier versions did not write is not compared."""
    found: set[Key] = set()
    sentences = []
    of = _by_persona(asked)
    told = _entries(run, tree)
    for behavior, adapter in dict.fromkeys((b, a) for b, a, _ in of if a != BASE):
        mine = {p: of[b, a, p] for b, a, p in of if (b, a) == (behavior, adapter)}
        base = {p: of[behavior, BASE, p] for p in mine if (behavior, BASE, p) in of}
        if not base:
            continue
        name = f"{behavior if tree == layout.COMPLETIONS else tree}/{adapter}"
        probable = " --measure probability" if tree.startswith(f"{layout.PROBABILITY}/") else ""
        remedy = f"measure both alike: leakfast eval --behavior {behavior} --adapter DIR --base{probable}"
        why = apart(told, [(behavior, adapter)], [(behavior, BASE)], "the unadapted model")
        if why is not None:
            found |= {(behavior, adapter, persona) for persona in mine}
            sentences.append(f"{name}: it {why}, so its rates have no baseline ({remedy})")
            continue
        others = [persona for persona in base if base[persona] != mine[persona]]
        if others:
            found |= {(behavior, adapter, persona) for persona in others}
            first = others[0]
            only = len(mine[first] - base[first]), len(base[first] - mine[first])
            sentences.append(
                f"{name}: {len(others)} of {len(mine)} personas were not asked what the unadapted model was "
                f"asked under them ({first}: {only[0]} questions or items that it was not, {only[1]} the other way "
                f"round), so their rates have no baseline ({remedy})"
            )
    return found, sentences


def told_of(run: Run) -> Told:
    """(behavior, adapter) → what the manifest says of the shards that its rates come from: of completions and choice scores,
    else of probabilities. Points of training stand in it by their names (layout.point_name), of completions and choice scores."""
    return _entries(run, layout.PROBABILITY) | _entries(run, layout.COMPLETIONS) | _of_points(run)


def apart(
    told: Mapping[Any, Mapping[str, set[str]]], one: Iterable[Any], other: Iterable[Any], name: str
) -> str | None:
    """How one side was asked or drawn otherwise than the other, called `name`; None where it was not, or where a side does
    not say, as earlier versions. How many samples each has may differ. told: by behavior and adapter, or by any other key."""
    sides = [list(one), list(other)]
    for key, words in _TOLD.items():
        mine, theirs = (set().union(*(told.get(s, {}).get(key, ()) for s in side)) for side in sides)
        if mine and theirs and mine != theirs:
            return words.format(other=name)
        if mine and theirs and key == "asked":
            return None  # which says all of a probability: pairs are asked no questions
    return None


def unlike_probable(run: Run, scores: pl.DataFrame, behaviors: Iterable[str]) -> tuple[set[Key], list[str]]:
    """`unlike` of behaviors whose rates are probabilities. scores: schema `probability`."""
    found: set[Key] = set()
    sentences: list[str] = []
    for behavior in behaviors:
        mine = scores.filter(~pl.col("estimator").str.ends_with("_own"), behavior=behavior)
        asked = mine.select("behavior", "adapter", "persona", "question").unique(maintain_order=True)
        keys, told = unlike(run, asked, layout.probability(behavior))
        found, sentences = found | keys, [*sentences, *told]
    return found, sentences


def questions_apart(run: Run) -> set[Side]:
    """(behavior, adapter) whose probabilities were asked on other questions than its completions answer, so that the two are not
    compared. Pairs are asked no questions, and what earlier versions did not write is not compared."""
    drawn = _entries(run, layout.COMPLETIONS)
    found: set[Side] = set()
    for tree in (layout.PROBABILITY, layout.PROBABILITY_OWN):
        for side, told in _entries(run, tree).items():
            if is_known(side[0]) and get(side[0]).probable_by == "pairs":
                continue
            mine, theirs = (its.get("questions_sha256", set()) for its in (told, drawn.get(side, {})))
            found |= {side} if mine and theirs and mine != theirs else set()
    return found


def told_apart(apart: Collection[Side]) -> list[str]:
    """What is said of them, a line a behavior."""
    return [
        f"{behavior}: {', '.join(sorted(a for b, a in apart if b == behavior))}: probabilities were asked on other questions "
        "than completions answer, so they are not compared (measure both alike: leakfast eval --behavior "
        f"{behavior} --measure both)"
        for behavior in sorted({behavior for behavior, _ in apart})
    ]


def points_apart(trajectory: pl.DataFrame) -> list[str]:
    """A sentence for each adapter with points of training that were asked or drawn otherwise than its beginning, so that they
    have no change against it. trajectory: the table."""
    if "delta_reason" not in trajectory.columns:  # there is none, or it is of an earlier version
        return []
    out = []
    told = trajectory.filter(pl.col("delta_reason").is_not_null())
    for (behavior, adapter, why), part in told.group_by(
        "behavior", "adapter", "delta_reason", maintain_order=True
    ):
        shares = ", ".join(f"{100 * share:g} %" for share in part["share"].unique().sort())
        out.append(
            f"{behavior}/{adapter}: at {shares} of training it {why}, so there is no change against the beginning (measure all "
            f"alike: leakfast eval --behavior {behavior} --adapter DIR --checkpoints --replace)"
        )
    return out


def partial(rates: pl.DataFrame) -> list[str]:
    """A sentence for each behavior that is read from rates because some bystanders have no baseline."""
    out = []
    known = rates.filter(pl.col("role") == "bystander", pl.col("rate").is_not_null())
    for (behavior,), mine in known.group_by("behavior", maintain_order=True):
        lacking = mine["baseline"].null_count()
        if 0 < lacking < mine.height and (mine["baseline"].drop_nulls() != 0).any():
            out.append(
                f"{behavior}: {lacking} of {mine.height} rates of bystanders have no baseline, so leakage is read from the "
                "rate and not from the change against the unadapted model"
            )
    return out


def seeds_apart(rates: pl.DataFrame) -> list[str]:
    """A sentence for each source whose training seeds were measured on different bystanders: a mean over seeds is then
    over different personas too."""
    out = []
    known = rates.filter(pl.col("role") == "bystander", pl.col("rate").is_not_null())
    for (behavior, source), mine in known.group_by("behavior", "source", maintain_order=True):
        people = {
            adapter: frozenset(rows["persona"])
            for (adapter,), rows in mine.group_by("adapter", maintain_order=True)
        }
        if mine["seed"].n_unique() > 1 and len(set(people.values())) > 1:
            shared = len(frozenset.intersection(*people.values()))
            out.append(
                f"{behavior} of {source}: its seeds were measured on different bystanders ({shared} in all of them), so that "
                "means over seeds mix personas with seeds"
            )
    return out


def gaps(rates: pl.DataFrame) -> list[str]:
    """Sentences on what was not measured: fewer draws than for other adapters, errors, a missing source."""
    out = []
    if "n_error" not in rates.columns:
        return out
    by = rates.with_columns(drawn=(pl.col("total") + pl.col("n_error")))
    choices = pl.col("n_empty").is_null() if "n_empty" in rates.columns else pl.lit(True)
    for (behavior,), group in by.group_by("behavior", maintain_order=True):
        if group["drawn"].null_count() == group.height:
            continue
        whole = group["persona"].n_unique() * group["drawn"].max()
        what = "items" if group.select(choices.all()).item() else "completions"
        for (adapter,), mine in group.group_by("adapter", maintain_order=True):
            name, drawn = f"{behavior}/{adapter}", mine["drawn"].sum()
            if mine["drawn"].null_count() == mine.height:
                continue
            if drawn < whole:
                out.append(f"{name}: {drawn} of {whole} {what} (what every persona has elsewhere)")
            errors, unclosed = mine["n_error"].sum(), 0
            if "n_unclosed" in mine.columns and (unclosed := mine["n_unclosed"].sum()):
                share = 100 * unclosed / max(1, mine["drawn"].sum())
                out.append(
                    f"{name}: {unclosed} completions ({share:.1f} %) ended inside their reasoning and are not counted: "
                    "they have no answer (raise max_reasoning_tokens)"
                )
            if errors := errors - unclosed:
                out.append(f"{name}: {errors} {what} have an error status and are not counted")
            if adapter != BASE and not (mine["role"] == "source").any():
                out.append(f"{name}: the source {mine['source'][0]} itself was not measured")
    return out


def _by_persona(asked: pl.DataFrame) -> dict[Key, frozenset]:
    groups = asked.group_by("behavior", "adapter", "persona", maintain_order=True).agg("question")
    return {(b, a, p): frozenset(questions) for b, a, p, questions in groups.rows()}


def _entries(run: Run, tree: str) -> Told:
    """(behavior, adapter) → what the manifest says of the shards of its completions, or of its choice scores."""
    told: Told = {}
    for path, entry in run.manifest["shards"].items():
        parts = PurePosixPath(path).parts
        if path.startswith(f"{tree}/") and len(parts) > 3:
            names, adapter = [parts[1]], parts[-2]
        elif parts[0] == layout.CHOICES and (of_choices := choice_behaviors(path, entry)):
            names, adapter = of_choices, parts[1]
        else:
            continue
        for name in names:
            for key, said in said_of([entry]).items():
                told.setdefault((name, adapter), {}).setdefault(key, set()).update(said)
    return told


def _of_points(run: Run) -> Told:
    """The same of points of training, by the names of their adapters there; of beginnings and ends nothing."""
    told: Told = {}
    for path, entry in run.manifest["shards"].items():
        parts = path.split("/")
        if path.startswith(f"{layout.completions(series=True)}/") and layout.point_of(parts[-2]):
            side = parts[2], parts[-2]
        elif parts[0] == layout.POINTS and (share := layout.share_of(parts[-2])) not in (None, 1.0):
            side = entry.get("behavior", BEHAVIOR), layout.point_name(parts[1], share)
        else:
            continue
        for key, said in said_of([entry]).items():
            told.setdefault(side, {}).setdefault(key, set()).update(said)
    return told


def choice_behaviors(path: str, entry: Mapping[str, Any]) -> list[str]:
    """What the behavior of a shard of choice scores may be called in tables; nothing where its entry does not tell."""
    parts = path.split("/")
    if not entry.get("behavior") or len(parts) < 4:
        return []
    # by another scoring beside letters it is a behavior of its own (accuracy.count)
    behavior, items = entry["behavior"], entry.get("items", "")
    return [behavior, f"{behavior}-{parts[2].removeprefix(f'{items}-')}"]


def said_of(entries: Iterable[Mapping[str, Any]]) -> dict[str, set[str]]:
    """What entries of the manifest say of how their shards were asked and drawn."""
    found: dict[str, set[str]] = {}
    for entry in entries:
        for key in _TOLD:
            if entry.get(key):
                found.setdefault(key, set()).add(entry[key])
    return found
