"""What this machine is, for reports: a figure without it is worth little."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def describe_machine() -> str:
    """`AMD EPYC 7B13, 2 cores, Linux x86_64`."""
    return f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def cpu_name() -> str:
    """What the processor calls itself, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def usable_cores() -> int:
    """Cores that this process may use: fewer than there are where it was bound to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
