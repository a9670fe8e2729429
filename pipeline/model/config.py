"""What defines a network apart from its data. Standard library only: configs are read without torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

Size = Literal["nano", "tiny", "small", "base"]
Profile = Literal["paper", "default"]
VMamba = Literal["v0", "s1l8"]


@dataclass(frozen=True)
class Preset:
    """Channels of the four stages; by encoder type their blocks and the stochastic depth VMamba trains them with."""

    dims: tuple[int, ...]
    depths: dict[VMamba, tuple[int, ...]]
    drop_path: dict[VMamba, float]


# tiny, small, base: VMamba (Liu et al. 2024, arXiv 2401.10166) and its public release MzeroMiko/VMamba, in
# classification/configs/vssm: v0 is vmambav0_{tiny,small,base}_224.yaml, s1l8 vmambav2v_{tiny,small,base}_224.yaml.
# "s1l8" is the release's name of Tiny; small and base of that kind it calls s1l20. nano is ours, for tests.
PRESETS: dict[str, Preset] = {
    "nano": Preset((12, 24, 48, 96), {"v0": (1, 1, 2, 1), "s1l8": (1, 1, 2, 1)}, {"v0": 0.0, "s1l8": 0.0}),
    "tiny": Preset((96, 192, 384, 768), {"v0": (2, 2, 9, 2), "s1l8": (2, 2, 8, 2)}, {"v0": 0.2, "s1l8": 0.2}),
    "small": Preset((96, 192, 384, 768), {"v0": (2, 2, 27, 2), "s1l8": (2, 2, 20, 2)}, {"v0": 0.3, "s1l8": 0.3}),
    "base": Preset((128, 256, 512, 1024), {"v0": (2, 2, 27, 2), "s1l8": (2, 2, 20, 2)}, {"v0": 0.5, "s1l8": 0.6}),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The structure of an MCF-Mamba.

    Attributes:
        size: named channels and depths; `dims` and `depths` override them.
        profile: "paper" is the published network to the bit of structure; "default" corrects its defects
            (docs/differences.md).
        vmamba: type of the encoders: "v0", as published, or VMamba's faster "s1l8" (blocks with an MLP and
            without a gate, one state, convolutions between the stages). Fusion and decoder are the same.
        dims: channels of the stages, each twice the one before and even; None: those of `size`.
        depths: blocks per stage; None: those of `size`.
        d_state: states per channel of the selective scan (N); an encoder of type "s1l8" always has 1.
        drop_path: highest rate of stochastic depth in the encoders, in [0, 1); None: that of `size`. The
            decoder uses the same, but at most 0.1.

    Raises:
        ValueError: an unknown name or a number out of range; the message names the field.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    size: Size = "tiny"
    profile: Profile = "default"
    vmamba: VMamba = "v0"
    dims: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None
    d_state: int = 16
    drop_path: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no network can be built from."""
        if self.size not in PRESETS:
            raise ValueError(f"size: {self.size!r} is not one of {', '.join(PRESETS)}")
        if self.profile not in ("paper", "default"):
            raise ValueError(f"profile: {self.profile!r} is not one of paper, default")
        if self.vmamba not in ("v0", "s1l8"):
            raise ValueError(f"vmamba: {self.vmamba!r} is not one of v0, s1l8")
        self._check_stages()
        if self.d_state < 1:
            raise ValueError(f"d_state: {self.d_state} states; at least 1 is needed")
        if not 0 <= self.encoder_drop_path < 1:
            raise ValueError(f"drop_path: {self.drop_path} is outside [0, 1)")

    def _check_stages(self) -> None:
        dims, depths = self.stage_dims, self.stage_depths
        if len(dims) != len(depths):
            raise ValueError(f"depths: {len(depths)} stages, but dims has {len(dims)}; give one number per stage")
        if len(dims) < 2:
            raise ValueError(f"dims: {list(dims)} is {len(dims)} stage; the decoder needs at least 2")
        if dims[0] < 2 or any(wide != 2 * narrow for narrow, wide in itertools.pairwise(dims)):
            raise ValueError(f"dims: {list(dims)}; each stage must have twice the channels of the one before")
        if min(depths) < 1:
            raise ValueError(f"depths: {list(depths)}; every stage needs at least 1 block")

    @property
    def stage_dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.dims) if self.dims is not None else PRESETS[self.size].dims

    @property
    def stage_depths(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        return tuple(self.depths) if self.depths is not None else PRESETS[self.size].depths[self.vmamba]

    @property
    def encoder_states(self) -> int:
        """States per channel of the scans in the encoders."""
        return self.d_state if self.vmamba == "v0" else 1

    @property
    def encoder_drop_path(self) -> float:
        """Drop path rate of the encoders' last block; it grows linearly from 0 at the first."""
        return self.drop_path if self.drop_path is not None else PRESETS[self.size].drop_path[self.vmamba]

    @property
    def decoder_drop_path(self) -> float:
        """End of the decoder's drop path ramp (0.1 in the paper's code)."""
        return min(0.1, self.encoder_drop_path)
