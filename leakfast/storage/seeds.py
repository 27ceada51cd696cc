"""Seeds, drawn from what a thing is: SHA-256 of its parts, so that none depends on order or on the process. Demands
nothing."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from named parts: SHA-256 over each part's `str` in UTF-8, length-prefixed.

    The same parts give the same seed on every machine and in every process."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = str(part).encode()
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return int.from_bytes(digest.digest()[:8], "big") >> 1
