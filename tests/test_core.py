"""The C++ tests (doctest, runners/tests), one pytest test a case: core, kernels, program, operators."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from nanochat_x.build import executable

SOURCES = Path(__file__).resolve().parent.parent / "runners" / "tests"
#: executable -> the folder of its sources
SUITES = {
    "core_tests": SOURCES,
    "program_tests": SOURCES / "program",
    "kernels_tests": SOURCES / "kernels",
    "operators_tests": SOURCES / "operators",
    "executorch_tests": SOURCES / "executorch",
}


def cases_in_sources(suite: str) -> list[str]:
    """Names of all TEST_CASEs, from the sources: collecting tests must not compile anything."""
    pattern = re.compile(r'^TEST_CASE\w*\(\s*"((?:[^"\\]|\\.)*)"', re.MULTILINE)
    files = sorted(SUITES[suite].glob("*.cpp"))
    names = [name for file in files for name in pattern.findall(file.read_text("utf-8"))]
    return [name.replace('\\"', '"').replace("\\\\", "\\") for name in names]


def run(build: Path, suite: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(build / executable(suite)), "--no-colors", *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)


def only(name: str) -> str:
    """The option that chooses one test case (a comma would separate two names)."""
    return "--test-case=" + name.replace("\\", "\\\\").replace(",", "\\,")


@pytest.mark.parametrize(("suite", "name"), [(suite, name) for suite in SUITES for name in cases_in_sources(suite)])
def test_case(runner_build: Path, suite: str, name: str) -> None:
    done = run(runner_build, suite, only(name))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"test cases:\s+1 \|", done.stdout), f"this name chose no test, or several:\n{done.stdout}"


@pytest.mark.parametrize("suite", SUITES)
def test_no_case_is_left_out(runner_build: Path, suite: str) -> None:
    listed = run(runner_build, suite, "--list-test-cases").stdout.splitlines()
    names = [line for line in listed if line.strip() and not line.startswith(("[doctest]", "====="))]
    assert names
    assert sorted(names) == sorted(cases_in_sources(suite))


def test_a_failing_case_is_seen(runner_build: Path) -> None:
    """An unknown case runs nothing, which `test_case` must not take for success."""
    done = run(runner_build, "core_tests", only("there is no such case"))
    assert not re.search(r"test cases:\s+1 \|", done.stdout)
