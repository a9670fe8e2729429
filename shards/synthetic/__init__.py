"""A made-up archive of georeferenced scenes that behaves like the real thing; the demo and tests live on it.

`make_archive` writes, for each place, what Sentinel-2 (13 bands, top of atmosphere), Sentinel-1 (VV, VH in
dB) and an elevation model would record of one latent landscape, and a land-cover label. The traps are those
of real archives: every sensor on its own grid, radar partly in another coordinate reference system, clouds
with shadows, edges of swaths, pixels without label, haze, season, soil and wind that differ from place to
place.

What each sensor has that the other lacks. Both read the same shares of materials, each through its part of
the table in `instruments`:

- settlements and bare ground look alike from above (concrete, tiles, sand); walls reflect radar back: +13 dB;
- reeds in standing water look like a meadow; water and stems together reflect radar back: +6 dB;
- lush crops and grass, or straw and dry grass, are within 1 dB for radar, but the red edge and the short-wave
  infrared tell them apart;
- asphalt and smooth sand are almost as dark as water for radar, but not for the optical sensor;
- clouds and their shadows hide the ground from the optical sensor, speckle blurs each pixel of radar.

And what only neighbours tell: the mean of speckle, rows and straight borders of fields (straw against dry
grass, ploughed soil against bare ground), lots and streets of settlements, the grain of heath and of crowns.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from shards import raster_io
from shards.synthetic.instruments import INSTRUMENTS
from shards.synthetic.landscape import CLASSES, landscape
from shards.synthetic.site import LIMIT, Site, site

__all__ = ["CLASSES", "make_archive", "make_place", "site"]

REVISION = 2  # of the landscape and the instruments: raised when the same seed gives other bytes


def make_place(root: Path, place: Site) -> None:
    """Write the four scenes of `place` under `root`, except those that are there already.

    A file appears whole or not at all, so what is there is finished.
    """
    paths = {sensor: root / place.name / f"{sensor}.tif" for sensor in INSTRUMENTS}
    missing = {sensor: path for sensor, path in paths.items() if not path.exists()}
    if not missing:
        return
    (root / place.name).mkdir(parents=True, exist_ok=True)
    side = place.size + 2 * place.margin
    land = landscape(place.seed, place.number, side, place.region.climate, place.day)
    for sensor, path in missing.items():
        raster = INSTRUMENTS[sensor](place, land)
        raster_io.write_geotiff(
            path, raster.values, crs=raster.crs, transform=raster.transform, nodata=raster.nodata,
            descriptions=raster.descriptions,
            colormap=dict(enumerate(CLASSES.palette)) if sensor == "label" else None,
        )  # fmt: skip


def _splits(places: int) -> list[str]:
    """The split of each place: of 24, the first 16 train, then 3 val and 5 test."""
    test, val = max(1, round(places * 5 / 24)), max(1, places // 8)
    return ["train"] * (places - val - test) + ["val"] * val + ["test"] * test


def _catalog(sites: Sequence[tuple[Site, str]]) -> str:
    """The catalog as CSV text: one row per scene; elevation and label have no time."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["place", "sensor", "href", "time", "offset", "group", "split"])
    for place, split in sites:
        later = timedelta(days=int(place.random(6).integers(0, 4)), hours=6)
        times = {"s2-l1c": place.time.isoformat(), "s1": (place.time + later).isoformat()}
        for sensor in INSTRUMENTS:
            href = f"{place.name}/{sensor}.tif"
            offset = "0" if sensor == "s2-l1c" else ""  # reflectance as it is, whatever the date
            rows.writerow([place.name, sensor, href, times.get(sensor, ""), offset, place.region.name, split])
    return text.getvalue()


def _write_text(path: Path, text: str) -> None:
    """Put `text` at `path`, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def make_archive(
    root: Path,
    *,
    places: int = 24,
    size: int = 384,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write an archive of `places` places, plus one scene to predict, and its `catalog.csv`.

    A call that was interrupted is simply made again: finished files are kept. The bytes depend on the
    arguments alone (given the same versions of numpy and GDAL and the same kind of processor).

    Args:
        root: folder of the archive; made if absent.
        places: number of places with a split train, val or test, 3 to 196; spread over four UTM zones.
        size: pixels of 10 m along each side of a place, 64 to 1536; the scene to predict is a third larger.
        seed: another seed, another world.
        progress: called with (places finished, places in all) after each place.

    Returns:
        The path of `catalog.csv`: columns place, sensor, href (relative), time (ISO 8601, empty for elevation
        and label), offset (0: reflectance as it is), group (the UTM zone), split (train, val, test or predict).

    Raises:
        ValueError: `places` or `size` out of range, or `root` holds an archive made with other arguments.
    """
    if not 3 <= places <= LIMIT or not 64 <= size <= 1536:
        raise ValueError(f"places={places}, size={size}: give 3 to {LIMIT} places of 64 to 1536 pixels")
    root.mkdir(parents=True, exist_ok=True)
    _claim(root, {"revision": REVISION, "places": places, "size": size, "seed": seed})
    sites = [(site(seed, number, size), split) for number, split in enumerate(_splits(places))]
    sites.append((site(seed, LIMIT, size + size // 3), "predict"))
    for done, (place, _) in enumerate(sites, 1):
        make_place(root, place)
        if progress is not None:
            progress(done, len(sites))
    _write_text(root / "catalog.csv", _catalog(sites))
    return root / "catalog.csv"


def _claim(root: Path, wanted: dict[str, int]) -> None:
    """Say in `archive.json` what this folder is made with; refuse a folder made with something else."""
    path = root / "archive.json"
    if not path.exists():
        _write_text(path, json.dumps(wanted) + "\n")
    found = json.loads(path.read_text(encoding="utf-8"))
    if found != wanted:
        raise ValueError(
            f"{root} holds an archive made with {found}, but {wanted} was asked for; remove it or name another folder"
        )
