"""The demo as a whole, on a smaller archive: interrupted, called again, and its report opened in a browser."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rasterio
from rio_cogeo import cog_validate

from pipeline.model import MCFMamba
from pipeline.signals import EXIT_STOPPED
from tests.test_report import chromium, probe  # noqa: F401

STEPS = 12
CODE = (
    "import sys; from pathlib import Path; from launchers.demo import Scale, demo\n"
    "small = Scale(places=4, size=96, seeds=(0, 1), pretrain_steps=12, finetune_steps=3)\n"
    "sys.exit(demo(Path(sys.argv[1]), small))"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished demo and what its second call printed; the first was stopped by Ctrl-C while it pretrained.

    The second call finds no compiler: what the compiled scan began, the scan in torch finishes.
    """
    out = tmp_path_factory.mktemp("demo") / "demo"
    metrics = out / "runs/pretrain/metrics.jsonl"
    command = [sys.executable, "-c", CODE, str(out)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while first.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == EXIT_STOPPED, said
    done = metrics.read_text().count("\n")
    assert 3 <= done < STEPS
    without_compiler = {**os.environ, "PATH": "/nonexistent"}  # the rest also works where there is none
    second = subprocess.run(command, capture_output=True, text=True, check=False, env=without_compiler)
    assert second.returncode == 0, second.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    return out, second.stdout


def test_the_last_line_is_the_verdict(finished: tuple[Path, str]) -> None:
    out, said = finished
    number = r"\d+\.\d"
    pattern = rf"mIoU scratch {number} \+- {number}, pretrained {number} \+- {number} \(2 seeds\), report (.*)"
    found = re.fullmatch(pattern, said.splitlines()[-1])
    assert found, said
    assert Path(found[1]) == out / "report.html"


def test_both_ways_had_the_same_budget_and_labels(finished: tuple[Path, str]) -> None:
    out, _ = finished
    for seed in (0, 1):
        states = [
            json.loads(next((out / f"runs/finetune-{arm}-{seed}/checkpoints").glob("*3/state.json")).read_text())
            for arm in ("scratch", "pretrained")
        ]
        assert states[0]["fingerprint"] == states[1]["fingerprint"]
        changed = {key for key in states[0]["config"] if states[0]["config"][key] != states[1]["config"][key]}
        assert changed == {"run", "checkpoint"}
        assert states[0]["model"] == states[1]["model"]


def test_the_map_covers_the_unseen_scene(finished: tuple[Path, str]) -> None:
    out, _ = finished
    (scene,) = {
        line.split(",")[2]
        for line in (out / "archive/catalog.csv").read_text().splitlines()
        if line.endswith(",predict") and ",s2-l1c," in line
    }
    assert cog_validate(out / "map.tif", quiet=True)[0]
    with rasterio.open(out / "map.tif") as found, rasterio.open(out / "archive" / scene) as source:
        assert (found.crs, found.shape, found.transform) == (source.crs, source.shape, source.transform)
        assert json.loads(found.tags()["classes"])["5"] == "built" and found.colormap(1)[5][:3] == (208, 52, 44)


def test_the_release_opens(finished: tuple[Path, str]) -> None:
    model = MCFMamba.from_pretrained(finished[0] / "release")
    assert list(model.channels) == ["s2-l1c", "s1"] and model.outputs == 8
    assert (finished[0] / "release/eval/finetune-pretrained-0-test.json").exists()


@pytest.mark.browser
def test_the_report_opens_in_a_browser(finished: tuple[Path, str], chromium: str, tmp_path: Path) -> None:  # noqa: F811
    pictures, console = probe(chromium, finished[0] / "report.html", tmp_path)
    assert console == []
    assert len(pictures) >= 7
    assert all(loaded and shown > 200 for loaded, _, shown in pictures)
