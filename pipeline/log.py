"""What a run says while it goes: one JSON line per step in metrics.jsonl, and a progress line on the console."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from shards.store import StoreError

if TYPE_CHECKING:
    from pipeline.trackers import Tracker

METRICS = "metrics.jsonl"
CONSOLE_SECONDS = 5.0  # between progress lines where the console cannot overwrite them


class Journal:
    """The metrics file and progress line of a run; rank 0 has one, other ranks none."""

    def __init__(
        self, run: Path, start: int, steps: int, trackers: Sequence[Tracker] = (), console: TextIO | None = None
    ) -> None:
        """Go on after step `start` of `steps`: lines of later steps, from before a kill, are dropped."""
        self._start, self._steps, self._trackers = start, steps, trackers
        self._began, self._shown = time.monotonic(), float("-inf")
        self._console = console or sys.stderr
        keep_until(run / METRICS, start)
        self._file = (run / METRICS).open("ab", buffering=0)  # what could not be written is not tried again

    def write(self, numbers: Mapping[str, Any]) -> None:
        """Record a step; `numbers` has at least step, loss, samples_per_second and data_wait.

        Raises:
            StoreError: the file cannot be written, such as on a full disk.
        """
        try:
            self._file.write(f"{json.dumps(numbers, allow_nan=False)}\n".encode())
        except OSError as error:
            raise StoreError(f"{self._file.name}: not written: {error}; the last checkpoint stands") from error
        for tracker in self._trackers:
            tracker.write(numbers)
        overwrite, done = self._console.isatty(), numbers["step"] >= self._steps
        if not overwrite and not done and time.monotonic() - self._shown < CONSOLE_SECONDS:
            return
        self._shown = time.monotonic()
        self._console.write(("\r\x1b[K" if overwrite else "") + self._line(numbers))
        self._console.write("\n" if done or not overwrite else "")
        self._console.flush()

    def close(self) -> None:
        """Close the file and leave the progress line."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()
        if self._console.isatty():
            self._console.write("\n")

    def _line(self, numbers: Mapping[str, Any]) -> str:
        step = int(numbers["step"])
        left = (time.monotonic() - self._began) / max(1, step - self._start) * (self._steps - step)
        parts = [f"step {step}/{self._steps}", _losses(numbers)]
        if "lr" in numbers:
            parts.append(f"lr {numbers['lr']:.1e}")
        if numbers.get("grad_norm") is not None:
            parts.append(f"norm {numbers['grad_norm']:.2g}")
        parts += [f"{numbers['samples_per_second']:.1f} samples/s", f"data-wait {100 * numbers['data_wait']:.0f} %"]
        if "mfu" in numbers:
            parts.append(f"MFU {100 * numbers['mfu']:.0f} %")
        if "memory" in numbers:
            parts.append(f"{numbers['memory']:.1f} GB")
        return "  ".join([*parts, f"ETA {_clock(left)}"])


def _losses(numbers: Mapping[str, Any]) -> str:
    """The loss and its parts, or why the step was passed over."""
    if "skipped" in numbers:
        return f"passed over: {numbers['skipped']['why']}"
    parts = ", ".join(f"{name[5:]} {value:.4f}" for name, value in numbers.items() if name.startswith("loss/"))
    return f"loss {numbers['loss']:.4f}" + (f" ({parts})" if parts else "")


def _clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and a last line that a kill cut short; nothing if there is no file."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def read(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order of steps; whole lines only."""
    lines = (run / METRICS).read_text(encoding="utf-8").splitlines()
    return [found for line in lines if (found := _whole(line))]


def _step(line: str) -> float:
    """The step of a line; infinity where the line is not whole."""
    return float(_whole(line).get("step", "inf"))


def _whole(line: str) -> dict[str, Any]:
    """What a line says; nothing where a kill or a full disk cut it short."""
    try:
        found = json.loads(line)
        return found if isinstance(found, dict) else {}
    except ValueError:
        return {}
