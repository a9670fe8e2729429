"""MCF-Mamba: one VMamba encoder per modality, a fusion at every stage, one decoder.

Letters: B batch, H W pixels, h = ceil(H / 4) and w = ceil(W / 4) tokens, M bands of a modality, C channels.

Paper: Liu et al. 2025, "MCF-Mamba", International Journal of Applied Earth Observation and Geoinformation
145:104960.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.model.config import ModelConfig
from pipeline.model.decoder import Decoder
from pipeline.model.encoder import PATCH, Encoder
from pipeline.model.fusion import Fusion
from pipeline.model.scan import check_name, resolve
from pipeline.model.ss2d import DropPath, StateSpace, VSSBlock


class MCFMamba(nn.Module):
    """Semantic segmentation or reconstruction from one to N co-registered modalities."""

    def __init__(self, config: ModelConfig, channels: Mapping[str, int], outputs: int, scan: str | None = None) -> None:
        """Build the network with fresh weights, drawn from torch's global generator.

        Args:
            config: structure.
            channels: bands of each modality by its name; the order of the modalities is part of the model.
            outputs: output channels: classes, or the sum of all bands for reconstruction.
            scan: scan backend by name (`pipeline.model.scan.BACKENDS`); None chooses the fastest that works
                here.

        Raises:
            ValueError: no modality, no band, no output, or an unknown backend.
        """
        super().__init__()
        if not channels or min(channels.values()) < 1 or outputs < 1:
            raise ValueError(f"at least one modality, band and output is needed; got {dict(channels)} -> {outputs}")
        self.config, self.channels, self.outputs = config, dict(channels), outputs
        self.scan = check_name(scan)
        self.encoders = nn.ModuleDict({name: Encoder(config, n, scan) for name, n in channels.items()})
        self.fusion = nn.ModuleList(
            Fusion(dim, config.d_state, list(channels), config.profile, scan) for dim in config.stage_dims
        )
        self.decoder = Decoder(config, scan)
        self.head = nn.Conv2d(config.stage_dims[0], outputs, 1, bias=False)
        for layer, drop_path in enumerate(module for module in self.modules() if isinstance(module, DropPath)):
            drop_path.layer = layer

    def recompute(self) -> None:
        """Keep only what lies between blocks and fusions for the backward (Chen et al. 2016, arXiv 1604.06174)."""
        for module in self.modules():
            if isinstance(module, VSSBlock | Fusion):
                module.recompute = True

    @classmethod
    def from_pretrained(cls, address: str | Path, scan: str | None = None) -> MCFMamba:
        """Open a release: a folder, s3://, or ORG/NAME on the Hub; see `pipeline.model.release.from_pretrained`."""
        from pipeline.model.release import from_pretrained

        return from_pretrained(address, scan)

    def forward(
        self,
        images: Mapping[str, Tensor],
        hidden: Mapping[str, Tensor] | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Map images of any size to `outputs` values per pixel.

        Args:
            images: normalised float [B, M, H, W] by modality, invalid pixels 0. A modality that is left out
                counts as wholly hidden.
            hidden: bool [B, h, w] by modality, True where a token is to be hidden; nothing is where a name is
                missing.
            keys: int64 [B], one random key per sample, for stochastic depth; None switches it off.

        Returns:
            [B, outputs, H, W].

        Raises:
            ValueError: unknown modality, none at all, wrong number of bands, differing sizes, below one
            patch; with
                `torch.autograd.set_detect_anomaly(True)` also values that are not finite.
            TypeError: images that are not floating point, masks that are not bool.
        """
        fused = self.pyramid(images, hidden, keys)
        height, width = next(iter(images.values())).shape[-2:]
        pixels = self.decoder(fused, keys)[:, :height, :width]  # [B, H, W, C]
        outputs: Tensor = self.head(pixels.permute(0, 3, 1, 2))  # [B, outputs, H, W]
        return outputs

    def pyramid(
        self,
        images: Mapping[str, Tensor],
        hidden: Mapping[str, Tensor] | None = None,
        keys: Tensor | None = None,
    ) -> list[Tensor]:
        """The fused map of every stage [B, h, w, C], finest first; arguments and errors as of `forward`."""
        maps = self.encode(images, hidden, keys)
        return [fusion({name: stages[i] for name, stages in maps.items()}) for i, fusion in enumerate(self.fusion)]

    def encode(
        self,
        images: Mapping[str, Tensor],
        hidden: Mapping[str, Tensor] | None = None,
        keys: Tensor | None = None,
    ) -> dict[str, list[Tensor]]:
        """The maps of every modality's own encoder, by stage [B, h, w, C]; otherwise as `pyramid`."""
        hidden = hidden or {}
        size = self._check(images, hidden)
        maps: dict[str, list[Tensor]] = {}
        for name, encoder in self.encoders.items():
            image, mask = self._input(name, images, hidden, size)
            maps[name] = encoder(image, mask, keys)
        return maps

    def _input(
        self,
        name: str,
        images: Mapping[str, Tensor],
        hidden: Mapping[str, Tensor],
        size: tuple[int, int, int],
    ) -> tuple[Tensor, Tensor | None]:
        """Image [B, M, H, W] and mask [B, h, w] of one modality; zeros, all hidden, if it is absent."""
        if name in images:
            return images[name], hidden.get(name)
        batch, height, width = size
        present = next(iter(images.values()))
        mask = torch.ones(batch, -(-height // PATCH), -(-width // PATCH), dtype=torch.bool, device=present.device)
        return present.new_zeros(batch, self.channels[name], height, width), mask

    def _check(self, images: Mapping[str, Tensor], hidden: Mapping[str, Tensor]) -> tuple[int, int, int]:
        """Refuse what the network cannot take; give B, H, W."""
        known = ", ".join(self.channels)
        unknown = [name for name in [*images, *hidden] if name not in self.channels]
        if unknown:
            raise ValueError(f"unknown modality {', '.join(map(repr, unknown))}; this model has {known}")
        if not images:
            raise ValueError(f"no modality given; this model takes at least one of {known}")
        first = next(iter(images.values()))
        for name, image in images.items():
            _check_image(name, image, self.channels[name], first.shape)
        batch, _, height, width = first.shape
        if min(height, width) < PATCH:
            raise ValueError(f"images are {height} x {width} pixels; at least one patch of {PATCH} x {PATCH} is needed")
        tokens = (batch, -(-height // PATCH), -(-width // PATCH))
        for name, mask in hidden.items():
            if mask.dtype != torch.bool:
                raise TypeError(f"hidden[{name!r}] is {mask.dtype}; a bool tensor, True = hidden, is needed")
            if tuple(mask.shape) != tokens:
                raise ValueError(f"hidden[{name!r}] is {tuple(mask.shape)}; these images have {tokens} tokens")
        return batch, height, width

    @property
    def scan_backend(self) -> str:
        """Name of the scan backend that runs where the parameters are now."""
        parameter = self.head.weight
        return resolve(self.scan, parameter.device, torch.promote_types(parameter.dtype, torch.float32))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay would pull away from where they mean something.

        A_log, D, the bias of dt, norms and biases. Empty for `profile: paper`, which decays everything.
        """
        if self.config.profile == "paper":
            return set()
        return {name for name, parameter in self.named_parameters() if parameter.dim() == 1} | set(self._state_space())

    def precision(self) -> dict[str, torch.dtype]:
        """Data types of A_log, D, the bias of dt and the norms by parameter name.

        All must be float32 (or float64) whatever an engine does to the others: check it after the engine is
        built.
        """
        norms = [name for name, module in self.named_modules() if isinstance(module, nn.LayerNorm)]
        names = {f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")} | set(self._state_space())
        return {name: parameter.dtype for name, parameter in self.named_parameters() if name in names}

    def _state_space(self) -> list[str]:
        owners = [name for name, module in self.named_modules() if isinstance(module, StateSpace)]
        return [f"{owner}.{parameter}" for owner in owners for parameter in ("A_log", "D", "dt_bias")]


def _check_image(name: str, image: Tensor, channels: int, first: torch.Size) -> None:
    if not image.is_floating_point():
        raise TypeError(f"images[{name!r}] is {image.dtype}; normalised floating point values are needed")
    if image.dim() != 4 or image.shape[1] != channels:
        raise ValueError(f"images[{name!r}] is {tuple(image.shape)}; [B, {channels}, H, W] is needed")
    if image.shape[0] != first[0] or image.shape[2:] != first[2:]:
        raise ValueError(f"images[{name!r}] is {tuple(image.shape)}, another image {tuple(first)}: B, H, W must agree")
    if torch.is_anomaly_enabled() and not bool(torch.isfinite(image).all()):
        raise ValueError(f"images[{name!r}] has values that are not finite; set invalid pixels to 0")
