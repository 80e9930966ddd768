"""Builds the C++ core and its tests, without any ML runtime, in ways of their own: sanitizers, fuzz targets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nanochat_x.build import find_tool, installed_sources


def build_core(folder: Path, programs: Sequence[str], **settings: str) -> Path:
    """The folder with the programs, built by need. Ends the process with the compiler's own words if it cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    backends = {f"NANOCHAT_X_{name}": "OFF" for name in ("AOTI", "TORCHSCRIPT", "ONNX", "EXECUTORCH")}
    ninja = find_tool("ninja")
    configure = [
        find_tool("cmake"), "-S", str(installed_sources()), "-B", str(folder), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}", *(f"-D{name}={value}" for name, value in {**backends, **settings}.items()),
    ]  # fmt: skip
    for command in (configure, [ninja, "-C", str(folder), "-j", str(os.cpu_count() or 1), *programs]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{done.stdout[-4000:]}{done.stderr}")
    return folder
