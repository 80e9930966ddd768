"""Opening files that may be anything: what is no regular file is refused instead of waited for."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path


def open_regular(path: Path) -> io.BufferedReader:
    """A regular file, links followed, for reading bytes.

    Raises OSError, for a pipe, a device or a folder too: to open a pipe is to wait for its writer, and a device may
    never end.
    """
    # (O_NONBLOCK and O_CLOEXEC: POSIX; O_BINARY: Windows)
    flags = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, most: int) -> bytes:
    """All of a regular file of at most `most` bytes, else its first `most` + 1. Raises OSError."""
    with open_regular(path) as file:
        return file.read(most + 1)
