"""The whole network: forward and training step of Tiny, their peak memory, and how both grow with the image.

Every row runs in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar
from unittest import mock

from benchmarks.timing import compare

CHANNELS = {"s2": 4, "s1": 2}
CLASSES = 8
THREADS = 2
LEARNING_RATE = 1e-4
Argument = TypeVar("Argument")
Result = TypeVar("Result")
ScanName = Literal["ours", "linear loop", "published-style loop"]


class Work(NamedTuple):
    """What one process does: `repetitions` of forward, or of a whole step of pretraining, on one square image.

    With `scan` the network runs the plain loop of that name (benchmarks/scan.py) instead of ours.
    """

    pixels: int
    training: bool
    vmamba: Literal["v0", "s1l8"] = "v0"
    repetitions: int = 3
    scan: ScanName = "ours"


WORKS = (
    Work(256, False),
    Work(256, True),
    Work(256, False, "s1l8"),
    Work(256, True, "s1l8"),
    Work(128, False),
    Work(512, False),
    Work(1024, False),
    Work(128, True),
    Work(512, True),
    Work(768, True),
    Work(128, True, repetitions=1, scan="published-style loop"),
)
SCANS: dict[int, tuple[ScanName, ...]] = {
    64: ("published-style loop", "linear loop", "ours"),
    128: ("linear loop", "ours"),
}


def run() -> None:
    """Tiny at 256 pixels by encoder type, its growth with the image, and the same network with the scan as a loop."""
    print(f"\nTiny, one image, {THREADS} threads, fp32; medians; a step is CMSS: masks, forward, backward, AdamW")
    for work in WORKS:
        _row(work)
    for pixels, scans in SCANS.items():
        in_new_process(compare_scans, (pixels, scans))


def compare_scans(arguments: tuple[int, tuple[ScanName, ...]]) -> None:
    """The same step with one scan and another, in turn."""
    import torch

    torch.set_num_threads(THREADS)
    pixels, scans = arguments
    steps = {scan: _with_scan(Work(pixels, True, scan=scan)) for scan in scans}
    compare(f"Step of pretraining, Tiny, 1 x {pixels} x {pixels}, {THREADS} threads", steps)


def _with_scan(work: Work) -> Callable[[], None]:
    once = _step(work)

    def under() -> None:
        with _scan_of(work):
            once()

    return under


def _row(work: Work) -> None:
    seconds, highest = in_new_process(measure, work)
    what = f"{work.vmamba} {'step' if work.training else 'forward'}, 1 x {work.pixels} x {work.pixels}"
    what += f", {work.scan}" if work.scan != "ours" else ""
    spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
    median = statistics.median(seconds)
    rate = median / work.pixels**2 * 1e6
    print(
        f"  {what:<48} {median:7.2f} s  ({spread})  {rate:6.1f} us per pixel  peak {highest / 1024:5.2f} GiB"
        f"  load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def in_new_process(function: Callable[[Argument], Result], argument: Argument) -> Result:
    """`function(argument)` in a process that has done nothing before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, argument).result()


def measure(work: Work) -> tuple[list[float], float]:
    """Seconds of each repetition after one for warming up, and the highest memory of this process in MiB."""
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    once = _step(work) if work.training else _forward(work)
    with _scan_of(work):
        return _seconds(once, work.repetitions), peak()


def _scan_of(work: Work) -> AbstractContextManager[object]:
    """A context in which the network's scan is the one asked for."""
    if work.scan == "ours":
        return nullcontext()
    from benchmarks.scan import loop

    linear = work.scan == "linear loop"
    return mock.patch("pipeline.model.ss2d.ss2d_scan", lambda *tensors: loop(*tensors[:7], linear=linear))


def _seconds(once: Callable[[], None], repetitions: int) -> list[float]:
    once()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    return seconds


def _forward(work: Work) -> Callable[[], None]:
    import torch

    from pipeline.model import MCFMamba, ModelConfig

    model = MCFMamba(ModelConfig(vmamba=work.vmamba), CHANNELS, CLASSES).eval()
    images = {name: torch.rand(1, bands, work.pixels, work.pixels) for name, bands in CHANNELS.items()}

    def once() -> None:
        with torch.no_grad():
            model(images)

    return once


def _step(work: Work) -> Callable[[], None]:
    import torch

    from pipeline.model import MCFMamba, ModelConfig, cmss

    model = MCFMamba(ModelConfig(vmamba=work.vmamba), CHANNELS, sum(CHANNELS.values()))
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    images = {name: torch.rand(1, bands, work.pixels, work.pixels) for name, bands in CHANNELS.items()}
    valid = {name: torch.ones(1, work.pixels, work.pixels, dtype=torch.bool) for name in CHANNELS}
    position = torch.zeros(1, dtype=torch.int64)

    def once() -> None:
        blocks = cmss.hide(cmss.presence(valid), position, seed=0, ratio=0.5)
        recon = model(images, cmss.hidden_tokens(blocks, valid), keys=position)
        optimiser.zero_grad()
        cmss.loss(recon, images, blocks, valid)[0].mean().backward()
        optimiser.step()

    return once


def peak() -> float:
    """Highest resident memory of this process in MiB, as Linux counts it since the program was loaded."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("/proc/self/status has no VmHWM: peaks of memory are measured on Linux only")
    return int(found[1]) / 1024
