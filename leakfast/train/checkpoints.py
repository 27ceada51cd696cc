"""Points of a training run: which steps they are, the model as it is measured there and then exactly as it
was, and the folders they are kept in. Demands nothing of what is measured; leaves saving to saving.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.storage.layout import CHECKPOINTS, share_of

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Checkpoints:
    """At which shares of the optimizer steps (0–1) the adapter is kept, and what is to be measured there.

    score: called with (model in eval mode with the adapter live, share); it may run the engine, and must not
    change the model. None: the adapter is kept and nothing measured."""

    shares: tuple[float, ...] = SHARES
    score: Callable[[Loaded, float], Any] | None = None

    def __post_init__(self) -> None:
        if any(not 0 <= share <= 1 for share in self.shares):
            raise ValueError(f"shares of training lie between 0 and 1, not {self.shares}")

    def at(self, total: int) -> dict[int, tuple[float, ...]]:
        """Finished steps (of `total`) → shares, rising; several can fall on one step of a short training. Step 0 is
        share 0 alone, where that is asked: an adapter that was not trained yet is no point of another share."""
        found: dict[int, tuple[float, ...]] = {}
        for share in sorted({*self.shares}):
            step = math.floor(share * total + 0.5)
            if step or not share:
                found[step] = (*found.get(step, ()), share)
        return found


def find_series(adapter: str | Path) -> list[tuple[float, Path]]:
    """(share, folder) of an adapter's checkpoints in order; the adapter itself is the last, at 1.

    Raises InputError where it was trained without checkpoints."""
    adapter = Path(adapter)
    found = {}
    for path in sorted((adapter / CHECKPOINTS).glob("p*")):
        share = share_of(path.name)
        if share is not None and path.is_dir():
            found[share] = path
    if not found:
        raise InputError(
            f"eval: {adapter} has no checkpoints. Train it again with: leakfast train --checkpoints 0,25,50,75,100"
        )
    return sorted({**found, 1.0: adapter}.items())


@contextmanager
def measured(loaded: Loaded, net: Any) -> Iterator[Loaded]:
    """The model in training as one to be measured: eval mode, adapter live; on leaving, every module's mode
    and every generator's state are what they were, so that training goes on to the same bits."""
    import torch

    training = [module for module in net.modules() if module.training]
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            net.eval()
            yield dataclasses.replace(loaded, model=net, adapter_hash="in training")
        finally:
            for module in training:
                module.training = True
