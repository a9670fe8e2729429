"""A dataset over the tars of an archive: read where they lie, in the same order and with the same pixels as shards."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import configs
from shards.build import build
from shards.index import _parts, index
from shards.manifest import read_facts, select
from shards.plan import BuildError, plan
from shards.store import open_store
from shards.stream import Share, Stream
from shards.verify import verify
from tests.benchmark_trees import SIZE
from tests.scenes import make_archive, shards_config
from tests.terramesh_trees import terramesh, values


def config(root: Path, out: Path, *overrides: str) -> Any:
    given = (f"archive.root={root}", f"out={out}", "sensors=[s2-l2a,s1,dem]", "tile.max_cloud=1", f"tile.size={SIZE}")
    return configs.load("shards-terramesh", (*given, *overrides))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("index")
    terramesh(root / "TerraMesh")
    index(config(root / "TerraMesh", root / "indexed"))
    return root


def test_samples_are_those_of_shards_built_from_the_same_archive(folder: Path, tmp_path: Path) -> None:
    build(config(folder / "TerraMesh", tmp_path / "built", "workers=1"))
    indexed, built = select(str(folder / "indexed")), select(str(tmp_path / "built"))
    assert indexed.contract == built.contract and len(indexed) == len(built) == 3
    shards = Stream(built, 0, 1, Share(1))
    seen = []
    for sample, position in islice(Stream(indexed, 5, 2, Share(1)), 6):
        seen.append((position, sample.key))
        for name, tile in shards.at(f"{sample.key}-00000-00000").tiles.items():
            np.testing.assert_array_equal(sample.tiles[name].values, tile.values)
            np.testing.assert_array_equal(sample.tiles[name].valid, tile.valid)
    assert len({key for _, key in seen[:3]}) == len({key for _, key in seen[3:]}) == 3
    assert [(p, sample.key) for sample, p in islice(Stream(indexed, 5, 2, Share(1), 2), 4)] == seen[2:]


def test_nothing_but_a_manifest_is_written_and_both_can_move_together(folder: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in (folder / "indexed").iterdir()) == ["dataset.json", "manifest.parquet"]
    facts = read_facts(open_store(folder / "indexed"))
    assert facts["foreign"]["root"] == "../TerraMesh" and facts["archive"]["licence"] == "CC-BY-SA-4.0"
    (tmp_path / "moved").symlink_to(folder)
    sample = Stream(select(str(tmp_path / "moved/indexed"), modalities=["s1"]), 0, 1, Share(1)).at(
        "majortom_train_0000009"
    )
    np.testing.assert_array_equal(sample.tiles["s1"].values, values("S1RTC", 1, 2, SIZE, SIZE)[0].astype(np.float32))
    assert list(sample.tiles) == ["s1"]


def test_verify_names_tars_that_are_gone_short_or_damaged(folder: Path, tmp_path: Path) -> None:
    assert verify(str(folder / "indexed")) == []
    terramesh(tmp_path / "TerraMesh")
    index(config(tmp_path / "TerraMesh", tmp_path / "indexed"))
    gone, short = (
        tmp_path / f"TerraMesh/train/{name}"
        for name in ("DEM/majortom_shard_000002.tar", "S1GRD/ssl4eos12_shard_000001.tar")
    )
    gone.unlink()
    short.write_bytes(short.read_bytes()[:2000])
    found = verify(str(tmp_path / "indexed"))
    assert any("DEM/majortom" in line and "No such file" in line for line in found)
    assert any("S1GRD/ssl4eos12" in line and "truncated" in line for line in found)


def test_what_cannot_be_indexed_is_refused(folder: Path, tmp_path: Path) -> None:
    make_archive(tmp_path, sensors=("s1",))
    with pytest.raises(BuildError, match="only archives of tars of zarr groups can be indexed; use mcf shards build"):
        index(shards_config(tmp_path, tmp_path / "out", "label=null", "sensors=[s1]", "tile.size=96"))
    planned = plan(config(folder / "TerraMesh", tmp_path / "out"))
    small = replace(planned, views=tuple(replace(view, size=16, stride=16) for view in planned.views))
    with pytest.raises(BuildError, match=f"{SIZE} x {SIZE} pixels, and an index cannot cut"):
        _parts(config(folder / "TerraMesh", tmp_path / "out"), small)
