"""By what a training is known, so that it is not done twice. Demands its settings; hashes nothing and leaves data and
model to the stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leakfast.study.config import DataConfig, TrainConfig

_NEWER = ("anchor", "stop_loss")


def settings_of(cfg: TrainConfig) -> dict[str, Any]:
    """What a training follows from: not what is asked of the adapter afterwards (`sample`); and settings that earlier
    versions had not are left out at their defaults, so that what they trained is not trained again."""
    fields = type(cfg).model_fields
    same = {key for key in _NEWER if getattr(cfg, key) == fields[key].default}
    return cfg.model_dump(exclude={"sample", *same})


def rows_settings_of(cfg: DataConfig) -> dict[str, Any]:
    """What training rows follow from; the newer setting left out at its default."""
    return cfg.model_dump(exclude=set() if cfg.suffix else {"suffix"})
