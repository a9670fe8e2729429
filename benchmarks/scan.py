"""The selective scan: our backends against the plain loop over pixels, forward and with gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import compare
from pipeline.model.scan import BACKENDS, available, ss2d_scan

STAGES = {
    "stage 1 of tiny at 128 px": (192, 32),
    "stage 3 of tiny at 128 px": (768, 8),
    "stage 1 of nano at 64 px": (24, 16),
}


def run() -> None:
    """One table per shape."""
    torch.set_num_threads(1)
    for title, (channels, side) in STAGES.items():
        tensors = _tensors(channels, side)
        backends = [name for name in BACKENDS if available(name)]
        compare(f"Scan forward, {title}", {name: _forward(tensors, name) for name in backends})
        compare(f"Scan forward and backward, {title}", {name: _training(tensors, name) for name in backends})


def _tensors(channels: int, side: int, states: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, delta = random(1, side, side, channels), random(1, side, side, 4, channels) - 4
    b, c = random(1, side, side, 4, states), random(1, side, side, 4, states)
    a = -torch.arange(1, states + 1, dtype=torch.float32).expand(4, channels, states).contiguous()
    return [tensor.requires_grad_() for tensor in (x, delta, a, b, c, random(4, channels), random(4, channels))]


def _forward(tensors: list[Tensor], backend: str) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            ss2d_scan(*tensors, backend=backend)

    return run


def _training(tensors: list[Tensor], backend: str) -> Callable[[], object]:
    def run() -> object:
        return torch.autograd.grad(ss2d_scan(*tensors, backend=backend).sum(), tensors)

    return run
