"""The scan as two fused Triton kernels (scan_triton_kernels.py) on CUDA: cross-scan and recurrence in one.

Inputs are read in the precision they come in, float32, float16 or bfloat16; states and sums are float32. Nothing is
stacked or flipped before; every direction writes its y and dx to the pixels they belong to, and one sum merges the
four. No two programs write to one place, so results have the same bits in every run.

Letters as in scan.py; P = H W pixels.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.model.scan import DIRECTIONS, in_pixel_order

WARP = 32  # lanes, and channels of a program
SECTION = 16  # steps S after which the states are kept for the backward pass: 1 / S of all
CHUNK = 4  # steps T whose states the backward pass has in registers; a section is a multiple
AHEAD = 4  # steps whose inputs the forward pass loads at once; a section is a multiple
VECTOR = 16  # bytes of the widest load
REACH = 2**31  # the kernels count within a sample in 32 bits
STATE_LANES = 4  # of the 32 lanes along the states, the others along channels: a square tile needs the fewest shuffles

HALVES = True  # reads float16 and bfloat16 as they are


def available() -> bool:
    """Whether Triton is installed, as CUDA builds of torch bring it, with a CUDA GPU or with its interpreter on."""
    return importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or _interpreted())


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this backend is the choice for the device and dtype: all but float64 on CUDA."""
    return device.type == "cuda" and dtype != torch.float64


def scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """`pipeline.model.scan.ss2d_scan` on CUDA; once differentiable; y is float32.

    Raises:
        ValueError: float64, not on CUDA, or an image of over 2^31 numbers of delta, B or C.
        ModuleNotFoundError: Triton is not installed.
    """
    if not supports(x.device, x.dtype) and not (_interpreted() and x.dtype != torch.float64):
        raise ValueError(f"scan backend 'triton' runs up to float32 on CUDA, not {x.dtype} on {x.device}; use 'torch'")
    result: Tensor = _Scan.apply(x, delta, A, B, C, D, delta_bias)  # type: ignore[no-untyped-call]
    return result


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        x, delta, A, B, C, D, delta_bias = tensors
        power = A.float().transpose(1, 2).mul(math.log2(math.e)).contiguous()  # [K, N, D]
        x, delta, D, delta_bias = x.contiguous(), in_pixel_order(delta), D.float(), delta_bias.float()
        # B and C are small, and cut out of one product at no multiple of 16 bytes, which wide loads need.
        inputs = (x, delta, power, B.contiguous(), C.contiguous(), D.contiguous(), delta_bias.contiguous())
        sections = -(-x.shape[1] * x.shape[2] // SECTION)
        y = x.new_empty(DIRECTIONS, *x.shape, dtype=torch.float32)
        kept = x.new_empty(len(x), DIRECTIONS, sections, *power.shape[1:], dtype=torch.float32)  # [B, K, L / S, N, D]
        _launch("forward", *inputs, y, kept)
        ctx.save_for_backward(*inputs, kept)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return y.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        *inputs, kept = ctx.saved_tensors
        x, delta, power, B, _, D, _ = inputs
        new = functools.partial(x.new_empty, dtype=torch.float32)
        dx, ddelta = new(DIRECTIONS, *x.shape), x.new_empty(delta.shape, dtype=delta.dtype)
        dA, dskip, dbias = new(len(x), *power.shape), new(len(x), *D.shape), new(len(x), *D.shape)
        dB, dC = (new(-(-x.shape[3] // WARP), *B.shape) for _ in range(2))  # [D / 32, B, H, W, K, N]
        notes = new(len(x), DIRECTIONS, SECTION // CHUNK, *power.shape[1:])
        _launch("backward", *inputs, kept, notes, dy.float().contiguous(), dx, ddelta, dA, dB, dC, dskip, dbias)
        sums = (dx.sum(0), ddelta, dA.sum(0).transpose(1, 2), dB.sum(0), dC.sum(0), dskip.sum(0), dbias.sum(0))
        return tuple(gradient.to(dtype) for gradient, dtype in zip(sums, ctx.dtypes, strict=True))


def constants(kernel: str, states: int, bytes_: int) -> dict[str, int]:
    """Steps and shapes of tiles of a kernel, for N states and inputs of so many bytes a number."""
    wide = 1 << (states - 1).bit_length()  # Triton's tiles have powers of two; what is too much is masked
    if kernel == "forward":
        vector = min(VECTOR // bytes_, wide)
        return {"N": states, "S": SECTION, "G": AHEAD, "R": wide // vector, "V": vector}
    lanes = min(STATE_LANES, wide)
    tile = {"NL": lanes, "NV": wide // lanes, "DV": lanes, "DL": WARP // lanes}
    return {"N": states, "T": CHUNK, "M": SECTION // CHUNK, **tile}


def check_reach(height: int, width: int, stride: int) -> None:
    """ValueError where an image of height x width pixels, `stride` numbers apart, is too large for the kernels."""
    if height * width * stride >= REACH:
        raise ValueError(
            f"scan backend 'triton' takes up to 2^31 numbers of a sample, not {height} x {width} pixels of {stride}; "
            "use smaller images, or 'torch'"
        )


def _launch(kernel: str, *tensors: Tensor) -> None:
    """Run a kernel on the inputs x, delta, power, B, C, D and bias and what follows them."""
    kernels = importlib.import_module("pipeline.model.scan_triton_kernels")  # needs Triton, which not all have
    x, delta, power, B, C, *_ = tensors
    batch, height, width, channels = x.shape
    check_reach(height, width, max(tensor.stride(2) for tensor in (delta, B, C)))
    strides = (tensor.stride(axis) for tensor in (delta, B, C) for axis in (0, 2, 3))
    grid = (-(-channels // WARP), DIRECTIONS, batch)
    sizes = (height, width, channels, -(-height * width // SECTION))
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        fixed = constants(kernel, power.shape[1], B.element_size())
        getattr(kernels, kernel)[grid](*tensors, *sizes, *strides, **fixed, num_warps=1)


def _interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, in Python (TRITON_INTERPRET=1): for tests."""
    if importlib.util.find_spec("triton") is None:
        return False
    return bool(importlib.import_module("triton").knobs.runtime.interpret)
