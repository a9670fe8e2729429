"""docs/releases.md: its Python is run as written, but for the folder's name and the size of the images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from pipeline.model import MCFMamba, ModelConfig, save
from shards.contract import CONVERSIONS
from tests.small_dataset import CONTRACT

TEXT = (Path(__file__).parent.parent / "docs/releases.md").read_text()


def test_the_examples_run(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    model = MCFMamba(ModelConfig(dims=(8, 16), depths=(1, 1), d_state=2), CONTRACT.channels, 3)
    save(tmp_path / "release", model, CONTRACT.to_json(), "")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for example in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
            exec(example.replace("256", "32"), found)
    assert found["logits"].shape == (1, 3, 32, 32) and found["contract"] == CONTRACT
    assert "s1 ('VV', 'VH') dB (-25.0, 0.0)" in capsys.readouterr().out


def test_what_the_table_says_is_what_the_messages_say() -> None:
    for way in ("10 log10(x)", "20 log10(x)", "x * 10000"):
        assert way in TEXT and any(text.startswith(way) for text in CONVERSIONS.values())
