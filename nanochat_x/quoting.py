"""Text of unknown origin, made fit for an error's one line."""

from __future__ import annotations


def quoted(text: object, limit: int = 120, *, keep_spaces: bool = False) -> str:
    """`str(text)` in one printable line of at most `limit` characters: a file's bytes must not reach a terminal raw.

    Runs of white space become one space; `keep_spaces` keeps those that align columns.
    """
    line = str(text) if keep_spaces else " ".join(str(text).split())
    if not line.isprintable():
        line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
    return line if len(line) <= limit else line[: limit - 3] + "..."
