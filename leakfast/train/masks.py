"""Dropout masks by counter: a function of a key and the place alone, the same on every device, whatever else is drawn.
Demands a 64-bit key; leaves what a key is made of to layers.py."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import torch

_GOLDEN, _M1, _M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LANES, _LEVELS = 4, 1 << 16  # 16 bits an element, four elements a word


def threshold(rate: float) -> int:
    """Of 65,536 levels, those at which an element is dropped: `rate` to the nearest 1/65,536."""
    return min(_LEVELS - 1, round(rate * _LEVELS))


def kept_share(rate: float) -> float:
    """The probability with which an element is kept, exactly as `mask` draws it."""
    return 1 - threshold(rate) / _LEVELS


def mask(key: int, rows: int, width: int, rate: float, like: torch.Tensor) -> torch.Tensor:
    """(rows, width) of the dtype and device of `like`: 1 where an element is kept, 0 where it is dropped.

    Element i (row after row) is dropped where lane i mod 4 (16 bits) of splitmix64's word i // 4 from `key` on lies
    below threshold(rate): independent Bernoulli draws, of one key always the same."""
    words = -(-rows * width // _LANES)
    if like.device.type == "cpu":
        made = np.empty(words * _LANES, np.float32)
        _fill(made, np.empty(words, np.uint64), np.uint64(key), np.uint16(threshold(rate)))
        return torch.from_numpy(made)[: rows * width].view(rows, width).to(like.dtype)
    return mask_reference(key, rows, width, rate, like)


def mask_reference(key: int, rows: int, width: int, rate: float, like: torch.Tensor) -> torch.Tensor:
    """`mask` in torch's integers, on any device."""
    words = torch.arange(-(-rows * width // _LANES), device=like.device, dtype=torch.int64)
    z = words * _signed(_GOLDEN) + _signed(key)
    z = (z ^ _shifted(z, 30)) * _signed(_M1)
    z = (z ^ _shifted(z, 27)) * _signed(_M2)
    z = z ^ _shifted(z, 31)
    lanes = torch.stack([(z >> (16 * lane)) & (_LEVELS - 1) for lane in range(_LANES)], 1)
    return (lanes.reshape(-1)[: rows * width] >= threshold(rate)).view(rows, width).to(like.dtype)


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    """z >> by of unsigned words."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def _fill(out: np.ndarray, words: np.ndarray, key: np.uint64, least: np.uint16) -> None:
    _draw(words, key)
    _compare(words.view(np.uint16), least, out)


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """numba.njit without the interpreter lock, kept on disk where a folder for it can be written."""
    found: Callable[..., None]
    try:
        found = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder can be written: compiled anew in every process
        found = numba.njit(nogil=True)(function)
    return found


@_compiled
def _draw(words, key):
    """splitmix64 (Steele, Lea and Flood 2014) at the places 0, 1, …"""
    for place in range(len(words)):
        z = key + np.uint64(place) * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_M1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_M2)
        words[place] = z ^ (z >> np.uint64(31))


@_compiled
def _compare(lanes, least, out):
    for place in range(len(lanes)):
        out[place] = np.float32(1.0) if lanes[place] >= least else np.float32(0.0)
