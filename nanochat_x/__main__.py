"""`python -m nanochat_x`, and the console script."""

import os
import signal
import sys
from types import FrameType

from nanochat_x.interrupts import ending_at_once, say_interrupted


def run() -> None:
    """Runs the command line on `sys.argv` and exits with its code."""
    _reserve_standard_streams()
    # Being ended is like Ctrl-C: half-written files are taken away and the processes that we started are ended too.
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _end)
    try:
        with ending_at_once():
            from nanochat_x.cli import main
        code = main(sys.argv[1:])
    except KeyboardInterrupt:  # in the moment before `main` or after it
        say_interrupted()
        code = 130
    sys.exit(code)


def _reserve_standard_streams() -> None:
    """A standard stream that is closed must not become the number of the next file that is opened.

    What takes its place cannot be written to, so whoever has an answer to give there still fails.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    run()
