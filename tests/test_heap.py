"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

# What is freed lies below what is kept, so that the C library does not give it back by itself.
_PROGRAM = """
import resource
from nanochat_x.heap import give_back

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

freed = [bytes(1000) for _ in range(100_000)]
kept = bytes(1000)
del freed
before = resident()
give_back()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="takes glibc")
def test_freed_memory_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 50_000_000  # of 100 MB
    idle = subprocess.run([sys.executable, "-c", _PROGRAM.replace("\ngive_back()", "")], capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert int(idle.stdout) < 5_000_000  # without it the memory stays
