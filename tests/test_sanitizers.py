"""The tools that look for faults (scripts/sanitize.py, scripts/fuzz.py) can find one.

The sanitizer builds themselves take minutes: `make sanitize`. Here each sanitizer gets a small program with the fault
that it is for.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FAULTS = {
    "address": "int main(int n, char**) { int* p = new int[4]; int x = p[n + 3]; delete[] p; return x & 0; }",
    "leak": "int main(int n, char**) { static volatile long kept; kept = n; return *new int(0); }",
    "undefined": "int main(int n, char**) { volatile int most = 2147483647; return most + n == 0; }",
    "thread": "#include <thread>\nint x; int main() { std::thread t([] { ++x; }); ++x; t.join(); return 0; }",
}
FLAGS = {
    "address": "address,undefined",
    "leak": "address,undefined",
    "undefined": "address,undefined",
    "thread": "thread",
}


@pytest.fixture
def scripts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "scripts"))


@pytest.fixture
def sanitize(scripts: None) -> ModuleType:
    return importlib.import_module("sanitize")


@pytest.fixture
def fuzz(scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("fuzz")
    monkeypatch.setattr(module, "WORK", tmp_path)
    return module


def compile_program(source: str, flags: str, program: Path) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"
    command = [compiler, "-x", "c++", "-std=c++20", "-g", f"-fsanitize={flags}", "-fno-sanitize-recover=all", "-o"]
    subprocess.run([*command, str(program), "-", "-pthread"], input=source, text=True, check=True)
    return program


@pytest.mark.skipif(sys.platform != "linux", reason="not every sanitizer is everywhere")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_sanitizer_reports_its_fault(fault: str, sanitize: ModuleType, tmp_path: Path) -> None:
    good, text = sanitize.run([compile_program(FAULTS[fault], FLAGS[fault], tmp_path / "program")])
    assert not good
    assert "Sanitizer" in text or "runtime error" in text


def test_a_report_alone_is_a_failure(sanitize: ModuleType) -> None:
    """Whatever the exit code, and whatever the exit code without a report."""
    assert sanitize.run(["sh", "-c", "echo fine"]) == (True, "fine\n")
    assert not sanitize.run(["sh", "-c", "echo x.cpp:1: runtime error: overflow >&2"])[0]
    assert not sanitize.run(["sh", "-c", "exit 1"])[0]


@pytest.mark.skipif(sys.platform != "linux", reason="not every sanitizer is everywhere")
@pytest.mark.parametrize("flags", sorted(set(FLAGS.values())))
def test_memory_that_is_not_to_be_had_is_no_report(flags: str, sanitize: ModuleType, tmp_path: Path) -> None:
    source = "#include <new>\nint main() { return ::operator new(1ul << 60, std::nothrow) != nullptr; }"
    good, text = sanitize.run([compile_program(source, flags, tmp_path / "program")])
    assert good, text


def test_a_fuzz_target_that_stops_is_a_failure(fuzz: ModuleType, tmp_path: Path) -> None:
    program = tmp_path / "program"
    for code, passed in ((0, True), (77, False)):
        program.write_text(
            f"#!/bin/sh\necho 'what(): broken promise: x'; echo 'stat::number_of_executed_units: 12'; exit {code}"
        )
        program.chmod(0o755)
        good, figures = fuzz.run_target("utf8", program, 0.01)
        assert good is passed
        assert "12 inputs, corpus 0 files, 0 bytes" in figures
    assert "FAILED: what(): broken promise: x; see" in figures


def test_without_clang_the_python_part_runs_alone(
    fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert fuzz.find_clang() is None
    monkeypatch.setattr(fuzz, "run_python", lambda minutes: (True, "no difference"))
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--minutes", "0"])
    assert fuzz.main() == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == ("libFuzzer is left out: it takes clang 16 or newer; apt-get install clang-16 libclang-rt-16-dev")
    assert out[1].split(maxsplit=1) == ["python", "no difference"]
