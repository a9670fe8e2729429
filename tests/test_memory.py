"""Memory that is used again: never while anything looks into it, always afterwards."""

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from shards.memory import IDLE, SMALL, Memory

SHAPE, KIND = (3, 256, 256), np.dtype(np.uint16)


def address(array: object) -> int:
    return int(np.asarray(array).ctypes.data)


@pytest.mark.parametrize(
    "look",
    [
        lambda array: array[1],
        lambda array: array.data,
        lambda array: array.reshape(-1).view(np.float32),
        lambda array: torch.from_numpy(array)[2],
        lambda array: np.frombuffer(array.data.cast("B")[64:128], np.uint8),
    ],
    ids=["view", "memoryview", "other type", "tensor", "part of its bytes"],
)
def test_memory_is_lent_again_only_when_nothing_looks_into_it(look):
    memory = Memory()
    array = memory.empty(SHAPE, KIND)
    assert (array.shape, array.dtype, array.flags.writeable, array.flags.c_contiguous) == (SHAPE, KIND, True, True)
    where, seen = address(array), look(array)
    del array
    other = memory.empty(SHAPE, KIND)
    assert address(other) != where
    del seen
    gc.collect()
    assert address(memory.empty(SHAPE, KIND)) == where


def test_sizes_that_differ_little_share_memory_and_no_piece_is_much_too_large():
    memory = Memory()
    where = address(memory.empty(1_000_000, np.uint8))
    assert address(memory.empty(999_000, np.uint8)) == where
    small = memory.empty(700_000, np.uint8)
    assert address(small) != where


def test_what_is_kept_is_bounded_and_small_arrays_are_not_kept():
    memory = Memory()
    many = [memory.empty(SHAPE, KIND) for _ in range(3 * IDLE)]
    many.clear()
    (idle,) = memory._idle.values()
    assert len(idle) == IDLE
    memory.empty(SMALL - 1, np.uint8)
    assert len(memory._idle) == 1


def test_threads_never_share_an_array():
    memory = Memory()

    def fill(number: int) -> bool:
        array = memory.empty((64, 1024), np.dtype(np.int64))
        array[...] = number
        return bool((array == number).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(fill, range(2000)))
