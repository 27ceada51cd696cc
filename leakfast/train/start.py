"""Where a training begins: the weights of another adapter of the same base, which it goes on from or is put on top of.
Demands that adapter's folder; leaves the training to lora.py, and what is on top to stacked.py. The base stays the base: one
adapter comes out, and rests on nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import AdapterError, InputError

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.study.config import TrainConfig
    from leakfast.train.recipe import Recipe


@dataclass(frozen=True)
class Start:
    """The adapter in `folder`, known by its hash (models.adapter_hash): two starts are equal where their weights are, and what
    becomes of them. stacked: they stay as they are, and others are trained on top; else they are trained further."""

    adapter_hash: str
    folder: Path = field(compare=False)
    stacked: bool = False

    @classmethod
    def of(cls, folder: str | Path, *, stacked: bool = False) -> Start:
        """Raises InputError where there is no adapter."""
        from leakfast.models.adapters import adapter_hash

        try:
            return cls(adapter_hash(folder), Path(folder), stacked)
        except AdapterError as error:
            raise InputError(error.message) from None

    @property
    def told(self) -> dict[str, Any]:
        """What the card of an adapter that began here says of it: name, hash, who was taught what, where it began itself, and
        whether it was stacked upon."""
        from leakfast.models.adapters import read_card

        card = read_card(self.folder)
        told: dict[str, Any] = {"adapter": self.folder.name, "adapter_hash": self.adapter_hash}
        told |= {"stacked": True} if self.stacked else {}
        if card is not None:
            told |= {
                "behavior": card.behavior,
                "source": card.source,
                "seed": card.seed,
                "data_hash": card.data_hash,
            }
            told |= {"init": card.recipe["init"]} if "init" in card.recipe else {}
        return told


def check(loaded: Loaded, init: Start | None, cfg: TrainConfig) -> None:
    """The adapter that a training begins from, if any, is of this base and of the shape that is trained. Raises InputError."""
    from leakfast.models.adapter_structure import config_of
    from leakfast.models.adapters import check_fits

    if init is None:
        return
    folder = init.folder
    if cfg.method not in ("lora", *["rslora"] * init.stacked):
        needed = "lora, whose matrices alone are trained further"
        needed = "lora or rslora, which are one adapter with it" if init.stacked else needed
        raise InputError(
            f"train: method {cfg.method} given, and {folder} to begin from. Needed: method {needed}. Leave --init (in a study: "
            "after) out, or train with --method lora."
        )
    try:
        structure, config = check_fits(loaded, folder), config_of(folder)
    except AdapterError as error:
        raise InputError(error.message) from None
    rslora = ["rank-stabilised LoRA"] if config.get("use_rslora") and not init.stacked else []
    if not structure.plain or rslora:
        how = (
            "cannot be one adapter with what is trained on top"
            if init.stacked
            else "training does not go on from"
        )
        raise InputError(
            f"train: {folder} has {' and '.join([*structure.beyond, *rslora])}, which {how}. Needed: an adapter of LoRA "
            "matrices alone. Train one with: leakfast train"
        )
    if init.stacked:
        return
    ranks, alpha = sorted(set(structure.ranks.values())), config.get("lora_alpha")
    if ranks != [cfg.rank] or alpha != cfg.alpha or config.get("alpha_pattern"):
        raise InputError(
            f"train: {folder} has rank {', '.join(map(str, ranks))} and alpha {alpha}, but rank {cfg.rank} and alpha "
            f"{cfg.alpha} are to be trained. Needed: the same of both, because its matrices are trained further. Set rank and "
            "alpha as it has them, or train on top of it with --stacked (in a study: stacked = true)."
        )


def begin(net: Any, recipe: Recipe, name: str = "default") -> None:
    """Give the fresh adapter `name` of a peft model the weights that the recipe begins from, or put them below it, frozen;
    without any, nothing happens. Raises InputError where they are those of other layers."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from leakfast.models.adapter_structure import WEIGHTS
    from leakfast.models.adapters import adapter_hash
    from leakfast.train.saving import state_of
    from leakfast.train.stacked import put_below

    if recipe.init is None:
        return
    folder = recipe.init.folder
    if adapter_hash(folder) != recipe.init.adapter_hash:
        raise InputError(
            f"train: {folder} changed since it was looked at. Needed: an adapter that stays. Try again."
        )
    if recipe.init.stacked:
        put_below(net, recipe.init, name)
        return
    given, fresh = load_file(folder / WEIGHTS), state_of(net, name)
    if set(given) != set(fresh):
        other = sorted(set(given) ^ set(fresh))[0]
        raise InputError(
            f"train: {folder} adapts other layers than are trained ({other} is in one of the two). Needed: an adapter of all "
            "linear layers of attention and MLP. Train one with: leakfast train"
        )
    set_peft_model_state_dict(net, given, adapter_name=name)
