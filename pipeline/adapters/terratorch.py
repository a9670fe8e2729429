"""A pretrained network as a backbone of TerraTorch (Gomes et al. 2025, arXiv 2503.20563).

A backbone there has `out_channels`, channels per feature map, and a `forward` that gives a list of feature maps
[B, C, H, W], finest first; of several modalities it takes a dict. What a batch holds besides image and mask comes along
as keyword arguments. Nothing here needs TerraTorch but `register`; `EncoderDecoderFactory` takes a `Backbone` as it is.

Letters: B batch, M bands of a modality, C channels of a stage, H W pixels, h w tokens of a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.model.cmss import hidden_tokens
from pipeline.model.config import PRESETS, ModelConfig
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.model.release import from_pretrained, opened, read_contract
from shards.contract import Contract, Modality

Merge = Literal["fusion", "concat"]
MERGES = ("fusion", "concat")


class Normalise(nn.Module):
    """Values in the contract's unit to the network's input, as `pipeline.batch.normalise` makes them of a tile."""

    offset: Tensor
    scale: Tensor

    def __init__(self, modality: Modality) -> None:
        """For the bands of `modality`, in its order."""
        super().__init__()
        self.clip = modality.clip
        for name, values in (("offset", modality.offset), ("scale", modality.scale)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """[B, M, H, W] -> float [B, M, H, W]."""
        return (image.float().clamp(*self.clip) - self.offset) / self.scale


class Backbone(nn.Module):
    """The encoders and fusions of a network, without its decoder and head: TerraTorch brings those.

    Attributes:
        out_channels: channels of each feature map, finest first.
    """

    def __init__(
        self, network: MCFMamba, contract: Contract | None = None, merge_method: Merge = "fusion", modality: str = ""
    ) -> None:
        """Take the network over; what is not used is taken out of it, as DDP refuses parameters without gradient.

        Args:
            network: whose stages become the feature maps.
            contract: to normalise images with; None: they come normalised, by TerraTorch's datamodule or by
                another.
            merge_method: `fusion` gives the fused map of every stage; `concat` the maps of the modalities' own encoders
                side by side, in the network's order, so that M modalities have M times the channels.
            modality: what a plain tensor is, where the network has several modalities.

        Raises:
            ValueError: another method, or a modality that the network does not have.
        """
        super().__init__()
        if merge_method not in MERGES:
            raise ValueError(f"merge_method: {merge_method!r} is not one of {', '.join(MERGES)}")
        known = list(network.channels)
        if modality and modality not in known:
            raise ValueError(f"modality: {modality!r} is not one of {', '.join(known)}")
        del network.decoder, network.head
        if merge_method == "concat":
            del network.fusion
        self.network, self.merge_method = network, merge_method
        self.bands = {m.sensor: m.bands for m in contract.modalities} if contract else {}
        self.normalise = nn.ModuleDict({m.sensor: Normalise(m) for m in contract.modalities} if contract else {})
        self.modality = modality or (known[0] if len(known) == 1 else "")
        times = len(known) if merge_method == "concat" else 1
        self.out_channels = [times * dim for dim in network.config.stage_dims]

    def forward(
        self, x: Tensor | Mapping[str, Tensor], valid: Tensor | Mapping[str, Tensor] | None = None, **_: Any
    ) -> list[Tensor]:
        """Images of any size to a pyramid of feature maps; sizes are padded inside as the network pads them.

        Args:
            x: [B, M, H, W] by modality, bands in the contract's order; a modality that is left out counts as wholly
                hidden. In the contract's unit where this backbone normalises, otherwise normalised.
            valid: bool [B, H, W] by modality. Pixels that are not valid, or not finite, become 0, and tokens
                without another pixel are hidden.
            **_: whatever else a batch of TerraTorch holds.

        Returns:
            [B, C, h, w] for every stage, h = ceil(H / 4), w = ceil(W / 4) in the first and halved from each to the
            next, rounded up.

        Raises:
            ValueError: an unknown modality, none at all, a wrong shape or number of bands, differing sizes.
            TypeError: validity that is not bool.
        """
        images, seen = self._ready(self._named(x), self._named(valid) if valid is not None else {})
        hidden = hidden_tokens({}, seen)
        keys = self._keys(next(iter(images.values()))) if self.training and images else None
        if self.merge_method == "fusion":
            maps = self.network.pyramid(images, hidden, keys)
        else:
            stages = zip(*self.network.encode(images, hidden, keys).values(), strict=True)
            maps = [torch.cat(stage, -1) for stage in stages]  # [B, h, w, M C]
        return [stage.permute(0, 3, 1, 2).contiguous() for stage in maps]

    @property
    def _known(self) -> str:
        return ", ".join(self.network.channels)

    def _named(self, x: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """By modality; ValueError where a plain tensor could be any of several."""
        if not isinstance(x, Tensor):
            return x
        if not self.modality:
            raise ValueError(f"a plain tensor could be any of {self._known}; give a dict, or say which: modality=NAME")
        return {self.modality: x}

    def _ready(
        self, x: Mapping[str, Tensor], valid: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Images for the network [B, M, H, W], and which of their pixels count [B, H, W]."""
        if lost := [name for name in valid if name not in x]:
            raise ValueError(f"valid: {', '.join(lost)} has no image; there are {', '.join(x)}")
        images, seen = {}, {}
        for name, image in x.items():
            seen[name] = self._seen(name, image, valid.get(name))
            ready = self.normalise[name](image) if name in self.normalise else image
            images[name] = ready.masked_fill(~seen[name][:, None], 0)
        return images, seen

    def _seen(self, name: str, image: Tensor, valid: Tensor | None) -> Tensor:
        """Which pixels [B, H, W] of an image count; ValueError where it is not what the network takes."""
        bands = self.network.channels.get(name)
        if bands is None:
            raise ValueError(f"unknown modality {name!r}; this backbone has {self._known}")
        if image.dim() != 4 or image.shape[1] != bands:
            order = f" ({', '.join(self.bands[name])})" if name in self.bands else ""
            raise ValueError(f"{name} is {tuple(image.shape)}; [B, {bands}, H, W]{order} is needed")
        seen = image.isfinite().all(1)
        if valid is None:
            return seen
        if valid.dtype != torch.bool:
            raise TypeError(f"valid[{name!r}] is {valid.dtype}; a bool tensor, True = valid, is needed")
        if valid.shape != seen.shape:
            raise ValueError(f"valid[{name!r}] is {tuple(valid.shape)}; these images are {tuple(seen.shape)}")
        return seen & valid

    def _keys(self, image: Tensor) -> Tensor:
        """One key per sample for stochastic depth: TerraTorch knows no positions, so torch's generator draws them."""
        return torch.randint(2**62, (len(image),), device=image.device)


def mcf_mamba(
    release: str | Path,
    normalise: bool = False,
    merge_method: Merge = "fusion",
    modality: str = "",
    scan: str | None = None,
) -> Backbone:
    """The backbone of a release.

    Args:
        release: a folder, s3://BUCKET/PREFIX, or ORG/NAME on the Hugging Face Hub.
        normalise: True: images come in the units of the release's contract, and this backbone normalises them. False:
            whoever loads them has.
        merge_method: as of `Backbone`.
        modality: as of `Backbone`.
        scan: scan backend; None chooses.

    Raises:
        ReleaseError: it cannot be fetched or opened.
    """
    with opened(release) as folder:
        network = from_pretrained(folder, scan)
        contract = Contract.from_json(read_contract(folder)) if normalise else None
    return Backbone(network.train(), contract, merge_method, modality)  # the mode that a fresh module is in


def _of_size(size: Any) -> Callable[..., Backbone]:
    def build(modalities: Mapping[str, int], merge_method: Merge = "fusion", **structure: Any) -> Backbone:
        network = MCFMamba(ModelConfig(size=size, **structure), modalities, outputs=1)  # the head goes again
        return Backbone(network, None, merge_method)

    build.__name__ = f"mcf_mamba_{size}"
    build.__doc__ = f"""{size.capitalize()} with fresh weights, for images that come normalised.

    Args:
        modalities: bands by modality, in the order of the network.
        merge_method: as of `Backbone`.
        **structure: other fields of `ModelConfig`, such as d_state, vmamba and drop_path.
    """
    return build


def register() -> list[str]:
    """Make the backbones known to TerraTorch: `mcf_mamba`, of a release, and `mcf_mamba_SIZE`, of fresh weights.

    Returns:
        Their names.

    Raises:
        ImportError: TerraTorch is not installed.
    """
    try:
        from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("terratorch"):
            raise
        raise ImportError("TerraTorch is not installed: pip install 'mcf-mamba[terratorch]'") from None
    factories = [mcf_mamba, *map(_of_size, PRESETS)]
    for factory in factories:
        TERRATORCH_BACKBONE_REGISTRY.register(factory)
    return [factory.__name__ for factory in factories]
