"""The decoder: from the coarsest fused map back to the pixels, with a skip from every finer stage.

Letters: B batch, h w tokens of the current level, H W pixels, C channels of the coarser level.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.model.config import ModelConfig
from pipeline.model.encoder import PATCH
from pipeline.model.precision import LayerNorm
from pipeline.model.ss2d import LINEAR_STD, VSSBlock

BLOCKS = 2  # VSS blocks with an MLP per level


class PatchExpand(nn.Module):
    """Finer tokens from the channels of coarse ones: linear, rearrange (row, column, channel), norm."""

    def __init__(self, dim: int, factor: int, out: int) -> None:
        """From `dim` channels to `out`, with `factor` times as many tokens in each direction."""
        super().__init__()
        self.factor, self.out = factor, out
        self.expand = nn.Linear(dim, factor * factor * out, bias=False)
        self.norm = LayerNorm(out)
        nn.init.trunc_normal_(self.expand.weight, std=LINEAR_STD)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] -> [B, factor h, factor w, out]."""
        batch, height, width, _ = x.shape
        f = self.factor
        x = self.expand(x).view(batch, height, width, f, f, self.out)  # rows and columns inside the token
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(batch, f * height, f * width, self.out)
        fine: Tensor = self.norm(x)
        return fine


class Level(nn.Module):
    """One step up: expand, cut to the skip's size, two blocks, concatenate the skip, project."""

    def __init__(self, dim: int, states: int, drop_path: list[float], scan: str | None) -> None:
        """To `dim` channels from twice as many; one block per rate in `drop_path`."""
        super().__init__()
        self.expand = PatchExpand(2 * dim, 2, dim)
        self.blocks = nn.ModuleList(VSSBlock(dim, states, rate, scan, mlp=True) for rate in drop_path)
        self.merge = nn.Linear(2 * dim, dim)
        nn.init.trunc_normal_(self.merge.weight, std=LINEAR_STD)
        nn.init.zeros_(self.merge.bias)

    def forward(self, x: Tensor, skip: Tensor, keys: Tensor | None) -> Tensor:
        """Bring x [B, ceil(h / 2), ceil(w / 2), 2 C] to the size of the skip [B, h, w, C] -> [B, h, w, C]."""
        x = self.expand(x)[:, : skip.shape[1], : skip.shape[2]]  # odd sizes were padded before they were merged
        for block in self.blocks:
            x = block(x, keys)
        merged: Tensor = self.merge(torch.cat([x, skip], -1))
        return merged


class Decoder(nn.Module):
    """Three levels of expanding blocks and a final expansion to pixels."""

    def __init__(self, config: ModelConfig, scan: str | None) -> None:
        """For the stages of `config`; stochastic depth grows from the deepest level to the finest."""
        super().__init__()
        dims = config.stage_dims[-2::-1]  # from the second coarsest to the finest
        # The published ramp is laid over BLOCKS per stage, but the coarsest stage has no level: its end is
        # never used.
        ramp = torch.linspace(0, config.decoder_drop_path, BLOCKS * len(config.stage_dims), device="cpu").view(
            -1, BLOCKS
        )
        self.levels = nn.ModuleList(
            Level(dim, config.d_state, rates, scan) for dim, rates in zip(dims, ramp.tolist(), strict=False)
        )
        self.expand = PatchExpand(dims[-1], PATCH, dims[-1])

    def forward(self, maps: list[Tensor], keys: Tensor | None) -> Tensor:
        """Fused maps [B, h, w, C], finest first -> features of whole patches of pixels [B, 4 h, 4 w, C]."""
        x = maps[-1]
        for level, skip in zip(self.levels, reversed(maps[:-1]), strict=True):
            x = level(x, skip, keys)
        pixels: Tensor = self.expand(x)
        return pixels
