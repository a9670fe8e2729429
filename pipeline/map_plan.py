"""What is to be mapped: the places of a config, the grid of each map, and what all who make it must agree on.

A map is begun by writing down its plan, which everybody who works at the map reads and compares with his own config:
parts on other machines, and the same command after a kill.

    MAP.parts/plan.json          what the blocks depend on
    MAP.parts/block-000003.tif   a finished block: class, confidence, coverage (and probabilities)
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from configs import ConfigError
from pipeline.checkpoint import Checkpoint
from pipeline.mosaic import Layout
from pipeline.predict_config import PredictConfig
from shards.archives import open_archive
from shards.archives.rows import address, radiometry
from shards.contract import Contract, ContractError
from shards.grid import Grid, Window
from shards.plausible import Looks
from shards.raster_io import is_geographic, utm_grid
from shards.scene import Asset, LeftOut, Place, Scene, SceneError
from shards.sensors import SENSORS, match
from shards.tile import OpenScene, bounds_in, open_scene, overlaps, read_tile

PLAN = "plan.json"
LOOKS = 16  # windows of a scene that are looked at before it is mapped
FROM_CONFIG = ("window", "overlap", "block", "precision", "flips", "turn", "probabilities")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One map to make.

    Attributes:
        number: among those of the config.
        place: its scenes, at most one of each sensor, by the names of the model's contract.
        out: address of the map.
        work: folder for its blocks.
    """

    number: int
    place: Place
    out: str
    work: Path

    @property
    def sensors(self) -> tuple[str, ...]:
        """Those there are scenes of."""
        return tuple(scene.sensor for scene in self.place.scenes)


@dataclass(frozen=True)
class Plan:
    """What a map's blocks depend on.

    Attributes:
        layout: grid, windows and blocks.
        identity: in JSON's types; equal for equal maps.
        micro_batch: windows per forward, which may change the last bit of a probability.
        notes: what was done about data that the model is not made for, by what was wrong with them.
    """

    layout: Layout
    identity: Mapping[str, Any]
    micro_batch: int
    notes: tuple[str, ...] = ()


def requests(config: PredictConfig, contract: Contract) -> list[Request]:
    """The maps that a config asks for.

    Raises:
        ConfigError: no scene is given, or a sensor twice.
        SensorError: a scene of a sensor that the model does not know.
        ArchiveError: the catalog cannot be used, or a place of it.
    """
    if config.catalog:
        return _from_catalog(config, contract)
    if not config.scene:
        raise ConfigError(f"scene: none given; the model takes {', '.join(contract.sensors)}")
    paths = {match(name, contract.sensors): path for name, path in config.scene.items()}
    if len(paths) < len(config.scene):
        raise ConfigError(f"scene: {', '.join(config.scene)} given, which are {len(paths)} of the model's sensors")
    scenes = tuple(
        Scene(name, (Asset(address(paths[name], Path()), radiometry=radiometry(name, paths[name], None)),))
        for name in contract.sensors
        if name in paths
    )
    name = config.out.rstrip("/").rpartition("/")[2]
    return [Request(0, Place(name, scenes), config.out, _work(config, config.out, name))]


def _work(config: PredictConfig, out: str, name: str) -> Path:
    if config.work:
        return Path(config.work) / f"{name}.parts"
    return Path(f"{name}.parts" if "://" in out else f"{out}.parts")


def _from_catalog(config: PredictConfig, contract: Contract) -> list[Request]:
    found: dict[str, Request] = {}
    others: set[str] = set()
    for place in open_archive("catalog", config.catalog):
        if isinstance(place, LeftOut):
            raise ConfigError(f"{config.catalog}: place {place.name}: {place.reason}")
        by_sensor = {name: place.of(name) for name in contract.sensors}
        others |= {scene.sensor for scene in place.scenes} - {*contract.sensors}
        if several := [name for name, scenes in by_sensor.items() if len(scenes) > 1]:
            raise ConfigError(
                f"{config.catalog}: place {place.name} has several scenes of {', '.join(several)}; a map is of one "
                "date: give each date a place of its own"
            )
        scenes = tuple(scene for scenes in by_sensor.values() for scene in scenes)
        if not scenes:
            raise ConfigError(
                f"{config.catalog}: place {place.name} has no scene of {', '.join(contract.sensors)}, which the model "
                "takes; leave it out of the table"
            )
        name = re.sub(r"[^\w.-]", "_", place.name) + ".tif"
        if name in found:
            raise ConfigError(f"{config.catalog}: places {found[name].place.name} and {place.name} are both {name}")
        out = f"{config.out.rstrip('/')}/{name}"
        found[name] = Request(len(found), replace(place, scenes=scenes), out, _work(config, out, name))
    if others:
        log.warning("%s: the model does not take %s", config.catalog, ", ".join(sorted(others)))
    return list(found.values())


@contextmanager
def opened(request: Request) -> Iterator[dict[str, OpenScene]]:
    """The scenes of a map, open, in the order of the model's sensors.

    Raises:
        SceneError: a file cannot be used.
    """
    with ExitStack() as stack:
        place = request.place
        yield {s.sensor: stack.enter_context(open_scene(s, place.coregistered)) for s in place.scenes}


def layout(scenes: Mapping[str, OpenScene], contract: Contract, config: PredictConfig) -> Layout:
    """Grid, windows and blocks of a map.

    The grid is that of the first scene. Where its pixels are not of the size that the model was trained on, or are
    degrees, it has pixels of that size instead: over the same extent in the same CRS, or in the scene's UTM zone.

    Raises:
        SceneError: the scenes do not overlap.
    """
    (_, first), *others = scenes.items()
    for name, other in others:
        if config.extent == "first" and not overlaps(first.grid, other.grid):
            raise SceneError(
                other.scene.path, f"{name} does not overlap {first.scene.path}; extent=union maps the ground of both"
            )
    grid, metres = first.grid, contract.resolution
    if metres and grid.crs and is_geographic(grid.crs):
        grid = utm_grid(grid, metres)
    elif metres and abs(grid.resolution / metres - 1) > 0.05:
        grid = _resized(grid, metres / grid.resolution)
    if config.extent == "union":
        bounds = {name: bounds_in(grid, scene.grid) for name, scene in scenes.items()}
        if unplaced := [name for name, window in bounds.items() if window is None]:
            raise SceneError(scenes[unplaced[0]].scene.path, f"cannot be placed in {grid.crs}; leave extent=union away")
        grid = grid.window(Window.around([window for window in bounds.values() if window]))
    return Layout(grid, config.window, config.overlap, config.block)


def _resized(grid: Grid, times: float) -> Grid:
    """The grid of pixels `times` as large on a side over the same extent, which the last ones may reach over."""
    a, b, c, d, e, f = grid.transform
    height, width = (max(1, -int(-side / times // 1)) for side in (grid.height, grid.width))
    return Grid((a * times, b * times, c, d * times, e * times, f), height, width, grid.crs)


def proposed(request: Request, scenes: Mapping[str, OpenScene], source: Checkpoint, config: PredictConfig) -> Plan:
    """The plan of a map as the config has it, from headers alone; `micro_batch` 0 where that has yet to be found out.

    Raises:
        SceneError: the scenes do not overlap.
    """
    wanted = layout(scenes, source.contract, config)
    files = {scene.sensor: [_file(asset) for asset in scene.assets] for scene in request.place.scenes}
    facts = {name: getattr(config, name) for name in FROM_CONFIG}
    facts |= {"checkpoint": source.sha256, "scenes": files, "grid": asdict(wanted.grid)}
    return Plan(wanted, json.loads(json.dumps(facts)), config.micro_batch or 0)


def begun(request: Request, plan: Plan, config: PredictConfig) -> Plan | None:
    """The plan by which a map was begun, which is this one with all that was found out; None where none was.

    Raises:
        ContractError: it is another, or one that only `force` lets through.
    """
    path = request.work / PLAN
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    given = {**plan.identity, "micro_batch": plan.micro_batch or found["micro_batch"]}
    there = {**found["identity"], "micro_batch": found["micro_batch"]}
    if different := [name for name in given if given[name] != there.get(name)]:
        name = different[0]
        raise ContractError(
            f"{request.work} holds blocks of another map ({name}: {there.get(name)}, now {given[name]}); remove that "
            "folder, or give another out="
        )
    _refuse(found["notes"], config)
    return replace(plan, micro_batch=found["micro_batch"], notes=tuple(found["notes"]))


def settle(
    request: Request, scenes: Mapping[str, OpenScene], plan: Plan, source: Checkpoint, config: PredictConfig,
    fitting: Callable[[], int],
) -> Plan:  # fmt: skip
    """The plan that everybody who makes the map follows: the one it was begun by, or this one, which is written down.

    Args:
        request: the map.
        scenes: its scenes, open.
        plan: as proposed.
        source: the model.
        config: what was asked.
        fitting: how many windows a forward takes, asked where nobody has found out.

    Raises:
        ContractError: as `begun`; or the scenes are not what the model is made for, and `force` is not given.
    """
    if found := begun(request, plan, config):
        return found
    notes = _unfit(scenes, source.contract, plan.layout)
    _refuse(notes, config)
    if config.extent == "first" and plan.layout.grid != next(iter(scenes.values())).grid:
        metres = plan.layout.grid.resolution
        log.warning("%s: mapped at %g m per pixel, as the model was trained", request.out, metres)
    record = {"identity": plan.identity, "micro_batch": plan.micro_batch or fitting(), "notes": notes}
    _write_once(request.work / PLAN, record)
    settled = begun(request, plan, config)  # by somebody else, perhaps, who was quicker
    assert settled is not None
    return settled


def _refuse(notes: Sequence[str], config: PredictConfig) -> None:
    if notes and not config.force:
        raise ContractError(f"{'; '.join(notes)}. --force (force=true) maps it nevertheless, and the map says so")


def _file(asset: Asset) -> dict[str, Any]:
    """An asset as it is now; of a file far away no more than its address."""
    path, facts = Path(asset.path), asdict(asset)
    if path.is_file():
        facts |= {"bytes": path.stat().st_size, "modified_ns": path.stat().st_mtime_ns}
    return facts


def _write_once(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a file unless another process, perhaps on another node, has done so meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    try:
        os.link(temporary, path)  # fails where the name exists
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _unfit(scenes: Mapping[str, OpenScene], contract: Contract, wanted: Layout) -> list[str]:
    """What of the scenes the model is not made for: other bands or units, and numbers that cannot be in the unit."""
    found = []
    for name, scene in scenes.items():
        modality, row = contract.modality(name), SENSORS[name]
        if modality.bands != scene.bands or modality.unit != row.unit:
            found.append(
                f"{scene.scene.path}: bands {', '.join(scene.bands)} in {row.unit}, the model was trained on "
                f"{', '.join(modality.bands)} in {modality.unit}"
            )
        looks = Looks(name)
        for window in _some(wanted):
            looks.add(read_tile(scene, wanted.grid.window(window)))
        if reason := looks.suspicion():
            found.append(f"{scene.scene.path}: {reason}")
    return found


def _some(wanted: Layout) -> Sequence[Window]:
    """Windows spread over the whole grid."""
    side = wanted.window
    rows, cols = (range(0, length, side) for length in (wanted.grid.height, wanted.grid.width))
    count = len(rows) * len(cols)
    chosen = sorted({number * count // LOOKS for number in range(LOOKS)})
    return [Window(rows[i // len(cols)], cols[i % len(cols)], side, side) for i in chosen]
