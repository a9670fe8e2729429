"""The scan by the CUDA kernel of the library mamba-ssm, with cross-scan and cross-merge around it.

The kernel (`selective_scan_fn` of mamba_ssm.ops.selective_scan_interface; Gu and Dao 2023, arXiv 2312.00752) knows
sequences only, in groups that share B and C: so the four directions are laid out as K groups of D channels,
[B, K D, L], and their outputs are put back and added. Its sums over channels are made by atomics, in any order, so that
gradients differ in their last bits from run to run. Letters as in scan.py.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.model.scan_torch import Walk

MAX_STATES = 256  # of the kernel

log = logging.getLogger(__name__)


def available() -> bool:
    """Whether mamba-ssm can be imported with its kernels (docs/install.md), and there is a CUDA GPU."""
    return torch.cuda.is_available() and _kernel() is not None


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this backend can run on the device and in the dtype: float32 on CUDA."""
    return device.type == "cuda" and dtype == torch.float32


def scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """`pipeline.model.scan.ss2d_scan` with mamba-ssm's kernel; once differentiable.

    Raises:
        ValueError: more than 256 states.
        RuntimeError: mamba-ssm cannot be imported.
    """
    kernel = _kernel()
    if kernel is None:
        raise RuntimeError("scan backend 'mamba_ssm' needs mamba-ssm and its kernels (docs/install.md); use 'triton'")
    if A.shape[2] > MAX_STATES:
        raise ValueError(f"scan backend 'mamba_ssm' takes at most {MAX_STATES} states, not {A.shape[2]}; use 'torch'")
    walk = Walk(x.shape[1], x.shape[2], x.device)
    u, dt, b, c = (walk.forth(tensor).permute(0, 2, 3, 1).contiguous() for tensor in (x, delta, B, C))  # [B, K, F, L]
    y = kernel(
        u.flatten(1, 2),  # [B, K D, L]
        dt.flatten(1, 2),
        A.flatten(0, 1).contiguous(),  # [K D, N]
        b,  # [B, K, N, L]
        c,
        D.flatten(),
        delta_bias=delta_bias.flatten(),
        delta_softplus=True,
    )
    y = torch.unflatten(y, 1, A.shape[:2]).permute(0, 3, 1, 2)  # [B, L, K, D]
    return walk.back(y.contiguous()).sum(3)  # [B, H, W, D]


@functools.cache
def _kernel() -> Callable[..., Tensor] | None:
    """mamba-ssm's function, or None with a line in the log where it is installed and cannot be imported."""
    name = "mamba_ssm.ops.selective_scan_interface"
    try:
        function: Callable[..., Tensor] = importlib.import_module(name).selective_scan_fn
    except ImportError as error:
        if error.name is None or not error.name.startswith("mamba_ssm"):
            log.warning("mamba-ssm is installed but cannot be imported, so another scan runs: %s", error)
        return None
    return function
