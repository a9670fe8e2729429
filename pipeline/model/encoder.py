"""The encoder of one modality: patch embedding, four stages of VSS blocks, patch merging between them.

Letters: B batch, H W pixels, h w tokens of the current stage, M bands, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.config import ModelConfig
from pipeline.model.precision import LayerNorm
from pipeline.model.ss2d import LINEAR_STD, VSSBlock

PATCH = 4  # pixels along each side of a token


class PatchEmbed(nn.Module):
    """A token for every patch of 4 x 4 pixels; hidden tokens are zero."""

    def __init__(self, bands: int, dim: int) -> None:
        """From `bands` bands to `dim` channels."""
        super().__init__()
        self.proj = nn.Conv2d(bands, dim, PATCH, PATCH)
        self.norm = LayerNorm(dim)

    def forward(self, image: Tensor, hidden: Tensor | None) -> Tensor:
        """Image [B, M, H, W], padded with zeros to whole patches, and hidden bool [B, h, w] -> [B, h, w, C].

        Hiding comes after the norm, so that a hidden token carries nothing of its patch (CMSS, section 3).
        """
        height, width = image.shape[-2:]
        image = F.pad(image, (0, -width % PATCH, 0, -height % PATCH))
        tokens: Tensor = self.norm(self.proj(image).permute(0, 2, 3, 1))  # [B, h, w, C]
        return tokens if hidden is None else tokens.masked_fill(hidden[..., None], 0)


class PatchMerging(nn.Module):
    """Half as many tokens in each direction with twice the channels."""

    def __init__(self, dim: int) -> None:
        """From `dim` to 2 `dim` channels."""
        super().__init__()
        self.norm = LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        nn.init.trunc_normal_(self.reduction.weight, std=LINEAR_STD)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] -> [B, ceil(h / 2), ceil(w / 2), 2 C]; odd sizes are padded with zero tokens."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        merged: Tensor = self.reduction(self.norm(torch.cat(corners, -1)))
        return merged


class Stage(nn.Module):
    """The blocks of one resolution; gives a normalised map to the fusion and goes on with the other."""

    def __init__(self, dim: int, states: int, drop_path: list[float], scan: str | None, last: bool) -> None:
        """One block per rate in `drop_path`; every stage but the last merges patches at its end."""
        super().__init__()
        self.blocks = nn.ModuleList(VSSBlock(dim, states, rate, scan) for rate in drop_path)
        self.out_norm = LayerNorm(dim)
        self.downsample = None if last else PatchMerging(dim)

    def forward(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, h, w, C] -> output of the stage [B, h, w, C] and, unless it is the last, input of the next."""
        for block in self.blocks:
            x = block(x, keys)
        return self.out_norm(x), x if self.downsample is None else self.downsample(x)


class Encoder(nn.Module):
    """VMamba v0 as a backbone for one modality."""

    def __init__(self, config: ModelConfig, bands: int, scan: str | None) -> None:
        """For images of `bands` bands."""
        super().__init__()
        dims, depths = config.stage_dims, config.stage_depths
        rates = torch.split_with_sizes(torch.linspace(0, config.encoder_drop_path, sum(depths), device="cpu"), depths)
        self.patch_embed = PatchEmbed(bands, dims[0])
        self.stages = nn.ModuleList(
            Stage(dim, config.d_state, rate.tolist(), scan, last=dim == dims[-1])
            for dim, rate in zip(dims, rates, strict=True)
        )

    def forward(self, image: Tensor, hidden: Tensor | None, keys: Tensor | None) -> list[Tensor]:
        """Image [B, M, H, W], hidden bool [B, h, w] of the finest -> maps [B, h, w, C], finest first."""
        x = self.patch_embed(image, hidden)
        maps = []
        for stage in self.stages:
            output, x = stage(x, keys)
            maps.append(output)
        return maps
