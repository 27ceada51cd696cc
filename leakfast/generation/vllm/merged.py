"""The base's weights with an adapter merged in, one tensor at a time, for an engine that swaps them in place: no
copy on disk, none of the whole model in memory. Demands the model beside the engine, in the same process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import ModelError

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded


class Merged:
    """Weights of a base model under its adapters: W + scale·B·A of every target, summed in float32 and rounded
    once to the model's dtype; all other weights as they are."""

    def __init__(self, loaded: Loaded) -> None:
        if loaded.stream is not None:
            raise ModelError(
                f"generate: adapters are to be merged into {loaded.name}, but its weights stay on disk. Needed: the model in "
                "memory. Use --stream off, or --lora live."
            )
        self.loaded = loaded

    def weights(self, adapter: Path | None) -> Iterator[tuple[str, Any]]:
        """(name in a checkpoint, tensor) of every weight, tied ones once; None: the base's own.

        Raises AdapterError for an adapter that does not fit or changes nothing."""
        from leakfast import models
        from leakfast.models.attach import updates

        with models.with_adapter(self.loaded, adapter) if adapter else nullcontext(self.loaded) as current:
            for name, weight, update in updates(current.model):
                if update is None:
                    yield name, weight.detach()
                else:
                    merged = weight.detach().float() + update.to(weight.device).float()
                    yield name, merged.to(weight.dtype)
