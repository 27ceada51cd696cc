"""Measures each behavior as its settings say: by what it is measured by, by probability, or by both, the unadapted model's
replies first. Demands a run and a loaded base model; leaves how to `measure`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from leakfast.behaviors.registry import get
from leakfast.measure.completions import drawn_as
from leakfast.measure.contract import Measured
from leakfast.measure.probability.replies import asked_as, folder_of
from leakfast.measure.request import Asked, Request, name_of
from leakfast.measure.stage import measure
from leakfast.models.adapters import adapter_hash
from leakfast.progress import Progress
from leakfast.prompts import chat
from leakfast.storage.layout import BASE

if TYPE_CHECKING:
    from leakfast.generation.backends import Drawing
    from leakfast.models.loading import Loaded
    from leakfast.storage.run import Run


def measure_as_asked(
    loaded: Loaded,
    run: Run,
    request: Request,
    drawing: Drawing,
    *,
    at: str = "final",
    by: str = "all",
    replace_others: bool = True,
    progress: Progress | None = None,
) -> tuple[list[Measured], list[Measured]]:
    """(what was measured by completions or choices, what by probability), each as `measure` returns it. by: "all", or one of
    the two alone, "own" or "probability".

    Where the probability of a behavior is asked on replies that the run holds none of, or others than are meant (of another
    base, of an adapter before it was trained again, to other questions, under other prompts, drawn otherwise, too few),
    `probability_samples` a prompt are drawn first: of the unadapted model, or of each adapter (at checkpoints, of each point).
    Raises as `measure`."""
    if by not in ("all", "own", "probability"):
        raise ValueError(f"by must be all, own or probability, not {by!r}")
    how: dict[str, Any] = {"replace": replace_others, "progress": progress}
    own = [one for one in request.asked if one.by_choices or one.config.measure != "probability"]
    probable = [one for one in request.asked if not one.by_choices and one.config.measure != "completions"]
    own, probable = own if by != "probability" else [], probable if by != "own" else []
    done = measure(loaded, run, _of(request, own), drawing, at=at, **how) if own else []
    _draw_lacking(loaded, run, _of(request, [one for one in probable if not one.beside]), drawing, at, how)
    if not probable:
        return done, []
    return done, measure(loaded, run, _of(request, probable), drawing, at=at, by="probability", **how)


def _draw_lacking(
    loaded: Loaded, run: Run, request: Request, drawing: Drawing, at: str, how: dict[str, Any]
) -> None:
    """The replies that probabilities are asked on and the run does not hold."""
    series = at == "checkpoints"
    asked = [_few(one) for one in request.asked if get(one.behavior).probable_by == "words"]
    hashes = chat.prompt_hashes(loaded.tokenizer, request.personas) if asked else {}
    lacks = partial(_lacks, loaded, run, hashes)
    of_base = [
        one for one in asked if one.config.probability_replies != "own" and lacks(one, one.folder(BASE), BASE)
    ]
    if of_base:
        run.create()
        unadapted = replace(_of(request, of_base), adapters=(), arms=(), base=True)
        measure(loaded, run, unadapted, drawing, **how)
    for one in asked:
        if one.config.probability_replies == "base" or not request.adapters:
            continue
        last = {a: request.series(a)[-1][1] if series else a for a in request.adapters}
        lacking = [
            a
            for a, point in last.items()
            if lacks(one, folder_of(one, name_of(point), series), adapter_hash(point))
        ]
        if lacking:
            run.create()
            few = replace(_of(request, [one]), adapters=tuple(lacking), base=False)
            measure(loaded, run, few, drawing, at=at, **how)


def _lacks(loaded: Loaded, run: Run, hashes: dict[str, str], one: Asked, folder: str, adapter: str) -> bool:
    """Whether a folder has no replies of this very model under this very adapter (its hash, or `base`) to these very questions,
    drawn as is asked, under prompts of these hashes (chat.prompt_hashes), or too few. What earlier versions did not write is
    not compared."""
    meant = {"base": loaded.fingerprint, "adapter": adapter, "drawn": drawn_as(loaded, one)}
    meant["questions_sha256"] = one.texts_hash
    entries = [run.manifest["shards"][path] for path in run.shards(folder)]
    if not entries or any(
        entry.get(key, value) != value for entry in entries for key, value in meant.items()
    ):
        return True
    told = asked_as(run, folder)
    if told and any(told.get(name) != digest for name, digest in hashes.items()):
        return True
    # where completions are measured too, as many are drawn as they ask for
    wanted = len(hashes) * len(one.texts) * one.config.samples
    return one.config.measure == "probability" and sum(entry["rows"] for entry in entries) < wanted


def _of(request: Request, asked: list[Asked]) -> Request:
    return replace(request, asked=asked)


def _few(one: Asked) -> Asked:
    """Its questions with as few samples as probabilities are asked on."""
    return replace(one, config=one.config.model_copy(update={"samples": one.config.probability_samples}))
