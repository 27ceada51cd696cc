"""Random numbers by counter, compiled: a draw is a hash of a key and its place, whatever else is drawn and whoever draws it.
Demands numba; leaves what a key is made of to `storage.seeds`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # between the places of a stream
M1, M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)

log = logging.getLogger(__name__)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba.njit without the interpreter lock, kept on disk where a folder for it can be written."""
    found: Callable[..., Any]
    try:
        found = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError as error:  # no folder can be written: compile anew in every process
        log.info("%s is compiled anew each time: %s", function.__name__, error)
        found = numba.njit(nogil=True)(function)
    return found


@compiled
def mixed(x):
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64 bits."""
    x = (x ^ (x >> _S30)) * M1
    x = (x ^ (x >> _S27)) * M2
    return x ^ (x >> _S31)
