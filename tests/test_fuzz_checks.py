"""The fuzz targets' checks (runners/fuzz) on their seeds and on random changes of each, without libFuzzer.

`make fuzz` lets libFuzzer look further, where there is clang; that each check sees what is broken is in
runners/tests/test_fuzz_checks.cpp.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = ["manifest", "tokenizer_file", "session", "calculator", "safetensors", "splitter", "utf8"]
CHANGES = 500  # of each seed


@pytest.fixture(scope="session")
def seeds(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What scripts/fuzz_seeds.py writes."""
    folder = tmp_path_factory.mktemp("seeds")
    subprocess.run([sys.executable, root / "scripts" / "fuzz_seeds.py", folder], check=True, capture_output=True)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(CHECKS)
    return folder


def replay(build: Path, check: str, changes: int, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(build / "fuzz_replay"), check, str(changes), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


@pytest.mark.parametrize("check", CHECKS)
def test_promises_are_kept(check: str, runner_build: Path, seeds: Path) -> None:
    done = replay(runner_build, check, CHANGES, seeds / check)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{(1 + CHANGES) * len(list((seeds / check).iterdir()))} inputs\n"


def test_a_broken_promise_is_told(runner_build: Path, seeds: Path) -> None:
    done = replay(runner_build, "never", 0, seeds / "utf8")
    assert done.returncode == 1
    assert "never: broken promise: this check is never passed" in done.stderr
    assert re.search(r"^input: [0-9a-f]+$", done.stderr, re.MULTILINE)


def test_cmake_names_every_check(root: Path) -> None:
    """Its list of targets, the table in checks.h and the seeds are three."""
    cmake = (root / "runners" / "fuzz" / "CMakeLists.txt").read_text()
    (names,) = re.findall(r"foreach\(_check IN ITEMS ([\w ]+)\)", cmake)
    assert names.split() == CHECKS
    table = (root / "runners" / "fuzz" / "checks.h").read_text()
    assert re.findall(r'\{"(\w+)", check_\w+\}', table) == CHECKS
