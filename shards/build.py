"""Building a dataset: this builder's share of the planned shards, and the merge when there is only one share.

For each shard that is not finished yet, the scenes of one view after the other are opened and read in blocks of many
windows, so that every block of a file is decoded once; tiles with too few valid pixels, too much cloud or too large a
shift are left out and counted; then the tar is written, and then its record. The record is the mark of a finished
shard: what a killed builder leaves behind is at most a tar without record, which is written again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from itertools import groupby, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from shards.coarse import stretches
from shards.config import ShardsConfig
from shards.grid import Grid, Window
from shards.labels import OpenLabel, open_label
from shards.merge import check_contract, merge
from shards.plan import BuildError, Item, Plan, View, plan, shard_name
from shards.plausible import Looks
from shards.raster_io import footprint, is_geographic
from shards.register import shift, stand_ins
from shards.sample import Sample, Tile
from shards.scene import LABEL, SceneError
from shards.store import Store, open_store
from shards.tally import Tally
from shards.tile import OpenScene, is_empty, open_scene, read_cloud, read_tile
from shards.write import ShardRecord, finish_shard, read_record, write_shard

__all__ = ["BuildError", "build", "build_shard", "merge", "plan", "unfinished_parts"]

BLOCK_BYTES = 128 << 20  # of values that are read at once; warping takes about three times as much


def build(config: ShardsConfig) -> Tally:
    """Build this part of a dataset, and merge it when there is only one part.

    Returns:
        What was done, and which files were skipped under `on_error=skip`.

    Raises:
        BuildError, ArchiveError, SceneError, StoreError: nothing is lost; run the same command again to go on.
    """
    store = open_store(config.out)
    planned = plan(config)
    check_contract(config, planned)
    part, parts = map(int, config.part.split("/"))
    mine = [i for i in range(planned.shards) if i % parts == part - 1]
    finished = _finished(store, config, planned)
    todo = [i for i in mine if shard_name(config, i) not in finished]
    tally = Tally(len(mine) - len(todo))
    tally.skip(planned.problems)
    if config.on_error == "skip":
        for name in (shard_name(config, i) for i in sorted({*mine} - {*todo})):
            tally.skip(read_record(store, name)[0].skipped)
    _build_shards(config, planned, todo, tally)
    if parts == 1:
        merge(config, planned, store)
    tally.retries.update(store.retries)
    return tally


def unfinished_parts(config: ShardsConfig, parts: int) -> list[int]:
    """Which of the parts k = 1 ... `parts` have shards that are not built yet.

    Raises:
        BuildError, ArchiveError, SceneError, StoreError: as `build`.
    """
    planned = plan(config)
    finished = _finished(open_store(config.out), config, planned)
    return sorted({i % parts + 1 for i in range(planned.shards) if shard_name(config, i) not in finished})


def _finished(store: Store, config: ShardsConfig, planned: Plan) -> set[str]:
    """Names of the shards that are done; refuses a folder in which another plan was begun."""
    names = {name.removesuffix(".parquet") for name in store.list(f"{config.name}-") if name.endswith(".parquet")}
    for name in sorted(names)[:1]:
        _, found, _ = read_record(store, name)
        if found != planned.fingerprint:
            raise BuildError(
                f"{store.url}: holds {config.name}-* of another build (other archive content, sensors or tiling); "
                "give another out=, add to that dataset under another name=, or remove that folder"
            )
    return names


def _build_shards(config: ShardsConfig, planned: Plan, todo: Sequence[int], tally: Tally) -> None:
    """Builds shards under a progress bar, and counts."""
    total = sum(len(planned.shard(index)) for index in todo)
    note = f" ({tally.finished} shards were finished before)" if tally.finished else ""
    with tqdm(total=total, desc=f"build{note}", unit="tile", disable=None) as bar:
        for record, tiles in _run(config, planned, todo):
            tally.add(record)
            bar.set_postfix_str(tally.note(), refresh=False)
            bar.update(tiles)


def _run(config: ShardsConfig, planned: Plan, todo: Sequence[int]) -> Iterator[tuple[ShardRecord, int]]:
    if config.workers == 1 or len(todo) < 2:
        for index in todo:
            items = planned.shard(index)
            yield build_shard(config, planned.fingerprint, index, items), len(items)
        return
    waiting = iter(todo)
    with ProcessPoolExecutor(config.workers, get_context("spawn")) as pool:
        running: dict[Future[ShardRecord], int] = {}
        try:
            # A few ahead of the workers, so that memory does not grow with the number of shards.
            while True:
                for index in islice(waiting, 2 * config.workers - len(running)):
                    items = planned.shard(index)
                    running[pool.submit(build_shard, config, planned.fingerprint, index, items)] = len(items)
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield future.result(), running.pop(future)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def build_shard(config: ShardsConfig, fingerprint: str, index: int, items: Sequence[Item]) -> ShardRecord:
    """Read, write and record one planned shard."""
    store, left_out, skipped = open_store(config.out), Counter[str](), list[str]()
    counts = Counter[str]()
    samples = _measured(_samples(config, items, left_out, skipped), counts)
    record = write_shard(samples, store, shard_name(config, index), config.encoding)
    record.left_out, record.skipped, record.stretches = dict(left_out), skipped, dict(counts)
    finish_shard(record, store, fingerprint, config.sensors)
    record.retries = store.retries
    return record


def _measured(samples: Iterator[Sample], found: Counter[str]) -> Iterator[Sample]:
    """The samples; counts stretches of their raster labels, where the pixels' size is known."""
    for sample in samples:
        crs, transform = sample.meta["crs"], sample.meta["transform"]
        if sample.label is not None and sample.instances is None and crs and not is_geographic(crs):
            count, short = stretches(sample.label, math.hypot(transform[0], transform[3]))
            found.update({"all": count, "short": short})
        yield sample


def _samples(
    config: ShardsConfig, items: Sequence[Item], left_out: Counter[str], skipped: list[str]
) -> Iterator[Sample]:
    for _, group in groupby(items, key=lambda item: item.view.stem):
        members, poor = list(group), Counter[str]()
        try:
            # A view is read whole before any of it is written, so that a damaged file leaves nothing half done.
            yield from list(_view_samples(config, members, poor))
            left_out.update(poor)
        except SceneError as error:
            if config.on_error == "fail":
                raise
            skipped.append(str(error))
            left_out["unreadable"] += len(members)


def _view_samples(config: ShardsConfig, items: Sequence[Item], left_out: Counter[str]) -> Iterator[Sample]:
    view = items[0].view
    looks = {name: Looks(name) for name in config.sensors}
    with ExitStack() as stack:
        opened, label = _open(config, view, stack)
        for block in _blocks(items, sum(len(scene.bands) * scene.dtype.itemsize for scene in opened.values())):
            yield from _block_samples(config, block, opened, label, looks, left_out)
        for name, seen in looks.items():
            if seen.valid == 0 and is_empty(opened[name]):
                raise SceneError(opened[name].scene.path, f"holds no valid pixel of {name}")
            if reason := seen.suspicion():
                raise SceneError(opened[name].scene.path, reason)


def _open(config: ShardsConfig, view: View, stack: ExitStack) -> tuple[dict[str, OpenScene], OpenLabel | None]:
    opened, label = {}, None
    for scene in view.place.scenes:
        if scene.sensor != LABEL:
            opened[scene.sensor] = stack.enter_context(open_scene(scene, view.place.coregistered))
        elif config.label is not None:
            label = stack.enter_context(open_label(scene, config.label, view.place.coregistered))
    return opened, label


def _blocks(items: Sequence[Item], pixel_bytes: int) -> Iterator[list[Item]]:
    """Runs of items whose common window is small enough to be read at once."""
    block: list[Item] = []
    outer = items[0].window
    for item in items:
        outer = Window.around([outer, item.window])
        if block and outer.height * outer.width * pixel_bytes > BLOCK_BYTES:
            yield block
            block, outer = [], item.window
        block.append(item)
    yield block


def _block_samples(
    config: ShardsConfig, block: Sequence[Item], opened: Mapping[str, OpenScene], label: OpenLabel | None,
    looks: Mapping[str, Looks], left_out: Counter[str],
) -> Iterator[Sample]:  # fmt: skip
    view, outer = block[0].view, Window.around([item.window for item in block])
    grid = view.grid.window(outer)
    read = {name: read_tile(opened[name], grid) for name in config.sensors}
    for name, tile in read.items():
        looks[name].add(tile)
    clouds = {name: cloud for name in config.sensors if (cloud := read_cloud(opened[name], grid)) is not None}
    classes, instances = label.read(grid) if label else (None, None)
    for item in block:
        cut = item.window.within(outer)
        tiles = {name: Tile(t.values[:, *cut], t.valid[cut], t.time) for name, t in read.items()}
        facts = _facts(view, view.grid.window(item.window))
        facts["cloud"] = _cloud(tiles, {name: cloud[cut] for name, cloud in clouds.items()})
        reason = _too_poor(config, tiles, facts["cloud"])
        if not reason:
            facts["shift"] = _shifts(tiles)
            reason = _too_far(config, facts["shift"])
        if reason:
            left_out[reason] += 1
            continue
        yield Sample(
            item.key, tiles, None if classes is None else classes[cut], facts,
            None if instances is None else instances[cut],
        )  # fmt: skip


def _cloud(tiles: Mapping[str, Tile], clouds: Mapping[str, NDArray[np.bool_]]) -> float | None:
    """Share of valid pixels under cloud, of the cloudiest modality; None where no product tells."""
    shares = [
        float((cloud & tiles[name].valid).sum() / max(tiles[name].valid.sum(), 1)) for name, cloud in clouds.items()
    ]
    return max(shares, default=None)


def _too_poor(config: ShardsConfig, tiles: Mapping[str, Tile], cloud: float | None) -> str:
    limits = config.tile
    for name, tile in tiles.items():
        if tile.fraction < limits.min_valid:
            return f"valid fraction of {name} under {limits.min_valid:g}"
    if limits.max_cloud is not None and cloud is not None and cloud > limits.max_cloud:
        return f"cloud over {limits.max_cloud:g}"
    return ""


def _shifts(tiles: Mapping[str, Tile]) -> dict[str, list[float] | None]:
    """By how many (rows, columns) each modality lies off the first; None where that cannot be told."""
    first, *others = tiles
    found: dict[str, list[float] | None] = {}
    for name in others:
        seen = shift(tiles[first], tiles[name], stand_ins(first), stand_ins(name))
        found[name] = None if seen is None else [round(seen.rows, 2), round(seen.cols, 2)]
    return found


def _too_far(config: ShardsConfig, found: Mapping[str, Sequence[float] | None]) -> str:
    limit = config.tile.max_shift
    for name, off in found.items():
        if limit is not None and off is not None and math.hypot(*off) > limit:
            return f"{name} lies more than {limit:g} px off"
    return ""


def _facts(view: View, grid: Grid) -> dict[str, Any]:
    place = view.place
    return {
        **place.facts,
        "place": place.name,
        "group": place.group,
        "split": place.split,
        "crs": grid.crs,
        "transform": list(grid.transform),
        "sources": [Path(asset.path).name + (f"/{asset.item}" if asset.item else "")
                    for scene in place.scenes for asset in scene.assets],
        "footprint": footprint(grid.crs, grid.corners()) if grid.crs else None,
    }  # fmt: skip
