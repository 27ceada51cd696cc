"""How long tables, figures and report will take: what a run's journal says that they took, and of how much. Demands a study and
the place of a run; how they grow was not measured, so that nothing is scaled from one size to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from leakfast.pipeline import asks
from leakfast.pipeline.estimate_stage import Stage
from leakfast.pipeline.steps import SHOWN
from leakfast.prompts.personas import load_personas
from leakfast.storage import layout
from leakfast.storage.manifests import events

if TYPE_CHECKING:
    from leakfast.storage.run import Run
    from leakfast.study.config import Study


@dataclass(frozen=True)
class Size:
    """What they are made of; completions: of the end of training, on all question sets."""

    adapters: int
    personas: int
    completions: int

    def __str__(self) -> str:
        plural = "" if self.adapters == 1 else "s"
        return f"{self.adapters:,} adapter{plural}, {self.personas:,} personas and {self.completions:,} completions"


def planned(study: Study, run: Run) -> Stage:
    """The stage: with seconds where the run timed it at the study's own size, else with a note of what is known. run: that of the
    study, or another that was timed; it need not be there."""
    here, seconds = _of_study(study), _took(run)
    there = _of_run(run) if seconds is not None else None
    if seconds is None:
        note = f"not planned: {run.path} did not time them"
    elif there == here:
        note = f"seconds as they took in {run.path}"
    else:
        note = f"not planned: they took {seconds:.1f} s in {run.path}, of {there}; this study has {here}"
    return Stage(SHOWN, here.adapters, 0, 0, seconds=seconds if there == here else None, note=note)


def _took(run: Run) -> float | None:
    """Seconds, the longest where they were made more than once: a later call makes again what changed alone."""
    told = [one["seconds"] for one in events(run.path / layout.JOURNAL, "took") if one["step"] == SHOWN]
    return max(told, default=None)


def _of_study(study: Study) -> Size:
    people, each = len(load_personas(study.personas)), len(study.sources) * len(study.seeds)
    completions = 0
    for behavior in study.behaviors:
        drawn = [
            one
            for one in asks.asked(study, behavior)
            if not one.by_choices and one.config.measure != "probability"
        ]
        targets = each * len(asks.measured_on(study, behavior)) + 1
        completions += targets * people * sum(len(one.texts) * one.config.samples for one in drawn)
    return Size(each * len(asks.trained(study)), people, completions)


def _of_run(run: Run) -> Size:
    entries = {path: one for path, one in run.manifest["shards"].items() if layout.measured_of(path)}
    adapters = {layout.unsteered(str(layout.measured_of(path))) for path in entries} - {layout.BASE}
    people = {name for one in entries.values() for name in one.get("personas", ())}
    drawn = (f"{layout.COMPLETIONS}/", f"{layout.SETS}/")
    completions = sum(one.get("rows", 0) for path, one in entries.items() if path.startswith(drawn))
    return Size(len(adapters), len(people), completions)
