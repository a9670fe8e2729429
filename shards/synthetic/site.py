"""Where the made-up places lie on Earth, and when each was seen."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from shards.synthetic.landscape import Climate
from shards.synthetic.noise import generator

PIXEL = 10.0  # metres, of Sentinel-2, the label and the latent grid
LIMIT = 196  # places in an archive, and the number of the scene to predict


@dataclass(frozen=True)
class Region:
    """A corner of the world.

    `name` and `crs` of its UTM zone, `origin` (easting and northing in metres) of its first place, `latitude`
    in degrees, UTC `hour` of the optical overpass.
    """

    name: str
    crs: str
    origin: tuple[float, float]
    latitude: float
    hour: int
    climate: Climate

    @property
    def neighbour(self) -> str:
        """CRS of the UTM zone to the west."""
        return f"EPSG:{int(self.crs.removeprefix('EPSG:')) - 1}"


REGIONS = (
    Region("33N", "EPSG:32633", (480_010, 5_330_020), 48.1, 10,
           Climate(wet=0.3, relief=190, farmed=0.45, field=15, red=0.1)),
    Region("21S", "EPSG:32721", (420_020, 6_300_010), -33.4, 13,
           Climate(wet=0.1, relief=60, farmed=0.5, field=20, red=0.35)),
    Region("36S", "EPSG:32736", (330_010, 9_600_010), -3.6, 8,
           Climate(wet=-0.35, relief=260, farmed=0.3, field=10, red=0.9)),
    Region("14N", "EPSG:32614", (560_020, 4_300_020), 38.8, 17,
           Climate(wet=-0.15, relief=110, farmed=0.5, field=18, red=0.5)),
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One place: where it lies and when it was seen.

    `size` is in pixels of 10 m, `corner` the upper left one in metres, `day` the day of the year in northern
    seasons, `time` that of the optical overpass.
    """

    seed: int
    number: int
    size: int
    corner: tuple[float, float]
    day: int
    time: datetime

    @property
    def region(self) -> Region:
        """Its region; regions take turns."""
        return REGIONS[self.number % len(REGIONS)]

    @property
    def name(self) -> str:
        """Name of the place and of its folder."""
        return f"{self.region.name}-{self.number:03d}"

    @property
    def margin(self) -> int:
        """Pixels of latent landscape around the place on each side; the radar's swath looks over the edge."""
        return max(16, self.size // 6)

    def random(self, use: int) -> np.random.Generator:
        """Random numbers for one use: 1 site, 2 optical, 3 radar, 4 elevation, 5 label, 6 dates."""
        return generator(self.seed, self.number, use)


def site(seed: int, number: int, size: int) -> Site:
    """The place `number` of archive `seed`; depends on nothing else. Places of a region lie 30 km apart."""
    region = REGIONS[number % len(REGIONS)]
    rng = generator(seed, number, 1)
    north, east = divmod(number // len(REGIONS), 5)
    x, y = region.origin[0] + 30_000 * east, region.origin[1] + 30_000 * north
    jitter = 10 * rng.integers(0, 900, 2)
    day = int(rng.integers(105, 265))
    shift = 0 if region.latitude > 0 else 182
    start = datetime(int(rng.integers(2019, 2024)), 1, 1, region.hour, int(rng.integers(60)), tzinfo=UTC)
    time = start + timedelta(days=(day + shift) % 365)
    return Site(seed, number, size, (x + float(jitter[0]), y + float(jitter[1])), day, time)
