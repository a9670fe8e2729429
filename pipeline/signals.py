"""Being told to stop: a signal becomes a flag, which the loop looks at between two steps.

So a run ends where its state is whole. INT is Ctrl-C, TERM comes from a launcher or from Slurm (cancelled,
requeued), USR2 from Slurm some time before the time limit or before a preemption.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

EXIT_STOPPED = 85
"""Exit code of a rank that was told to stop, saved and ended: neither success nor failure, it can go on."""

EXIT_HUNG = 86
"""Exit code of a rank that made no step for too long and ended itself: to be started again."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Stopped(Exception):
    """A stage was told to stop, saved its state and ended; run it again and it goes on from there."""


class StopRequest:
    """While this context is open, INT, TERM and USR2 do not end the process but are remembered.

    A context inside of another shares its memory: what arrived while a stage was being imported is known to
    its loop. INT for the second time raises KeyboardInterrupt, for whoever will not wait. Outside of the
    main thread, where Python allows no handlers, the context does nothing.

    Example:
        with StopRequest() as stop:
            for step in steps:
                train(step)
                if ranks.agree(stop.requested):
                    save()
                    raise Stopped(f"saved at step {step}")
    """

    def __init__(self) -> None:
        """Nothing happens before the context is entered."""
        self._received: list[signal.Signals] = []
        self._before: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether any of the signals has arrived."""
        return bool(self._received)

    @property
    def signals(self) -> tuple[signal.Signals, ...]:
        """The signals that have arrived, in order."""
        return tuple(self._received)

    def __enter__(self) -> StopRequest:
        """Takes over the signals, and what an outer context has received."""
        if threading.current_thread() is not threading.main_thread():
            return self
        outer = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if isinstance(outer, StopRequest):
            self._received = outer._received
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # type: ignore[arg-type]
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and signal.SIGINT in self._received
        self._received.append(signal.Signals(number))
        if again:
            raise KeyboardInterrupt
