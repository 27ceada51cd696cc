"""Whether a text to stop at stands in what was generated, asked after every token and answered by decoding only
where the last token could have completed it. Demands a tokenizer; leaves the decoding loop to its owner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Seen:
    """`texts` (none empty) in generated token ids, as `generate.decode` spells them.

    A token can complete a text only if it brings the text's last character. Where that is ASCII, the token's own
    text shows it, since no tokenizer cuts such a character; elsewhere every token is looked at."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.tokenizer, self.texts = tokenizer, tuple(texts)
        self._last = {text[-1] for text in texts}
        self._always = not all(character.isascii() for character in self._last)
        self._known: dict[int, bool] = {}

    def may_end(self, tokens: np.ndarray) -> np.ndarray:
        """(B,) bool: whether each of the tokens (B,) could be the last of one of the texts."""
        return np.array([self._ends(int(token)) for token in tokens], dtype=bool)

    def in_text(self, token_ids: Sequence[int]) -> bool:
        """Whether one of the texts stands in the decoded ids."""
        from leakfast.generation.frames import decode

        (text,) = decode(self.tokenizer, [[int(token) for token in token_ids]])
        return any(wanted in text for wanted in self.texts)

    def _ends(self, token: int) -> bool:
        if self._always:
            return True
        if token not in self._known:
            piece = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
            self._known[token] = any(character in piece for character in self._last)
        return self._known[token]
