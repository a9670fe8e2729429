"""The parts every stage is made of: 2-D selective scan with and without gate, VSS block, keyed stochastic depth.

Letters: B batch, H W rows and columns of tokens, C channels of the block, D inner channels (2 C with a gate, C
without), K = 4 directions, N states per channel, R = ceil(C / 16) rank of the step sizes.

Structure and initial values follow VMamba (Liu et al. 2024, arXiv 2401.10166, and its public release),
which takes the recurrence from Mamba (Gu and Dao 2023, arXiv 2312.00752, section 3.6 for dt and A).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.model.keyed import uniform
from pipeline.model.precision import KeepPrecision, LayerNorm
from pipeline.model.scan import DIRECTIONS, ss2d_scan

EXPAND = 2  # inner channels per channel of the block ("ssm_ratio")
DT_RANGE = (1e-3, 1e-1)  # step sizes after softplus at the start, log-uniform
LINEAR_STD = 0.02


def step_rank(dim: int) -> int:
    """R, the rank of the step sizes of a block with `dim` channels."""
    return math.ceil(dim / 16)


class DropPath(nn.Module):
    """Stochastic depth per sample (Huang et al. 2016), decided by a key instead of a global generator."""

    def __init__(self, rate: float) -> None:
        """Drop a sample's residual with probability `rate`, in [0, 1)."""
        super().__init__()
        self.rate = rate
        self.layer = 0  # distinguishes the layers of one network; set by the network

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Zero the samples of x [B, ...] that (keys[b], layer) drops and scale the others by 1 / (1 - rate).

        Without keys (int64 [B]) nothing is dropped.
        """
        if keys is None or self.rate == 0:
            return x
        keep = (uniform(keys, self.layer) >= self.rate).to(x.dtype) / (1 - self.rate)  # [B]
        return x * keep.view(-1, *[1] * (x.dim() - 1))


class StateSpace(KeepPrecision):
    """A, D and the bias of dt of all directions: the parameters that must never leave fp32.

    Steps of 1e-3 and decays near 1 are lost in half precision, and errors grow along the sequence. So
    `.half()`, `.bfloat16()` and engines that convert a whole network leave these three as they are.
    """

    def __init__(self, channels: int, states: int) -> None:
        """A = -(1..N) for every channel (S4D-real), D = 1, dt log-uniform in `DT_RANGE`."""
        super().__init__()
        low, high = (math.log(limit) for limit in DT_RANGE)
        dt = torch.exp(torch.rand(DIRECTIONS, channels) * (high - low) + low)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus [K, D]
        rates = torch.arange(1, states + 1).float().repeat(DIRECTIONS, channels, 1)
        self.A_log = nn.Parameter(rates.log())  # [K, D, N]
        self.D = nn.Parameter(torch.ones(DIRECTIONS, channels))  # [K, D]


class DirectionalScan(nn.Module):
    """Depthwise convolution and the four-direction scan with the projections that make dt, B and C."""

    def __init__(self, inner: int, rank: int, states: int, scan: str | None, conv_bias: bool = True) -> None:
        """For `inner` channels, steps of rank `rank` and `states` states, on the scan backend named `scan`."""
        super().__init__()
        self.split = (rank, states, states)
        self.scan = scan
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        self.x_proj = nn.Parameter(torch.empty(DIRECTIONS, sum(self.split), inner))  # [K, R + 2 N, D]
        self.dt_proj = nn.Parameter(torch.empty(DIRECTIONS, inner, rank))  # [K, D, R]
        self.ssm = StateSpace(inner, states)
        nn.init.uniform_(self.x_proj, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.dt_proj, -(rank**-0.5), rank**-0.5)

    def scanned(self, x: Tensor) -> Tensor:
        """Map [B, H, W, D] to the scan summed over directions, float32 [B, H, W, D]."""
        x = F.silu(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)  # [B, H, W, D]
        parts = F.linear(x, self.x_proj.flatten(0, 1))  # [B, H, W, K (R + 2 N)]
        parts = torch.unflatten(parts, -1, (DIRECTIONS, -1))  # [B, H, W, K, R + 2 N]
        dt, B, C = torch.split_with_sizes(parts, self.split, -1)  # [B, H, W, K, R], [B, H, W, K, N] twice
        delta = torch.einsum("bhwkr,kdr->bhwkd", dt, self.dt_proj)  # [B, H, W, K, D]
        A = -torch.exp(self.ssm.A_log)  # [K, D, N]
        return ss2d_scan(x, delta, A, B, C, self.ssm.D, self.ssm.dt_bias, self.scan)


class GatedScan(DirectionalScan):
    """Projection to values and gate, and the scan of the values; the gate is not yet applied."""

    def __init__(self, dim: int, states: int, scan: str | None) -> None:
        """For `dim` channels; see `DirectionalScan`."""
        inner = EXPAND * dim
        super().__init__(inner, step_rank(dim), states, scan)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        nn.init.trunc_normal_(self.in_proj.weight, std=LINEAR_STD)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map [B, H, W, C] to the scan (float32) and the gate, both [B, H, W, D]."""
        x, z = self.in_proj(x).chunk(2, -1)  # [B, H, W, D] twice
        return self.scanned(x), F.silu(z)


class SS2D(nn.Module):
    """The 2-D selective scan layer: scan, normalise, gate, project."""

    def __init__(self, dim: int, states: int, scan: str | None) -> None:
        """For `dim` channels; see `GatedScan`."""
        super().__init__()
        self.gated = GatedScan(dim, states, scan)
        self.norm = LayerNorm(EXPAND * dim)
        self.out_proj = nn.Linear(EXPAND * dim, dim, bias=False)
        nn.init.trunc_normal_(self.out_proj.weight, std=LINEAR_STD)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        y, gate = self.gated(x)
        result: Tensor = self.out_proj(self.norm(y).to(gate.dtype) * gate)
        return result


class PlainSS2D(DirectionalScan):
    """The layer of VMamba `s1l8`: no gate, as many inner channels as outer ones, no bias (its `v05_noz`)."""

    def __init__(self, dim: int, states: int, scan: str | None) -> None:
        """For `dim` channels; see `DirectionalScan`."""
        super().__init__(dim, step_rank(dim), states, scan, conv_bias=False)
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.norm = LayerNorm(dim)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        for linear in (self.in_proj, self.out_proj):
            nn.init.trunc_normal_(linear.weight, std=LINEAR_STD)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = self.in_proj(x)
        result: Tensor = self.out_proj(self.norm(self.scanned(x)).to(x.dtype))
        return result


class MLP(nn.Sequential):
    """Two linears with an exact GELU between them, four times as wide inside."""

    def __init__(self, dim: int, ratio: int = 4) -> None:
        """For `dim` channels."""
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(ratio * dim, dim)
        for linear in (self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=LINEAR_STD)
            nn.init.zeros_(linear.bias)


class VSSBlock(nn.Module):
    """x + SS2D(norm(x)), and with `mlp` also x + MLP(norm2(x)); stochastic depth on both residuals."""

    def __init__(
        self, dim: int, states: int, drop_path: float, scan: str | None, mlp: bool = False, gated: bool = True
    ) -> None:
        """For `dim` channels; `drop_path` is the rate of both residuals; without `gated` it is `PlainSS2D`."""
        super().__init__()
        self.norm = LayerNorm(dim)
        self.ss2d = SS2D(dim, states, scan) if gated else PlainSS2D(dim, states, scan)
        self.drop_path = DropPath(drop_path)
        self.norm2 = LayerNorm(dim) if mlp else None
        self.mlp = MLP(dim) if mlp else None
        self.drop_path2 = DropPath(drop_path) if mlp else None

        self.recompute = False

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Map [B, H, W, C] to [B, H, W, C], with keys int64 [B] for stochastic depth.

        With `recompute` nothing inside is kept for the backward, which computes it again.
        """
        if self.recompute and torch.is_grad_enabled():
            # Randomness is keyed, so there is no generator whose state would have to be restored.
            kept: Tensor = checkpoint(self._residuals, x, keys, use_reentrant=False, preserve_rng_state=False)
            return kept
        return self._residuals(x, keys)

    def _residuals(self, x: Tensor, keys: Tensor | None) -> Tensor:
        x = x + self.drop_path(self.ss2d(self.norm(x)), keys)
        if self.norm2 is not None and self.mlp is not None and self.drop_path2 is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)), keys)
        return x
