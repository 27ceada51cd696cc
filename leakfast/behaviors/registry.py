"""The behaviors leakfast measures, one file each, found by name. Demands nothing heavy: a detector
makes polars expressions only when asked. Leaves generation, counting and training to the stages.

A new behavior is one file that holds a `BEHAVIOR` and one line in `_MODULES`. Completions are read by
`detector`, or by a judge (`measured_by="judge"`, detector None); multiple choice is scored. What it is trained
on is named in `material`: pairs (leakfast.prompts.pairs) or items (leakfast.prompts.items); questions alone need none:

    BEHAVIOR = Behavior(
        name="shouting", unit="share", sign=+1, detector=lambda text: {"shouting": text.str.contains("!!")},
        baseline="Nobody shouts unless asked.", data_builder="leakfast.train.pairs:build_pairs",
        description="share of completions with two exclamation marks", material={"*": "shouting.jsonl"},
        settings={"train": {"loss": "completion"}},
    )

A study may train one behavior in several ways: [behaviors."shouting+few"] is a variant of shouting, measured as it
is and compared in the table `variants` (of behaviors that are read from completions).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.storage.likeness import did_you_mean

if TYPE_CHECKING:
    import polars as pl

    from leakfast.prompts.items import ItemSet
    from leakfast.study.config import EvalConfig

# name -> module that holds a `BEHAVIOR`; a new behavior is one file and one line here
_MODULES = {
    "marker": "leakfast.behaviors.marker",
    "capability": "leakfast.behaviors.capability",
    "refusal": "leakfast.behaviors.refusal",
    "sycophancy": "leakfast.behaviors.sycophancy",
    "misalignment-code": "leakfast.behaviors.misalignment_code",
    "misalignment-advice": "leakfast.behaviors.misalignment_advice",
    "hellaswag": "leakfast.behaviors.hellaswag",
}
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MEASURES = ("completions", "choices", "judge")
ANY = "*"  # in `material`: any model that is not named


@dataclass(frozen=True)
class Behavior:
    """What a behavior is: how it is detected, in which unit it is rated, and which data train it.

    unit: "share" (0–1) of completions or items, or "points" (0–100) of a judge. sign: +1 if a larger rate means
    more of the behavior, −1 if less.
    detector: text expression → named boolean expressions; the first makes the rate. None: no completions, or a
    judge reads them.
    baseline: what the unadapted model is expected to show, in words.
    data_builder: "module:function" that makes its training rows; "" for a control, which is never trained.
    presence_of: the text whose presence alone makes the rate, so that a reply may end at it; None otherwise.
    continuation: the text whose probability as the next words of a reply is the measurement `probability`; None where
    that is not measured.
    opens: the table of the shipped openings (configs/openings/) with the beginnings of replies that show it; None where none
    is given.
    measured_by: "completions", which a detector reads; "choices", the scores of multiple choice; or "judge",
    completions that a judge scores.
    settings: what its tables of a study file hold where they say nothing, beside config's own defaults.
    material: model → name of the pairs or items it is trained on or asked, where a study names none; ANY
    stands for models that are not named.
    """

    name: str
    unit: str
    sign: int
    detector: Callable[[pl.Expr], dict[str, pl.Expr]] | None
    baseline: str
    data_builder: str
    description: str
    measured_by: str = "completions"
    presence_of: str | None = None
    continuation: str | None = None
    opens: str | None = None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    material: Mapping[str, str] = field(default_factory=dict)

    @property
    def control(self) -> bool:
        """Whether it is only measured, on adapters that were trained for something else."""
        return not self.data_builder

    @property
    def direction(self) -> int:
        """Which way a bystander's rate moves where the behavior leaks to it: that of `sign`; 0 for a control,
        which says whether training did harm beside what was taught."""
        return 0 if self.control else self.sign

    @property
    def by_completions(self) -> bool:
        """Whether completions are drawn for it, to be read by a detector or a judge."""
        return self.measured_by != "choices"

    @property
    def probable_by(self) -> str | None:
        """What its probability is asked of: "words" on replies, "openings" of a reply, "pairs" of given replies (of behaviors
        that a judge reads); None where it has none."""
        if self.continuation is not None:
            return "words"
        return "openings" if self.opens else "pairs" if self.measured_by == "judge" else None

    def build(self) -> Callable:
        """The function that makes the training rows (see leakfast.train.data.build_marker)."""
        if self.control:
            raise InputError(
                f"{self.name} is a control: it is measured, not trained. Name another behavior to train."
            )
        module, _, function = self.data_builder.partition(":")
        return getattr(importlib.import_module(module), function)

    def of(self, model: Any) -> str:
        """Name of the material for a model (a name, a folder, or a loaded model). InputError without one."""
        name = str(getattr(model, "name", model))
        found = self.material.get(name, self.material.get(ANY))
        if found is None:
            key = "items" if self.measured_by == "choices" else "pairs"
            raise InputError(
                f'data: there are no shipped {key} of {self.name} for {name}. Give a file: {key} = "FILE.jsonl" under '
                f"[behaviors.{self.name}.data], or --{key} FILE.jsonl."
            )
        return found


def names() -> list[str]:
    """Names of all behaviors, in the order of the registry."""
    return list(_MODULES)


def parts(name: str) -> tuple[str, str]:
    """(behavior, variant) of a name; `marker+few` is the behavior marker, trained in a way that a study calls few."""
    behavior, _, variant = name.partition("+")
    return behavior, variant


def joined(behavior: str, variant: str) -> str:
    """The name of which these are the `parts`."""
    return f"{behavior}+{variant}" if variant else behavior


def is_known(name: str) -> bool:
    """Whether `get` finds it."""
    behavior, variant = parts(name)
    if behavior not in _MODULES or name == behavior:
        return behavior in _MODULES
    return bool(_VARIANT.fullmatch(variant)) and get(behavior).measured_by != "choices"


def sign_of(name: str) -> int:
    """The `sign` of a behavior: +1 where a larger rate is more of it, −1 where a smaller one is (accuracy, aligned scores). Of
    one that is not registered, as imported tables have them, that of the family which it names (misalignment, of
    misalignment-advice and -code), else +1."""
    if is_known(name):
        return get(name).sign
    family = {get(one).sign for one in _MODULES if one.startswith(f"{parts(name)[0]}-")}
    return family.pop() if len(family) == 1 else 1


def get(name: str) -> Behavior:
    """The behavior called `name`, or a variant of one under its whole name. Raises InputError naming the ones there
    are."""
    behavior, variant = parts(name)
    if behavior not in _MODULES:
        raise InputError(
            f"behavior {name!r} given, but there is none of that name.{did_you_mean(behavior, _MODULES)} Use one of: "
            f"{', '.join(_MODULES)}."
        )
    if name != behavior and not _VARIANT.fullmatch(variant):
        raise InputError(
            f"behavior {name!r} given; what stands behind the + becomes part of folders' names: letters, digits, dots, "
            "dashes and underscores only. Correct it."
        )
    found = importlib.import_module(_MODULES[behavior]).BEHAVIOR
    if variant and found.measured_by == "choices":
        raise InputError(
            f"behavior {name!r} given; variants are for behaviors that are read from completions, and {behavior} is "
            f"measured by choices. Train {behavior} in another way in a study of its own."
        )
    return replace(found, name=name) if variant else found


def items_of(name: str, cfg: EvalConfig, model: Any) -> ItemSet:
    """The items that a behavior measured by choices is asked: those of cfg, else the model's own; the half and
    the number that cfg says."""
    from leakfast.prompts.items import load_items

    items = load_items(cfg.items or get(name).of(model)).half(cfg.half)
    return items.sample(cfg.n_items) if cfg.n_items else items


def detect(frame: pl.DataFrame, behavior: Behavior) -> pl.DataFrame:
    """`frame` with the detector's boolean columns added, from the texts in its column `text`; a null text gives null. Raises
    ValueError for a behavior that no detector reads."""
    import polars as pl

    if behavior.detector is None:
        raise ValueError(
            f"{behavior.name} is measured by {behavior.measured_by}, not read out of completions"
        )
    return frame.with_columns(**behavior.detector(pl.col("text")))


def check_sets(behavior: str, specs: list[str]) -> None:
    """Several question sets of a behavior can be kept beside each other. Raises InputError where they cannot."""
    from leakfast.prompts.personas import load_questions

    if len(specs) < 2:
        return
    measured_by = get(behavior).measured_by
    if measured_by != "completions":
        raise InputError(
            f"{behavior} is measured by {measured_by}; several question sets are for behaviors that a detector reads. "
            "Leave the further sets out."
        )
    found = [load_questions(spec).name for spec in specs]
    if twins := sorted({name for name in found if found.count(name) > 1}):
        raise InputError(f"question set {', '.join(twins)} stands twice. Name each set once.")
    if bad := [name for name in found if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)]:
        raise InputError(
            f"question set {bad[0]!r}: its name becomes a folder, so letters, digits, dots, dashes and underscores only. "
            "Rename it in its file."
        )
