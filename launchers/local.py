"""Several ranks of a job on this machine: started, watched, stopped and ended together.

Rank 0 speaks to the console. Every rank has a log file, to which a further attempt is appended.

How it ends: a rank that fails takes the others with it (TERM, and KILL when they do not go). Ranks that hung, and ended
themselves because of it, are started again. INT (Ctrl-C), TERM, HUP and USR2 are passed on to the ranks, which then
save and end; after USR2, Slurm's notice of a time limit, they are started again, as a job there is requeued. A second
signal means: now, saved or not.
"""

from __future__ import annotations

import codecs
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, BinaryIO, TextIO

import configs
from pipeline.holding import check_free
from pipeline.ranks import Ranks, child_environment
from pipeline.signals import EXIT_HUNG, EXIT_STOPPED

GRACE_S = 15.0
POLL_S = 0.05
RESTARTS = 20  # as often as a job on Slurm by default; a stage's own guard ends what leads nowhere earlier
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
Ended = queue.SimpleQueue[tuple[int, int]]


def run(config: Any, processes: int, log_dir: Path, kill_when: Callable[[], bool] | None = None) -> int:
    """Runs a stage in several processes.

    Args:
        config: of the stage.
        processes: number of ranks.
        log_dir: gets the config and `rank-K.log`.
        kill_when: asked many times a second; once it says True, all ranks are killed (KILL), as a lost machine would.

    Returns:
        0; EXIT_STOPPED when a signal came and all ranks saved; 128 + its number when they did not; otherwise
        the code of the rank that failed first, which stderr names together with its log.

    Raises:
        ValueError: fewer than one process.
        RunHeld: another run is at work in the stage's run folder.
    """
    if run := getattr(config, "run", ""):
        check_free(Path(run))
    log_dir.mkdir(parents=True, exist_ok=True)
    path = log_dir / "config.yaml"
    path.write_text(configs.dump(config), encoding="utf-8")
    return launch(["launchers.job", str(path)], processes, log_dir, kill_when)


def launch(module: Sequence[str], processes: int, log_dir: Path, kill_when: Callable[[], bool] | None = None) -> int:
    """Runs `python -m MODULE ARGUMENTS --parent PID` in several processes; otherwise like `run`."""
    if processes < 1:
        raise ValueError(f"{processes} processes given; at least 1 is needed")
    log_dir.mkdir(parents=True, exist_ok=True)
    for left in range(RESTARTS, -1, -1):
        group = _attempt(module, processes, log_dir, kill_when)
        code, again = group.exit_code(), group.to_be_started_again()
        if not again or not left:
            break
        print(f"{again}; starting again", file=sys.stderr)
    return code


def _attempt(module: Sequence[str], processes: int, log_dir: Path, kill_when: Callable[[], bool] | None) -> _Group:
    """Starts the ranks and waits for their end."""
    group = _Group()
    with _passing_signals_to(group):
        try:
            group.start(module, processes, log_dir)
            group.wait(kill_when or (lambda: False))
        finally:
            group.kill()
    return group


class _Rank:
    """One process, its log, and for rank 0 the console."""

    def __init__(self, place: Ranks, module: Sequence[str], log_dir: Path, ended: Ended) -> None:
        """Starts it, in a session of its own: Ctrl-C reaches it only through the launcher."""
        self.number, self.log = place.rank, log_dir / f"rank-{place.rank}.log"
        self._threads: list[threading.Thread] = []
        log = self.log.open("ab")
        self._begin = log.tell()
        output: Any = subprocess.PIPE if place.rank == 0 else log
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-P", "-m", *module, "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=child_environment(place),
            start_new_session=True,
        )
        if self.process.stdout and self.process.stderr:
            self._thread(_copy, self.process.stdout, log, sys.stdout)
            self._thread(_copy, self.process.stderr, log, sys.stderr)
        self._thread(self._report, log, ended)

    def _thread(self, function: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _report(self, log: BinaryIO, ended: Ended) -> None:
        """Waits for the end of the process and of what it said."""
        code = self.process.wait()
        for thread in self._threads[:-1]:
            thread.join(timeout=5)  # a grandchild may hold the pipe open
        log.close()
        ended.put((self.number, code))

    def last_words(self) -> str:
        """Returns the end of what this process has logged."""
        return "\n".join(self.log.read_bytes()[self._begin :].decode(errors="replace").splitlines()[-40:])


class _Group:
    """The ranks of one launch, what became of them, and the signals that came meanwhile."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._ended: Ended = queue.SimpleQueue()
        self._codes: dict[int, int] = {}
        self._failed: int | None = None
        self._signals: list[int] = []
        self._kill_at = float("inf")

    def start(self, module: Sequence[str], processes: int, log_dir: Path) -> None:
        """Starts all ranks."""
        port = _free_port()
        for rank in range(processes):
            place = Ranks(rank, processes, rank, processes, port=port)
            self._ranks.append(_Rank(place, module, log_dir, self._ended))

    def wait(self, kill_when: Callable[[], bool]) -> None:
        """Waits until all ranks ended; the first that fails decides that the others end too."""
        while len(self._codes) < len(self._ranks):
            try:
                number, code = self._ended.get(timeout=POLL_S)
            except queue.Empty:
                if time.monotonic() > self._kill_at or kill_when():
                    self.kill()
                continue
            self._codes[number] = code
            if code not in (0, EXIT_STOPPED) and self._failed is None:
                self._failed = number
                self._end()

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal: passes it on; the second time ends the ranks."""
        self._signals.append(number)
        self._send(number)
        if len(self._signals) > 1:
            self._end()

    def _end(self) -> None:
        self._send(signal.SIGTERM)
        self._kill_at = min(self._kill_at, time.monotonic() + GRACE_S)

    def kill(self) -> None:
        """Ends whatever still runs."""
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            rank.process.send_signal(number)

    def exit_code(self) -> int:
        """Returns the code of the launch and says on stderr why it is not 0."""
        if self._failed is None:
            return EXIT_STOPPED if EXIT_STOPPED in self._codes.values() else 0
        if self._signals:
            name = signal.Signals(self._signals[0]).name
            print(f"ended by {name} before all ranks had saved; the last checkpoint stands", file=sys.stderr)
            return 128 + self._signals[0]
        return self._explain(self._ranks[self._failed], self._codes[self._failed])

    def to_be_started_again(self) -> str:
        """Returns why the ranks are to begin where they ended, as Slurm would have them; empty: they are not."""
        if self._failed is not None and self._codes[self._failed] == EXIT_HUNG:
            return "the ranks hung and have ended themselves"
        if self._failed is None and EXIT_STOPPED in self._codes.values() and set(self._signals) == {signal.SIGUSR2}:
            return "stopped by USR2, as before a time limit"
        return ""

    def _explain(self, rank: _Rank, code: int) -> int:
        cause = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        if rank.number > 0:  # what rank 0 said is on the console already
            print(rank.last_words(), file=sys.stderr)
        print(f"rank {rank.number} failed ({cause}); its log: {rank.log}", file=sys.stderr)
        return code if code > 0 else 128 - code


@contextmanager
def _passing_signals_to(group: _Group) -> Iterator[None]:
    """Gives signals to the group; not outside of the main thread, where Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, group.receive) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _copy(source: IO[bytes], log: BinaryIO, console: TextIO) -> None:
    """Copies what a process says to its log and to the console until it ends; the console may go away."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while chunk := os.read(source.fileno(), 1 << 16):
        log.write(chunk)
        log.flush()
        with suppress(OSError, ValueError):
            console.write(decoder.decode(chunk))
            console.flush()


def _free_port() -> int:
    """Returns a port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
