"""One latent landscape per place: what is on the ground, before any sensor looks at it.

Everything is drawn on a square grid of 10 m pixels, larger than the place by a margin. Letters in the
comments: H, W rows and columns of that grid; M materials.

Order of events: relief with a river and lakes; moisture and human pressure from relief and noise; settlements
and roads where it is flat and dry, fields where people live, nature elsewhere; then each class is filled with
*materials* (leaves, straw, soil, roofs, water, ...), whose shares per pixel sum to 1. Sensors see materials,
never classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from shards.contract import Classes
from shards.synthetic.noise import Map, Mask, blur, cells, fractal, generator, turned


class Cover(IntEnum):
    """Land-cover classes; the value is the class number in the label."""

    WATER = 0
    TREES = 1
    GRASS = 2
    CROPS = 3
    SHRUB = 4
    BUILT = 5
    BARE = 6
    WETLAND = 7


CLASSES = Classes(
    names=tuple(cover.name.lower() for cover in Cover),
    palette=(
        (52, 104, 192), (24, 92, 40), (150, 196, 84), (236, 200, 72),
        (148, 128, 60), (208, 52, 44), (196, 178, 156), (70, 168, 164),
    ),
)  # fmt: skip
"""The classes of the label, in the order of their numbers, with a colour each."""


class Material(IntEnum):
    """What a pixel is made of; `shards.synthetic.instruments` knows what each looks like."""

    CLEAR_WATER = 0
    SILTY_WATER = 1
    BROADLEAF = 2
    CONIFER = 3
    GRASS = 4
    DRY_GRASS = 5
    LUSH_CROP = 6
    STRAW = 7
    PLOUGHED = 8
    SAND = 9
    CONCRETE = 10
    TILES = 11
    ASPHALT = 12
    HEATH = 13
    REED = 14


Mixture = dict[Material, Map]
"""Materials and the weight of each, maps [H, W]."""


@dataclass(frozen=True, kw_only=True)
class Climate:
    """What the places of one region share.

    `wet` shifts the moisture (standard deviations), `relief` is the height range in metres, `farmed` the
    share of land under fields, `field` the side of a field in pixels, `red` how red the soil is (0 to 1).
    """

    wet: float
    relief: float
    farmed: float
    field: float
    red: float


@dataclass(frozen=True)
class Landscape:
    """Maps on the latent grid.

    `elevation` [H, W] in metres; `cover` uint8 [H, W], a `Cover` per pixel; `shares` [M, H, W], the share of
    each `Material`, summing to 1; `texture` [H, W], the roughness of the surface seen by radar as a factor
    around 1.
    """

    elevation: Map
    cover: NDArray[np.uint8]
    shares: Map
    texture: Map


@dataclass(frozen=True)
class _Ground:
    """Maps [H, W] that the rest is derived from.

    `elevation` in metres, `steep` as rise over run, `river` in pixels from the middle of its bed, `water` or
    not, `wet` as moisture in standard deviations.
    """

    elevation: Map
    steep: Map
    river: Map
    water: Mask
    wet: Map


def _channel(rng: np.random.Generator, side: int, angle: float, place: float) -> tuple[Map, Map]:
    """A meandering line across the grid: signed pixels across it [H, W], and the distance to it [H, W]."""
    _, v = turned(side, angle, 1, 1)
    bends = 0.04 * side * fractal(rng, side, 5, longest=side / 3) + 1.5 * fractal(rng, side, 5, longest=40)
    across = v - v[side // 2, side // 2] - place * side + bends
    down, right = np.gradient(across)
    return across, np.abs(across) / np.maximum(np.hypot(down, right), 0.7)


def _ground(rng: np.random.Generator, side: int, climate: Climate) -> _Ground:
    """Relief with a valley, its river, one tributary, and lakes in the lowest basins."""
    angle, lakes = rng.uniform(0, np.pi), rng.choice([0.001, 0.01, 0.03, 0.09])
    across, main = _channel(rng, side, angle, rng.uniform(-0.2, 0.2))
    _, tributary = _channel(rng, side, angle + rng.uniform(1.0, 2.1), rng.uniform(-0.2, 0.2))
    river = np.minimum(main, np.where(across > 0, tributary, tributary + np.abs(across)))
    valley = 1 - np.exp(-blur(river, 5) / (0.16 * side))
    hills = fractal(rng, side, 4.8, longest=side / 2)
    height = climate.relief * (0.45 * valley + (0.06 + 0.3 * valley) * hills)
    width = rng.uniform(1.2, 4.5) * np.exp(0.25 * fractal(rng, side, 3, longest=60))
    level = np.quantile(height, lakes)
    water = (height < level) | (main < width) | ((across > 0) & (tributary < 0.4 * width))
    height = np.maximum(height, level) - level + 0.4 * fractal(rng, side, 2) * ~water
    down, right = np.gradient(blur(height, 1.5), 10.0)
    shore = blur(water.astype(np.float32), 8)
    wet = climate.wet + 1.1 * np.exp(-river / 18) + 1.2 * shore + 0.8 * fractal(rng, side, 4, longest=160)
    steep = np.hypot(down, right)
    return _Ground(height.astype(np.float32), steep, river, water, (wet - 0.5).astype(np.float32))


@dataclass(frozen=True)
class _Town:
    """Settlements: `density` [H, W] (built where above 0.5), `road` [H, W], and the angle of the streets."""

    density: Map
    road: Mask
    angle: float


def _towns(rng: np.random.Generator, ground: _Ground) -> _Town:
    """Two to five settlements on flat dry land by the water, and winding roads between and out of them."""
    side = ground.steep.shape[0]
    spots = rng.integers(int(0.12 * side), int(0.88 * side), (60, 2))
    appeal = np.exp(-ground.river / 40) - 6 * ground.steep - 9 * ground.water
    best = spots[np.argsort(-appeal[spots[:, 0], spots[:, 1]])]
    centres: list[NDArray[np.int64]] = []
    for spot in best:
        if all(np.hypot(*(spot - other)) > 0.22 * side for other in centres):
            centres.append(spot)
    centres = centres[: rng.integers(2, 6)]
    y, x = np.mgrid[:side, :side]
    density = np.zeros((side, side), dtype=np.float32)
    for row, col in centres:
        radius = rng.choice([0.04, 0.06, 0.09, 0.13]) * side
        density = np.maximum(density, np.exp(-((y - row) ** 2 + (x - col) ** 2) / radius**2))
    density *= 1 + 0.3 * fractal(rng, side, 3.6, longest=40)
    road = np.zeros((side, side), dtype=bool)
    ends = [*centres, np.array([0, rng.integers(side)]), np.array([rng.integers(side), side - 1])]
    for k in range(1, len(ends)):
        nearest = min(centres[:k], key=lambda c: float(np.hypot(*(c - ends[k]))))
        _draw(road, nearest, ends[k], rng)
    return _Town(density.astype(np.float32), road & ~ground.water, rng.uniform(0, np.pi / 2))


def _draw(road: Mask, start: NDArray[np.int64], end: NDArray[np.int64], rng: np.random.Generator) -> None:
    """Mark in `road` a winding line from `start` to `end` (row, col)."""
    along = np.linspace(0, 1, 4 * road.shape[0])
    line = start[:, None] + along * (end - start)[:, None]
    wide, narrow = (np.sin(2 * np.pi * waves * (along + rng.random())) for waves in (1, 3.3))
    bend = (0.05 * wide + 0.014 * narrow) * np.minimum(1, 6 * np.minimum(along, 1 - along))
    line += bend * (end - start)[::-1, None] * [[1], [-1]]
    rows, cols = np.clip(line.round().astype(np.int64), 0, road.shape[0] - 1)
    road[rows, cols] = True


@dataclass(frozen=True)
class _Fields:
    """Parcels, as maps [H, W].

    `farmed` or not, `use` (a `Cover`), `crop` (an index of `_SOWN`), `phase` of its growth as a share of the
    year, pixels to the `border` of the parcel, and the stripes of its `rows` (-1 to 1).
    """

    farmed: Mask
    use: NDArray[np.int64]
    crop: NDArray[np.int64]
    phase: Map
    border: Map
    rows: Map


# Start of growth as a day of the year: winter cereals, rape, maize, late vegetables (northern hemisphere).
_SOWN = np.array([25, 5, 115, 160], dtype=np.float32)


def _fields(rng: np.random.Generator, ground: _Ground, climate: Climate, day: int) -> _Fields:
    """Quadrilateral parcels where people live and land is flat; each has one use, crop and sowing date."""
    side, angle = ground.steep.shape[0], rng.uniform(0, np.pi)
    size = climate.field * rng.uniform(0.8, 1.25)
    u, v = turned(side, angle, size, size * rng.uniform(1.3, 2.2))
    bend = 0.2 * fractal(rng, side, 4.5, longest=150)
    number, border = cells(u + bend, v - bend, 0.28, rng)
    count = int(number.max()) + 1
    pressure = fractal(rng, side, 3.5, longest=160) + np.exp(-ground.river / 60) - 9 * ground.steep
    area = np.maximum(np.bincount(number.ravel(), minlength=count), 1)
    mean = np.bincount(number.ravel(), pressure.ravel(), minlength=count) / area
    farmed = (mean > np.quantile(pressure, 1 - climate.farmed))[number]
    uses = np.array([Cover.CROPS, Cover.GRASS, Cover.TREES, Cover.SHRUB])
    use = rng.choice(uses, count, p=[0.7, 0.18, 0.06, 0.06])
    crop = rng.choice(len(_SOWN), count, p=[0.4, 0.15, 0.3, 0.15])
    phase = ((day - _SOWN[crop] + rng.normal(0, 9, count)) % 365 / 365).astype(np.float32)
    rows = np.sin(2 * np.pi * (u * size + 0.6 * fractal(rng, side, 4, longest=40)) / rng.uniform(2.6, 3.6))
    return _Fields(farmed, use[number], crop[number], phase[number], border * size, rows.astype(np.float32))


def _cover(rng: np.random.Generator, ground: _Ground, town: _Town, fields: _Fields) -> NDArray[np.uint8]:
    """The class of every pixel [H, W]: nature, and over it fields, wetland, settlements, roads and water."""
    side, wet = ground.steep.shape[0], ground.wet
    scores = {
        Cover.TREES: 0.2 + 0.9 * wet,
        Cover.GRASS: 0.15 + 0.1 * wet,
        Cover.SHRUB: 0.05 - 0.5 * wet,
        Cover.BARE: -0.9 - 1.1 * wet + 1.5 * ground.steep,
    }
    ranked = np.stack([score + 0.6 * fractal(rng, side, 3.4, 100) for score in scores.values()])  # [4, H, W]
    cover = np.array(list(scores), dtype=np.uint8)[ranked.argmax(0)]
    cover = np.where(fields.farmed, fields.use, cover)
    cover[fields.farmed & (fields.border < 0.6)] = rng.choice([Cover.GRASS, Cover.SHRUB, Cover.TREES])
    low = 1.2 * np.exp(-ground.river / 15) - 8 * ground.steep
    cover[wet + low + 0.9 * fractal(rng, side, 3.4, longest=60) > 1.6] = Cover.WETLAND
    cover[(town.density > 0.5) | town.road] = Cover.BUILT
    cover[ground.water] = Cover.WATER
    return cover.astype(np.uint8)


def _bump(phase: Map, centre: float, width: float) -> Map:
    """1 near `centre`, falling to 0 at `width` to either side; `phase` is a share of the year and wraps."""
    away = np.abs((phase - centre + 0.5) % 1 - 0.5) / width
    return np.asarray(np.clip(1.5 - 1.5 * away, 0, 1), dtype=np.float32)


def _town_mix(rng: np.random.Generator, town: _Town) -> tuple[Mixture, Map]:
    """Shares of roofs, streets and gardens in settlements, lot by lot, and each lot's radar brightness."""
    side = town.density.shape[0]
    lot, _ = cells(*turned(side, town.angle, 3.0, 2.2), 0.5, rng)
    _, kerb = cells(*turned(side, town.angle, 11, 8), 0.25, rng)
    kinds = np.array([Material.CONCRETE, Material.TILES, Material.GRASS, Material.BROADLEAF])
    kind = rng.choice(kinds, int(lot.max()) + 1, p=[0.36, 0.34, 0.2, 0.1])[lot]
    bright = np.exp(0.6 * rng.standard_normal(int(lot.max()) + 1)).astype(np.float32)[lot]
    street = np.where(kerb < 0.075, 0.75, 0.12).astype(np.float32)
    roof = np.clip(0.3 + 0.35 * town.density, 0.3, 0.75) * (1 - street)
    garden = 1 - street - roof
    mix = {material: roof * (kind == material) for material in map(Material, kinds)}
    mix[Material.GRASS] = mix[Material.GRASS] + 0.6 * garden
    mix[Material.SAND] = 0.4 * garden
    return mix | {Material.ASPHALT: street}, bright


def _crop_mix(fields: _Fields, noise: Map) -> Mixture:
    """Shares of leaves, straw and soil in fields by the phase of growth, with rows and `noise` [H, W]."""
    phase = fields.phase + 0.012 * noise
    lush = 0.92 * _bump(phase, 0.30, 0.2)
    straw = 0.9 * np.minimum(_bump(phase, 0.56, 0.11), 1 - lush)
    soil = np.clip(1 - lush - straw + 0.13 * fields.rows, 0.02, 1)
    return {Material.LUSH_CROP: lush, Material.STRAW: straw, Material.PLOUGHED: soil}


def _forest_mix(stand: Map, noise: Map, day: int) -> Mixture:
    """Conifers where `stand` [H, W] is high, elsewhere broadleaf trees (bare in winter), grass in clearings."""
    conifer = (1 / (1 + np.exp(-4 * stand))).astype(np.float32)
    leaves = np.clip(1.3 * np.cos(2 * np.pi * (day - 200) / 365) + 0.7, 0.15, 1)
    return {
        Material.CONIFER: conifer,
        Material.BROADLEAF: (1 - conifer) * leaves,
        Material.DRY_GRASS: (1 - conifer) * (1 - leaves) + 0.04,
        Material.GRASS: np.clip(0.1 * noise, 0, 0.4),
    }


def _mixtures(rng: np.random.Generator, ground: _Ground, fields: _Fields, day: int) -> dict[Cover, Mixture]:
    """For each class but settlements: the materials it is made of and the weight of each, maps [H, W]."""
    side = ground.steep.shape[0]
    stand, fine, rough, patch = (fractal(rng, side, slope, longest=60) for slope in (3.2, 0.6, 1.8, 2.4))
    green = np.clip(rng.uniform(0.35, 0.75) + 0.12 * ground.wet + 0.16 * rough, 0.05, 0.97)
    silt = 1 / (1 + np.exp(-2 * (0.6 * stand + rng.normal(0, 1.2)))).astype(np.float32)
    bush = np.clip(0.5 + 0.28 * fine + 0.15 * patch, 0, 1)
    pool = np.clip(0.05 + 0.12 * patch, 0, 0.4)
    return {
        Cover.WATER: {Material.SILTY_WATER: silt, Material.CLEAR_WATER: 1 - silt},
        Cover.TREES: _forest_mix(stand + rng.normal(0, 0.7), rough, day),
        Cover.GRASS: {
            Material.GRASS: green,
            Material.DRY_GRASS: 1 - green,
            Material.HEATH: np.clip(0.5 * fine - 0.4, 0, 0.8),
            Material.SAND: np.clip(-0.4 * patch - 0.4, 0, 0.6),
        },
        Cover.CROPS: _crop_mix(fields, rough),
        Cover.SHRUB: {
            Material.HEATH: 0.8 * bush,
            Material.BROADLEAF: 0.2 * bush,
            Material.DRY_GRASS: (1 - bush) * (1 - green),
            Material.GRASS: (1 - bush) * green,
        },
        Cover.BARE: {
            Material.SAND: 0.75 + 0.1 * rough.clip(-3, 2),
            Material.DRY_GRASS: np.clip(0.2 + 0.2 * patch, 0, 1),
        },
        Cover.WETLAND: {
            Material.REED: 0.75 * green,
            Material.DRY_GRASS: 0.5 * (1 - green),
            Material.CLEAR_WATER: pool,
        },
    }


def landscape(seed: int, place: int, side: int, climate: Climate, day: int) -> Landscape:
    """The landscape of one place.

    Args:
        seed: of the archive.
        place: number of the place.
        side: pixels of 10 m along each side of the grid.
        climate: of its region.
        day: day of the year in northern seasons (southern places: half a year on), for leaves and crops.
    """
    rng = generator(seed, place, 0)
    ground = _ground(rng, side, climate)
    town, fields = _towns(rng, ground), _fields(rng, ground, climate, day)
    cover = _cover(rng, ground, town, fields)
    built, bright = _town_mix(rng, town)
    shares = np.zeros((len(Material), side, side), dtype=np.float32)  # [M, H, W]
    for kind, mixture in (_mixtures(rng, ground, fields, day) | {Cover.BUILT: built}).items():
        for material, weight in mixture.items():
            shares[material] += np.where(cover == kind, weight, 0)
    lane = town.road & (town.density <= 0.5)
    shares[:, lane] = 0
    shares[Material.ASPHALT, lane], shares[Material.GRASS, lane] = 0.65, 0.35
    shares = shares.clip(0, None)
    texture = np.exp(0.12 * fractal(rng, side, 1.2))
    texture[cover == Cover.TREES] **= 2
    texture[cover == Cover.BUILT] *= bright[cover == Cover.BUILT]
    return Landscape(ground.elevation, cover, shares / shares.sum(0), texture.astype(np.float32))
