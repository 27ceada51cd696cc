"""Which name was meant by one that is not known. Demands the names there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The entry of `known` that `name` most likely was meant to be, or None."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """` Did you mean X?`, or nothing."""
    close = nearest(name, known)
    return f" Did you mean {close}?" if close else ""
