"""The scan as a short program without loops over pixels, for torch.export: log2(L) steps of recursive doubling.

Letters: B batch, L = H W pixels, K = 4 directions, D channels, N states per channel.

Two steps of h_l = a_l h_{l-1} + b_l are one step of the same kind over twice the distance:

    h_l = (a_l a_{l-1}) h_{l-2} + (a_l b_{l-1} + b_l)

so each round doubles how far back a pixel has looked, until it is all the way (Hillis and Steele 1986, "Data parallel
algorithms"; Blelloch 1990, "Prefix sums and their applications"). It costs log2(L) times the work of a loop and keeps
[B, L, K, D, N] numbers in memory, so nothing chooses it by itself. All decays are at most 1, so nothing overflows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.scan_reference import paths


def scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """`pipeline.model.scan.ss2d_scan` by recursive doubling, differentiated by autograd."""
    path = paths(x.shape[1], x.shape[2], x.device).t()  # [L, K]
    k = torch.arange(path.shape[1], device=x.device)
    walked = x.flatten(1, 2)[:, path]  # [B, L, K, D]
    step, B, C = (tensor.flatten(1, 2)[:, path, k] for tensor in (F.softplus(delta + delta_bias), B, C))
    decay = torch.exp(step[..., None] * A)  # [B, L, K, D, N]
    state = (step * walked)[..., None] * B[..., None, :]  # [B, L, K, D, N]
    reach = 1
    while reach < len(path):
        behind = (0, 0, 0, 0, 0, 0, reach, -reach)  # moves a sequence along by `reach` pixels, zeros first
        state = torch.addcmul(state, decay, F.pad(state, behind))
        decay = decay * F.pad(decay, behind)
        reach *= 2
    y = (state * C[..., None, :]).sum(-1) + D * walked  # [B, L, K, D]
    merged = torch.zeros_like(x.flatten(1, 2)).index_add(1, path.flatten(), y.flatten(1, 2))  # [B, L, D]
    return merged.view(x.shape)
