"""The encoder of one modality: patch embedding, four stages of VSS blocks, half the tokens from each to the next.

Two types of VMamba: "v0" embeds and merges patches, "s1l8" uses overlapping convolutions for both.

Letters: B batch, H W pixels, h w tokens of the current stage, M bands, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.config import ModelConfig, Profile
from pipeline.model.precision import LayerNorm
from pipeline.model.ss2d import LINEAR_STD, VSSBlock

PATCH = 4  # pixels along each side of a token


class Hide(nn.Module):
    """Puts one learned vector in the place of every hidden token (SimMIM, Xie et al. 2022, section 3.2).

    The published code (`profile: paper`) writes zeros, which is no vector to start from: the gate of a block is 0 for a
    zero token, so that regions of zeros stay zero through all blocks, and every layer norm on the way multiplies the
    gradient there by 1 / sqrt(eps). At the start of training the gradient of Tiny so has a norm of 1e27
    (docs/differences.md).
    """

    def __init__(self, dim: int, profile: Profile) -> None:
        """For tokens of `dim` channels."""
        super().__init__()
        self.token = None if profile == "paper" else nn.Parameter(torch.empty(dim))
        if self.token is not None:
            nn.init.trunc_normal_(self.token, std=LINEAR_STD)

    def forward(self, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        """Tokens [B, h, w, C] and hidden bool [B, h, w] -> [B, h, w, C]."""
        if hidden is None:
            return tokens
        if self.token is None:
            return tokens.masked_fill(hidden[..., None], 0)
        return torch.where(hidden[..., None], self.token.to(tokens.dtype), tokens)


class PatchEmbed(nn.Module):
    """A token for every patch of 4 x 4 pixels, and another for those that are hidden."""

    def __init__(self, bands: int, dim: int, profile: Profile) -> None:
        """From `bands` bands to `dim` channels."""
        super().__init__()
        self.hide = Hide(dim, profile)
        self.proj = nn.Conv2d(bands, dim, PATCH, PATCH)
        self.norm = LayerNorm(dim)

    def forward(self, image: Tensor, hidden: Tensor | None) -> Tensor:
        """Image [B, M, H, W], padded with zeros to whole patches, and hidden bool [B, h, w] -> [B, h, w, C].

        Hiding comes after the norm, so that a hidden token carries nothing of its patch (CMSS, section 3).
        """
        height, width = image.shape[-2:]
        image = F.pad(image, (0, -width % PATCH, 0, -height % PATCH))
        tokens: Tensor = self.norm(self.proj(image).permute(0, 2, 3, 1))  # [B, h, w, C]
        shown: Tensor = self.hide(tokens, hidden)
        return shown


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


class Stem(nn.Module):
    """Two 3x3 convolutions with stride 2, each followed by a norm (the patch embedding of `s1l8`)."""

    def __init__(self, bands: int, dim: int, profile: Profile) -> None:
        """From `bands` bands to `dim` channels, half of them after the first convolution."""
        super().__init__()
        self.hide = Hide(dim, profile)
        self.conv1 = nn.Conv2d(bands, dim // 2, 3, 2, 1)
        self.norm1 = LayerNorm(dim // 2)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, 1)
        self.norm2 = LayerNorm(dim)

    def forward(self, image: Tensor, hidden: Tensor | None) -> Tensor:
        """Image [B, M, H, W] and hidden bool [B, h, w] -> [B, h, w, C].

        A token sees up to 3 pixels of its neighbours above and to the left. So the pixels of hidden tokens are
        zero before, and the tokens are hidden after the norms.
        """
        if hidden is not None:
            pixels = hidden.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
            image = image.masked_fill(pixels[:, None, : image.shape[2], : image.shape[3]], 0)
        x = F.gelu(self.norm1(self.conv1(image).permute(0, 2, 3, 1)))  # [B, ceil(H / 2), ceil(W / 2), C / 2]
        tokens: Tensor = self.norm2(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # [B, h, w, C]
        shown: Tensor = self.hide(tokens, hidden)
        return shown


class Downsample(nn.Module):
    """Half as many tokens in each direction with twice the channels, by a 3x3 convolution (`s1l8`)."""

    def __init__(self, dim: int) -> None:
        """From `dim` to 2 `dim` channels."""
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, 3, 2, 1)
        self.norm = LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] -> [B, ceil(h / 2), ceil(w / 2), 2 C]."""
        halved: Tensor = self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return halved


class Stage(nn.Module):
    """The blocks of one resolution; gives a normalised map to the fusion and goes on with the other."""

    def __init__(self, config: ModelConfig, dim: int, drop_path: list[float], scan: str | None) -> None:
        """One block per rate in `drop_path`; every stage but the last halves the tokens at its end."""
        super().__init__()
        v0 = config.vmamba == "v0"
        self.blocks = nn.ModuleList(
            VSSBlock(dim, config.encoder_states, rate, scan, mlp=not v0, gated=v0) for rate in drop_path
        )
        self.out_norm = LayerNorm(dim)
        halve = PatchMerging if v0 else Downsample
        self.downsample = None if dim == config.stage_dims[-1] else halve(dim)

    def forward(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, h, w, C] -> output of the stage [B, h, w, C] and, unless it is the last, input of the next."""
        for block in self.blocks:
            x = block(x, keys)
        return self.out_norm(x), x if self.downsample is None else self.downsample(x)


class Encoder(nn.Module):
    """VMamba as a backbone for one modality."""

    def __init__(self, config: ModelConfig, bands: int, scan: str | None) -> None:
        """For images of `bands` bands."""
        super().__init__()
        dims, depths = config.stage_dims, config.stage_depths
        rates = torch.split_with_sizes(torch.linspace(0, config.encoder_drop_path, sum(depths), device="cpu"), depths)
        self.patch_embed = (PatchEmbed if config.vmamba == "v0" else Stem)(bands, dims[0], config.profile)
        self.stages = nn.ModuleList(
            Stage(config, dim, rate.tolist(), scan) for dim, rate in zip(dims, rates, strict=True)
        )

    def forward(self, image: Tensor, hidden: Tensor | None, keys: Tensor | None) -> list[Tensor]:
        """Image [B, M, H, W], hidden bool [B, h, w] of the finest -> maps [B, h, w, C], finest first."""
        x = self.patch_embed(image, hidden)
        maps = []
        for stage in self.stages:
            output, x = stage(x, keys)
            maps.append(output)
        return maps
