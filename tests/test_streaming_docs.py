"""docs/streaming.md: its Python is run as written, but for the names of datasets and smaller batches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.small_dataset import write_dataset

ROOT = Path(__file__).parent.parent


def test_the_examples_run(tmp_path: Path) -> None:
    data = write_dataset(tmp_path)
    torch_example, plain = re.findall(r"```python\n(.*?)```", (ROOT / "docs/streaming.md").read_text(), re.DOTALL)
    changes = {"s3://bucket/data": data, "256": "8", "ranks=8": "ranks=2", "micro_batch=32": "micro_batch=2"}
    for old, new in {**changes, "    ...": "    if step == 4:\n        break"}.items():
        assert old in torch_example
        torch_example = torch_example.replace(old, new)
    found: dict[str, Any] = {}
    exec(torch_example, found)
    assert found["batch"].values["s1"].shape == (2, 2, 32, 32) and found["stream"].state(8)["position"] == 8
    exec(plain.replace('"data"', repr(data)).replace("place-00000-00000", "sample-003"), found)
    assert found["position"] == 0 and found["sample"].key.startswith("sample-")
