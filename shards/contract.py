"""The contract: what the numbers of a dataset or a checkpoint mean, so that nothing is fed what it was not made for.

A contract is written into `dataset.json`, into every checkpoint and every release, and compared wherever two of them
meet. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import sqrt
from operator import mul
from types import MappingProxyType
from typing import Any, Literal

FORMAT_VERSION = 1
IGNORE = 255  # label value of pixels that count nowhere

Normalisation = Literal["range", "statistics"]

REFLECTANCE = "reflectance x 10000"
SCALE, OFFSET = 10_000, 1_000  # of Sentinel-2's numbers; the offset since processing baseline 04.00
# (unit that is there, unit that is wanted): what to do. The words after "written" go into a catalog of scenes.
CONVERSIONS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("linear power", "dB"): "10 log10(x), written quantity=power in a catalog",
        ("power", "dB"): "10 log10(x), written quantity=power in a catalog",
        ("linear amplitude", "dB"): "20 log10(x), written quantity=amplitude in a catalog",
        ("amplitude", "dB"): "20 log10(x), written quantity=amplitude in a catalog",
        ("dB", "linear power"): "10 ** (x / 10)",
        ("dB", "linear amplitude"): "10 ** (x / 20)",
        ("reflectance", REFLECTANCE): "x * 10000, written scale=10000 in a catalog",
        (REFLECTANCE, "reflectance"): "x / 10000, written scale=0.0001 in a catalog",
    }
)


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

    Each line says how to make the right as the left, where that is known. Statistics may differ (two datasets of one
    kind have different means); names, bands, their order, unit, clip and classes may not. Offset and scale of the
    network's input are the checkpoint's own and not compared.
    """
    found = [f"modality {name} is missing on the right" for name in a.sensors if name not in b.sensors]
    found += [f"modality {name} is missing on the left" for name in b.sensors if name not in a.sensors]
    for left, right in ((a.modality(name), b.modality(name)) for name in a.sensors if name in b.sensors):
        name = left.sensor
        if left.bands != right.bands:
            found.append(f"{name}.bands: {left.bands} against {right.bands}: {_reordered(left.bands, right.bands)}")
        if left.unit != right.unit:
            way = CONVERSIONS.get((right.unit, left.unit), f"build the right again in {left.unit}")
            found.append(f"{name}.unit: {left.unit} against {right.unit}: {way}")
        if left.clip != right.clip:
            low, high = left.clip
            found.append(f"{name}.clip: {left.clip} against {right.clip}: cut the right off at {low:g} and {high:g}")
    if a.classes and b.classes and a.classes.names != b.classes.names:
        found.append(f"classes: {a.classes.names} against {b.classes.names}")
    if a.resolution and b.resolution and abs(a.resolution / b.resolution - 1) > 0.05:
        metres = f"{a.resolution} m against {b.resolution} m per pixel"
        found.append(f"resolution: {metres}: build the right again at {a.resolution} m")
    return found


def _reordered(left: Sequence[str], right: Sequence[str]) -> str:
    """How to get the bands on the left from those on the right."""
    if missing := [name for name in left if name not in right]:
        return f"the right lacks {', '.join(missing)}"
    return f"take the bands [{', '.join(str(right.index(name)) for name in left)}] of the right, counted from 0"


def check_fit(model: Contract, data: Contract, force: bool = False) -> list[str]:
    """Make sure that a model may be shown some data. The data may lack modalities: the network takes those as hidden.

    Besides what `compare` finds, statistics that can only be of another unit, scale or offset count as a difference.

    Args:
        model: of a checkpoint or release (left in messages); without classes where it is to learn new ones.
        data: what it is to be shown (right).
        force: go on in spite of differences.

    Returns:
        The differences that were overruled, for the outputs to tell; empty when there are none.

    Raises:
        ContractError: they differ and `force` is not given, or no network could be made of it: a modality that the
            model does not know, or another number of bands or classes.
    """
    if unknown := [name for name in data.sensors if name not in model.sensors]:
        raise ContractError(
            f"sensors: the checkpoint knows {', '.join(model.sensors)}, not {', '.join(unknown)}; choose among them "
            "with sensors=[...], or start from scratch"
        )
    known = model.restrict(data.sensors)
    if not (found := compare(known, data) + disguised(known, data)):
        return []
    counts = [len(contract.classes.names) for contract in (model, data) if contract.classes]
    possible = known.channels == data.channels and len(set(counts)) < 2
    if force and possible:
        return found
    way = "write force=true to go on all the same; the outputs will say so" if possible else "force=true cannot help"
    raise ContractError(
        f"the checkpoint (left) and the data (right) do not fit: {'; '.join(found)}. Build the data as the checkpoint "
        f"expects them, or {way}"
    )


def disguised(a: Contract, b: Contract) -> list[str]:
    """Modalities whose statistics on the right can only be of another unit, scale or offset than the one they name.

    All bands must tell the same, so that snow, clouds or another country do not count.
    """
    pairs = ((a.modality(name), b.modality(name)) for name in a.sensors if name in b.sensors)
    return [line for left, right in pairs if left.bands == right.bands for line in _disguise(left, right)]


def _disguise(left: Modality, right: Modality) -> Iterator[str]:
    means = list(zip(left.mean or (), right.mean or (), strict=False))
    if not means or left.unit != right.unit:
        return
    where = f"{left.sensor}: means of {_listed(left.mean)} against {_listed(right.mean)} {left.unit}"
    if left.unit == "dB" and all(mean < 0 <= other for mean, other in means):
        yield f"{where}: the right looks linear: {CONVERSIONS['linear power', 'dB']}"
    if left.unit != REFLECTANCE:
        return
    steps = [other - mean for mean, other in means]
    spreads = [wide / std for std, wide in zip(left.std or (), right.std or (), strict=False) if std > 0]
    if all(other > 0 and SCALE / 5 < mean / other < SCALE * 5 for mean, other in means):
        yield f"{where}: the right looks like reflectance from 0 to 1: {CONVERSIONS['reflectance', REFLECTANCE]}"
    for sign, words in ((1, "has the offset of processing baseline 04.00: x - 1000, written offset=-1000"),
                        (-1, "had its offset taken off twice: x + 1000, written offset=0")):  # fmt: skip
        same = all(abs(step - sign * OFFSET) < OFFSET / 4 for step in steps)
        if same and all(2 / 3 < spread < 3 / 2 for spread in spreads):
            yield f"{where}: the right looks as if it {words} in a catalog"


def _listed(values: Sequence[float] | None) -> str:
    return ", ".join(f"{value:.4g}" for value in values or ())
