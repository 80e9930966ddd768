"""`--device cuda`: which program computes on a card, and what this machine must have for it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nanochat_x.errors import RunnerError

#: Where Linux tells the version of NVIDIA's driver; there while a card can be used.
DRIVER = Path("/proc/driver/nvidia/version")

#: What `build.ensure_built` knows the program with CUDA kernels by.
PROGRAM = "cuda"


def program_for(target: str, device: str | None) -> str:
    """The program that runs a bundle for `target` on `device`, as `ensure_built` knows it.

    Bundles for `aoti` have one of their own for a card: kernels of this project on the bundle's weights. Other targets
    are told the device and answer for themselves. Raises RunnerError if this machine lacks what the kernels take.
    """
    if device != "cuda" or target != "aoti":
        return target
    check_cuda()
    return PROGRAM


def check_cuda() -> None:
    """Raises RunnerError naming what is missing: NVIDIA's driver, or nvcc, which the kernels are compiled with."""
    if not DRIVER.exists():
        raise RunnerError(
            "this machine has no NVIDIA driver", remedy="leave out --device, or use a machine with a card"
        )
    if find_nvcc() is None:
        raise RunnerError(
            "nvcc, which the CUDA kernels are compiled with, was not found",
            remedy="install a CUDA toolkit of 12.8 or newer and put nvcc on PATH, or leave out --device",
        )


def find_nvcc() -> Path | None:
    """nvcc: $CUDACXX, on PATH, in $CUDA_HOME, or where NVIDIA's packages put it."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((Path(path) for path in candidates if path and Path(path).is_file()), None)
