"""Scan backends as test parameters: one that cannot run here is skipped with its reason, not left out in silence."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.model.scan import available


def working(names: list[str]) -> list[Any]:
    """Parameters of pytest for the backends."""
    return [
        pytest.param(name, marks=pytest.mark.skipif(not available(name), reason=f"scan backend {name} cannot run here"))
        for name in names
    ]
