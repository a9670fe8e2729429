"""The 2-D selective scan: one signature, several implementations, and the one place that chooses.

Letters: B batch, H W rows and columns, L = H W, K = 4 directions, D channels, N states per channel.

For every direction k the pixels form a sequence l = 1..L: k = 0 row by row, k = 1 column by column, k = 2 and
k = 3 the same two from the end to the beginning. Along it every channel runs a diagonal linear recurrence
whose step, input and readout depend on the data (S6, Gu and Dao 2023, arXiv 2312.00752, algorithm 2):

    dt_l = softplus(delta_l + delta_bias)
    h_l  = exp(dt_l A) h_{l-1} + dt_l B_l x_l,   h_0 = 0      [N] per channel
    y_l  = C_l . h_l + D x_l

and the sum of the four y at each pixel is returned (cross-scan and cross-merge of VMamba, arXiv 2401.10166).

Everything is in pixel order and channel last: a direction only changes the order in which an implementation
walks over the pixels, so that nothing is stacked, flipped or merged outside, and one matrix product makes
delta, B and C of all directions. The state is float32 (float64 for float64 inputs) whatever the inputs are,
also under autocast.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.model.precision import full_precision

DIRECTIONS = 4
ScanFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

# Module of each backend, the fastest first. It holds `scan(x, delta, A, B, C, D, delta_bias)` and, if it has
# conditions, `available()` on this machine and `supports(device, dtype)`. One with HALVES reads float16 and bfloat16
# as they are; the others are given float32 (or float64).
BACKENDS = {
    "triton": "pipeline.model.scan_triton",
    "mamba_ssm": "pipeline.model.scan_mamba_ssm",
    "cpp": "pipeline.model.scan_cpp",
    "torch": "pipeline.model.scan_torch",
    "reference": "pipeline.model.scan_reference",
}
# Chosen by name only: a program for torch.export, for finite numbers and gradients of autograd.
NAMED = {"doubling": "pipeline.model.scan_doubling"}


def check_name(backend: str | None) -> str | None:
    """The name itself; ValueError if it is neither None nor a backend."""
    if backend is not None and backend not in BACKENDS and backend not in NAMED:
        raise ValueError(f"scan backend {backend!r} does not exist; choose one of {', '.join(BACKENDS)}")
    return backend


def available(backend: str) -> bool:
    """Whether the backend works on this machine; one without conditions always does."""
    module = importlib.import_module(BACKENDS[backend])
    return bool(module.available()) if hasattr(module, "available") else True


def resolve(backend: str | None, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that runs for inputs on `device` (None: the CPU) in `dtype`.

    None chooses the fastest that is available and supports both. A name is taken at its word: if it cannot run,
    running it says why.

    Raises:
        ValueError: no backend has this name.
    """
    if check_name(backend) is not None:
        return str(backend)
    return next(name for name in BACKENDS if _fits(name, device or torch.device("cpu"), dtype))


def _fits(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    module = importlib.import_module(BACKENDS[backend])
    return (not hasattr(module, "supports") or module.supports(device, dtype)) and available(backend)


def ss2d_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Run the whole 2-D selective scan.

    Args:
        x: input [B, H, W, D].
        delta: step sizes before bias and softplus [B, H, W, K, D].
        A: decay rates [K, D, N], negative.
        B: input weights [B, H, W, K, N].
        C: readout weights [B, H, W, K, N].
        D: skip weights [K, D].
        delta_bias: bias of the step sizes [K, D].
        backend: a key of `BACKENDS` or `NAMED`; None chooses among the first.

    Returns:
        y [B, H, W, D], float32, or float64 if x is float64. NaN and inf spread as the recurrence spreads
        them. On the meta device its shape alone.

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
    """
    _check_shapes(x, delta, A, B, C, D, delta_bias)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.is_meta:
        return torch.empty_like(x, dtype=dtype)
    module = importlib.import_module((BACKENDS | NAMED)[resolve(backend, x.device, dtype)])
    function: ScanFunction = module.scan
    tensors = (x, delta, A, B, C, D, delta_bias)
    with full_precision(x.device):
        return function(*(tensors if hasattr(module, "HALVES") else (tensor.to(dtype) for tensor in tensors)))


def in_pixel_order(tensor: Tensor) -> Tensor:
    """For kernels that walk by strides of sample, pixel and direction, with dense features.

    The tensor [B, H, W, K, F] itself if one stride walks over its pixels and its features are dense, else a copy.
    """
    dense = tensor.stride(4) == 1 or tensor.shape[4] == 1
    single = tensor.stride(1) == tensor.stride(2) * tensor.shape[2] or tensor.shape[1] == 1
    return tensor if dense and single else tensor.contiguous()


def _check_shapes(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> None:
    if x.dim() != 4 or A.dim() != 3 or A.shape[0] != DIRECTIONS:
        raise ValueError(f"x must be [B, H, W, D] and A [4, D, N]; got {tuple(x.shape)} and {tuple(A.shape)}")
    pixels, channels, states = tuple(x.shape[:3]), x.shape[3], A.shape[2]
    expected = {
        "delta": (delta, (*pixels, DIRECTIONS, channels)),
        "A": (A, (DIRECTIONS, channels, states)),
        "B": (B, (*pixels, DIRECTIONS, states)),
        "C": (C, (*pixels, DIRECTIONS, states)),
        "D": (D, (DIRECTIONS, channels)),
        "delta_bias": (delta_bias, (DIRECTIONS, channels)),
    }
    wrong = [f"{name} {tuple(t.shape)}, not {shape}" for name, (t, shape) in expected.items() if t.shape != shape]
    if wrong:
        raise ValueError(f"for x {tuple(x.shape)} these shapes do not fit: {'; '.join(wrong)}")
