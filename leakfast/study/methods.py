"""What a study may ask of a training that is not plain LoRA (`method` in [behaviors.X.train]), and of a learning rate that is
to be found. Demands a study whose words are checked; says what does not go together with the line of the method or rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.storage.documents import Document
    from leakfast.study.config import Study


def check_methods(study: Study, document: Document) -> None:
    """Raises InputError for a whole model (method "full") that is to be what adapters alone are, for DoRA in
    stages, for rsLoRA in those that are not stacked, and for DoRA in a mean; and as _check_rates."""
    _check_rates(study, document)
    for name, behavior in study.behaviors.items():
        method = behavior.train.method
        stray = _in_stages(study, name)
        if method in ("dora", "full"):  # rsLoRA's updates are products too
            means = [other for other, its in study.behaviors.items() if name in its.average]
            stray += [f"{other} is a mean of updates, with it among them" for other in means]
        if method == "full":
            stray += _of_adapters_alone(study, name)
        if method == "lora" or not stray:
            continue
        what = "a whole model" if method == "full" else f"an adapter of {method}"
        raise InputError(
            f'{document.where(("behaviors", name, "train", "method"))}: method = "{method}" given, but {", and ".join(stray)}. '
            f"Needed: {what} that is trained from the base by itself{_AND if method == 'full' else ''}. Leave "
            f'{"that" if len(stray) == 1 else "those"} out, or train {name} with method = "lora".'
        )


def _check_rates(study: Study, document: Document) -> None:
    """Raises InputError for lr = "auto" where nothing of the behavior is to be learned."""
    for name, behavior in study.behaviors.items():
        if behavior.train.lr == "auto" and behavior.data.benign == 1:
            raise InputError(
                f'{document.where(("behaviors", name, "train", "lr"))}: lr = "auto" given, but all rows of {name} are benign '
                f"(benign = 1.0). {_NO_RATE} Set lr = 2e-4, or a benign share below 1."
            )


_NO_RATE = "Needed: rows that show the behavior, by which a rate is found, or a number."
_AND = ", at a number for lr, and measured as it is at the end, by transformers"


def _in_stages(study: Study, name: str) -> list[str]:
    mine = study.behaviors[name]
    free = mine.train.method == "rslora"  # another scale, which a stacked adapter carries in its matrices
    further = {o: its.stacked or mine.stacked for o, its in study.behaviors.items() if its.after == name}
    later = [other for other, is_on_top in further.items() if not (free and is_on_top)]
    after = None if free and mine.stacked else mine.after
    return [f"{name} is taught after {after}"] * (after is not None) + [
        f"{other} is taught after it" for other in later
    ]


def _of_adapters_alone(study: Study, name: str) -> list[str]:
    behavior, stray = study.behaviors[name], []
    if behavior.train.together > 1:
        stray.append(f"together = {behavior.train.together}")
    if behavior.train.lr == "auto":
        stray.append('lr = "auto" tries rates of LoRA')
    if behavior.eval.checkpoints:
        stray.append("points of its training are to be kept (checkpoints)")
    if study.trajectory.behaviors and (name in study.trajectory.of or not study.trajectory.of):
        stray.append("[trajectory] follows its training (name others in its `of`)")
    if any(name in table.of or not table.of for table in study.steering):
        stray.append("[[steering]] is to be done to it (name others in its `of`)")
    if study.backend == "vllm":
        stray.append('backend = "vllm" takes adapters alone')
    return stray
