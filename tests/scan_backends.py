"""Scan backends as test parameters, and where each runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.model.scan import BACKENDS, available

GPU = ("triton", "mamba_ssm")  # elsewhere tested by test_scan_triton.py and test_scan_mamba_ssm.py


ON_CPU = [name for name in BACKENDS if name not in GPU]


def working(names: list[str]) -> list[Any]:
    """Parameters of pytest for the backends; one that cannot run here is skipped with its reason."""
    return [
        pytest.param(name, marks=pytest.mark.skipif(not available(name), reason=f"scan backend {name} cannot run here"))
        for name in names
    ]


def device(backend: str) -> torch.device:
    """Where tests run the backend."""
    return torch.device("cuda" if backend in GPU and torch.cuda.is_available() else "cpu")
