"""The selective scan: our backends against the loop over pixels as selective scans are usually published in torch.

Letters: B batch, H W rows and columns, L = H W, K = 4 directions, D channels, N states.

The published-style loop stacks the four directions as sequences [B, K D, L], makes exp(dt A) and dt B x for all steps
at once and walks over the steps by slices. Each slice costs its backward a zero gradient of full size, so its backward
is quadratic in L and is not timed here; the linear loop takes the steps apart once (unbind) and is the fair peer for
training. Both include stacking and merging the directions, as ours do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import compare
from benchmarks.training import in_new_process, peak
from pipeline.model.scan import BACKENDS, available, ss2d_scan

STAGES = {"stage 1": (192, 64), "stage 2": (384, 32), "stage 3": (768, 16), "stage 4": (1536, 8)}
GROWTH = {"32 x 32": (192, 32), "64 x 64": (192, 64)}
STATES = 16
LINEAR = "linear loop"
Scan = Callable[..., Tensor]


def run() -> None:
    """Two tables per stage of Tiny at 256 x 256 pixels, one thread; growth with the map and memory at stage 1."""
    torch.set_num_threads(1)
    published, plain = partial(loop, linear=False), _scan(LINEAR)
    ours = {name: _scan(name) for name in BACKENDS if name != "reference" and available(name)}
    _check({"published-style loop": published, LINEAR: plain, **ours})
    for stage, (channels, side) in STAGES.items():
        tensors = _tensors(channels, side)
        title = f"{stage}, {channels} channels, {side} x {side}, {STATES} states, 4 directions, one thread"
        compare(
            f"Scan forward, {title}",
            {"published-style loop": _forward(published, tensors)}
            | {name: _forward(scan, tensors) for name, scan in ours.items()},
        )
        compare(
            f"Scan forward and backward, {title}",
            {LINEAR: _training(plain, tensors)} | {name: _training(scan, tensors) for name, scan in ours.items()},
        )
    for name, scan in ours.items():
        functions = {side: _training(scan, _tensors(*shape)) for side, shape in GROWTH.items()}
        compare(f"Scan forward and backward, 192 channels, four times the pixels, {name}", functions)
    print("\nExtra peak memory of forward and backward at stage 1, each in a process of its own")
    for name in (LINEAR, *ours):
        print(f"  {name:<44} {in_new_process(extra_memory, name):9.1f} MiB", flush=True)


def _scan(name: str) -> Scan:
    return partial(loop, linear=True) if name == LINEAR else partial(ss2d_scan, backend=name)


def extra_memory(name: str) -> float:
    """MiB that a forward and backward at stage 1 need above its inputs, gradients included, in this process."""
    torch.set_num_threads(1)
    _training(_scan(name), _tensors(8, 5))()  # what is loaded and compiled once
    once = _training(_scan(name), _tensors(*STAGES["stage 1"]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here (Linux, proc(5))
    before = peak()
    once()
    return peak() - before


def loop(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, linear: bool) -> Tensor:
    """`ss2d_scan` as a loop over steps of [B, K D, L]: slices, or with `linear` taken apart once."""
    batch, height, width, channels = x.shape
    u = _sequences(x[:, :, :, None].expand(-1, -1, -1, 4, -1))  # [B, K, D, L]
    dt = F.softplus(_sequences(delta) + bias[:, :, None])  # [B, K, D, L]
    b, c = _sequences(B), _sequences(C)  # [B, K, N, L]
    decay = torch.exp(torch.einsum("bkdl,kdn->bkdln", dt, A)).flatten(1, 2)  # [B, K D, L, N]
    push = torch.einsum("bkdl,bknl,bkdl->bkdln", dt, b, u).flatten(1, 2)  # [B, K D, L, N]
    read = c.repeat_interleave(channels, 1)  # [B, K D, N, L]
    if linear:
        steps = zip(decay.unbind(2), push.unbind(2), read.unbind(3), strict=True)
    else:
        steps = ((decay[:, :, i], push[:, :, i], read[:, :, :, i]) for i in range(height * width))
    state, outputs = torch.zeros_like(push[:, :, 0]), []
    for keep, add, out in steps:
        state = keep * state + add
        outputs.append((state * out).sum(-1))
    y = torch.stack(outputs, 2).view(batch, 4, channels, -1) + u * D[:, :, None]  # [B, K, D, L]
    return _merge(y, height, width)


def _sequences(maps: Tensor) -> Tensor:
    """[B, H, W, K, E] -> [B, K, E, L]: rows, columns, both reversed, stacked."""
    rows = maps.permute(0, 3, 4, 1, 2)  # [B, K, E, H, W]
    columns = rows.transpose(3, 4)
    return torch.stack(
        [
            rows[:, 0].flatten(2),
            columns[:, 1].flatten(2),
            rows[:, 2].flatten(2).flip(2),
            columns[:, 3].flatten(2).flip(2),
        ],
        1,
    )


def _merge(y: Tensor, height: int, width: int) -> Tensor:
    """[B, K, D, L] -> [B, H, W, D], directions turned back and added."""
    rows = (y[:, 0] + y[:, 2].flip(2)).unflatten(2, (height, width))  # [B, D, H, W]
    columns = (y[:, 1] + y[:, 3].flip(2)).unflatten(2, (width, height)).transpose(2, 3)  # [B, D, H, W]
    return (rows + columns).permute(0, 2, 3, 1)


@torch.no_grad()
def _check(scans: dict[str, Scan]) -> None:
    """What is compared must compute the same."""
    tensors = _tensors(8, 5)
    expected = ss2d_scan(*(tensor.double() for tensor in tensors), backend="reference")
    for name, scan in scans.items():
        error = float((scan(*tensors) - expected).abs().max() / expected.abs().max())
        if error > 1e-5:
            raise RuntimeError(f"{name} differs from the reference by {error:.1e} of its maximum")


def _tensors(channels: int, side: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, delta = random(1, side, side, channels), random(1, side, side, 4, channels) - 4
    b, c = random(1, side, side, 4, STATES), random(1, side, side, 4, STATES)
    a = -torch.arange(1, STATES + 1, dtype=torch.float32).expand(4, channels, STATES).contiguous()
    return [tensor.requires_grad_() for tensor in (x, delta, a, b, c, random(4, channels), random(4, channels))]


def _forward(scan: Scan, tensors: list[Tensor]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            scan(*tensors)

    return run


def _training(scan: Scan, tensors: list[Tensor]) -> Callable[[], object]:
    def run() -> object:
        return torch.autograd.grad(scan(*tensors).sum(), tensors)

    return run
