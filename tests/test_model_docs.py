"""docs/differences.md claims only what tests show: every test it names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def named_tests(text: str) -> list[tuple[str, str]]:
    """(file, test) of each `tests/file.py::test`; `::test` alone is of the file named before it."""
    found, file = [], ""
    for given, test in re.findall(r"`(tests/\w+\.py)?::(\w+)`", text):
        file = given or file
        found.append((file, test))
    return found


def test_every_test_named_in_the_differences_is_there() -> None:
    names = named_tests((ROOT / "docs/differences.md").read_text())
    assert len(names) > 30
    missing = [(file, test) for file, test in names if f"def {test}(" not in (ROOT / file).read_text()]
    assert not missing


def test_every_row_of_the_differences_has_evidence() -> None:
    _, _, tables = (ROOT / "docs/differences.md").read_text().partition("## Switched by")
    rows = [line for line in tables.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| what |")]
    assert len(rows) > 12
    assert [row for row in rows if not named_tests(row.split(" | ")[-1])] == []
