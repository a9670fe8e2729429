"""Randomness as a function of integers: the same key gives the same bits on every device, rank and resume.

A key is a sequence of 64-bit words, by convention (seed, position of the sample, use, ...). The hash is a
chain of splitmix64 finalisers (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"),
all arithmetic modulo 2^64. torch has no logical shift for int64, so the sign bits that an arithmetic shift
brings in are masked off.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(word: int) -> int:
    """The int64 with the same 64 bits as `word` modulo 2^64."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def hash64(*words: Tensor | int) -> Tensor:
    """Hash of the words in their order: int64, all bits random, of the shape to which the words broadcast.

    Args:
        words: int64 tensors or Python ints (taken modulo 2^64); at least one.

    Raises:
        TypeError: a tensor is not int64 (a narrower one would wrap elsewhere and change the bits).
    """
    tensors = [word for word in words if isinstance(word, Tensor)]
    for tensor in tensors:
        if tensor.dtype != torch.int64:
            raise TypeError(f"hash64 takes int64 tensors, got {tensor.dtype}; write tensor.long()")
    h = torch.zeros((), dtype=torch.int64, device=tensors[0].device if tensors else None)
    for word in words:
        h = _mix(h + (word if isinstance(word, Tensor) else _signed(word)) + _signed(_GOLDEN))
    return h


def uniform(*words: Tensor | int) -> Tensor:
    """Float32 in [0, 1) on a grid of 2^-24, from the upper 24 bits of `hash64(*words)`."""
    return _shift(hash64(*words), 40).to(torch.float32) * 2.0**-24
