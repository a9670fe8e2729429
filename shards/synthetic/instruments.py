"""What the instruments record of a landscape: optical, radar, elevation, and the label that people drew.

Letters in the comments: C bands; H, W rows and columns of the latent grid; h, w those of the sensor's own
grid; M materials. Spectra and backscatter are round numbers of the usual size (backscatter: C band, Ulaby &
Dobson, "Handbook of Radar Scattering Statistics for Terrain", 1989). Speckle is intensity times a gamma
variate of mean 1 whose shape is the number of looks, 4.4 as in Sentinel-1 IW GRDH (Sentinel-1 Product
Definition, S1-RS-MDA-52-7440).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import raster_io
from shards.sensors import SENSORS
from shards.synthetic.landscape import CLASSES, Cover, Landscape, Material
from shards.synthetic.noise import Map, Mask, blur, fractal
from shards.synthetic.site import PIXEL, Site

LOOKS = 4.4
_M = Material

# Surface reflectance x 10000 in B1..B8, B8A, B9, B10, B11, B12, then backscatter in dB: VV, VH.
_MATERIALS: Mapping[Material, tuple[float, ...]] = MappingProxyType(
    {
        _M.CLEAR_WATER: (300, 350, 330, 190, 170, 150, 140, 120, 110, 100, 0, 60, 40, -21.0, -28.0),
        _M.SILTY_WATER: (480, 600, 880, 820, 700, 420, 380, 330, 270, 230, 0, 90, 60, -20.5, -27.5),
        _M.BROADLEAF: (180, 220, 450, 280, 800, 2300, 2900, 3100, 3250, 3300, 0, 1600, 750, -7.8, -13.0),
        _M.CONIFER: (150, 180, 330, 230, 560, 1450, 1800, 1950, 2050, 2100, 0, 1050, 480, -8.4, -13.4),
        _M.GRASS: (300, 390, 760, 520, 1200, 2450, 2900, 3050, 3200, 3250, 0, 2200, 1200, -12.3, -19.0),
        _M.DRY_GRASS: (500, 650, 1000, 1250, 1650, 1950, 2150, 2350, 2500, 2550, 0, 3250, 2300, -13.2, -20.4),
        _M.LUSH_CROP: (250, 320, 800, 390, 1300, 3300, 4100, 4300, 4450, 4500, 0, 1950, 950, -11.9, -18.4),
        _M.STRAW: (560, 730, 1130, 1480, 1880, 2180, 2380, 2580, 2730, 2780, 0, 3400, 2450, -13.0, -20.2),
        _M.PLOUGHED: (600, 780, 1080, 1400, 1650, 1800, 1950, 2100, 2250, 2300, 0, 3050, 2650, -12.7, -20.6),
        _M.SAND: (950, 1180, 1560, 1930, 2130, 2230, 2330, 2430, 2530, 2550, 0, 2750, 2400, -16.0, -24.0),
        _M.CONCRETE: (1000, 1220, 1520, 1800, 1970, 2070, 2170, 2300, 2400, 2400, 0, 2850, 2600, -2.5, -9.5),
        _M.TILES: (650, 780, 1050, 1650, 1900, 2020, 2120, 2260, 2360, 2360, 0, 2800, 2500, -3.0, -10.0),
        _M.ASPHALT: (700, 780, 880, 950, 1000, 1050, 1080, 1120, 1150, 1150, 0, 1300, 1250, -16.5, -23.5),
        _M.HEATH: (290, 350, 590, 570, 1000, 1650, 1880, 2020, 2170, 2220, 0, 2200, 1400, -11.0, -16.3),
        _M.REED: (295, 380, 745, 515, 1170, 2400, 2840, 2990, 3130, 3180, 0, 2100, 1140, -6.0, -15.0),
    }
)  # fmt: skip
_SOILS = [_M.PLOUGHED, _M.SAND, _M.DRY_GRASS, _M.STRAW]
_DAMP = [_M.GRASS, _M.DRY_GRASS, _M.LUSH_CROP, _M.STRAW, _M.PLOUGHED, _M.SAND]
# Path reflectance x 10000 and transmission of a clear atmosphere; B9 sees water vapour, B10 only cirrus.
_PATH = (1050, 780, 470, 290, 240, 200, 180, 150, 130, 40, 12, 20, 10)
_CLEAR = (0.78, 0.82, 0.86, 0.9, 0.91, 0.92, 0.93, 0.93, 0.95, 0.35, 0.0, 0.96, 0.95)
_CLOUD = (6200, 6300, 6100, 6200, 6300, 6400, 6500, 6600, 6600, 3200, 350, 4300, 3400)


@dataclass(frozen=True)
class Raster:
    """Values [C, H, W] with their place on Earth, and what a reader needs to know."""

    values: NDArray[Any]
    crs: str
    transform: raster_io.Transform
    nodata: float | None = None
    descriptions: Sequence[str] = ()


def _inner(place: Site, field: NDArray[Any]) -> NDArray[Any]:
    """The place itself, without the margin: `field` [..., H, W] -> [..., size, size]."""
    m = place.margin
    return field[..., m : m + place.size, m : m + place.size]


def _swath(place: Site, rng: np.random.Generator, odds: float) -> Mask:
    """Where the sensor looked [H, W]: everywhere or, with probability `odds`, up to a slanted edge."""
    side = place.size + 2 * place.margin
    angle, cut = rng.choice([0.2, np.pi + 0.2]) + rng.normal(0, 0.05), rng.uniform(0.1, 0.38)
    if rng.random() >= odds:
        return np.ones((side, side), dtype=bool)
    y, x = np.mgrid[:side, :side] / side - 0.5
    return np.asarray(x * np.cos(angle) + y * np.sin(angle) < cut)


def _sun(place: Site) -> tuple[float, float]:
    """Elevation of the sun in mid-morning, and the direction to it clockwise from north, in radians."""
    season = place.day + (0 if place.region.latitude > 0 else 182)
    declination = -23.44 * math.cos(2 * math.pi * (season + 10) / 365)
    height = 84 - abs(place.region.latitude - declination)
    return math.radians(height), math.radians(145 if place.region.latitude > declination else 35)


def _clouds(place: Site, rng: np.random.Generator, sun: tuple[float, float]) -> tuple[Map, Map]:
    """Opacity of clouds and depth of their shadows, both 0 to 1 [H, W]; half of the places are clear."""
    side = place.size + 2 * place.margin
    share = max(0.0, rng.uniform(-0.1, 0.1))  # as in archives filtered by cloudiness
    puffs = fractal(rng, side, 4, longest=60)
    opacity = np.clip((puffs - np.quantile(puffs, 1 - share)) / 1.4, 0, 1) if share > 0 else 0 * puffs
    height = rng.uniform(500, 1600) / PIXEL / math.tan(sun[0])
    move = int(height * math.cos(sun[1])), -int(height * math.sin(sun[1]))  # (row, col) away from the sun
    return opacity, blur(np.roll(opacity, move, (0, 1)), 1.5).clip(0, 1)


def _slopes(land: Landscape) -> tuple[Map, Map]:
    """Rise over run towards north and towards east [H, W]."""
    down, right = (np.asarray(slope, dtype=np.float32) for slope in np.gradient(land.elevation, PIXEL))
    return -down, right


def _coarse(band: Map, factor: int) -> Map:
    """`band` [H, W] as if its pixels were `factor` times as large, on the grid it came on."""
    if factor == 1:
        return band
    for axis in (0, 1):
        index = np.arange(band.shape[axis]) // factor
        starts = np.flatnonzero(np.diff(index, prepend=-1))
        counts = np.bincount(index).reshape((-1, 1) if axis == 0 else (1, -1))
        band = np.take(np.add.reduceat(band, starts, axis) / counts, index, axis).astype(np.float32)
    return band


def _spectra(place: Site, rng: np.random.Generator) -> Map:
    """Surface reflectance [M, 13] of materials at this place: soils redder in some regions, all a bit off."""
    table = np.array([_MATERIALS[material][:13] for material in Material], dtype=np.float32)
    hue = np.linspace(-0.4, 0.12, 13) * (place.region.climate.red + rng.normal(0, 0.12))
    table[_SOILS] *= (1 + hue).astype(np.float32)
    bright, tint = 0.1 * rng.standard_normal((2, len(Material), 1))
    return np.asarray(table * np.exp(bright + 1.2 * tint * np.linspace(-1, 1, 13)), dtype=np.float32)


def _light(place: Site, land: Landscape, sun: tuple[float, float]) -> Map:
    """Sunlight on sloping ground relative to level ground [H, W], a ratio of cosines of incidence."""
    north, east = _slopes(land)
    facing = 1 - (north * math.cos(sun[1]) + east * math.sin(sun[1])) / math.tan(sun[0])
    return np.asarray(np.clip(facing / np.sqrt(1 + north**2 + east**2), 0.25, 1.8), dtype=np.float32)


def _column(values: Sequence[float]) -> Map:
    """One value per band [C] as [C, 1, 1]."""
    return np.array(values, dtype=np.float32)[:, None, None]


def optical(place: Site, land: Landscape) -> Raster:
    """Sentinel-2 L1C-like: uint16 [13, size, size], reflectance x 10000 at the top of the air, 0 = no data.

    All bands lie on the 10 m grid; those of 20 and 60 m repeat the mean of their larger pixels.
    """
    rng, sun, side = place.random(2), _sun(place), land.cover.shape[0]
    crowns = 0.06 * (land.texture - 1) * (land.cover == Cover.TREES)
    opacity, shadow = _clouds(place, rng, sun)
    light = _light(place, land, sun) * (1 + 0.1 * fractal(rng, side, 1.6) + crowns) * (1 - 0.6 * shadow)
    values = _mixed(_spectra(place, rng).T, _inner(place, land.shares)) * _inner(place, light)  # [C, h, w]
    haze = rng.uniform(0.7, 1.7)
    values = values * _column(_CLEAR) * (1.06 - 0.06 * haze) + _column(_PATH) * haze
    cover, bright = _inner(place, opacity), _inner(place, 1 + 0.07 * fractal(rng, side, 3))
    values = values * (1 - cover) + _column(_CLOUD) * bright * cover
    sensor = SENSORS["s2-l1c"]
    for band, row in zip(sensor.bands, values, strict=True):
        row[:] = _coarse(row, int(band.resolution / PIXEL))
    values += (12 + 0.004 * values) * rng.standard_normal(values.shape, dtype=np.float32)
    seen = _inner(place, _swath(place, rng, 0.25))
    counts = np.where(seen, np.clip(values, 1, 20000), 0).round().astype(np.uint16)
    return Raster(counts, place.region.crs, _ten_metres(place), 0, sensor.band_names)


def _ten_metres(place: Site) -> raster_io.Transform:
    """The affine of the place's own grid."""
    return (PIXEL, 0.0, place.corner[0], 0.0, -PIXEL, place.corner[1])


def _sample(field: Map, rows: NDArray[np.float64], cols: NDArray[np.float64]) -> Map:
    """Bilinear values of `field` [C, H, W] at fractional pixels (0 = middle of the first); NaN outside."""
    height, width = field.shape[1:]
    inside = (rows >= 0) & (rows <= height - 1) & (cols >= 0) & (cols <= width - 1)
    i = np.clip(np.floor(rows), 0, height - 2).astype(np.int64)
    j = np.clip(np.floor(cols), 0, width - 2).astype(np.int64)
    v, u = rows - i, cols - j
    upper = field[:, i, j] * (1 - u) + field[:, i, j + 1] * u
    lower = field[:, i + 1, j] * (1 - u) + field[:, i + 1, j + 1] * u
    return np.where(inside, upper * (1 - v) + lower * v, np.nan).astype(np.float32)


def _put(place: Site, field: Map, crs: str, pixel: float, reach: float) -> tuple[Map, raster_io.Transform]:
    """`field` [C, H, W] of the latent grid on a grid of `crs` with square pixels of `pixel` units.

    The grid's corner is a multiple of `pixel` plus `reach` pixels, so it shares no line with the 10 m grid.
    """
    left, top, length = *place.corner, place.size * PIXEL
    edge = np.linspace(0, length, 9)
    zero, full = np.zeros(9), np.full(9, length)
    ring_x, ring_y = left + np.r_[edge, full, edge, zero], top - np.r_[zero, edge, full, edge]
    xs, ys = raster_io.transform_points(place.region.crs, crs, ring_x, ring_y)
    x0, y0 = (np.floor(xs.min() / pixel) - 1 + reach) * pixel, (np.ceil(ys.max() / pixel) + 1 - reach) * pixel
    width, height = int(np.ceil((xs.max() - x0) / pixel)) + 1, int(np.ceil((y0 - ys.min()) / pixel)) + 1
    x, y = np.meshgrid(x0 + pixel * (np.arange(width) + 0.5), y0 - pixel * (np.arange(height) + 0.5))
    east, north = raster_io.transform_points(crs, place.region.crs, x, y)
    rows = (top - north) / PIXEL + place.margin - 0.5
    cols = (east - left) / PIXEL + place.margin - 0.5
    return _sample(field, rows, cols), (pixel, 0.0, float(x0), 0.0, -pixel, float(y0))


def _radar_grid(place: Site) -> tuple[str, float, float]:
    """CRS, pixel size in its units, and by what part of a pixel the grid is off; four kinds take turns."""
    kinds = (
        (place.region.crs, 12.5, 0.31),
        (place.region.neighbour, 12.5, 0.62),
        (place.region.crs, 10.0, 0.37),
        ("EPSG:4326", 1.0 / 9000, 0.5),
    )
    return kinds[(place.number + place.number // len(kinds)) % len(kinds)]


def _facing(land: Landscape, look: float, incidence: float) -> Map:
    """Backscatter of sloping ground relative to level ground [H, W], by the beam's azimuth and incidence."""
    north, east = _slopes(land)
    tilt = np.arctan(north * math.cos(look) + east * math.sin(look))  # positive where the ground faces the radar
    local = np.clip(incidence - tilt, 0.15, 1.45)
    return np.asarray(np.clip(math.tan(incidence) / np.tan(local), 0.3, 4), dtype=np.float32)


def radar(place: Site, land: Landscape) -> Raster:
    """Sentinel-1-like: float32 [2, h, w], VV and VH in dB, speckle of 4.4 looks, NaN outside the swath."""
    rng = place.random(3)
    power = 10 ** (np.array([_MATERIALS[material][13:] for material in Material]) / 10)  # [M, 2]
    power[_DAMP] *= 10 ** (rng.normal(0, 1.0) / 10)  # soil moisture of the day
    power[[_M.CLEAR_WATER, _M.SILTY_WATER]] *= 10 ** (rng.normal(0, 1.8) / 10)  # wind on water
    relief = _facing(land, math.radians(rng.choice([80, 280])), math.radians(rng.uniform(33, 43)))
    field = _mixed(power.T.astype(np.float32), land.shares) * land.texture * relief  # [2, H, W]
    field[:, ~_swath(place, rng, 0.25)] = np.nan
    crs, pixel, reach = _radar_grid(place)
    values, transform = _put(place, field, crs, pixel, reach)  # [2, h, w]
    gain = 10 ** (rng.normal(0, 0.3) / 10)
    decibels = 10 * np.log10(values * gain * rng.gamma(LOOKS, 1 / LOOKS, values.shape))
    return Raster(decibels.astype(np.float32), crs, transform, math.nan, SENSORS["s1"].band_names)


def elevation(place: Site, land: Landscape) -> Raster:
    """An elevation model: float32 [1, h, w] in metres, 30 m pixels on their own grid, decimetres of error."""
    rng = place.random(4)
    base = rng.uniform(5, 900)
    smooth = blur(land.elevation, 1.2)[None]
    values, transform = _put(place, smooth, place.region.crs, 30.0, 0.0)
    values += base + rng.normal(0, 0.3, values.shape)
    metres = values.round(2).astype(np.float32)
    return Raster(metres, place.region.crs, transform, None, SENSORS["dem"].band_names)


def label(place: Site, land: Landscape) -> Raster:
    """Land cover: uint8 [1, size, size], a class number or 255 where, in some places, nobody mapped."""
    rng = place.random(5)
    missing = fractal(rng, land.cover.shape[0], 4, longest=120) > (1.9 if rng.random() < 0.4 else 9)
    values = np.where(missing, CLASSES.ignore, land.cover).astype(np.uint8)
    crs, transform = place.region.crs, _ten_metres(place)
    return Raster(_inner(place, values)[None], crs, transform, CLASSES.ignore, ("land cover",))


INSTRUMENTS: Mapping[str, Callable[[Site, Landscape], Raster]] = MappingProxyType(
    {"s2-l1c": optical, "s1": radar, "dem": elevation, "label": label}
)


def _mixed(signatures: NDArray[Any], shares: NDArray[Any]) -> NDArray[Any]:
    """Of classes [C, K] by their shares [K, h, w]: [C, h, w].

    Not by BLAS, whose sums depend on the processor and the number of threads, and the archive's bytes must not.
    """
    mixed: NDArray[Any] = np.einsum("ck,khw->chw", signatures, shares)
    return mixed
