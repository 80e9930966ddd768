"""What a long verb says while it works: stages with their times and sizes.

On a terminal the running stage has a spinner (rich); elsewhere each line is plain text, so that a log stays readable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console


class Stage:
    """One running stage; `detail` adds what should stand beside its time when it ends."""

    def __init__(self, show: Callable[[str], None] | None = None) -> None:
        self.details: list[str] = []
        self._show = show

    def update(self, text: str) -> None:
        """How far it is ("12 of 500"), where that can be drawn; elsewhere it is not said."""
        if self._show is not None:
            self._show(text)

    def detail(self, text: str) -> None:
        """Adds e.g. a size ("1.5 MB") to the line that ends the stage."""
        self.details.append(text)


class Progress(Protocol):
    """How a stage of work tells its user where it is. Both forms below and `Silent` implement it."""

    def note(self, text: str) -> None:
        """A line of information."""

    def stage(self, title: str) -> AbstractContextManager[Stage]:
        """Times the block; an exception that leaves it marks the stage as failed and goes on."""


class Silent:
    """Says nothing: for use as a library."""

    def note(self, text: str) -> None:
        """Nothing."""

    def stage(self, title: str) -> AbstractContextManager[Stage]:
        """A stage that nobody sees."""
        return nullcontext(Stage())


class PlainProgress:
    """One line when a stage begins and one when it ends, each flushed at once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def note(self, text: str) -> None:
        """Prints the line."""
        print(text, file=self._stream, flush=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """`title ...`, then `title: 1.2 s, 3.4 MB`."""
        stage = Stage()
        start = time.monotonic()
        self.note(f"{title} ...")
        try:
            yield stage
        except BaseException:
            self.note(f"{title}: stopped after {format_seconds(time.monotonic() - start)}")
            raise
        self.note(f"{title}: {', '.join([format_seconds(time.monotonic() - start), *stage.details])}")


class TerminalProgress:
    """A spinner with the seconds so far, then a tick, the time and the details."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def note(self, text: str) -> None:
        """Prints the line."""
        self._console.print(text, markup=False, highlight=False)

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """Shows the stage while it runs and leaves one line of it."""
        from rich.progress import Progress as Display
        from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

        start = time.monotonic()
        # redirect_*: off, as a library's own warnings must not be drawn through the display.
        display = Display(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        task = display.add_task(title, total=None)
        stage = Stage(lambda text: display.update(task, description=f"{title}: {text}"))
        try:
            with display:
                yield stage
        except BaseException:
            self._line("✗", "red", title, ["stopped after " + format_seconds(time.monotonic() - start)])
            raise
        self._line("✓", "green", title, [format_seconds(time.monotonic() - start), *stage.details])

    def _line(self, mark: str, color: str, title: str, details: list[str]) -> None:
        from rich.text import Text

        line = Text.assemble((f"{mark} ", color), f"{title:<44} ", ("  ".join(f"{d:>9}" for d in details), "dim"))
        self._console.print(line, highlight=False)


def progress_on(stream: TextIO | None) -> Progress:
    """The form that fits the stream: drawn on a terminal, plain lines elsewhere (and where TERM is "dumb").

    None, a standard stream that is closed: nobody listens, and the work is done all the same.
    """
    if stream is None:
        return Silent()
    if not stream.isatty():
        return PlainProgress(stream)
    from rich.console import Console

    console = Console(file=stream)
    return PlainProgress(stream) if console.is_dumb_terminal else TerminalProgress(console)


def format_seconds(seconds: float) -> str:
    """`0.4 s`, `12.3 s`, `3 min 05 s`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def format_size(size: int) -> str:
    """Bytes as people read them, in powers of ten: `999 B`, `8.9 MB`, `1.15 GB`."""
    for factor, unit, digits in ((1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1)):
        if size >= factor:
            return f"{size / factor:.{digits}f} {unit}"
    return f"{size} B"


def tree_size(path: Path) -> int:
    """Bytes of a file, or of all files under a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
