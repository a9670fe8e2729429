"""Memory: arrays whose memory is used again once nothing looks into it any more.

A process gets fresh memory in pages that the kernel clears first, which takes longer than a copy out of the page cache.
Samples are all of much the same size, so a reader that keeps what its consumer has let go of needs no fresh pages.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

SMALL = 1 << 17  # bytes up to which malloc keeps memory by itself
IDLE = 32  # pieces of one size that are kept


class Memory:
    """Gives arrays as `numpy.empty` does.

    An array's memory is taken back when the array and all that was made of it without a copy (views, memoryviews,
    tensors) are gone. Four sizes per power of two, so that at most a quarter of a piece is left over.
    """

    def __init__(self) -> None:
        self._idle: dict[int, deque[NDArray[np.uint8]]] = {}

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array whose content is whatever was there."""
        shape, kind = (shape,) if isinstance(shape, int) else shape, np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        if size < SMALL:
            return np.empty(shape, kind)
        unit = 1 << (size.bit_length() - 3)
        idle = self._idle.setdefault(-(-size // unit) * unit, deque(maxlen=IDLE))
        try:
            piece = idle.pop()
        except IndexError:
            piece = np.empty(-(-size // unit) * unit, np.uint8)
        lent = piece[:size]
        # `append` on a deque is atomic, so this may happen in any thread, also in the middle of `pop`.
        weakref.finalize(lent, idle.append, piece).atexit = False
        # Through a memoryview: an array made of `lent` itself would hold `piece`, and `lent` would seem to be gone.
        return np.frombuffer(lent.data, kind).reshape(shape)
