"""The fusion of one stage: every modality is scanned with its own weights, and what they meet in is the sum.

Letters: B batch, h w tokens, C channels of the stage, D = 2 C inner channels, M modalities.

The paper scans the modalities of one pixel grid in 4 M directions and adds all results. No scan ever crosses
from one modality to another, so this is exactly one four-direction scan per modality (`GatedScan`), added up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.model.config import Profile
from pipeline.model.precision import LayerNorm
from pipeline.model.ss2d import EXPAND, GatedScan


class Branch(nn.Module):
    """One modality's way into the fusion."""

    def __init__(self, dim: int, states: int, scan: str | None) -> None:
        """For `dim` channels; see `GatedScan`."""
        super().__init__()
        self.norm = LayerNorm(dim)
        self.gated = GatedScan(dim, states, scan)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, h, w, C] -> scanned (float32) and gate, both [B, h, w, D]."""
        result: tuple[Tensor, Tensor] = self.gated(self.norm(x))
        return result


class Mix(nn.Module):
    """From one gated map per modality to one map: grouped 3x3, depthwise 3x3, 1x1 convolution.

    Each of the D groups of the first convolution sees M of the M D channels. The published code lines the
    modalities up one behind the other, [m1 | m2], so that a group sees two neighbouring channels of one
    modality and nothing is mixed. The default profile interleaves them: group d sees channel d of every
    modality, as the paper's figure draws.
    """

    def __init__(self, dim: int, modalities: int, profile: Profile) -> None:
        """For `dim` channels outside and 2 `dim` inside."""
        super().__init__()
        inner = EXPAND * dim
        self.interleave = profile != "paper"
        self.grouped = nn.Conv2d(modalities * inner, inner, 3, padding=1, groups=inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.project = nn.Conv2d(inner, dim, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """M maps [B, h, w, D] -> [B, h, w, C]."""
        x = torch.stack(maps, -1).flatten(-2) if self.interleave else torch.cat(maps, -1)  # [B, h, w, M D]
        x = F.silu(self.grouped(x.permute(0, 3, 1, 2)))  # [B, D, h, w]
        x = self.project(F.silu(self.depthwise(x)))  # [B, C, h, w]
        fused: Tensor = x.permute(0, 2, 3, 1)
        return fused


class Fusion(nn.Module):
    """The multi-modal cross fusion of one stage, for one to N modalities."""

    def __init__(self, dim: int, states: int, names: list[str], profile: Profile, scan: str | None) -> None:
        """For `dim` channels and the modalities `names`, in their order."""
        super().__init__()
        self.branches = nn.ModuleDict({name: Branch(dim, states, scan) for name in names})
        self.norm = LayerNorm(EXPAND * dim)
        self.mix = Mix(dim, len(names), profile)
        self.recompute = False

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        """One map [B, h, w, C] per modality -> the fused map [B, h, w, C]; `recompute` as in `VSSBlock`."""
        if self.recompute and torch.is_grad_enabled():
            kept: Tensor = checkpoint(self._fuse, maps, use_reentrant=False, preserve_rng_state=False)
            return kept
        return self._fuse(maps)

    def _fuse(self, maps: Mapping[str, Tensor]) -> Tensor:
        scanned, gates = zip(*(branch(maps[name]) for name, branch in self.branches.items()), strict=True)
        y = self.norm(sum(scanned[1:], scanned[0]))  # [B, h, w, D]
        fused: Tensor = self.mix([y.to(gate.dtype) * gate for gate in gates])
        return torch.stack([fused, *(maps[name] for name in self.branches)]).sum(0)  # [B, h, w, C]
