"""The C++ compiler that AOTInductor's code is compiled with."""

from __future__ import annotations

import os
import shutil

from nanochat_x.errors import LoweringError


def find_compiler() -> str:
    """The C++ compiler: $CXX, else g++, else clang++. Raises LoweringError if there is none."""
    wanted = os.environ.get("CXX")
    if wanted:
        found = shutil.which(wanted)
        if found is None:
            raise LoweringError(f"CXX={wanted} is not a program", remedy="set CXX to a compiler alone, without options")
        return found
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise LoweringError("no C++ compiler found", remedy="install one (Debian: apt-get install g++) or set CXX")
    return found
