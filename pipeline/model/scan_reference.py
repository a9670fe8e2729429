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
    """`pipeline.model.scan.ss2d_scan` by its definition, direction by direction and pixel by pixel."""
    batch, height, width, channels = x.shape
    flat = x.flatten(1, 2)  # [B, L, D]
    step = F.softplus(delta + delta_bias).flatten(1, 2)  # [B, L, K, D]
    y = torch.zeros_like(flat)
    for k, path in enumerate(paths(height, width, x.device)):
        inputs = (flat[:, path], step[:, path, k], B.flatten(1, 2)[:, path, k], C.flatten(1, 2)[:, path, k])
        y = y.index_add(1, path, _sequence(*inputs, A[k]) + D[k] * inputs[0])
    return y.view(batch, height, width, channels)


def _sequence(x: Tensor, step: Tensor, B: Tensor, C: Tensor, A: Tensor) -> Tensor:
    """One walk: x, step [B, L, D], B, C [B, L, N] in its order and A [D, N] -> C . h [B, L, D]."""
    state = x.new_zeros(x.shape[0], *A.shape)  # [B, D, N]
    outputs = []
    # unbind, not indexing: its backward is one stack, while every index would make a full-size gradient
    for x_l, step_l, B_l, C_l in zip(x.unbind(1), step.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        drive = (step_l * x_l)[..., None] * B_l[:, None]  # [B, D, N]
        state = torch.exp(step_l[..., None] * A) * state + drive
        outputs.append((state * C_l[:, None]).sum(-1))  # [B, D]
    return torch.stack(outputs, 1)  # [B, L, D]
