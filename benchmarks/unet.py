"""A small U-Net that sees all modalities as one image: what MCF-Mamba is compared with.

After Ronneberger, Fischer & Brox 2015 (arXiv 1505.04597), with padding, batch normalisation and bilinear upsampling.
Early fusion: the normalised bands of all modalities, invalid pixels 0, stacked as channels.
Letters: B batch, C channels, H W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (20, 40, 80, 128)  # 0.64 M parameters with 15 bands; MCF-Mamba of the demo has 0.68 M


class UNet(nn.Module):
    """Takes what MCFMamba takes, so that the same objective and the same scoring serve both."""

    def __init__(self, channels: Mapping[str, int], outputs: int, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.channels = dict(channels)
        inputs = (sum(channels.values()), *widths[:-1])
        self.down = nn.ModuleList(map(_double, inputs, widths))
        deep = list(zip(widths[::-1], widths[-2::-1], strict=False))
        self.up = nn.ModuleList(_double(below + beside, beside) for below, beside in deep)
        self.head = nn.Conv2d(widths[0], outputs, 1)

    def forward(
        self, images: Mapping[str, Tensor], hidden: Mapping[str, Tensor] | None = None, keys: Tensor | None = None
    ) -> Tensor:
        """Images float [B, C, H, W] by modality to logits [B, K, H, W]; `hidden` and `keys` mean nothing here."""
        image = torch.cat([images[name] for name in self.channels], 1)  # [B, C, H, W]
        skips = []
        for level, block in enumerate(self.down):
            image = block(F.max_pool2d(image, 2) if level else image)
            skips.append(image)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            larger = F.interpolate(image, skip.shape[2:], mode="bilinear", align_corners=False)
            image = block(torch.cat([larger, skip], 1))
        logits: Tensor = self.head(image)
        return logits


def _double(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3 x 3 convolutions."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
