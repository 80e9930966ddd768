"""`python -m nanochat_x`, and the console script."""

import signal
import sys
from types import FrameType


def run() -> None:
    """Runs the command line on `sys.argv` and exits with its code."""
    # Being ended is like Ctrl-C: half-written files are taken away and the processes that we started are ended too.
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _end)
    try:
        from nanochat_x.cli import main

        code = main(sys.argv[1:])
    except KeyboardInterrupt:  # while the lines above were still importing
        code = 130
    sys.exit(code)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    run()
