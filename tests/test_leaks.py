"""The leak certificate: ground and keys that a test set shares with what a checkpoint was trained on."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapely

import configs
from pipeline.checkpoint import Checkpoint, find
from pipeline.engine import State
from pipeline.evaluate import evaluate
from pipeline.finetune import finetune
from pipeline.leaks import certificate, in_words
from shards.build import build
from shards.manifest import select, write_manifest
from shards.overlap import shared, square_km
from shards.raster_io import transform_points
from shards.store import open_store
from shards.write import schema
from tests.benchmark_trees import dfc2020_patch, hunan_tile
from tests.small_dataset import CONTRACT, one_thread, quiet

__all__ = ["one_thread", "quiet"]
SIDE = 0.01  # degrees


def square(lon: float, lat: float, width: float = SIDE, height: float = SIDE) -> shapely.Polygon:
    return shapely.box(lon, lat, lon + width, lat + height)


def array(*polygons: shapely.Geometry) -> Any:
    return np.array(polygons, np.object_)


# --- shared ground ---------------------------------------------------------------------------------------------------


def test_areas_are_those_of_an_equal_area_projection() -> None:
    squares = array(square(10, -60), square(10.005, -60), square(-170, 70, 0.5), square(20, 0.3))

    def project(points: Any) -> Any:
        return np.stack(transform_points("OGC:CRS84", "EPSG:6933", points[:, 0], points[:, 1]), axis=1)

    expected = shapely.area(shapely.union_all(shapely.transform(squares, project))) / 1e6
    assert square_km(squares) == pytest.approx(expected, rel=1e-6)  # the first two overlap: counted once
    found = shared(squares[:1], [squares[1:]])
    assert found.km2 == pytest.approx(square_km(squares[:1]) / 2, rel=1e-6) and found.overlapping.tolist() == [True]


def test_neighbours_adjoin_and_do_not_overlap() -> None:
    metre = 1 / 111_320
    mine = array(square(0, 0), square(5, 0), square(10, 0), square(15, 0))
    others = array(square(SIDE, 0), square(5 + SIDE + 0.5 * metre, 0), square(10 + SIDE + 5 * metre, 0))
    found = shared(mine, [others[:1], others[1:]])
    assert found.adjoining.tolist() == [True, True, False, False]
    assert not found.overlapping.any() and found.km2 == 0
    # A neighbour does not hide that another overlaps.
    found = shared(mine[:1], [others[:1], array(square(0.009, 0))])
    assert found.overlapping.tolist() == [True] and not found.adjoining.any()


def test_the_date_line_parts_nobody() -> None:
    across = shapely.MultiPolygon([square(179.99, 50), square(-180, 50)])
    found = shared(array(square(-179.995, 50), across), [array(across)])
    assert found.overlapping.tolist() == [True, True] and found.km2 == pytest.approx(square_km(array(across)))
    for west, east in ((square(179.99, 50), square(-180, 50)), (square(-180, 80), square(179.99, 80))):
        assert shared(array(west), [array(east)]).adjoining.tolist() == [True]


def test_many_dates_and_overlapping_tests_count_once() -> None:
    mine = array(square(0, 0), square(0.005, 0), square(0, 0))
    found = shared(mine, [array(*[square(0, 0)] * 5), array(square(0, 0), square(0.012, 0))])
    assert found.overlapping.all()
    assert found.km2 == pytest.approx(square_km(array(square(0, 0), square(0.012, 0, 0.003))), rel=1e-9)
    assert shared(array(), [mine]).km2 == 0 and shared(mine, [array()]).km2 == 0 and shared(mine, []).km2 == 0


def test_a_thousand_against_ten_thousand() -> None:
    rng = np.random.default_rng(0)
    mine = shapely.box(*(corner := rng.uniform(0, 4, (2, 1000))), *(corner + SIDE))
    others = shapely.box(*(corner := rng.uniform(0, 4, (2, 10_000))), *(corner + SIDE))
    started = time.perf_counter()
    found = shared(mine, np.array_split(others, 4))
    assert time.perf_counter() - started < 60
    for number in range(0, 1000, 97):
        common = shapely.union_all(shapely.intersection(others, mine[number])).area
        assert found.overlapping[number] == (common > 1.5e-5 * SIDE**2)
    everything = shapely.intersection(shapely.union_all(mine), shapely.union_all(others))
    assert found.km2 == pytest.approx(square_km(array(everything)), rel=1e-6)


# --- certificates ----------------------------------------------------------------------------------------------------


def dataset(folder: Path, *samples: tuple[str, str, shapely.Geometry | None], fingerprint: str = "") -> str:
    """A manifest without shards, of samples (key, split, footprint)."""
    rows = [
        {"key": key, "shard": "a.tar", "members": [], "split": split, "group": "g", "classes": [0],
         "geometry": footprint and footprint.wkb}
        for key, split, footprint in samples
    ]  # fmt: skip
    facts = {"format_version": 1, "contract": CONTRACT.to_json(), "fingerprint": fingerprint or folder.name}
    write_manifest(open_store(str(folder)), pa.Table.from_pylist(rows, schema(CONTRACT.sensors)), facts)
    return str(folder)


def training(stage: str, data: str, **more: Any) -> dict[str, Any]:
    known: dict[str, Any] = {
        "where": {},
        "protocol": None,
        "sensors": ["s1"],
        "fingerprint": "",
        "datasets": [Path(data).name],
    }
    return {"stage": stage, "data": data, **known, **more}


def certified(test: str, lineage: Sequence[Any], trained_on: Sequence[str] = (), **facts: Any) -> dict[str, Any]:
    checkpoint = Checkpoint("run", {"lineage": lineage, **facts}, State({}, {}, 0))
    found = certificate(select(test, where={"split": ["test"]}), checkpoint, trained_on)
    assert json.loads(json.dumps(found)) == found
    return found


@pytest.fixture
def benchmark(tmp_path: Path) -> str:
    """Four test samples in a row, one of them twice; two to train on, of which one adjoins; one to validate on."""
    row = [square(SIDE * number, 0) for number in range(5)]
    return dataset(
        tmp_path / "benchmark", ("a", "test", row[0]), ("b", "test", row[1]), ("b2", "test", row[1]),
        ("c", "test", row[2]), ("t", "train", row[3]), ("u", "train", square(3, 3)), ("v", "val", row[1]),
    )  # fmt: skip


def test_every_training_is_looked_at(benchmark: str, tmp_path: Path) -> None:
    scenes = dataset(
        tmp_path / "scenes", ("x", "", square(-0.005, 0)), ("x2", "", square(-0.005, 0)), ("y", "", square(7, 7)),
        ("z", "", None),
    )  # fmt: skip
    trained = [training("pretrain", scenes), training("finetune", benchmark, where={"split": ["train"]})]
    found = certified(benchmark, trained)
    assert found["test"] == {"samples": 4, "located": 4, "km2": pytest.approx(3 * square_km(array(square(0, 0))), 1e-3)}
    pretrained, tuned, validated = found["trainings"]
    counts = ("samples", "located", "overlapping", "adjoining", "same_keys")
    assert [pretrained[name] for name in counts] == [4, 3, 1, 0, 0] and pretrained["unknown"] is None
    assert pretrained["km2"] == pytest.approx(square_km(array(square(0, 0, 0.005))), abs=1e-3)
    assert [tuned[name] for name in counts] == [2, 2, 0, 1, 0] and tuned["role"] == "train"
    assert [validated[name] for name in counts] == [1, 1, 2, 2, 0] and validated["role"] == "val"
    assert found["verdict"] == "overlap"
    words = in_words(found)
    assert words[0].startswith("The test set is not unseen") and "Test: 4 samples" in words[1]
    assert "(4 samples, 1 of them without georeference): 1 of 4 test samples overlap it (0.615 km2)" in words[2]
    assert words[4].startswith(f"finetune val on {benchmark} (1 samples): 2 of 4 test samples overlap it")


def test_a_clean_record(benchmark: str, tmp_path: Path) -> None:
    elsewhere = dataset(tmp_path / "elsewhere", ("x", "", square(50, 50)))
    found = certified(benchmark, [training("pretrain", elsewhere)])
    assert found["verdict"] == "none" and in_words(found)[0].startswith("No ground of the test set was trained")
    # Named by hand, all samples of a dataset count, and it need not have been recorded.
    assert [certified(benchmark, [training("pretrain", elsewhere)], [benchmark])["trainings"][1][name]
            for name in ("stage", "overlapping", "same_keys")] == ["named", 4, 4]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "nowhere"}, "nowhere: not a dataset"),
        ({"datasets": ["another"]}, "has changed since that training"),
        ({"datasets": None}, "has changed since that training"),
        ({"where": {"cloud": [1]}}, "unknown column"),
        (dict.fromkeys(("stage", "data", "where", "protocol", "sensors", "fingerprint")), "was not recorded"),
        ({"protocol": {"name": "dfc2020/competition", "fold": 0, "lists": ""}, "stage": "finetune"}, "is made of"),
    ],
)
def test_what_cannot_be_looked_up_is_unknown(
    change: dict[str, Any], words: str, benchmark: str, tmp_path: Path
) -> None:
    elsewhere = dataset(tmp_path / "elsewhere", ("x", "", square(50, 50)))
    found = certified(benchmark, [{**training("pretrain", elsewhere), **change}])
    (one,) = found["trainings"]
    assert words in one["unknown"] and one["overlapping"] is None and found["verdict"] == "unknown"
    assert "unknown: " in in_words(found)[2] and in_words(found)[0].startswith("It is not known")


def test_gaps_in_the_record(benchmark: str, tmp_path: Path) -> None:
    elsewhere = dataset(tmp_path / "elsewhere", ("x", "", square(50, 50)))
    assert certified(benchmark, [])["verdict"] == "unknown"
    own = [training("finetune", elsewhere)]
    assert certified(benchmark, own)["verdict"] == "none"
    found = certified(benchmark, own, config={"checkpoint": "weights-of-others", "validate_every": 0})
    assert "was not recorded" in found["trainings"][0]["unknown"] and found["verdict"] == "unknown"
    # Checkpoints from before there was a lineage tell their own training by their config.
    config: dict[str, Any] = {"stage": "pretrain", "data": elsewhere, "where": {}, "sensors": ["s1"], "start": None}
    identity = select(elsewhere, modalities=["s1"]).identity
    older = Checkpoint("run", {"config": config, "fingerprint": select(elsewhere, modalities=["s1"]).fingerprint,
                               "data": identity}, State({}, {}, 0))  # fmt: skip
    assert certificate(select(benchmark, where={"split": ["test"]}), older)["verdict"] == "none"


def test_without_georeference_only_keys_are_compared(tmp_path: Path) -> None:
    data = dataset(tmp_path / "hunan", ("a", "test", None), ("b", "test", None), ("t", "train", None))
    trained = training("finetune", data, where={"split": ["train"]})
    found = certified(data, [trained])
    assert found["verdict"] == "unknown" and found["trainings"][0]["unknown"] == "the test's files have no georeference"
    assert (
        found["trainings"][0]["same_keys"] == 0 and "0 of 2 test samples are in it by their keys" in in_words(found)[2]
    )
    everything = certified(data, [training("finetune", data)])
    assert everything["verdict"] == "overlap" and everything["trainings"][0]["same_keys"] == 2


def test_a_test_set_of_which_a_part_is_nowhere_is_not_clean(tmp_path: Path) -> None:
    data = dataset(tmp_path / "mixed", ("a", "test", None), ("b", "test", square(0, 0)))
    found = certified(data, [training("pretrain", dataset(tmp_path / "elsewhere", ("x", "", square(50, 50))))])
    assert found["test"]["located"] == 1 and found["trainings"][0]["unknown"] is None
    assert found["verdict"] == "unknown" and "1 have no georeference" in in_words(found)[1]


# --- from trees ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["dfc2020", "hunan"])
def test_from_an_archive_to_a_number_with_its_certificate(preset: str, tmp_path: Path) -> None:
    if preset == "dfc2020":
        for number in range(6):
            dfc2020_patch(tmp_path / "in", "ROIs0000_test", "0", number)
    else:
        for split, number in (("train", 1), ("train", 2), ("val", 3), ("test", 4)):
            hunan_tile(tmp_path / "in", split, number)
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    build(configs.load(f"shards-{preset}", [f"archive.root={tmp_path / 'in'}", f"out={data}", "workers=1", "tile.size=32"]))  # fmt: skip  # noqa: E501
    small = [
        "model={dims: [8, 16], depths: [1, 1], d_state: 2}",
        "checkpoint=null",
        "epochs=1",
        "engine.precision=fp32",
    ]
    finetune(configs.load(f"finetune-{preset}", [f"data={data}", f"run={run}", *small, "batch.global_batch=2", "track=[]"]))  # fmt: skip  # noqa: E501
    protocol = configs.load(f"finetune-{preset}").protocol.name
    raw = {"stage": "evaluate", "run": str(tmp_path / "scored"), "checkpoint": run, "data": data, "maps": 0}
    evaluate(configs.parse({**raw, "protocol": {"name": protocol}}))
    facts = json.loads((tmp_path / "scored/metrics.json").read_text())
    assert facts["protocol"]["name"] == protocol and facts["data"][0]["protocol"]["role"] == "test"
    trainings = facts["leaks"]["trainings"]
    assert [(one["stage"], one["role"], one["protocol"]) for one in trainings] == [
        ("finetune", "train", protocol), ("finetune", "val", protocol),
    ]  # fmt: skip
    assert find(run).facts["lineage"][0]["datasets"] == [facts["data"][0]["dataset"]]
    if preset == "dfc2020":  # whose paper validates on its test patches
        assert [(one["overlapping"], one["same_keys"]) for one in trainings] == [(0, 0), (1, 1)]
        assert facts["leaks"]["verdict"] == "overlap"
    else:
        assert all(one["unknown"] == "the test's files have no georeference" for one in trainings)
        assert [one["same_keys"] for one in trainings] == [0, 0] and facts["leaks"]["verdict"] == "unknown"
