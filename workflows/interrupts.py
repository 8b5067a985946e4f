"""Ctrl-C and SIGTERM during a run: the first ends it between two steps, a second at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ERRORS = {
    signal.SIGINT: lambda: KeyboardInterrupt(),
    signal.SIGTERM: lambda: SystemExit(128 + signal.SIGTERM),
}
# Who has set answers of their own keeps them, and a shell's background job ignores Ctrl-C.
REPLACED = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Interrupts:
    """A context in which both signals are answered; other answers than Python's own stay.

    `check` and the block of `open` raise KeyboardInterrupt for Ctrl-C, SystemExit(143) for SIGTERM.
    In a thread that is not the main one nothing changes.
    """

    def __init__(self) -> None:
        self.asked: int | None = None  # the first signal that came
        self.twice = False
        self._open = False
        self._replaced: list[int] = []

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._replaced = [s for s, own in REPLACED.items() if signal.getsignal(s) is own]
        for number in self._replaced:
            signal.signal(number, self._answer)
        return self

    def __exit__(self, *_: Any) -> None:
        for number in self._replaced:
            signal.signal(number, REPLACED[number])
        self._replaced = []

    def check(self) -> None:
        """Raises where a signal has come."""
        if self.asked is not None:
            raise ERRORS[self.asked]()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, a signal raises at once: the state is whole and nothing is half written."""
        self.check()
        self._open = True
        try:
            yield
        finally:
            self._open = False
        self.check()

    def _answer(self, number: int, frame: Any) -> None:
        self.twice = self.asked is not None
        self.asked = number
        if self.twice:
            raise ERRORS[number]()
        name = signal.Signals(number).name
        # Not printed: a handler may run inside a print of what it interrupts.
        os.write(2, f"\n{name}: ends after this step; once more ends it at once\n".encode())
        if self._open:
            raise ERRORS[number]()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the block ends: a step donates the old state to the new one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        for number in caught if callable(before) else []:
            signal.raise_signal(number)
