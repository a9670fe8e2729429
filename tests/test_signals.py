"""Signals become a flag."""

import os
import signal
import threading

import pytest

from pipeline.signals import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.signals == (number,)


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(RuntimeError), StopRequest():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_ctrl_c_twice_interrupts() -> None:
    with StopRequest(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_term_may_come_often() -> None:
    """Slurm sends it more than once; only the user's second Ctrl-C means at once."""
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(stop.signals) == 3


def test_what_came_before_the_loop_is_known_to_it() -> None:
    with StopRequest() as outer:
        os.kill(os.getpid(), signal.SIGTERM)
        with StopRequest() as inner:
            assert inner.requested
            os.kill(os.getpid(), signal.SIGUSR2)
        assert outer.signals == (signal.SIGTERM, signal.SIGUSR2)


def test_one_after_another_are_strangers() -> None:
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
    with StopRequest() as second:
        assert not second.requested


def test_outside_of_the_main_thread_nothing_happens() -> None:
    seen: list[bool] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.append(stop.requested)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGTERM) is before
