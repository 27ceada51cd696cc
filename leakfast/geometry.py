"""Which decoder blocks are meant: `all`, `0-5`, `10,15,20`, counted from 0. Demands the model's number of blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from leakfast.errors import InputError

_SPAN = re.compile(r"(\d+)(?:\s*[-–]\s*(\d+))?")


def parse_layers(spec: str | int | Sequence[int], n_layers: int, name: str = "this model") -> list[int]:
    """Decoder blocks, 0-based, each once, in the order given: "all", "0,2,4", "0-5", "0-2,5", an int
    or a list of ints. Raises InputError for what is no layer or not in 0…n_layers-1."""
    remedy = f"Use --layers 0-{n_layers - 1} or --layers all."
    if isinstance(spec, str):
        if spec.strip().lower() == "all":
            return list(range(n_layers))
        asked: list[int] = []
        for word in filter(None, (part.strip() for part in spec.split(","))):
            span = _SPAN.fullmatch(word)
            if not span or (span[2] and int(span[2]) < int(span[1])):
                raise InputError(f"centroids: {word!r} is no layer, but layers are numbers from 0. {remedy}")
            top = int(span[2] or span[1])
            if top >= n_layers:
                raise _no_such_layer(top, n_layers, name, remedy)
            asked += range(int(span[1]), top + 1)
    else:
        asked = [spec] if isinstance(spec, int) else list(spec)
    if not asked:
        raise InputError(f"centroids: no layer asked, at least one is needed. {remedy}")
    for layer in asked:
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer):
            raise InputError(f"centroids: {layer!r} is no layer, but layers are numbers from 0. {remedy}")
        if not 0 <= layer < n_layers:
            raise _no_such_layer(layer, n_layers, name, remedy)
    return list(dict.fromkeys(int(layer) for layer in asked))


def _no_such_layer(layer: int, n_layers: int, name: str, remedy: str) -> InputError:
    return InputError(f"centroids: layer {layer} asked, but {name} has blocks 0–{n_layers - 1}. {remedy}")
