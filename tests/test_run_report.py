"""The page of a run: what it shows of made-up lines, when it is written, and that it never ends training."""

from __future__ import annotations

import html
import json
import logging
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import figures, report
from pipeline.ranks import Ranks
from pipeline.report import reporter, sections
from pipeline.run import Run
from shards.report import Section, Table, write_report
from tests.small_dataset import CONTRACT
from tests.training_scenarios import config

HOSTILE = "<script>alert('$x_1$')</script>"
FACTS = {"stage": "pretrain", "data": HOSTILE, "parameters": 58123456, "GFLOP per sample": 34.25}
PNG = figures.shares({"a": 1.0}, "ms")


def line(step: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl; two samples a step, half a second each step."""
    io = {"samples": 2, "bytes": 3_000_000, "requests": 5, "wait": 0.1, "held": 9, "retries": 1}
    return {
        "step": step, "samples": 2 * step, "position": 2 * step, "loss": 3.0 / step, "loss/s1": 2.0 / step,
        "loss/dem": 1.0 / step, "lr": 1e-3, "grad_norm": 0.5, "digest": "00", "samples_per_second": 4.0,
        "samples_per_second_per_device": 2.0, "data_wait": 0.25, "memory": 1.5, "io": io, "saving": 75.0, **changes,
    }  # fmt: skip


def skipped(step: int, samples: dict[str, list[str]], why: str = "loss nan") -> dict[str, Any]:
    lost = {"loss": None, "loss/s1": None, "loss/dem": None, "grad_norm": None}
    return line(step, **lost, skipped={"why": why, "samples": samples})


def told(folder: Path, rows: list[dict[str, Any]]) -> list[Section]:
    return sections(folder, rows, {"steps": 100, **FACTS})


def table(found: Sequence[Section], title: str) -> list[list[object]]:
    (section,) = (section for section in found if section.title == title)
    assert isinstance(section, Table)
    return [list(row) for row in section.rows]


def run_of(folder: Path, steps: int = 5, rank: int = 0) -> Run:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").touch()
    return Run(folder, config(folder.parent, folder.name, steps=steps), CONTRACT, "data", Ranks(rank, 2))


def record(run: Run, row: dict[str, Any]) -> None:
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def texts(run: Run) -> str:
    page = (run.folder / "report.html").read_text()
    return re.sub(r"<[^>]+>", " ", page)


def test_the_page_has_every_section_and_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/step-000010.png").write_bytes(PNG)
    (tmp_path / "pictures/step-000020.png").write_bytes(PNG[:-20])  # being written
    rows = [line(step) for step in range(1, 31)]
    rows[9] |= {"probe/mIoU": 41.5, "probe/OA": 70.0, "mfu": 0.3}
    rows[14] = skipped(15, {"0": ["a", "b"], "3": ["c"]})
    rows[19] |= {"rolled_back_to": 10}
    rows[29] |= {"mfu": 0.42, "val/mIoU": 55.25, "val/IoU/water": 90.0}
    found = told(tmp_path, rows)
    titles = ["The run", "Now", "Loss", "Learning rate and gradient", "Speed", "Reading", "Linear probe", "Validation"]
    assert [section.title for section in found] == [*titles, "Reconstructions", "Skipped steps", "Roll backs"]
    assert table(found, "The run")[1:] == [
        ["stage", "pretrain"], ["data", HOSTILE], ["parameters", "58,123,456"], ["GFLOP per sample", "34.25"],
    ]  # fmt: skip
    now = {str(name): value for name, value in table(found, "Now")}
    assert now["step"] == "30 of 100 (30.0%)" and now["loss"] == "0.1" and now["samples seen"] == "60"
    assert (now["samples/s"], now["samples/s per device"], now["waiting for data"]) == ("4", "2", "25.0%")
    assert (now["steps skipped"], now["roll backs"], now["MFU"]) == ("1", "1", "36.0%")
    assert (now["time left"], now["held up by checkpoints"]) == ("0 min 35 s", "1 min 15 s")
    assert now["peak memory of rank 0"] == "1.5 GB"
    reading = {str(row[0]): row[1:] for row in table(found, "Reading")}
    assert reading["MB/s"] == [6.0, 6.0] and reading["requests per step"] == [5.0, 5.0]
    assert reading["retries"] == [30, 30] and "found in the cache (%)" not in reading
    step, why, rank, keys = table(found, "Skipped steps")[0]
    assert (step, str(why).replace("\N{NO-BREAK SPACE}", " "), rank, keys) == ("15", "loss nan", "0", "a, b")
    assert table(found, "Roll backs") == [["20", "10"]]
    captions = {section.title: getattr(section, "caption", "") for section in found}
    assert "step-000010.png" in captions["Reconstructions"] and "mIoU 41.50" in captions["Linear probe"]
    assert "At step 30: val/mIoU 55.25." in captions["Validation"] and "In all: 1;" in captions["Skipped steps"]


@pytest.mark.parametrize("row", [line(1), skipped(1, {})])
def test_a_page_of_one_line_and_of_no_loss_works(tmp_path: Path, row: dict[str, Any]) -> None:
    del row["io"]
    write_report(tmp_path / "report.html", sections(tmp_path, [row], {}), title="t")
    text = (tmp_path / "report.html").read_text()
    assert "Now" in text and "Reading" not in text and text.count("<img") == 3


def test_only_the_last_of_many_skipped_steps_are_named(tmp_path: Path) -> None:
    rows = [skipped(step, {"0": [f"k{n}" for n in range(40)]}) for step in range(1, 200)]
    cells = table(told(tmp_path, rows), "Skipped steps")
    assert len(cells) == report.SKIPS and cells[-1][0] == "199"
    assert str(cells[0][3]).endswith("k7 and 32 more")


def test_a_step_that_was_done_again_is_drawn_once(tmp_path: Path) -> None:
    rows = [line(step) for step in (1, 2, 3, 2, 3, 4)]
    rows[2]["rolled_back_to"] = 1
    found = told(tmp_path, rows)
    with_repeats = [section for section in found if section.title == "Speed"]
    without = [section for section in told(tmp_path, [*rows[:1], *rows[3:]]) if section.title == "Speed"]
    assert with_repeats == without
    assert table(found, "Roll backs") == [["3", "1"]]


@pytest.mark.parametrize("count", [0, 1, 7, 10, 11, 99_999])
def test_thinning_keeps_the_extremes_the_mean_and_the_order(count: int) -> None:
    points = np.column_stack([np.arange(count), np.random.default_rng(0).random(count)])
    if count:
        points[count // 3, 1], points[count // 2, 1] = -50.0, 900.0
    bins = figures.thinned(points, 10)
    assert bins.shape == (min(10, count), 4)
    if count:
        assert (bins[:, 2].min(), bins[:, 3].max()) == (points[:, 1].min(), points[:, 1].max())
        assert (np.diff(bins[:, 0]) > 0).all() and (bins[:, 2] <= bins[:, 1]).all() and (bins[:, 1] <= bins[:, 3]).all()
    if count == 10:
        np.testing.assert_array_equal(bins[:, :2], points)


def test_a_long_run_has_no_larger_page(tmp_path: Path) -> None:
    sizes = []
    for count in (3_000, 30_000):
        rows = [line(step, loss=1 + (step * 7919 % 1000) / 1000) for step in range(1, count + 1)]
        sizes.append(sum(len(found.png) for found in sections(tmp_path, rows, {}) if isinstance(found, report.Figure)))
    assert sizes[1] < 1.5 * sizes[0] < 1_000_000


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run & <b>", steps=1)
    reporter(run, FACTS)(skipped(1, {"0": [HOSTILE]}, why=HOSTILE))
    page = (run.folder / "report.html").read_text()
    assert "<script" not in page and "run & <b>" not in page
    assert html.unescape(page).count(HOSTILE) == 3 and "run &amp; &lt;b&gt;" in page


def test_pages_are_written_after_a_minute_then_once_in_the_interval_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, written = run_of(tmp_path / "run", steps=9), []
    clock = [1000.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])

    def write(path: Path, found: Any, title: str) -> None:
        written.append(table_of(found)["step"])
        clock[0] += 2.0  # so that the next is due 200 seconds later

    monkeypatch.setattr(report, "write_report", write)
    hook = reporter(run, {})
    for step, later in ((1, 59.0), (2, 1.0), (3, 199.0), (4, 1.0), (5, 0.0), (9, 0.0)):
        clock[0] += later
        assert hook(line(step)) == {}
        hook._pool.submit(lambda: None).result()  # type: ignore[attr-defined]
        record(run, line(step))
    assert [step.split()[0] for step in written] == ["2", "4", "9"]


def table_of(found: Any) -> dict[str, str]:
    return {name: value for section in found if section.title == "Now" for name, value in section.rows}


def test_a_page_that_takes_long_is_not_waited_for_but_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, go, written = run_of(tmp_path / "run", steps=3), threading.Event(), []
    monkeypatch.setattr(report, "EVERY_S", 0.0)
    monkeypatch.setattr(report, "SHARE", 0)
    monkeypatch.setattr(report, "write_report", lambda *_, **__: go.wait(60) and written.append(1))
    hook = reporter(run, {})
    hook(line(1))
    hook(line(2))
    assert written == []
    go.set()
    hook(line(3))
    assert len(written) == 2  # none for step 2, when the first was under way


def test_the_last_page_is_complete_when_the_hook_returns(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", steps=3)
    hook = reporter(run, FACTS)
    for step in (1, 2):
        hook(line(step))
        record(run, line(step))
    hook(line(3, loss=0.0123))
    assert "3 of 3 (100.0%)" in texts(run) and "0.0123" in texts(run)
    hook(line(3))  # once more, after a roll back from the last step


def test_a_page_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(tmp_path / "run", steps=3)
    monkeypatch.setattr(report, "EVERY_S", 0.0)
    monkeypatch.setattr(report, "SHARE", 0)
    monkeypatch.setattr(report, "write_report", lambda *_, **__: 1 / 0)
    hook = reporter(run, {})
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            assert hook(line(step)) == {}
            hook._pool.submit(lambda: None).result()  # type: ignore[attr-defined]
    assert [entry.message for entry in caplog.records if entry.name == "pipeline.report"] == [
        f"{run.folder / 'report.html'} could not be written: ZeroDivisionError: division by zero"
    ]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", steps=1, rank=1)
    assert reporter(run, {})(line(1)) == {}
    assert [path.name for path in run.folder.iterdir()] == ["metrics.jsonl"]
