"""Signals that end the program, while it does what an exception must not break into."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


@contextmanager
def ending_at_once() -> Iterator[None]:
    """While modules are imported: Ctrl-C and requests to end do so at once, with Ctrl-C's line.

    An exception there may be swallowed by a module's own `except`, or come out as an ImportError with a traceback.
    Nothing may be half-written in the block: nothing is cleaned up.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers are the main thread's alone
        yield
        return
    before = {}
    for name in _NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored on purpose: stays
            before[number] = signal.signal(number, _end_at_once)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        say_interrupted()
    os._exit(128 + number)


def say_interrupted() -> None:
    """Ctrl-C's line on standard error, past whatever state its Python object is in."""
    with suppress(OSError):  # closed
        os.write(2, b"nanochat_x: interrupted\n")
