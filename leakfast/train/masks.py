"""Dropout masks by counter: a function of a key and the place alone, the same on every device, whatever else is drawn.
Demands a 64-bit key; leaves what a key is made of to layers.py."""

from __future__ import annotations

import numpy as np
import torch

from leakfast.counters import GOLDEN, M1, M2, compiled, mixed

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
    z = words * _signed(GOLDEN) + _signed(key)
    z = (z ^ _shifted(z, 30)) * _signed(M1)
    z = (z ^ _shifted(z, 27)) * _signed(M2)
    z = z ^ _shifted(z, 31)
    lanes = torch.stack([(z >> (16 * lane)) & (_LEVELS - 1) for lane in range(_LANES)], 1)
    return (lanes.reshape(-1)[: rows * width] >= threshold(rate)).view(rows, width).to(like.dtype)


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    """z >> by of unsigned words."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int | np.uint64) -> int:
    word = int(word) & (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def _fill(out: np.ndarray, words: np.ndarray, key: np.uint64, least: np.uint16) -> None:
    _draw(words, key)
    _compare(words.view(np.uint16), least, out)


@compiled
def _draw(words, key):
    """splitmix64 at the places 0, 1, …"""
    for place in range(len(words)):
        words[place] = mixed(key + np.uint64(place) * GOLDEN)


@compiled
def _compare(lanes, least, out):
    for place in range(len(lanes)):
        out[place] = np.float32(1.0) if lanes[place] >= least else np.float32(0.0)
