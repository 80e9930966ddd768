"""Makes the environment of peers.py: build/peers, apart from the project's own.

    python bench/setup_peers.py

Takes a C++ compiler, and 5 to 20 minutes: llama.cpp is compiled for this machine. What cannot be installed is told and
left out; peers.py names it as missing then.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / "build" / "peers"


def python_of(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def requirements() -> list[str]:
    """The pinned packages, one a line."""
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [found[0] for line in lines if (found := re.findall(r"^[\w.-]+==[\w.]+", line))]


def main() -> int:
    """Installs one after the other; returns 1 if any of them failed."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not python_of(PEERS).exists():
        venv.EnvBuilder(with_pip=True).create(PEERS)
    site = subprocess.run([str(python_of(PEERS)), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    # Behind its own packages, those of the project: torch is large, and the same version serves.
    Path(site, "project.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    # Nothing of llama.cpp's tools, nor of its image models: the library alone
    environment = {**os.environ, "CMAKE_ARGS": "-DLLAVA_BUILD=OFF " + os.environ.get("CMAKE_ARGS", "")}
    failed = []
    for package in requirements():
        print(f"install {package} ...", flush=True)
        command = [str(python_of(PEERS)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package]
        if subprocess.run(command, env=environment, check=False).returncode != 0:
            failed.append(package)
    print(f"{PEERS}: ready" if not failed else f"not installed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
