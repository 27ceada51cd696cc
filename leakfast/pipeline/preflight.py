"""What of a study can be known to fail before anything is spent: judges that cannot be asked, rows of one's own that contradict
each other, a backend that cannot draw what is asked. Demands a study whose words are checked, and its model; leaves the rest to
the stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.pipeline import asks
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
    check_layers(study, loaded)
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


def check_layers(study: Study, loaded: Callable[[], Loaded]) -> None:
    """Decoder blocks that the model does not have: of centroids and predictors, of directions, of negatives by geometry."""
    asked: dict[str, Any] = {"[centroids]": study.centroids.layers}
    asked |= {"[predictors]": study.predictors.layers} if study.asks_predictors else {}
    asked |= {f"[[steering]] {table.name}": table.layers for table in study.steering}
    for name, behavior in study.behaviors.items():
        if behavior.train.steering is not None:
            asked[f"[behaviors.{name}.train.steering]"] = behavior.train.steering.layers
        if behavior.data.negatives_layer is not None:
            asked[f"[behaviors.{name}.data], negatives_layer,"] = [behavior.data.negatives_layer]
    for where, layers in asked.items():
        if layers != "all" and max(layers) >= loaded().n_layers:
            raise InputError(
                f"study: {where} names layer {max(layers)}, but {loaded().name} has blocks 0–{loaded().n_layers - 1}. Name some "
                "of these."
            )


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
        drawing = backends.Drawing.of(study)
        backend = backends.settle(loaded(), drawing, asked, adapters=True, opens=opens)
        if backend == "vllm" and opens:
            _check_adapters(study, drawn, live=drawing.options.lora == "live")


def _check_adapters(study: Study, drawn: Sequence[str], *, live: bool) -> None:
    """InputError where adapters that replies will be drawn of will be none that vLLM runs: DoRA, or (live: beside the weights)
    of a higher rank than it takes. That a whole model is in an adapter's place is seen to where it is drawn of."""
    from leakfast.generation import vllm

    asked = {behavior: study.behaviors[behavior].eval for behavior in drawn}
    own = [b for b, cfg in asked.items() if cfg.measure != "probability" or cfg.probability_replies != "base"]
    under = {of: None for behavior in own for of in asks.measured_on(study, behavior)}
    if any(behavior in study.trajectory.behaviors for behavior in own):
        under |= dict.fromkeys(asks.followed(study))
    for name in under:
        rank = _rank(study, name)
        if study.behaviors[name].train.method == "dora":
            raise InputError(
                f"study: adapters of {name} will be DoRA, which vLLM does not run, but it is to draw their replies. Needed: "
                f'LoRA matrices alone, or the other backend. Set backend = "transformers", or train {name} by another method.'
            )
        if live and rank > vllm.RANKS[-1]:
            raise InputError(
                f"study: adapters of {name} will have rank {rank}, but vLLM runs adapters up to rank {vllm.RANKS[-1]} beside the "
                'weights. Set lora = "merged" under [vllm], or backend = "transformers", or a smaller rank.'
            )


def _rank(study: Study, name: str) -> int:
    """Of a behavior's adapters: those of a mean, and of one on top of another, are concatenated."""
    behavior = study.behaviors[name]
    if behavior.average:
        return sum(_rank(study, part) for part in behavior.average)
    below = behavior.after if behavior.stacked else None
    return behavior.train.rank + (0 if below is None else _rank(study, below))
