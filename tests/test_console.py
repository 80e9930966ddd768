"""Progress: plain lines in a log, a drawn display on a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from nanochat_x.console import (
    PlainProgress,
    Progress,
    Silent,
    TerminalProgress,
    format_seconds,
    format_size,
    progress_on,
)


def work(progress: Progress) -> None:
    progress.note("checkpoint [demo] d4")
    with progress.stage("compile prefill") as stage:
        stage.detail("1.5 MB")
    with pytest.raises(KeyError), progress.stage("compile decode"):
        raise KeyError


def test_plain_lines() -> None:
    stream = io.StringIO()
    work(progress_on(stream))
    lines = [re.sub(r"\d+\.\d s", "T", line) for line in stream.getvalue().splitlines()]
    assert lines == [
        "checkpoint [demo] d4",
        "compile prefill ...",
        "compile prefill: T, 1.5 MB",
        "compile decode ...",
        "compile decode: stopped after T",
    ]


def test_a_terminal() -> None:
    stream = io.StringIO()
    work(TerminalProgress(Console(file=stream, force_terminal=True, width=100, color_system=None)))
    shown = [line.split("\r")[-1] for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).splitlines()]
    text = "\n".join(shown)
    assert "checkpoint [demo] d4" in text, "brackets are no markup"
    assert re.search(r"✓ compile prefill +\d\.\d s +1\.5 MB", text)
    assert re.search(r"✗ compile decode +stopped after \d\.\d s", text)


def test_the_form_fits_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(progress_on(Terminal()), TerminalProgress)
    assert isinstance(progress_on(io.StringIO()), PlainProgress)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress_on(Terminal()), PlainProgress)


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    work(Silent())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (8_912_345, "8.9 MB"), (1_150_000_000, "1.15 GB")],
)
def test_sizes(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (12.34, "12.3 s"), (99.9, "99.9 s"), (185, "3 min 05 s")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
