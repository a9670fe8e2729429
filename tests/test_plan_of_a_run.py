"""`launchers.plan`: what it says of a run, checked by hand, against a stream's own ledger and against a real run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import configs
from launchers import is_message
from launchers import plan as planning
from launchers.config import SlurmConfig
from launchers.plan import Plan, PlanError, plan
from pipeline import checkpoint
from pipeline.engine import State
from pipeline.pretrain import pretrain
from shards.manifest import select
from shards.reading import Reading
from shards.stream import Share, Stream
from tests.small_dataset import CONTRACT, one_thread, write_dataset  # noqa: F401
from tests.streams import GAP, far, write_rows

MODEL = {"dims": [8, 16], "depths": [1, 1]}
SIZES = [40, 24, 40]  # samples of the shards of the rows' dataset
SAMPLE = 5000  # bytes of one of its samples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("small") / "data")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "data", SIZES, lambda _: SAMPLE)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets are far away."""
    monkeypatch.setattr(planning, "select", lambda *given, **named: far(select(*given, **named)))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Disks with `free` bytes left."""
    found = SimpleNamespace(free=10**12)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: found)
    return found


def config(data: Any, run: Path, stage: str = "pretrain", **changes: Any) -> Any:
    raw = {"stage": stage, "run": str(run), "data": data, "model": MODEL, "batch": {"global_batch": 6}, "steps": 100}
    return configs.parse({**raw, **changes})


def row(found: Plan, name: str) -> str:
    return dict(found.rows)[name]


def write_lines(run: Path, speeds: list[float], ranks: int = 2, **last: Any) -> None:
    run.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": step, "samples_per_second": speed, "samples_per_second_per_device": speed / ranks}
        for step, speed in enumerate(speeds, 1)
    ]
    lines[-1] |= last
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_checkpoint(run: Path, step: int, dims: tuple[int, ...] = (8, 16)) -> None:
    model = {"dims": list(dims), "depths": [1] * len(dims)}
    facts = {"step": step, "model": model, "contract": CONTRACT.to_json()}
    checkpoint.save(checkpoint.open_store(run), State({"w": torch.zeros(1)}, {}, step), facts)


def numbers(config: Any, channels: dict[str, int], outputs: int) -> int:
    model = planning.MCFMamba(config.model, channels, outputs, "reference")
    return sum(parameter.numel() for parameter in model.parameters())


def test_rows_by_hand(data: str, tmp_path: Path, disk: SimpleNamespace) -> None:
    batch = {"global_batch": 12, "micro_batch": 3}
    settings = config(data, tmp_path / "run", sensors=["s1"], batch=batch, checkpoint_every=30, optim={"ema": 0.9})
    found = plan(settings, 2, step_seconds=0.5)
    assert row(found, "run") == f"{tmp_path / 'run'} begins"
    assert row(found, "steps") == "100, 100 of them left"
    assert row(found, "global batch") == "12 = 2 ranks x 3 a micro-batch x 2 accumulated"
    assert row(found, "samples") == "16 in 2 shards"
    assert row(found, "epochs") == "75.00"  # 1200 / 16, and no tail
    members = pq.read_table(Path(data) / "manifest.parquet")["members"].to_pylist()
    epoch = sum(each[-1]["offset"] + each[-1]["bytes"] - each[0]["offset"] for each in members)
    assert epoch > 16 * 32 * 32 * 4 * 3  # float32 of two bands and a DEM, which is read along
    assert row(found, "read") == f"about {epoch / 1e3:.0f} kB an epoch, {75 * epoch / 1e6:.3g} MB in the run"
    assert row(found, "requests") == "about 16 an epoch, single samples from a folder"
    count = numbers(settings, {"s1": 2}, 2)
    assert row(found, "parameters") == f"{count / 1e6:.2f} million"
    size = 4 * 4 * count  # parameters, two moments, average; at steps 30, 60, 90, 100
    each, all_ = f"{size / 1e3:.0f} kB each", f"{4 * size / 1e6:.3g} MB"
    text = f"{each}, at most 4 at a time (one being written): {all_}; 1.0 TB free in {tmp_path}"
    assert row(found, "checkpoints") == text
    assert row(found, "step") == "0.5 s, as given"
    assert row(found, "time") == "1.8 min for 100 steps and 1 start of 60 s, without validation"  # 50 + 60 s
    assert not found.warnings and "cache" not in dict(found.rows) and "slurm" not in dict(found.rows)
    assert not (tmp_path / "run").exists()


def test_the_text_is_aligned_and_warnings_come_last() -> None:
    text = Plan([("a", "one"), ("long name", "two")], ["mind this"]).text()
    assert text.splitlines() == ["a          one", "long name  two", "warning: mind this"]


def test_the_tail_is_the_last_epochs_part(data: str, tmp_path: Path) -> None:
    assert row(plan(config(data, tmp_path / "run"), 1), "epochs") == "37.50; 8 samples of the last"


@pytest.mark.parametrize(
    ("changes", "samples"),
    [({}, 8), ({"fraction": 0.75}, 6), ({"limit": 7}, 7), ({"where": {"split": ["val", "train"]}}, 12)],
)
def test_finetuning_counts_its_labelled_samples(data: str, tmp_path: Path, changes: Any, samples: int) -> None:
    settings = config(data, tmp_path / "run", "finetune", sensors=["s1"], **{"where": {"split": ["train"]}, **changes})
    found = plan(settings, 1)
    assert row(found, "samples") == f"{samples} in 2 shards"
    assert row(found, "epochs").startswith(f"{600 / samples:.2f}")
    assert row(found, "parameters") == f"{numbers(settings, {'s1': 2}, 3) / 1e6:.2f} million"


def test_mixed_datasets_have_epochs_of_their_own(data: str, rows: str, tmp_path: Path) -> None:
    found = plan(config({data: 1, rows: 3}, tmp_path / "run"), 1)
    assert row(found, "samples") == "120 in 5 shards"
    assert row(found, "epochs") == f"{150 / 16:.2f} of {data}, {450 / 104:.2f} of {rows}"


def ledger(selection: Any, ranks: int, lanes: int, epochs: int) -> dict[str, float]:
    """What all ranks together really read."""
    total = {"requests": 0.0, "bytes": 0.0}
    reading = Reading(ahead=1, threads=1)
    for rank in range(ranks):
        stream = Stream(selection, 0, lanes, Share(8, ranks, rank), 0, reading)
        items = stream.members()
        assert sum(1 for _ in islice(items, epochs * len(selection) // ranks)) > 0
        items.close()  # type: ignore[attr-defined]
        total = {name: total[name] + stream.ledger[name] for name in total}
    return total


@pytest.mark.parametrize(
    ("away", "ranks", "lanes", "where", "how"),
    [
        (False, 1, 4, {}, "single samples from a folder"),
        (True, 1, 4, {}, "blocks of up to 8 samples from the network"),
        (True, 2, 4, {}, "blocks of up to 8 samples from the network"),
        (True, 2, 3, {}, "single samples from the network"),
        (True, 1, 16, {"split": ["train"]}, "blocks of up to 8 samples from the network"),
        (True, 1, 4, {"split": ["val"]}, "single samples from the network"),
    ],
)
def test_requests_and_bytes_are_about_those_of_a_stream(
    rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: bool, ranks: int, lanes: int, where: Any, how: str
) -> None:
    place = far if away else lambda selection: selection
    monkeypatch.setattr(planning, "select", lambda *given, **named: place(select(*given, **named)))
    settings = config(rows, tmp_path / "run", lanes=lanes, where=where, batch={"global_batch": 8})
    found, selection = plan(settings, ranks), place(select(rows, where=where))
    real = ledger(selection, ranks, lanes, 10)
    said = int(row(found, "requests").removeprefix("about ").split(" an epoch, ")[0])
    assert row(found, "requests").endswith(how)
    assert 1 / 1.5 < said / (real["requests"] / 10) < 1.5
    size, unit = row(found, "read").removeprefix("about ").split()[:2]
    assert 1 / 1.5 < float(size) * {"kB": 1e3, "MB": 1e6}[unit] / (real["bytes"] / 10) < 1.5


def test_what_is_far_says_which_lanes_would_do(rows: str, tmp_path: Path, remote: None) -> None:
    (warning,) = plan(config(rows, tmp_path / "run"), 3).warnings
    assert warning.startswith("lanes=32 is no multiple of 3 ranks") and "write lanes=33," in warning
    assert not plan(config(rows, tmp_path / "run", lanes=33), 3).warnings


def test_a_cache_by_hand(rows: str, tmp_path: Path, remote: None, disk: SimpleNamespace) -> None:
    reading = {"cache_dir": str(tmp_path / "cache"), "cache_limit": 10**6}
    found = plan(config(rows, tmp_path / "run", lanes=1, reading=reading), 1)
    first, second, last = (count * (GAP + SAMPLE) for count in SIZES)
    now = sum(
        (first, second, last)[shard] for shard in Stream(select(rows), 0, 1, Share(1)).order.orders[0].upcoming(0)
    )
    text = f"{now / 1e3:.0f} kB of tars at a time on each node, {(first + second + last) / 1e3:.0f} kB in all"
    assert now < first + second + last  # one lane reads a tar, and then the next
    assert row(found, "cache") == f"{text}, under cache_limit 1 MB; fetched once by about 3 requests"
    assert row(found, "requests") == "about 104 an epoch, single samples from the node's cache"
    assert not found.warnings and not (tmp_path / "cache").exists()
    small = plan(config(rows, tmp_path / "run", lanes=1, reading=reading | {"cache_limit": 10**5}), 1)
    assert "fetched every epoch" in row(small, "cache")
    assert f"write reading.cache_limit={now} or more" in small.warnings[0]


def test_a_cache_that_the_disk_cannot_hold(rows: str, tmp_path: Path, remote: None, disk: SimpleNamespace) -> None:
    settings = config(rows, tmp_path / "run", reading={"cache_dir": str(tmp_path / "no/such"), "cache_limit": 10**9})
    disk.free = 522_495  # of 104 samples of 5024 bytes, one byte too little; checkpoints take more
    with pytest.raises(PlanError, match=f"reading.cache_limit=1000000000: the cache will take 522 kB.*{tmp_path} has"):
        plan(settings, 1)
    tar = tmp_path / "no/such/mcf-tars/x/a.tar"
    tar.parent.mkdir(parents=True)
    tar.write_bytes(b"1")  # what the cache holds already is not needed once more
    with pytest.raises(PlanError) as refused:
        plan(settings, 1)
    assert "cache_limit" not in str(refused.value)


def test_the_disks_of_nodes_are_others(rows: str, tmp_path: Path, remote: None, disk: SimpleNamespace) -> None:
    settings = config(rows, tmp_path / "run", reading={"cache_dir": str(tmp_path / "c")}, store="s3://bucket/run")
    disk.free = 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "store_of", lambda _: SimpleNamespace(url="s3://bucket/run", list=lambda _: []))
        found = plan(settings, 1, SlurmConfig())
    assert row(found, "checkpoints").endswith("in s3://bucket/run")
    assert any("the cache will take 522 kB more" in warning for warning in found.warnings)


def test_a_folder_is_not_cached(data: str, tmp_path: Path) -> None:
    found = plan(config(data, tmp_path / "run", reading={"cache_dir": str(tmp_path / "cache")}), 1)
    assert row(found, "cache") == "none: the data lie in a folder, which is not cached"


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 4),  # three, and the one being written
        ({"checkpoint_every": 50}, 2),  # there are no more
        ({"keep_best": "loss"}, 5),
        ({"keep_every": 20}, 9),  # five multiples
    ],
)
def test_how_many_checkpoints_are_kept(data: str, tmp_path: Path, changes: Any, most: int) -> None:
    found = plan(config(data, tmp_path / "run", **{"checkpoint_every": 10, **changes}), 1)
    assert f"at most {most} at a time" in row(found, "checkpoints")


def test_checkpoints_that_the_disk_cannot_hold(data: str, tmp_path: Path, disk: SimpleNamespace) -> None:
    disk.free = 1000
    with pytest.raises(PlanError, match=f"^keep=3, keep_every=0: checkpoints will take .*{tmp_path} has 1 kB free"):
        plan(config(data, tmp_path / "run"), 1)


def test_parts_and_hours(data: str, tmp_path: Path) -> None:
    slurm = SlurmConfig(time_min=10, signal_delay_s=60, max_requeues=4)
    settings = config(data, tmp_path / "run", steps=1000)
    found = plan(settings, 1, slurm, step_seconds=2)
    # A part steps for 600 - 60 - 60 s.
    assert row(found, "slurm") == "time limit 10.0 min: 5 parts of 240 steps at most, 4 requeues of 4"
    assert row(found, "time") == "38.3 min for 1,000 steps and 5 starts of 60 s, without validation"  # 2300 s
    assert not found.warnings
    (warning,) = plan(settings, 1, SlurmConfig(time_min=10, signal_delay_s=60, max_requeues=2), step_seconds=2).warnings
    assert warning.startswith("max_requeues=2: the run needs 4, and stays down at about step 720; write max_requeues=4")
    write_checkpoint(tmp_path / "run", 500)
    later = plan(settings, 1, slurm, step_seconds=18)
    assert row(later, "run").endswith("goes on from step 500")
    assert row(later, "slurm") == "time limit 10.0 min: 20 parts of 26 steps at most, 19 requeues of 4"
    assert row(later, "time") == "2.8 h for 500 steps and 20 starts of 60 s, without validation"  # 10200 s


def test_the_time_of_a_step_is_measured(data: str, tmp_path: Path) -> None:
    settings, run = config(data, tmp_path / "run"), tmp_path / "run"
    assert row(plan(settings, 2), "step") == "unknown: give --step-seconds, or run --profile"
    assert "time" not in dict(plan(settings, 2).rows)
    assert row(plan(settings, 2, SlurmConfig()), "slurm") == "time limit 1.0 h; parts unknown, as a step is"
    profile = tmp_path / "run-profile"
    write_lines(profile, [1.0, 12.0, 12.0])
    text = f"0.5 s, median of the last 3 steps in {profile / 'metrics.jsonl'}, 2 ranks"
    assert row(plan(settings, 2), "step") == text
    write_lines(run, [1000.0] * 90 + [1.5] * 51 + [100.0] * 49)  # of the last 100, most took 4 s
    text = f"4 s, median of the last 100 steps in {run / 'metrics.jsonl'}, 2 ranks"
    assert row(plan(settings, 2), "step") == text and not plan(settings, 2).warnings
    (warning,) = plan(settings, 3).warnings
    assert "is of 2 ranks, this run of 3" in warning
    assert row(plan(settings, 3, step_seconds=7), "step") == "7 s, as given"


def test_a_signal_that_comes_too_late(data: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "run", [6.0] * 9, save_budget=40.5)
    settings = config(data, tmp_path / "run")
    (warning,) = plan(settings, 2, SlurmConfig(signal_delay_s=40)).warnings
    assert warning.startswith("signal_delay_s=40: ") and "40.5 s (save_budget of step 9)" in warning
    assert warning.endswith("write signal_delay_s=81")
    assert not plan(settings, 2, SlurmConfig(signal_delay_s=41)).warnings
    assert not plan(settings, 2).warnings


def refusals() -> Iterator[Any]:
    yield {"batch": {"global_batch": 7}}, 2, None, "batch.global_batch=7 cannot be split over 2 ranks.*multiple of 2"
    text = "batch.global_batch=32: the selection has 16 samples, fewer.*write batch.global_batch=16 or less"
    yield {"batch": {"global_batch": 32}}, 2, None, text
    # 60 s to start, 3 s a step and 57 s before the end are just the two minutes.
    text = r"time_min=2: 120 s are not more than .*60 s.*3 s.* signal_delay_s=57; write time_min=3 or more"
    yield {}, 2, SlurmConfig(time_min=2, signal_delay_s=57), text
    text = "gpus_per_node=0: engine.precision=fp16: needs a CUDA GPU.*write gpus_per_node=N"
    yield {"engine": {"precision": "fp16"}}, 2, SlurmConfig(), text
    yield {"engine": {"offload": "optimizer"}}, 2, SlurmConfig(), "gpus_per_node=0: engine.offload: needs"


@pytest.mark.parametrize(("changes", "ranks", "slurm", "message"), list(refusals()))
def test_refusals_say_what_to_write(
    data: str, tmp_path: Path, changes: Any, ranks: int, slurm: SlurmConfig | None, message: str
) -> None:
    with pytest.raises(PlanError, match=message) as refused:
        plan(config(data, tmp_path / "run", **changes), ranks, slurm, step_seconds=3)
    assert "\n" not in str(refused.value) and is_message(refused.value)


def test_what_just_fits_is_not_refused(data: str, tmp_path: Path) -> None:
    settings = config(data, tmp_path / "run", batch={"global_batch": 16}, engine={"precision": "fp16"})
    found = plan(settings, 2, SlurmConfig(time_min=2, signal_delay_s=56, gpus_per_node=2, max_requeues=99), 3)
    assert row(found, "slurm").startswith("time limit 2.0 min: 100 parts of 1 step") and not found.warnings


def test_all_problems_are_told_at_once(data: str, tmp_path: Path, disk: SimpleNamespace) -> None:
    disk.free = 0
    settings = config(data, tmp_path / "run", batch={"global_batch": 33}, engine={"precision": "fp16"})
    with pytest.raises(PlanError) as refused:
        plan(settings, 2, SlurmConfig(time_min=1))
    starts = [line.split("=")[0] for line in str(refused.value).splitlines()]
    assert starts == ["batch.global_batch", "batch.global_batch", "keep", "time_min", "gpus_per_node"]


def test_a_start_is_counted_by_its_own_structure(data: str, tmp_path: Path) -> None:
    settings = config(data, tmp_path / "run", start=str(tmp_path / "other"))
    (warning,) = plan(settings, 1).warnings
    assert warning.startswith(f"the parameters are those of model: of the config, since {tmp_path / 'other'}: no check")
    write_checkpoint(tmp_path / "other", 5, (16, 32))
    wide = configs.parse({**configs.to_dict(settings), "model": {"dims": [16, 32], "depths": [1, 1]}})
    found = plan(settings, 1)
    assert row(found, "parameters") == f"{numbers(wide, {'s1': 2, 'dem': 1}, 3) / 1e6:.2f} million"
    assert row(found, "run").endswith("begins") and not found.warnings


def test_a_damaged_checkpoint_is_told(data: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", 50)
    (tmp_path / "run/checkpoints/step-000050/state.json").write_text("{")
    (warning,) = plan(config(data, tmp_path / "run"), 1).warnings
    assert "step-000050 is not a whole checkpoint" in warning and "planned from step 0" in warning


def test_a_real_run_takes_what_was_planned_and_is_told_to_be_finished(data: str, tmp_path: Path) -> None:
    settings = config(data, tmp_path / "run", steps=2, optim={"ema": 0.5}, track=[])
    planned = plan(settings, 1)
    pretrain(settings)
    size = sum(path.stat().st_size for path in (tmp_path / "run/checkpoints").rglob("*.safetensors"))
    said = float(row(planned, "checkpoints").split(" MB each")[0]) * 1e6
    assert 0.99 * said < size < 1.2 * said  # names and shapes besides
    found = plan(settings, 1, SlurmConfig(time_min=1))
    assert found.rows == (("run", f"{tmp_path / 'run'} is finished: all 2 steps are done, and nothing will happen"),)
    other = plan(configs.parse({**configs.to_dict(settings), "steps": 3}), 1)
    assert row(other, "steps") == "3, 1 of them left" and "last 2 steps in" in row(other, "step")
