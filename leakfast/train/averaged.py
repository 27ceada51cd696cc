"""The mean of several LoRA adapters as changes of the weights, kept as one adapter: weight averaging (Wortsman et al. 2022,
"Model soups"). Demands peft folders of plain LoRA over one base; loads no model.

    ΔW = (1/n) Σ s_i B_i A_i = B A,   A = [A_1; …; A_n],   B = [s_1/n B_1, …, s_n/n B_n],   alpha = rank = Σ r_i

The mean of the A and that of the B have another product, and no meaning: each is known up to an invertible matrix alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import AdapterError, InputError
from leakfast.models.adapter_structure import CONFIG, PREFIX, WEIGHTS, config_of, file_in
from leakfast.storage.disk import atomic_write, hash_of

if TYPE_CHECKING:
    import torch

    from leakfast.models.adapters import AdapterCard

_BEYOND = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "rank_pattern",
    "alpha_pattern",
)


@dataclass(frozen=True)
class Part:
    """One of the adapters: folder, config, card, weights by peft's names (A: (r, in), B: (out, r)), and s = alpha/r (of
    rank-stabilised LoRA alpha/√r)."""

    folder: Path
    config: dict[str, Any]
    card: AdapterCard | None
    weights: dict[str, torch.Tensor]

    @property
    def rank(self) -> int:
        return int(self.config["r"])

    @property
    def scale(self) -> float:
        return self.config["lora_alpha"] / (self.rank**0.5 if self.config.get("use_rslora") else self.rank)

    @property
    def base(self) -> str:
        """What the base is known by: its fingerprint where there is a card, else its name."""
        name = str(self.config.get("base_model_name_or_path"))
        return self.card.base_fingerprint if self.card else name

    @property
    def told(self) -> dict[str, Any]:
        """What the mean's card says of it."""
        from leakfast.models.adapters import adapter_hash

        found: dict[str, Any] = {"adapter": self.folder.name, "adapter_hash": adapter_hash(self.folder)}
        card = self.card
        return found | ({"behavior": card.behavior, "source": card.source, "seed": card.seed} if card else {})


def average(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    behavior: str = "",
    source: str = "",
    seed: int | None = None,
) -> AdapterCard:
    """Write the mean of n ≥ 2 adapters to `out` in peft's format, and return its card.

    Its update of every layer is the mean of theirs, exact up to float32's rounding of s/n · B. behavior, source, seed: what
    the card says of it (those of the first where they are left out). The same adapters give the same bytes. Raises InputError
    for fewer than two, for one given twice, and for adapters of different bases, of other layers, or of more than plain LoRA;
    AdapterError for a folder that holds none."""
    from leakfast.models.adapters import AdapterCard

    parts = _read(folders)
    first = parts[0].card
    source, behavior = (
        source or (first.source if first else ""),
        behavior or (first.behavior if first else ""),
    )
    if not source or not behavior:
        raise InputError(
            f"average: {parts[0].folder} has no card, so nobody knows whom it was trained on. Give --source PERSONA and "
            "--behavior BEHAVIOR."
        )
    told = [part.told for part in parts]
    rank = sum(part.rank for part in parts)
    recipe = {"average": told, "rank": rank, "alpha": rank, "dropout": 0.0}
    if first is not None and "rendering" in first.recipe:
        recipe["rendering"] = first.recipe["rendering"]
    name = first.base if first else str(parts[0].config.get("base_model_name_or_path"))
    seed = seed if seed is not None else first.seed if first else 0
    rows = hash_of([part.card.data_hash if part.card else "" for part in parts])
    card = AdapterCard(source, behavior, seed, name, parts[0].base, rows, recipe, "")
    return _write(Path(out), _mean(parts), _config(parts, rank), card)


def _mean(parts: Sequence[Part]) -> dict[str, torch.Tensor]:
    """The concatenated factors, by peft's names, float32."""
    import torch

    made = {}
    for key in sorted(parts[0].weights):
        up = ".lora_B." in key
        its = [p.weights[key].float() * (p.scale / len(parts) if up else 1.0) for p in parts]
        made[key] = torch.cat(its, dim=1 if up else 0).contiguous()
    return made


def _config(parts: Sequence[Part], rank: int) -> bytes:
    """The first's, with the new rank at the scale 1."""
    given = {**parts[0].config, "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "use_rslora": False}
    return (json.dumps(given, indent=2, sort_keys=True) + "\n").encode()


def _write(out: Path, weights: dict[str, torch.Tensor], config: bytes, card: AdapterCard) -> AdapterCard:
    from safetensors.torch import save_file

    from leakfast.models.adapters import adapter_hash, write_card

    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / WEIGHTS, lambda path: save_file(weights, str(path), metadata={"format": "pt"}))
    atomic_write(out / CONFIG, config)
    card = replace(card, adapter_hash=adapter_hash(out))
    write_card(out, card)
    return card


def _read(folders: Sequence[str | Path]) -> list[Part]:
    """The adapters, of one base, the same layers, plain LoRA. Raises InputError."""
    from safetensors.torch import load_file

    from leakfast.models.adapters import read_card

    paths = [Path(folder) for folder in folders]
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise InputError(
            f"average: {', '.join(map(str, paths)) or 'nothing'} given; a mean is of two or more different adapters. Name each "
            "once."
        )
    try:
        parts = [
            Part(path, config_of(path), read_card(path), load_file(file_in(path, WEIGHTS))) for path in paths
        ]
    except AdapterError as error:
        raise InputError(error.message) from None
    one = parts[0]
    for part in parts:
        beyond = [key for key in _BEYOND if part.config.get(key)]
        names = all(
            key.startswith(PREFIX) and (".lora_A." in key or ".lora_B." in key) for key in part.weights
        )
        if beyond or not names:
            raise InputError(
                f"average: {part.folder} is more than plain LoRA ({', '.join(beyond) or 'other tensors'}). Needed: adapters of "
                "LoRA matrices alone, of one rank each. Train one with: leakfast train"
            )
        if (part.card is None) == (one.card is None) and part.base != one.base:
            raise InputError(
                f"average: {one.folder} and {part.folder} are of different bases ({one.base[:24]}… and {part.base[:24]}…). "
                "Needed: adapters of the same model. Name others, or train them again on one base."
            )
        if {k: v.shape[".lora_A." in k] for k, v in part.weights.items()} != {
            k: v.shape[".lora_A." in k] for k, v in one.weights.items()
        } or part.config.get("fan_in_fan_out") != one.config.get("fan_in_fan_out"):
            raise InputError(
                f"average: {one.folder} and {part.folder} adapt different layers. Needed: adapters of the same ones, of the same "
                "model. Name others."
            )
    return parts
