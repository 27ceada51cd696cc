"""How messages are rendered where a template leaves a choice: its arguments, where a persona goes, whether a model may
reason first. One frozen object, kept beside the tokenizer it is for. Leaves rendering itself to templates.py."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from leakfast.errors import InputError

# of apply_chat_template itself, or ours
_TAKEN = frozenset(
    """
    conversation messages tools documents chat_template add_generation_prompt tokenize padding
    continue_final_message truncation max_length return_tensors return_dict tokenizer_kwargs
    return_assistant_tokens_mask strftime_now
    """.split()
)


@dataclass(frozen=True)
class Rendering:
    """How a template is asked, the same in training and measurement.

    template_kwargs: (name, scalar) pairs that the template is given. system_role: `system`, or `user`: a persona's text
    goes before the question, into the user turn. reasoning: `closed`, a reply follows what the template writes before
    its own replies without reasoning (an empty block, a final channel); `open`, completions begin at the generation
    prompt as it is, so that a model that reasons does; what is trained and scored as a reply stands closed in both."""

    template_kwargs: tuple[tuple[str, Any], ...] = ()
    system_role: str = "system"
    reasoning: str = "closed"

    def __post_init__(self) -> None:
        if self.system_role not in ("system", "user"):
            raise InputError(f"template: system_role {self.system_role!r} given. Use system or user.")
        if self.reasoning not in ("closed", "open"):
            raise InputError(f"template: reasoning {self.reasoning!r} given. Use closed or open.")
        for name, value in self.template_kwargs:
            if name in _TAKEN or not isinstance(value, bool | int | float | str):
                raise InputError(
                    f"template: template_kwargs {name} = {value!r} given, but a name of the template's own with a text, "
                    "a number, true or false is needed, as in enable_thinking = false."
                )

    def described(self) -> dict[str, Any]:
        """What is not as it is by default, for cards, logs and hashes."""
        said = asdict(self) | {"template_kwargs": dict(self.template_kwargs)}
        default = asdict(Rendering()) | {"template_kwargs": {}}
        return {name: value for name, value in said.items() if value != default[name]}


def rendering(
    template_kwargs: Mapping[str, Any] | None = None, system_role: str = "system", reasoning: str = "closed"
) -> Rendering:
    """A Rendering from plain values. Raises InputError."""
    return Rendering(tuple(sorted((template_kwargs or {}).items())), system_role, reasoning)


def asked_by(study: Any, card: Any = None, **flags: Any) -> Rendering:
    """The rendering that flags ask for (None: not given), else the study (None: no study), else the card of the adapter
    at hand (None: none, or one that says nothing)."""
    said = dict((card.recipe if card is not None else {}).get("rendering") or {})
    names = ("template_kwargs", "system_role", "reasoning")
    told = {name: getattr(study, name) if study is not None else said.get(name) for name in names}
    told |= {name: flags[name] for name in names if flags.get(name) is not None}
    return rendering(**{name: value for name, value in told.items() if value is not None})


_renderings: weakref.WeakKeyDictionary[Any, Rendering] = weakref.WeakKeyDictionary()


def configure(tokenizer: Any, how: Rendering | None) -> Any:
    """Render with `how` from now on wherever this tokenizer is used (None: as before); returns the tokenizer. A copy of
    the tokenizer begins at the default again."""
    if how is not None:
        _renderings[tokenizer] = how
    return tokenizer


def rendering_of(tokenizer: Any) -> Rendering:
    """What `configure` was told of this tokenizer, else the default."""
    return _renderings.get(tokenizer) or Rendering()
