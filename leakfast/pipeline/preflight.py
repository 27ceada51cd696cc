"""What of a study can be known to fail before anything is spent: judges that cannot be asked, rows of one's own that contradict
each other, a backend that cannot draw what is asked. Demands a study whose words are checked, and its model; leaves the rest to
the stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from leakfast.storage import layout

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.storage.run import Run
    from leakfast.study.config import Study


def check(
    study: Study,
    run: Run,
    loaded: Callable[[], Loaded],
    *,
    judged: Sequence[str],
    trained: Sequence[str],
    drawn: Sequence[str],
) -> None:
    """Raises InputError, JudgeError or ModelError for behaviors of the study that are to be judged, trained or drawn.
    loaded: makes the model, once nothing else is wrong."""
    check_judges(study, judged, run)
    check_rows(study, trained, run, loaded)
    check_drawing(study, drawn, run, loaded)


def check_judges(study: Study, behaviors: Sequence[str], run: Run) -> None:
    """Judges that are no judges, have no price or lack their key."""
    from leakfast.behaviors.registry import get
    from leakfast.judge import stage

    for behavior in behaviors:
        cfg = stage.settings(study, behavior)
        # a finished run needs no key to be looked at
        is_new = not run.shards(layout.judgements(behavior))
        if behavior in study.trajectory.behaviors:
            is_new = is_new or not run.shards(layout.judgements(behavior, series=True))
        if get(behavior).measured_by == "judge" and cfg.judge is not None and is_new:
            stage.check(cfg)


def check_rows(study: Study, behaviors: Sequence[str], run: Run, loaded: Callable[[], Loaded]) -> None:
    """Rows of one's own that teach a behavior and its absence for one prompt of a source."""
    from leakfast.prompts.personas import load_personas
    from leakfast.train import chats

    for behavior in behaviors:
        cfg = study.behaviors[behavior].data
        for source in study.sources if cfg.rows is not None and cfg.benign != 1 else ():
            names = [layout.adapter_name(behavior, source, seed) for seed in study.seeds]
            # a finished run may be looked at
            if not all((run.path / layout.rows(name)).exists() for name in names):
                chats.own(loaded().tokenizer, cfg, source, load_personas(study.personas))


def check_drawing(study: Study, behaviors: Sequence[str], run: Run, loaded: Callable[[], Loaded]) -> None:
    """A backend that cannot draw what is asked, under the adapters that will be there, on this machine."""
    from leakfast.behaviors.registry import get
    from leakfast.generation import backends
    from leakfast.measure import asked_of

    drawn = [b for b in behaviors if get(b).by_completions]
    asked = [one.sampling for b in drawn for one in asked_of(b, study.behaviors[b].eval)]
    if asked:
        # a finished run may be looked at where it could not be drawn
        opens = not all(run.shards(layout.completions(behavior)) for behavior in drawn)
        backends.settle(loaded(), backends.Drawing.of(study), asked, adapters=True, opens=opens)
