"""Where a step goes: its phases are marked in the loop, recorded over a few steps, and told on a page.

Rank 0 records with torch.profiler. Wall time is divided among the phases; communication that happens inside of
another (DeepSpeed's collectives) is taken out of it. While recording, the device is waited for at the end of each
phase, so that a phase has the time of its kernels; steps are slower for that.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._C._autograd import DeviceType, _profiler_enabled
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity

from configs import ConfigError
from pipeline.figures import shares
from shards.report import Figure, Section, Table, Text, write_report

if TYPE_CHECKING:
    from pipeline.loop import Hook
    from pipeline.run import Run

FOLDER, TRACE, SUMMARY = "profile", "trace.json.gz", "summary.html"  # below the run folder
WARM_UP = 3  # steps before recording begins: compiling, caches, first reads
PHASES = ("data", "forward", "backward", "communication", "optimiser")
MARK, STEP = "step/", "step "  # begin the names of marked phases and steps in the trace
COLLECTIVES = ("c10d::", "gloo:", "nccl:", "nccldevkernel", "ncclkernel")  # begin the names of collectives, lower case
OPERATORS = 10  # in the table
ADVICE = {
    "data": "The model waits for samples: raise reading.threads and reading.memory, or keep tars near by, with "
    "reading.cache_dir.",
    "forward": "Most is the forward pass: engine.precision=bf16 and a faster engine.scan shorten it.",
    "backward": "Most is the backward pass, as it should be: engine.precision=bf16 shortens it, and where "
    "engine.recompute is on and memory allows, leaving that out.",
    "communication": "Ranks wait for each other: a larger batch.global_batch makes updates rarer, a lower engine.zero "
    "sends less; see whether one rank is slower than the others.",
    "optimiser": "Most is the update: a larger batch.global_batch makes it rarer, a higher engine.zero divides it "
    "among the ranks, engine.offload=none keeps it on the device.",
    "other": "Most lies between the marked phases: checkpoints (checkpoint_every), pictures, validation and probes.",
}
DATA_SHARE = 0.1  # of a step: from here on waiting for data is what to mend first
# A run to be profiled is short and does nothing beside training.
SHORT: Mapping[str, object] = {
    "steps": 8, "profile": 5, "checkpoint_every": 8, "keep_every": 0, "keep_best": "", "store": "", "track": (),
    "pictures_every": 0, "validate_every": 0,
}  # fmt: skip

Interval = tuple[float, float]  # begin and end in microseconds


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Marks a part of a step; costs a few microseconds unless a profiler runs."""
    if not _profiler_enabled():
        yield
        return
    with record_function(MARK + name):
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def profiler(run: Run, start: int) -> Hook:
    """A hook of the loop that records steps on rank 0 and writes RUN/profile; without `profile` one that does nothing.

    Args:
        run: whose config says how many steps to record.
        start: steps already done.
    """
    steps, left = run.config.profile, run.config.steps - start
    if not steps or run.ranks.rank:
        return lambda line: {}
    if left < 2:
        print(f"profile: nothing to record, {left} of the run's steps left; at least 2 are needed", file=sys.stderr)
        return lambda line: {}
    first = start + (WARM_UP if left > WARM_UP else 1)
    if left <= WARM_UP:
        print(f"profile: only {left} steps left; begins after step {first}, hardly warmed up", file=sys.stderr)
    return _Profiler(run.folder / FOLDER, first, steps, run.config.steps)


class _Profiler:
    """The hook of rank 0: records `count` steps after step `first`, or as many as there are until step `end`."""

    def __init__(self, folder: Path, first: int, count: int, end: int) -> None:
        self._folder, self._first, self._count, self._end = folder, first, count, end
        self._cuda = torch.cuda.is_available()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._recording: Any = torch.profiler.profile(activities=kinds)
        self._mark = ExitStack()  # of the step under way, from hook to hook
        self._done: int | None = None  # steps recorded; None before recording begins

    def __call__(self, line: Mapping[str, Any]) -> Mapping[str, object]:
        """Begin, end a step, or end all and write; called between steps."""
        if self._done == self._count or (self._done is None and line["step"] < self._first):
            return {}
        self._mark.close()
        if self._done is None:
            self._recording.start()
        self._done = 0 if self._done is None else self._done + 1
        if line["step"] >= self._end:  # also of a run rolled back meanwhile
            self._count = self._done
        if self._done == self._count:
            self._recording.stop()
            self._write(self._done)
        else:
            self._mark.enter_context(record_function(f"{STEP}{line['step'] + 1}"))
        return {}

    def _write(self, count: int) -> None:
        self._folder.mkdir(exist_ok=True)
        self._recording.export_chrome_trace(str(self._folder / TRACE))
        divided = divide([Event(e.name, e.time_range.start, e.time_range.end) for e in self._recording.events()])
        parts = {name: time / 1000 / count for name, time in divided.items()}
        key = "self_device_time_total" if self._cuda else "self_cpu_time_total"
        # On a GPU every kernel is there once more by itself, beside the operator that started it.
        averages = [item for item in self._recording.key_averages() if item.device_type == DeviceType.CPU]
        operators = [(item.key, item.count / count, getattr(item, key) / 1000 / count) for item in averages]
        print(_lines(parts, count), file=sys.stderr)
        recorded = f"{count} steps after step {self._first}"
        title = f"Where a step goes: {self._folder.parent}"
        write_report(self._folder / SUMMARY, sections(parts, operators, recorded), title=title)


@dataclass(frozen=True)
class Event:
    """Something in a trace: its name, begin and end in microseconds."""

    name: str
    begin: float
    end: float


def divide(events: Sequence[Event]) -> dict[str, float]:
    """The time of all marked steps, in microseconds, by phase: each moment belongs to one, what is in none to `other`.

    Communication comes first: collectives, wherever they lie, and what the loop marks as such.
    """
    steps = union((event.begin, event.end) for event in events if event.name.startswith(STEP))
    taken: list[Interval] = []
    found = {}
    for name in ("communication", *(name for name in PHASES if name != "communication")):
        mine = [
            (event.begin, event.end)
            for event in events
            if event.name == MARK + name or (name == "communication" and event.name.lower().startswith(COLLECTIVES))
        ]
        together = union([*taken, *within(mine, steps)])
        found[name] = length(together) - length(taken)
        taken = together
    found["other"] = length(steps) - length(taken)
    return {name: found[name] for name in (*PHASES, "other")}


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments as intervals in order that do not touch each other."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def within(intervals: Iterable[Interval], bounds: Sequence[Interval]) -> list[Interval]:
    """The parts of `intervals` that lie in `bounds`."""
    cut = [(max(begin, low), min(end, high)) for begin, end in intervals for low, high in bounds]
    return [(begin, end) for begin, end in cut if begin < end]


def length(intervals: Iterable[Interval]) -> float:
    """The sum of the lengths."""
    return sum(end - begin for begin, end in intervals)


def sections(parts: Mapping[str, float], operators: Sequence[tuple[str, float, float]], recorded: str) -> list[Section]:
    """What RUN/profile/summary.html shows.

    Args:
        parts: phase -> milliseconds per step.
        operators: name, calls and milliseconds per step, in any order.
        recorded: which steps these are means of, in words.
    """
    whole = sum(parts.values())
    rows = [[name, round(time, 1), round(100 * time / whole, 1)] for name, time in [*parts.items(), ("step", whole)]]
    caption = f"Mean of {recorded}, on rank 0. Communication is counted wherever it happens, also beside computing. "
    caption += "Recording makes steps slower than they are without."
    longest = sorted((row for row in operators if not row[0].startswith((MARK, STEP))), key=lambda row: -row[2])
    most = [
        [name[:80], calls, round(time, 1), round(100 * time / whole, 1)] for name, calls, time in longest[:OPERATORS]
    ]
    kernels = "on the GPU" if torch.cuda.is_available() else "on the CPU"
    return [
        Text("What to do", advice(parts)),
        Table("Where a step goes", ["part", "ms per step", "% of a step"], rows, caption),
        Figure("The same as bars", shares(parts, "ms"), "Milliseconds per step, and the share of a step."),
        Table(
            "Operators with the most time of their own",
            ["operator", "calls per step", "ms per step", "% of a step"],
            most,
            f"Time {kernels} without that of what they call. All else is in {TRACE}: open it at ui.perfetto.dev.",
        ),
    ]


def advice(parts: Mapping[str, float]) -> str:
    """A sentence or two on the part that is worth mending; `parts` as times by phase."""
    whole = sum(parts.values())
    waits = parts["data"] > DATA_SHARE * whole
    name = "data" if waits else max(parts, key=lambda part: parts[part])
    return f"{name}: {parts[name] / whole:.0%} of a step. {ADVICE[name]}"


def _lines(parts: Mapping[str, float], count: int) -> str:
    """The parts as a table for the console."""
    whole = sum(parts.values())
    rows = [f"  {name:<14}{time:>10.1f} ms {time / whole:>6.1%}" for name, time in [*parts.items(), ("step", whole)]]
    return "\n".join([f"profile: mean of {count} steps", *rows, f"  {advice(parts)}"])


def short(config: Any) -> Any:
    """The config of a run of a few steps beside that of `config`, to be profiled."""
    known = {field.name for field in fields(config)}
    changes = {**SHORT, "run": f"{Path(config.run)}-profile"}
    if "probe" in known:
        changes["probe"] = replace(config.probe, data=None)
    return replace(config, **{key: value for key, value in changes.items() if key in known})


def page(config: Any) -> Path:
    """Where a profiled run leaves its page."""
    return Path(config.run) / FOLDER / SUMMARY


def clear(folder: Path) -> None:
    """Remove the folder of an earlier run.

    Raises:
        ConfigError: it holds something else.
    """
    if not folder.exists():
        return
    if not (folder / "config.yaml").exists() and {path.name for path in folder.iterdir()} - {"logs"}:
        raise ConfigError(f"{folder} is in the way and holds no run (no config.yaml); move it, or write another run=")
    shutil.rmtree(folder)
