"""The hash of everything a shard of choice scores follows from. Demands a loaded model and items; scores nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leakfast.measure.request import Target
    from leakfast.models.loading import Loaded
    from leakfast.prompts.items import ItemSet
    from leakfast.prompts.personas import Persona


def _read(persona: Persona, items: ItemSet) -> Callable[[Any], Any]:
    """All that a tokenizer makes of the items' texts."""
    from leakfast.prompts import chat

    def read(tokenizer: Any) -> list[Any]:
        asked = [text for item in items for text in (item.letters_prompt, item.question)]
        said = [(item.question, choice) for item in items for choice in item.choices]
        return [chat.render(tokenizer, persona.system, text) for text in asked] + [
            chat.render_training(tokenizer, persona.system, *one) for one in said
        ]

    return read


def request_of(
    loaded: Loaded,
    target: Target,
    block: Sequence[Persona],
    items: ItemSet,
    scoring: str,
    engine_name: str,
    **older: str | None,
) -> str:
    """SHA-256 of everything the shard's scores follow from. older: what an earlier version put beside it."""
    from leakfast.prompts import chat, tokenizer_file

    tokenizer = loaded.tokenizer
    probe = chat.render(tokenizer, block[0].system, items[0].letters_prompt, reply=True)
    rendering = {name: value for name, value in chat.recorded(tokenizer).items() if name != "reasoning"}
    what = {
        "base": loaded.fingerprint,
        "dtype": loaded.dtype,
        "adapter": target.digest,
        "personas": [[p.name, p.kind, p.prompt] for p in block],
        "items": items.hash,
        "scoring": scoring,
        "engine": engine_name,
        "template": chat.template_hash(tokenizer),
        "first prompt": chat.ids_hash(probe),
        **older,
        **({"rendering": rendering} if rendering else {}),
    }
    if otherwise := tokenizer_file.reading(
        tokenizer, f"items {items.hash} {scoring}", _read(block[0], items)
    ):
        what["reading"] = otherwise
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
