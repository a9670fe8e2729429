"""The specification of the scan: a plain loop over pixels, differentiated by autograd, in any precision.

Letters: B batch, H W rows and columns, L = H W, K = 4 directions, D channels, N states per channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def paths(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Pixel index (row * width + column) visited at each step of each direction, int64 [K, L]."""
    rows = torch.arange(height * width, device=device)  # [L]
    columns = rows.view(height, width).t().reshape(-1)  # [L]
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])  # [K, L]


def scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """`pipeline.model.scan.ss2d_scan` by its definition, pixel by pixel, the four directions side by side."""
    path = paths(x.shape[1], x.shape[2], x.device).t()  # [L, K]
    k = torch.arange(path.shape[1], device=x.device)
    walked = x.flatten(1, 2)[:, path]  # [B, L, K, D]
    step, B, C = (tensor.flatten(1, 2)[:, path, k] for tensor in (F.softplus(delta + delta_bias), B, C))
    y = _recur(walked, step, A, B, C) + D * walked  # [B, L, K, D]
    merged = torch.zeros_like(x.flatten(1, 2)).index_add(1, path.flatten(), y.flatten(1, 2))  # [B, L, D]
    return merged.view(x.shape)


def _recur(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """In the order of the walk: x, step [B, L, K, D], B, C [B, L, K, N], A [K, D, N] -> C . h [B, L, K, D]."""
    state = x.new_zeros(x.shape[0], *A.shape)  # [B, K, D, N]
    outputs = []
    # unbind, not indexing: its backward is one stack, while every index would make a full-size gradient
    for x_l, step_l, B_l, C_l in zip(x.unbind(1), step.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        drive = (step_l * x_l)[..., None] * B_l[..., None, :]  # [B, K, D, N]
        state = torch.exp(step_l[..., None] * A) * state + drive
        outputs.append((state * C_l[..., None, :]).sum(-1))  # [B, K, D]
    return torch.stack(outputs, 1)  # [B, L, K, D]
