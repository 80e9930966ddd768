"""Which runtimes the C++ programs can be built with: packages of this Python environment, never imported here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from nanochat_x.errors import RunnerError

#: Packages whose libraries and headers the runners link.
PACKAGES = ("torch", "onnxruntime", "executorch")

#: target -> the one of them that its runner is built with.
RUNTIMES = {"aoti": "torch", "torchscript": "torch", "onnx": "onnxruntime", "executorch": "executorch"}


def torch_version() -> str:
    """Version of the installed torch, as `2.13.0+cpu`. Raises RunnerError if there is none."""
    version = installed_version("torch")
    if version is None:
        raise RunnerError("the runner needs torch's libraries", remedy="pip install nanochat_x's dependencies")
    return version


def runtime_versions() -> tuple[str, ...]:
    """`PACKAGE VERSION` of each that is installed, in a fixed order."""
    return tuple(f"{package} {version}" for package in PACKAGES if (version := installed_version(package)) is not None)


def cmake_prefixes() -> list[Path]:
    """Where CMake looks first: the packages' own files, and the libraries that scripts/system-deps.sh unpacked."""
    torch = [folder / "share" / "cmake" for folder in _folders("torch")]
    unpacked = Path(sys.prefix, "cxx", "usr")
    return [*torch, *_folders("onnxruntime"), *_folders("executorch"), *([unpacked] if unpacked.is_dir() else [])]


def installed_version(package: str) -> str | None:
    """Version of a package of this environment; None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _folders(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
