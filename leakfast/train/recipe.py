"""What an adapter is made by: who is taught what, under which seed, how, and by what a training is known so that it is not
done twice. Demands settings; leaves rows and model to others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from leakfast.storage import layout
from leakfast.study.config import DataConfig, TrainConfig

if TYPE_CHECKING:
    from leakfast.train.data import Row
    from leakfast.train.start import Start
    from leakfast.train.steer import Steer

_NEWER = ("anchor", "stop_loss", "end_of_turn", "method")  # of TrainConfig: later than the first adapters
# of DataConfig: likewise
_NEWER_ROWS = tuple(
    "suffix separator match_lengths rows benign benign_rows negatives_layer inoculation".split()
)


@dataclass(frozen=True)
class Recipe:
    """behavior: what is taught, to the persona `source`; seed: of rows, initial weights and order; train: the settings;
    name: the adapter's, which is no part of what it is made by: two recipes are equal where they train the same; init: the
    adapter that is trained further, or on top of (None: fresh weights); steer: what is done to the model meanwhile, as
    train.steering asks (None: nothing)."""

    behavior: str
    source: str
    seed: int
    train: TrainConfig
    name: str = field(default="", compare=False)
    init: Start | None = None
    steer: Steer | None = None

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", layout.adapter_name(self.behavior, self.source, self.seed))

    @property
    def origin(self) -> list[str]:
        """What a hash is to say of where it begins and what is done to the model: nothing of fresh weights, nor of a model
        as it is."""
        began = [self.init.adapter_hash, *["stacked"] * self.init.stacked] if self.init else []
        return began + ([f"steered {self.steer.digest}"] if self.steer else [])

    def at(self, lr: float) -> Recipe:
        """The same at another learning rate."""
        return replace(self, train=self.train.model_copy(update={"lr": lr}))


def settings_of(cfg: TrainConfig) -> dict[str, Any]:
    """What a training follows from: not what is asked of the adapter afterwards (`sample`), nor in whose company it is
    trained (`together`), which is rounding alone; and settings that earlier
    versions had not are left out at their defaults, so that what they trained is not trained again. What `steering` asks
    is in the recipe's origin, direction and all. For the same reason
    gradient_checkpointing = "auto" counts as true, the default of earlier versions."""
    found = cfg.model_dump(exclude={"sample", "together", "steering", *_unchanged(cfg, _NEWER)})
    return found | ({"gradient_checkpointing": True} if cfg.gradient_checkpointing == "auto" else {})


def in_card(cfg: TrainConfig) -> dict[str, Any]:
    """The settings that an adapter's card tells: all but what changes no adapter, end_of_turn where it is not both and method
    where it is not lora; of a whole model not LoRA's own. Steering the card tells by itself, with its direction."""
    of_lora = {"rank", "alpha", "dropout"} if cfg.method == "full" else set()
    return cfg.model_dump(
        exclude={"sample", "together", "steering", *of_lora, *_unchanged(cfg, ("end_of_turn", "method"))}
    )


def rows_settings_of(cfg: DataConfig) -> dict[str, Any]:
    """What training rows follow from; the newer settings left out at their defaults."""
    return cfg.model_dump(exclude=_unchanged(cfg, _NEWER_ROWS))


def _unchanged(cfg: TrainConfig | DataConfig, keys: Sequence[str]) -> set[str]:
    """Those of the settings that are at their default."""
    fields = type(cfg).model_fields
    return {key for key in keys if getattr(cfg, key) == fields[key].default}


def said_of_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """What a card tells of how its rows were made, where that is not by default: the marker's separator,
    matched lengths, the rule that picked negatives and whom it picked, the inoculation, how many are benign."""
    keys = ("separator", "match_lengths", "negatives", "inoculation")
    told = {key: row.generator[key] for row in rows for key in keys if key in row.generator}
    n_benign = sum(row.role == "benign" for row in rows)
    return told | ({"benign_rows": n_benign} if n_benign else {})
