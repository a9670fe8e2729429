"""Interleaved timing of named functions, reported as ratios to the first."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping


def compare(title: str, functions: Mapping[str, Callable[[], object]], repetitions: int = 5) -> None:
    """Run all functions in turn, after one warm-up each, and print medians and ratios to the first."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    print(f"\n{title} ({repetitions} interleaved runs, load {os.getloadavg()[0]:.1f})")
    for name, seconds in medians.items():
        spread = f"{min(times[name]) * 1e3:.1f} to {max(times[name]) * 1e3:.1f}"
        print(f"  {name:<44} {seconds * 1e3:9.1f} ms  ({spread})  speed {first / seconds:6.2f} of the first")


def machine() -> str:
    """What was measured on, in a line."""
    import torch

    return (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
