"""Functions side by side, each in a process forked off this one: they share what it holds in memory.

For work that holds Python's lock, as a compiler written in Python does. Linux alone: elsewhere a forked process may not
use the system's libraries.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Generic, TypeVar

import torch

from nanochat_x.errors import NanochatXError

T = TypeVar("T")


class LostProcessError(Exception):
    """A process ended without an answer: killed, as by a system that is out of memory."""


def side_by_side(functions: Sequence[Callable[[], T]]) -> list[T]:
    """What each returns, in their order; the first exception in time of any of them, the others being ended then.

    They begin in the order given, and one more run at once than there are cores for this process, as one or another
    waits for a file. A result or an exception must be small and pickle. One function, or a platform without: in turn,
    in this process. Within a function torch has one thread. Raises LostProcessError for a process that was killed.
    """
    if len(functions) < 2 or not can_fork():
        return [function() for function in functions]
    started: list[_Running[T]] = []
    try:
        while not all(one.done for one in started) or len(started) < len(functions):
            running = [one for one in started if not one.done]
            if len(running) <= len(os.sched_getaffinity(0)) and len(started) < len(functions):
                started.append(_Running(functions[len(started)]))
                continue
            ready = wait([one.answers for one in running])
            for one in running:
                if one.answers in ready:
                    one.receive()
        return [one.result for one in started]
    finally:
        for one in started:
            one.end()


def can_fork() -> bool:
    """Whether processes are forked here."""
    return sys.platform == "linux"


class _Running(Generic[T]):
    """A function in a process of its own."""

    result: T
    done = False

    def __init__(self, function: Callable[[], T]) -> None:
        context = multiprocessing.get_context("fork")
        self.answers, sending = context.Pipe(duplex=False)
        self._process: ForkProcess = context.Process(target=_answer, args=(function, sending), daemon=False)
        self._process.start()
        sending.close()  # ours: its end in the process is the only one now, and closes with it

    def receive(self) -> None:
        try:
            answer = self.answers.recv()
        except EOFError:
            self._process.join()
            raise LostProcessError(f"a process of it ended without an answer ({self._how()})") from None
        if isinstance(answer, BaseException):
            raise answer
        self.result = answer[0]
        self.done = True

    def _how(self) -> str:
        code = self._process.exitcode or 0
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def end(self) -> None:
        """Ends the process with all that it started, if it still runs."""
        if self._process.is_alive() and self._process.pid is not None:
            with suppress(ProcessLookupError):  # it has no group yet
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
        self._process.join()
        self.answers.close()


def _answer(function: Callable[[], T], sending: Connection) -> None:
    """In the new process. It ends here: what this one's `finally` blocks would do is the other's business."""
    # A group of its own can be ended as a whole, compilers that it runs included. Ctrl-C reaches the other alone then.
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)  # threads of the other are not here, whatever their pool believes
    try:
        answer: object = (function(),)
    except (NanochatXError, OSError) as error:
        answer = error
    except BaseException as error:  # one that may not pickle
        answer = RuntimeError(f"{type(error).__name__}: {error}")
    with suppress(OSError):  # nobody listens any more
        sending.send(answer)
    os._exit(0)
