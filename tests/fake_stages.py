"""Small stages to launch in tests; `python -m tests.fake_stages NAME FOLDER --parent PID` is a rank of one."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launchers.job import Job, PreflightError, run_rank
from pipeline import ranks
from pipeline.signals import Stopped, StopRequest


@contextmanager
def quietly() -> Iterator[None]:
    """Trainings without page, list of packages and count of operations, which take longer than a small run does."""
    from unittest import mock

    with (
        mock.patch("pipeline.observing.reporter", lambda *_: lambda line: {}),
        mock.patch("pipeline.observing.utilisation", lambda *_: lambda line: {}),
        mock.patch("pipeline.run.environment", dict),
    ):
        yield


@dataclass(frozen=True)
class AddUp:
    """Trains nothing: in every step the ranks add up their numbers; goes on from the step in its folder.

    Attributes:
        folder: gets `steps.jsonl`, a line per step, and `saved`, the number of steps done.
        steps: of the whole run.
        seconds: a step takes.
    """

    folder: Path
    steps: int
    seconds: float

    def __call__(self) -> Path:
        """Runs to the end; raises Stopped after a signal. Alone it needs no torch, which takes seconds to import."""
        place = ranks.from_environment()
        if place.world > 1:
            ranks.init(place)
        saved = self.folder / "saved"
        start = int(saved.read_text()) if saved.exists() else 0
        with StopRequest() as stop:
            for step in range(start, self.steps):
                total = place.rank + 1
                if place.world > 1:
                    total = int(ranks.added_up({"rank": total})["rank"])
                time.sleep(self.seconds)
                if place.rank == 0:
                    self._write({"step": step, "sum": total, "world": place.world, "from": start})
                told = ranks.agree(stop.requested) if place.world > 1 else stop.requested
                if told and step + 1 < self.steps:
                    if place.rank == 0:
                        saved.write_text(str(step + 1))
                    if place.world > 1:
                        ranks.agree(False)  # nobody leaves before it is saved
                    raise Stopped(f"stopped after step {step}")
        return self.folder

    def _write(self, line: dict[str, int]) -> None:
        with (self.folder / "steps.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def steps(folder: Path) -> list[dict[str, int]]:
    """Returns what AddUp wrote."""
    path = folder / "steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass(frozen=True)
class Fails:
    """Rank 1 raises when all are there; the others wait until they are told to stop, or, if stubborn, killed."""

    folder: Path
    stubborn: bool = False

    def __call__(self) -> None:
        """Raises RuntimeError in rank 1."""
        place = ranks.from_environment()
        rank = place.rank
        print(f"hello from rank {rank}")
        if self.stubborn:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (self.folder / f"pid-{rank}").write_text(str(os.getpid()))
        while rank == 1 and len(list(self.folder.glob("pid-*"))) < place.world:
            time.sleep(0.05)
        if rank == 1:
            raise RuntimeError("no such luck")
        with StopRequest() as stop:
            while self.stubborn or not stop.requested:
                time.sleep(0.05)


@dataclass(frozen=True)
class Idles:
    """Ranks that do nothing until they are told to stop, without torch; each leaves `pid-RANK` and `stopped-RANK`."""

    folder: Path

    def __call__(self) -> None:
        """Raises Stopped after a signal."""
        rank = ranks.from_environment().rank
        with StopRequest() as stop:
            (self.folder / f"pid-{rank}").write_text(str(os.getpid()))
            while not stop.requested:
                time.sleep(0.05)
        (self.folder / f"stopped-{rank}").touch()
        raise Stopped("stopped")


@dataclass(frozen=True)
class Hangs:
    """Rank 1 of 2, or the only one, makes no second step: for ever, or in its first attempt only."""

    folder: Path
    attempts: int

    def __call__(self) -> Path:
        """Adds up once, then hangs or adds up once more."""
        import torch

        from pipeline.watchdog import Watchdog

        place = ranks.from_environment()
        ranks.init(place)
        if place.rank == 0:
            counter = self.folder / "starts"
            counter.write_text(str(int(counter.read_text()) + 1 if counter.exists() else 1))
        total = torch.tensor(place.rank + 1)
        with Watchdog(2.0, self.folder / f"stacks-{place.rank}"):
            ranks.everyone(place.rank)
            attempt = int((self.folder / "starts").read_text())
            if attempt <= self.attempts and place.rank == place.world - 1:
                time.sleep(600)
            if place.world > 1:
                torch.distributed.all_reduce(total)
        (self.folder / "ended").write_text(str(attempt))
        return self.folder


@dataclass(frozen=True)
class Preflights:
    """Checks a run on the dataset in its folder, and begins none; each rank leaves `said-TROUBLE-RANK.json`.

    Attributes:
        folder: holds `data`.
        troubles: one after the other. slow or clock: on the node of rank 1; full: on that node; full-everywhere; none.
        pretend: whether each rank takes itself for one on a node of its own.
    """

    folder: Path
    troubles: tuple[str, ...]
    pretend: bool = True

    def __call__(self) -> None:
        """Raises what the last preflight raises."""
        from launchers.preflight import PreflightError

        for trouble in self.troubles[:-1]:
            with suppress(PreflightError):
                self._check(trouble)
        self._check(self.troubles[-1])

    def _check(self, trouble: str) -> None:
        from unittest import mock

        import configs
        from launchers.preflight import PreflightError, preflight

        place = ranks.from_environment()
        ranks.init(place)
        raw = {"stage": "pretrain", "run": str(self.folder / "run"), "data": str(self.folder / "data"), "steps": 1}
        with ExitStack() as stack:
            if self.pretend:
                stack.enter_context(mock.patch.object(ranks, "node_name", return_value=f"node{place.rank}"))
                place = replace(place, local_rank=0, local_world=1)
            self._make_trouble(stack, trouble, place.rank)
            said: dict[str, object] = {"node": ranks.node_name()}
            try:
                said["checks"] = [finding.check for finding in preflight(configs.parse(raw), place)]
            except PreflightError as error:
                said |= {"message": str(error), "nodes": error.nodes}
                raise
            finally:
                (self.folder / f"said-{trouble}-{place.rank}.json").write_text(json.dumps(said))

    def _make_trouble(self, stack: ExitStack, trouble: str, rank: int) -> None:
        import shutil
        from unittest import mock

        import torch

        send, now = torch.distributed.send, time.time
        if trouble == "slow" and rank == 1:
            late = mock.patch.object(torch.distributed, "send", lambda *given: (time.sleep(0.3), send(*given)))
            stack.enter_context(late)
        if trouble == "clock" and rank == 1:
            stack.enter_context(mock.patch.object(time, "time", lambda: now() + 100))
        if trouble == "full-everywhere" or (trouble == "full" and rank == 1):
            full = shutil._ntuple_diskusage(10**12, 10**12, 5)  # type: ignore[attr-defined]
            stack.enter_context(mock.patch.object(shutil, "disk_usage", return_value=full))


@dataclass(frozen=True)
class Tells(AddUp):
    """AddUp that also writes what a training run does: metrics.jsonl, and `latest` as if every step were saved."""

    def _write(self, line: dict[str, int]) -> None:
        super()._write(line)
        step = line["step"] + 1
        told = {"step": step, "samples": 4 * step, "samples_per_second": 4 / self.seconds, "loss": 1 / step}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(told) + "\n")
        (self.folder / "latest").write_text(f"step-{step:06d}\n")


@dataclass(frozen=True)
class Refuses:
    """Does not begin on the first node that it meets, as after a preflight that found it unfit; ends on any other."""

    folder: Path

    def __call__(self) -> Path:
        """Raises PreflightError on that node."""
        marker = self.folder / "unfit"
        with suppress(FileExistsError), marker.open("x") as file:
            file.write(ranks.node_name())
        unfit = marker.read_text()
        if ranks.node_name() == unfit:
            raise PreflightError(f"the run does not begin; gpu on {unfit}: hot", (unfit,))
        (self.folder / "ended").write_text(ranks.node_name())
        return self.folder


@dataclass(frozen=True)
class Notes:
    """What comes after Refuses: copies what that has left, `ended`, to `notes`."""

    folder: Path

    def __call__(self) -> Path:
        """Raises FileNotFoundError where there is nothing."""
        (self.folder / "notes").write_text((self.folder / "ended").read_text())
        return self.folder


@dataclass(frozen=True)
class Waits(Job):
    """Pretraining that is caught at steps of a test's choice: its last rank waits there until it is told to stop.

    Attributes:
        at: the step to wait at in each attempt of a Slurm job; none in later ones.
        fails: whether it raises there instead.
    """

    at: tuple[int, ...] = ()
    fails: bool = False

    def __call__(self) -> Path | str:
        """Trains; leaves `waits-ATTEMPT` in the run folder where it waits."""
        from unittest import mock

        place, attempt = ranks.from_environment(), (ranks.slurm_job() or (0, 1))[1]
        step = self.at[attempt - 1] if attempt <= len(self.at) else 0

        def hook(line: Mapping[str, Any]) -> Mapping[str, Any]:
            if line["step"] == step and place.rank == place.world - 1:
                if self.fails:
                    raise RuntimeError("no such luck")
                (Path(self.config.run) / f"waits-{attempt}").touch()
                while not stop.requested:
                    time.sleep(0.05)
            return {}

        with StopRequest() as stop, quietly(), mock.patch("pipeline.pretrain.pictures", lambda *_: hook):
            return super().__call__()


def main() -> int:
    """Runs one rank of a stage; returns its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent", type=int)
    given = parser.parse_args()
    stages: dict[str, Callable[[], object]] = {
        "adds-up": AddUp(given.folder, steps=40, seconds=0.05),
        "fails": Fails(given.folder),
        "idles": Idles(given.folder),
        "hangs": Hangs(given.folder, attempts=99),
        "hangs-once": Hangs(given.folder, attempts=1),
        "fails-stubbornly": Fails(given.folder, stubborn=True),
        "preflights": Preflights(given.folder, ("none", "clock", "full-everywhere")),
        "preflight-slow": Preflights(given.folder, ("slow",)),
    }
    return run_rank(stages[given.name], given.parent)


if __name__ == "__main__":
    sys.exit(main())
