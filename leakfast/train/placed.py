"""Whether an adapter that lies in a folder is the one that a recipe makes of some rows. Demands its card; trains nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from leakfast.errors import AdapterError
from leakfast.models.adapters import adapter_hash, read_card
from leakfast.prompts.templates import recorded, template_hash
from leakfast.train.data import data_hash
from leakfast.train.recipe import in_card

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.train.data import Row
    from leakfast.train.recipe import Recipe


def is_of(folder: Path, loaded: Loaded, recipe: Recipe, rows: Sequence[Row]) -> bool:
    """Whether the folder's card tells of this recipe, these rows and this model in its precision and rendering; what earlier
    versions did not tell passes. Raises AdapterError for a card that cannot be read."""
    card, settings = read_card(folder), in_card(recipe.train)
    if card is None:
        return False
    told = card.recipe
    rendering = {"template": template_hash(loaded.tokenizer), **recorded(loaded.tokenizer)}
    return (
        (card.source, card.behavior, card.seed) == (recipe.source, recipe.behavior, recipe.seed)
        and (card.base_fingerprint, card.data_hash) == (loaded.fingerprint, data_hash(rows))
        and all(told.get(key) == value for key, value in settings.items())
        and told.get("end_of_turn", "both") == recipe.train.end_of_turn
        and told.get("method", "lora") == recipe.train.method
        and told.get("init") == (recipe.init.told if recipe.init else None)
        and told.get("steering") == (recipe.steer.told if recipe.steer else None)
        and told.get("dtype", loaded.dtype) == loaded.dtype
        and told.get("rendering", rendering) == rendering
    )


def is_whole(folder: Path, loaded: Loaded, recipe: Recipe, rows: Sequence[Row]) -> bool:
    """`is_of`, and its bytes are those that its card tells of; one that cannot be read is none."""
    try:
        if not is_of(folder, loaded, recipe, rows):
            return False
        card = read_card(folder)
        return card is not None and card.adapter_hash == adapter_hash(folder)
    except (AdapterError, OSError):
        return False
