"""What an adapter is made by: who is taught what, under which seed, how, and by what a training is known so that it is not
done twice. Demands settings; leaves rows and model to others."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from leakfast.storage import layout
from leakfast.study.config import DataConfig, TrainConfig

_NEWER = ("anchor", "stop_loss")


@dataclass(frozen=True)
class Recipe:
    """behavior: what is taught, to the persona `source`; seed: of rows, initial weights and order; train: the settings;
    name: the adapter's, which is no part of what it is made by: two recipes are equal where they train the same."""

    behavior: str
    source: str
    seed: int
    train: TrainConfig
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", layout.adapter_name(self.behavior, self.source, self.seed))

    def at(self, lr: float) -> Recipe:
        """The same at another learning rate."""
        return replace(self, train=self.train.model_copy(update={"lr": lr}))


def settings_of(cfg: TrainConfig) -> dict[str, Any]:
    """What a training follows from: not what is asked of the adapter afterwards (`sample`), nor in whose company it is
    trained (`together`), which is rounding alone; and settings that earlier
    versions had not are left out at their defaults, so that what they trained is not trained again. For the same reason
    gradient_checkpointing = "auto" counts as true, the default of earlier versions."""
    fields = type(cfg).model_fields
    same = {key for key in _NEWER if getattr(cfg, key) == fields[key].default}
    found = cfg.model_dump(exclude={"sample", "together", *same})
    return found | ({"gradient_checkpointing": True} if cfg.gradient_checkpointing == "auto" else {})


def rows_settings_of(cfg: DataConfig) -> dict[str, Any]:
    """What training rows follow from; the newer setting left out at its default."""
    return cfg.model_dump(exclude=set() if cfg.suffix else {"suffix"})
