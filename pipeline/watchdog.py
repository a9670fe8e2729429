"""A run that hangs ends by itself, saying where it hung.

A collective that one rank never reaches, a dead file system, a kernel that does not return: nothing fails, and the job
burns its hours. Every rank has a thread that expects a beat from the loop. Without one for so long it writes the Python
stacks of all threads, gives the other ranks the time to do the same, and ends the process with a code that launchers
start again.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from pipeline.signals import EXIT_HUNG

GRACE_S = 5.0  # between the stacks and the end, since ranks do not notice in the same second


class Watchdog:
    """While this context is open, `beat` must be called at least every `seconds`; 0: nobody watches."""

    def __init__(self, seconds: float, stacks: Path) -> None:
        """`stacks`: file for the stacks; they go to stderr as well."""
        self.seconds, self.stacks = seconds, stacks
        self._last, self._closed = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Say that things go on."""
        self._last = time.monotonic()

    def __enter__(self) -> Watchdog:
        """Begins to watch."""
        self.beat()
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(max(0.01, self._last + self.seconds - time.monotonic())):
            if time.monotonic() - self._last >= self.seconds:
                return self._end()

    def _end(self) -> None:
        """Write the stacks and end this process, wherever its threads are."""
        text = f"no step for {self.seconds:g} s: this process hangs, and ends with code {EXIT_HUNG}"
        try:
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            with self.stacks.open("a", encoding="utf-8") as file:
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=file, flush=True)
                faulthandler.dump_traceback(file)
            text += f"; its stacks are in {self.stacks}"
        except OSError as error:  # perhaps it is the file system that hangs
            text += f"; no stacks: {error}"
        print(text, file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        self._closed.wait(min(GRACE_S, self.seconds))
        os._exit(EXIT_HUNG)
