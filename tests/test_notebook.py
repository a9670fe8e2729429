"""docs/finetune.ipynb: run as it is committed, by a kernel of its own in an empty folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from shards.raster_io import read_classes

NOTEBOOK = Path(__file__).parent.parent / "docs/finetune.ipynb"


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook: Any) -> str:
    return "".join(output.text for output in outputs(notebook) if output.get("name") == "stdout")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def executed(folder: Path) -> Any:
    """The notebook with what its cells gave; an error in one of them is raised here."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    return client.execute()


def test_the_notebook_runs_from_a_dataset_to_a_map(executed: Any, folder: Path) -> None:
    pictures = [output for output in outputs(executed) if "image/png" in output.get("data", {})]
    assert len(pictures) == 4  # a sample, losses, confusion, map
    scores = [float(value) for value in re.findall(r"step \d+: mIoU ([\d.]+) %", printed(executed))]
    assert len(scores) == 2 and scores[-1] > 100 / 8  # better than one class everywhere
    found = json.loads((folder / "landcover/test/metrics.json").read_text())
    assert f"mIoU {found['mIoU']:.1f} %" in printed(executed) and found["mIoU"] > 100 / 8
    classes = read_classes(folder / "landcover/map.tif")
    assert classes.shape == (256, 256)


def test_what_is_committed_is_small_and_names_no_machine() -> None:
    text = NOTEBOOK.read_text()
    notebook = nbformat.reads(text, as_version=4)
    assert len(text) < 300_000
    assert "of 15 samples" in printed(notebook) and not re.search(r"/(tmp|work|home|root|usr)/", text)
    assert {output.get("name") for output in outputs(notebook)} <= {"stdout", None}
