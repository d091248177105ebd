"""Ctrl-C waits for the end of a block that must not be cut in two, and is not lost there."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from octavo.cli.interrupt import uninterrupted


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Also where the tests run in a shell's background, which ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Callback:
    """Raises what its ``__del__`` raises into nothing, as the interpreter does with every callback."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_it_is_raised_at_the_end() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            steps.append("went on")
        steps.append("unreachable")
    assert steps == ["went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_callback_does_not_swallow_it() -> None:
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        Callback()


def test_a_second_one_does_not_wait() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        steps.append("unreachable")
    assert steps == []


def test_it_stays_ignored_where_it_was() -> None:
    """A shell's background process."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_one_nothing_happens() -> None:
    with uninterrupted():
        pass
    ran = []

    def work() -> None:
        with uninterrupted():
            ran.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [signal.default_int_handler]
