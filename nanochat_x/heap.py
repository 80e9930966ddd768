"""Memory that was freed, back to the system: glibc keeps it for what comes next, and the peak then has both."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """Gives back what the C library has of freed memory, where it can be asked for that (glibc); else nothing."""
    gc.collect()  # graphs of programs refer to one another
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
