"""Processes that outlive the command that started them, found again by a pid file."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.services import ServiceError


@dataclass(frozen=True)
class Daemon:
    """One long-running process.

    Attributes:
        folder: where `NAME.pid` and `NAME.log` lie.
        name: unique in that folder.
        command: program and arguments; must stay in the foreground.
        environment: variables to add to this process's own.
    """

    folder: Path
    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """The file that takes stdout and stderr."""
        return self.folder / f"{self.name}.log"

    @property
    def _pid_file(self) -> Path:
        return self.folder / f"{self.name}.pid"

    def pid(self) -> int | None:
        """Returns the process id; None when it does not run, even if its number is another process's now."""
        if not self._pid_file.exists():
            return None
        pid, started = self._pid_file.read_text().split()
        return int(pid) if _start_time(int(pid)) == started else None

    def start(self) -> None:
        """Starts the process unless it runs already."""
        if self.pid() is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        command, settings = _words(self.command), {**os.environ, **self.environment}
        with self.log.open("ab") as log, open(os.devnull, "rb") as nothing:
            process = subprocess.Popen(
                command, stdin=nothing, stdout=log, stderr=log, env=settings, start_new_session=True
            )
        self._pid_file.write_text(f"{process.pid} {_start_time(process.pid)}")

    def stop(self, seconds: float = 30) -> None:
        """Ends the process by TERM and waits for it; never by KILL, which would leave broken state behind.

        Raises:
            ServiceError: it still runs after `seconds`.
        """
        pid = self.pid()
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            self._wait(lambda: self.pid() is None, f"{self.name} (pid {pid}) did not end", seconds)
        self._pid_file.unlink(missing_ok=True)

    def wait_until(self, ready: Callable[[], bool], seconds: float = 60) -> None:
        """Waits until the process serves.

        Args:
            ready: says whether it does.
            seconds: the longest to wait.

        Raises:
            ServiceError: it ended or took too long; the message shows the end of its log.
        """
        self._wait(lambda: self.pid() is None or ready(), f"{self.name} is not ready", seconds)
        if self.pid() is None:
            raise ServiceError(f"{self.name} ended by itself{self._last_words()}")

    def _wait(self, reached: Callable[[], bool], complaint: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > deadline:
                raise ServiceError(f"{complaint} after {seconds:.0f} s{self._last_words()}")
            time.sleep(0.1)

    def _last_words(self) -> str:
        tail = self.log.read_text(errors="replace").splitlines()[-15:]
        return "\n".join([f". The end of {self.log}:", *tail])


def _start_time(pid: int) -> str | None:
    """Returns the kernel's start time of a live process, in clock ticks; None for a dead one or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None, seconds: float = 900) -> str:
    """Runs a command to its end and returns its stdout.

    Args:
        command: program and arguments.
        environment: variables to add to this process's own.
        seconds: the longest it may take.

    Raises:
        ServiceError: it is missing, took too long or failed; the message carries what it printed.
    """
    words, settings = _words(command), {**os.environ, **(environment or {})}
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=seconds, env=settings, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceError(f"{words[0]}: {error}") from error
    if done.returncode:
        raise ServiceError(f"{' '.join(words)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def _words(command: Sequence[str | Path]) -> list[str]:
    """Returns the command with the full path of its program, if it is installed."""
    first, *rest = map(str, command)
    return [program(first) or first, *rest]


def answers(command: Sequence[str], environment: Mapping[str, str] | None = None) -> bool:
    """Returns whether a command ends well within 10 s; `environment`: variables to add."""
    try:
        run(command, environment, seconds=10)
    except ServiceError:
        return False
    return True


def program(name: str) -> str | None:
    """Returns the path of an installed program, also from the administrator's folders; None when absent."""
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


def install(packages: dict[str, str]) -> None:
    """Installs the Debian packages whose program is missing.

    Args:
        packages: program -> the package that holds it.

    Raises:
        ServiceError: something is missing and this is not root on Debian, or apt failed.
    """
    missing = sorted({package for name, package in packages.items() if program(name) is None})
    if not missing:
        return
    if os.geteuid() != 0 or program("apt-get") is None:
        raise ServiceError(f"missing packages: {', '.join(missing)}. Install them, or run as root on Debian")
    print(f"installing {' '.join(missing)}", flush=True)
    run(["apt-get", "update", "-qq"])
    options = ["-y", "-qq", "--no-install-recommends"]
    run(["apt-get", "install", *options, *missing], {"DEBIAN_FRONTEND": "noninteractive"})
