"""`cmake --install`, and a project elsewhere that uses what it installs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat_x.build import PROGRAMS
from nanochat_x.build import find_tool as tool


@pytest.fixture(scope="module")
def prefix(runner_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation of the runners."""
    folder = tmp_path_factory.mktemp("installed")
    run(tool("cmake"), "--install", runner_build, "--prefix", folder)
    return folder


@pytest.fixture
def consumer(root: Path, tmp_path: Path) -> Path:
    """The example project, where nothing of ours lies beside it."""
    return Path(shutil.copytree(root / "runners" / "examples" / "consumer", tmp_path / "consumer"))


def run(*command: str | Path) -> str:
    """Standard output; what a failing command printed is in the failure."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def configure(consumer: Path, prefix: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [tool("cmake"), "-S", consumer, "-B", consumer / "build", "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}"]
    command += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-DCMAKE_BUILD_TYPE=Release", *options]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("target", PROGRAMS)
def test_a_project_that_finds_the_package(
    target: str, consumer: Path, prefix: Path, lowered: Callable[..., Path]
) -> None:
    done = configure(consumer, prefix, f"-DBACKEND={target}")
    assert done.returncode == 0, done.stderr
    run(tool("cmake"), "--build", consumer / "build")
    answer = run(consumer / "build" / "consumer", lowered("demo", target), "What is 9325 + 33?")
    assert "The answer is 9358." in answer


def test_a_backend_that_was_not_installed(consumer: Path, prefix: Path) -> None:
    done = configure(consumer, prefix, "-DBACKEND=abacus")
    assert done.returncode != 0
    assert "the backend abacus is not in this installation, which has: aoti;torchscript" in " ".join(
        done.stderr.split()
    )


def test_the_installed_program_runs_by_itself(prefix: Path, demo_bundle: Path) -> None:
    program = prefix / "bin" / "nanochat-aoti"
    question = ["chat", demo_bundle, "--prompt", "What is 9325 + 33?", "--temperature", "0"]
    assert "9358" in run(program, *map(str, question))


def test_headers_stand_alone(prefix: Path, tmp_path: Path) -> None:
    """Each compiles when it is the only one that is included."""
    headers = sorted((prefix / "include" / "nanochat_x").glob("*.h"))
    assert len(headers) >= 12
    for header in headers:
        (tmp_path / f"{header.stem}.cpp").write_text(f'#include "nanochat_x/{header.name}"\n')
    compiler = os.environ.get("CXX", "c++")
    sources = [str(path) for path in sorted(tmp_path.glob("*.cpp"))]
    run(compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{prefix / 'include'}", *sources)
