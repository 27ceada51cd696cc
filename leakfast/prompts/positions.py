"""Where in a prompt a text ends: the token that a state may be taken at, beside the last one. Demands a fast tokenizer with a
chat template; runs no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leakfast.errors import ModelError
from leakfast.prompts import templates
from leakfast.prompts.conversation import prefill_of
from leakfast.prompts.personas import TEMPLATE_DEFAULT

NO_SYSTEM = "no system message that could end"
NOT_THERE = "the template writes another text than the one given"


def indices(tokenizer: Any, system: Any, question: str, positions: Sequence[str | int]) -> list[int | str]:
    """For each position the index, from 0, of its token in `chat.render(tokenizer, system, question)`, or why there is none.

    `system_end`: the token that the last character of the system prompt is in (of the template's own where it writes one by
    itself); `question_end`: the same of the question. A negative number counts from the prompt's end: -1 is the last token.
    Where one character is several tokens it is the last of them. Raises ModelError for a tokenizer without offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"positions: {type(tokenizer).__name__} does not say which characters its tokens are of. Use a folder with a "
            "tokenizer.json."
        )
    text = templates.prompt_text(tokenizer, system, question)
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    n = len(spans)

    def index(position: str | int) -> int | str:
        if isinstance(position, int):
            return n + position if -n <= position < 0 else f"a prompt of {n} tokens"
        if position == "question_end":
            wanted = str(question).strip()
            start = text.rfind(wanted, 0, len(text) - len(prefill_of(question)))
        else:
            said = templates.default_system(tokenizer) if system is TEMPLATE_DEFAULT else system
            if not said:
                return NO_SYSTEM
            wanted = said.strip()
            start = text.find(wanted)
        if start < 0:
            return NOT_THERE
        last = start + len(wanted) - 1
        within = [k for k, (begin, end) in enumerate(spans) if begin <= last < end]
        return within[-1] if within else NOT_THERE

    return [index(position) for position in positions]
