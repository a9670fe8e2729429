"""The contract: what the numbers of a dataset or a checkpoint mean, so that nothing is fed what it was not made for.

A contract is written into `dataset.json`, into every checkpoint and every release, and compared wherever two of them
meet. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import sqrt
from operator import mul
from typing import Any, Literal

FORMAT_VERSION = 1
IGNORE = 255  # label value of pixels that count nowhere

Normalisation = Literal["range", "statistics"]


class ContractError(ValueError):
    """Two contracts, or a contract and a file, do not fit; the message says what differs."""


@dataclass(frozen=True, kw_only=True)
class Modality:
    """What one modality's array [C, H, W] holds.

    The network's input is `(clip(value) - offset) / scale` per band; invalid pixels are 0 after that. `mean` and `std`
    are over the valid pixels of a dataset, in `unit` and after clipping; None where they were not computed. `note` says
    what the unit leaves open, such as the datum of heights or that dB were made from linear power.
    """

    sensor: str
    bands: tuple[str, ...]
    unit: str
    dtype: str
    clip: tuple[float, float]
    offset: tuple[float, ...]
    scale: tuple[float, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    note: str = ""

    def normalised(self, how: Normalisation) -> Modality:
        """The same modality with `offset` and `scale` taken from its clip range (to 0..1) or its statistics."""
        count = len(self.bands)
        if how == "range":
            low, high = self.clip
            return replace(self, offset=(low,) * count, scale=(high - low,) * count)
        if self.mean is None or self.std is None:
            raise ContractError(
                f"{self.sensor}: normalise=statistics needs the statistics of the dataset, which are absent; "
                "build the shards again or write normalise=range"
            )
        return replace(self, offset=self.mean, scale=tuple(max(value, 1e-6) for value in self.std))


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes of a label raster: index i is `names[i]`, drawn in `palette[i]`; `ignore` marks unlabelled pixels."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore: int = IGNORE

    def __post_init__(self) -> None:
        """Refuse a table that cannot be used as indices of uint8."""
        if len(self.names) != len(self.palette):
            raise ContractError(f"{len(self.names)} class names but {len(self.palette)} colours; give one per class")
        if not len(self.names) <= self.ignore <= 255:
            raise ContractError(f"ignore={self.ignore}: must lie between {len(self.names)} (the classes) and 255")


@dataclass(frozen=True, kw_only=True)
class Contract:
    """Modalities in the order of the dataset, classes if it is labelled, metres per pixel if there is one value."""

    modalities: tuple[Modality, ...]
    classes: Classes | None = None
    resolution: float | None = None
    format_version: int = FORMAT_VERSION

    @property
    def sensors(self) -> tuple[str, ...]:
        """Names of the modalities."""
        return tuple(modality.sensor for modality in self.modalities)

    @property
    def channels(self) -> dict[str, int]:
        """Bands per modality."""
        return {modality.sensor: len(modality.bands) for modality in self.modalities}

    def modality(self, name: str) -> Modality:
        """The modality called `name`; ContractError lists those that exist."""
        for modality in self.modalities:
            if modality.sensor == name:
                return modality
        raise ContractError(f"no modality {name!r} here; there are {', '.join(self.sensors)}")

    def restrict(self, names: Sequence[str]) -> Contract:
        """The contract of only these modalities, in the order given; all when `names` is empty."""
        return replace(self, modalities=tuple(map(self.modality, names))) if names else self

    def normalised(self, how: Normalisation) -> Contract:
        """The contract with every modality's offset and scale settled."""
        return replace(self, modalities=tuple(modality.normalised(how) for modality in self.modalities))

    def pooled(self, others: Sequence[Contract], weights: Sequence[float]) -> Contract:
        """This contract with the mean and std of all pixels together, this one's and others', each with its weight."""
        modalities = tuple(
            _pooled([contract.modality(name) for contract in (self, *others)], weights) for name in self.sensors
        )
        return replace(self, modalities=modalities)

    def to_json(self) -> dict[str, Any]:
        """A plain dict of JSON's types; `from_json` is its inverse."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Contract:
        """Read what `to_json` wrote.

        Raises:
            ContractError: a newer format, or keys that are missing or unknown.
        """
        version = data.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ContractError(f"contract format_version {version!r}; this release reads up to {FORMAT_VERSION}")
        classes = data.get("classes")
        return Contract(
            modalities=tuple(_build(Modality, item) for item in data["modalities"]),
            classes=None if classes is None else _build(Classes, classes),
            resolution=data.get("resolution"),
            format_version=version,
        )


def apart(a: Contract, b: Contract) -> list[str]:
    """Bands of two contracts whose statistics are far apart, a line each: the same meaning, but perhaps not one unit.

    Far is a mean more than half a standard deviation away, or one of the deviations half as large again.
    """
    found = []
    for left, right in ((a.modality(name), b.modality(name)) for name in a.sensors if name in b.sensors):
        numbers = zip(left.bands, left.mean or (), right.mean or (), left.std or (), right.std or (), strict=False)
        found += [
            f"{left.sensor} {band}: mean {mean:.4g} against {other:.4g}, spread {std:.4g} against {wide:.4g}"
            for band, mean, other, std, wide in numbers
            if abs(mean - other) > 0.5 * max(std, wide) or max(std, wide) > 1.5 * min(std, wide)
        ]
    return found


def _pooled(modalities: Sequence[Modality], weights: Sequence[float]) -> Modality:
    shares = [weight / sum(weights) for weight in weights]
    means = [modality.mean for modality in modalities if modality.mean is not None]
    stds = [modality.std for modality in modalities if modality.std is not None]
    if min(len(means), len(stds)) < len(modalities):
        return replace(modalities[0], mean=None, std=None)
    mean = tuple(sum(map(mul, shares, band)) for band in zip(*means, strict=True))
    squares = [[s * s + m * m for s, m in zip(*pair, strict=True)] for pair in zip(stds, means, strict=True)]
    seconds = [sum(map(mul, shares, band)) for band in zip(*squares, strict=True)]
    std = tuple(sqrt(max(0.0, second - m * m)) for second, m in zip(seconds, mean, strict=True))
    return replace(modalities[0], mean=mean, std=std)


def _build(kind: type[Any], data: Mapping[str, Any]) -> Any:
    names = {field.name for field in fields(kind)}
    if unknown := set(data) - names:
        raise ContractError(f"{kind.__name__}: unknown keys {sorted(unknown)}; known: {sorted(names)}")
    try:
        return kind(**{key: _tuples(value) for key, value in data.items()})
    except TypeError as error:
        raise ContractError(f"{kind.__name__}: {error}") from None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def compare(a: Contract, b: Contract) -> list[str]:
    """What differs between two contracts in a way that changes the meaning of the numbers; empty when they agree.

    Statistics may differ (two datasets of one kind have different means); names, bands, their order, unit, clip and
    classes may not. Offset and scale are compared by the checkpoint that owns them, not here.
    """
    found = [f"modality {name} is missing on the right" for name in a.sensors if name not in b.sensors]
    found += [f"modality {name} is missing on the left" for name in b.sensors if name not in a.sensors]
    for name in (name for name in a.sensors if name in b.sensors):
        left, right = a.modality(name), b.modality(name)
        for key in ("bands", "unit", "clip"):
            if getattr(left, key) != getattr(right, key):
                found.append(f"{name}.{key}: {getattr(left, key)} against {getattr(right, key)}")
    if a.classes and b.classes and a.classes.names != b.classes.names:
        found.append(f"classes: {a.classes.names} against {b.classes.names}")
    if a.resolution and b.resolution and abs(a.resolution / b.resolution - 1) > 0.05:
        found.append(f"resolution: {a.resolution} m against {b.resolution} m per pixel")
    return found
