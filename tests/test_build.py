"""nanochat_x.build on a project of one file, so that every build takes a second."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_x.build import LOG, STAMP, default_build_dir, ensure_built, error_line, hash_sources
from nanochat_x.errors import RunnerError, UsageError
from nanochat_x.runtimes import torch_version

CMAKE = """\
cmake_minimum_required(VERSION 3.24)
project(tiny LANGUAGES CXX)
file(APPEND "${CMAKE_CURRENT_SOURCE_DIR}/../configured.txt" "tests ${NANOCHAT_X_TESTS} werror ${NANOCHAT_X_WERROR}\\n")
add_executable(nanochat-aoti main.cpp)
target_compile_options(nanochat-aoti PRIVATE -Wall $<$<BOOL:${NANOCHAT_X_WERROR}>:-Werror>)
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny project in place of runners/; its build folder is `tmp_path / "build"`."""
    monkeypatch.setenv("NANOCHAT_X_BUILD_DIR", str(tmp_path / "build"))
    folder = tmp_path / "runners"
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(CMAKE)
    (folder / "main.cpp").write_text("int main() { return 7; }\n")
    return folder


def code_of(program: Path) -> int:
    return subprocess.run([program], check=False).returncode


def configured(sources: Path) -> list[str]:
    return (sources.parent / "configured.txt").read_text().splitlines()


def test_builds_once_and_again_when_a_source_changes(sources: Path) -> None:
    first = ensure_built("aoti", sources=sources)
    assert first.build_dir == sources.parent / "build"
    assert code_of(first.program) == 7
    made = first.program.stat().st_mtime_ns
    assert ensure_built("aoti", sources=sources) == first
    assert first.program.stat().st_mtime_ns == made
    assert configured(sources) == ["tests OFF werror OFF"]

    (sources / "main.cpp").write_text("int main() { return 8; }\n")
    assert code_of(ensure_built("aoti", sources=sources).program) == 8


@pytest.mark.parametrize("after", ["a good build", "a failed build"])
def test_a_source_that_changed_and_looks_older(sources: Path, after: str) -> None:
    """As after `cp -p` or unpacking an archive: Ninja alone would keep the old object."""
    (sources / "other.cpp").write_text("int other() { return 1; }\n")
    (sources / "CMakeLists.txt").write_text(CMAKE.replace("main.cpp", "main.cpp other.cpp"))
    (sources / "main.cpp").write_text("int other();\nint main() { return other(); }\n")
    assert code_of(ensure_built("aoti", sources=sources).program) == 1
    if after == "a failed build":
        (sources / "main.cpp").write_text("int other();\nint main() { return another(); }\n")
        with pytest.raises(RunnerError):
            ensure_built("aoti", sources=sources)
        (sources / "main.cpp").write_text("int other();\nint main() { return other(); }\n")
    (sources / "other.cpp").write_text("int other() { return 2; }\n")
    os.utime(sources / "other.cpp", (1_000_000_000, 1_000_000_000))
    assert code_of(ensure_built("aoti", sources=sources).program) == 2


@pytest.mark.parametrize("harm", ["program", "stamp", "stamp is not JSON", "stamp of another version"])
def test_a_harmed_build_is_repaired(sources: Path, harm: str) -> None:
    done = ensure_built("aoti", sources=sources)
    stamp = done.build_dir / STAMP
    if harm == "program":
        done.program.unlink()
    elif harm == "stamp":
        stamp.unlink()
    else:
        stamp.write_text("{" if harm == "stamp is not JSON" else json.dumps({"prefixes": [], "new": 1}))
    assert code_of(ensure_built("aoti", sources=sources).program) == 7
    assert json.loads(stamp.read_text())["sources"] == hash_sources(sources)


def test_more_than_was_asked_for_is_good_enough(sources: Path) -> None:
    ensure_built("aoti", sources=sources)
    ensure_built("aoti", sources=sources, tests=True)
    ensure_built("aoti", sources=sources)
    ensure_built("aoti", sources=sources, werror=True)
    ensure_built("aoti", sources=sources, tests=True)
    assert configured(sources) == ["tests OFF werror OFF", "tests ON werror OFF", "tests ON werror ON"]


def test_werror_finds_a_warning(sources: Path) -> None:
    (sources / "main.cpp").write_text("int main() { int unused; return 7; }\n")
    assert code_of(ensure_built("aoti", sources=sources).program) == 7
    with pytest.raises(RunnerError, match="unused"):
        ensure_built("aoti", sources=sources, werror=True)


def test_a_compiler_error_is_one_line_with_the_log(sources: Path) -> None:
    good = ensure_built("aoti", sources=sources)
    (sources / "main.cpp").write_text("int main() { return nothing; }\n")
    for _ in range(2):  # the old program must not pass for the new one
        with pytest.raises(RunnerError) as caught:
            ensure_built("aoti", sources=sources)
        line = str(caught.value)
        assert "\n" not in line
        assert "main.cpp:1:21: error:" in line
        assert str(good.build_dir / LOG) in line
    (sources / "main.cpp").write_text("int main() { return 9; }\n")
    assert code_of(ensure_built("aoti", sources=sources).program) == 9


def test_what_cmake_says_is_passed_on(sources: Path) -> None:
    (sources / "CMakeLists.txt").write_text(CMAKE + 'message(FATAL_ERROR "PCRE2 was not found.")\n')
    with pytest.raises(RunnerError, match=r"CMake Error at CMakeLists.txt:6 \(message\): PCRE2 was not found\."):
        ensure_built("aoti", sources=sources)


def test_no_compiler(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(RunnerError, match=r"/no/such/compiler"):
        ensure_built("aoti", sources=sources)


def test_a_build_without_the_program(sources: Path) -> None:
    (sources / "CMakeLists.txt").write_text(CMAKE.replace("nanochat-aoti", "other"))
    with pytest.raises(RunnerError, match="left no nanochat-aoti"):
        ensure_built("aoti", sources=sources)


def test_a_folder_that_served_other_sources(sources: Path) -> None:
    ensure_built("aoti", sources=sources)
    moved = sources.with_name("moved")
    shutil.move(sources, moved)
    (moved / "main.cpp").write_text("int main() { return 3; }\n")
    assert code_of(ensure_built("aoti", sources=moved).program) == 3


def test_two_at_once_build_once(sources: Path) -> None:
    code = "import sys, pathlib; from nanochat_x.build import ensure_built; "
    code += "print(ensure_built('aoti', sources=pathlib.Path(sys.argv[1])).program)"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(sources)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(set(outputs)) == 1
    assert len(configured(sources)) == 1


def test_unknown_target() -> None:
    with pytest.raises(UsageError, match=r"'tpu'; choose one of: aoti"):
        ensure_built("tpu")


def test_a_build_folder_that_cannot_be_made(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sources.parent / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_X_BUILD_DIR", str(sources.parent / "file" / "build"))
    with pytest.raises(RunnerError, match="cannot write the build folder"):
        ensure_built("aoti", sources=sources)


def test_where_builds_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NANOCHAT_X_BUILD_DIR", raising=False)
    assert sys.prefix != sys.base_prefix, "the tests run in a virtual environment"
    here = default_build_dir(tmp_path)
    assert here.parent == Path(sys.prefix, "var", "nanochat_x")
    assert here.name.startswith(f"runners-{torch_version()}-")
    assert default_build_dir(tmp_path / "elsewhere") != here

    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_build_dir(tmp_path).parent == tmp_path / "cache" / "nanochat_x"


def test_the_hash_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.cpp").write_text("1")
    hashes = [hash_sources(tmp_path)]
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.pyc").write_text("")
    assert hash_sources(tmp_path) == hashes[0], "no source of a build"
    (tmp_path / "src" / "a.cpp").write_text("2")
    hashes.append(hash_sources(tmp_path))
    (tmp_path / "src" / "a.cpp").rename(tmp_path / "src" / "b.cpp")
    hashes.append(hash_sources(tmp_path))
    (tmp_path / "src" / "c.h").write_text("")
    hashes.append(hash_sources(tmp_path))
    assert len(set(hashes)) == 4


GCC = """\
[1/3] Building CXX object CMakeFiles/x.dir/a.cpp.o
FAILED: [code=1] CMakeFiles/x.dir/a.cpp.o
/usr/bin/c++ -Werror -o a.o -c a.cpp
a.cpp: In function 'int f()':
a.cpp:3:9: error: 'y' was not declared in this scope
a.cpp:4:9: error: expected ';'
ninja: build stopped: subcommand failed.
"""
LINKER = """\
FAILED: x
/usr/bin/ld: a.o: in function `main':
a.cpp:(.text+0x5): undefined reference to `g()'
collect2: error: ld returned 1 exit status
"""
CMAKE_MESSAGE = """\
-- Detecting CXX compile features - done
CMake Error at cmake/Dependencies.cmake:81 (message):
  Libraries that the runners are built from were not found.

    doctest is missing: apt-get install doctest-dev
Call Stack (most recent call first):
  CMakeLists.txt:31 (include)


-- Configuring incomplete, errors occurred!
"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (GCC, "a.cpp:3:9: error: 'y' was not declared in this scope"),
        (LINKER, "a.cpp:(.text+0x5): undefined reference to `g()'"),
        ("x\n/usr/bin/ld: cannot find -lfoo: No such file\n", "/usr/bin/ld: cannot find -lfoo: No such file"),
        ("a.cpp(3): error C2065: 'y': undeclared identifier\n", "a.cpp(3): error C2065: 'y': undeclared identifier"),
        (
            CMAKE_MESSAGE,
            "CMake Error at cmake/Dependencies.cmake:81 (message): Libraries that the runners are built from were "
            "not found. doctest is missing: apt-get install doctest-dev",
        ),
        ("CMake Error: no such generator\n", "CMake Error: no such generator"),
        ("Killed\n\n", "Killed"),
        ("", "no output"),
    ],
)
def test_error_line(text: str, line: str) -> None:
    assert error_line(text) == line


APT_GET = """\
#!/bin/sh
# In place of apt-get: has the package only where another release's sources are given.
for argument in "$@"; do
  case $argument in
    Dir::Etc::SourceParts=*) cat "${argument#*=}"/* >"$SEEN" ;;
    download) [ -s "$SEEN" ] && [ -n "$DEB" ] || exit 100; cp "$DEB" . ;;
  esac
done
"""


@pytest.fixture
def fake_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts APT_GET before the real one; returns the file in which it keeps the sources that it was given."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed: no Debian, no Ubuntu")
    tree, tools = tmp_path / "tree", tmp_path / "tools"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: libonnxruntime-dev\nVersion: 1\nArchitecture: all\nMaintainer: none\nDescription: none\n"
    )
    (tree / "usr/include/onnxruntime").mkdir(parents=True)
    (tree / "usr/include/onnxruntime/onnxruntime_cxx_api.h").write_text("")
    (tree / "usr/include/other.h").write_text("")
    subprocess.run(["dpkg-deb", "--build", tree, tmp_path / "headers.deb"], check=True, capture_output=True)
    tools.mkdir()
    (tools / "apt-get").write_text(APT_GET)
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("DEB", str(tmp_path / "headers.deb"))
    monkeypatch.delenv("ONNXRUNTIME_ROOT", raising=False)
    return tmp_path / "seen"


def system_deps(root: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["sh", root / "scripts" / "system-deps.sh", "--force-unpack", "--onnxruntime", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_headers_of_onnxruntime_come_from_a_newer_release(root: Path, tmp_path: Path, fake_apt: Path) -> None:
    """Headers alone, by way of the machine's own sources with another release's name in them."""
    done = system_deps(root, tmp_path / "a folder")
    assert (done.returncode, done.stderr) == (0, "")
    files = {path.relative_to(tmp_path / "a folder").as_posix() for path in (tmp_path / "a folder").rglob("*.h")}
    assert files == {"usr/include/onnxruntime/onnxruntime_cxx_api.h"}
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    own, newer = release["VERSION_CODENAME"], {"debian": "trixie", "ubuntu": "resolute"}[release["ID"]]
    suites = re.findall(r"^(?:Suites:|deb(?: \[.*\])? \S+) .*", fake_apt.read_text(), flags=re.MULTILINE)
    assert any(newer in line for line in suites)
    assert own == newer or not any(re.search(rf"\b{own}(-updates|-security)?\b", line) for line in suites)


def test_headers_of_onnxruntime_that_cannot_be_had(
    root: Path, tmp_path: Path, fake_apt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEB", "")
    done = system_deps(root, tmp_path / "folder")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "no package libonnxruntime-dev" in line
    assert "set ONNXRUNTIME_ROOT" in line
    assert not (tmp_path / "folder").exists()


def test_headers_of_onnxruntime_that_are_named_are_taken(
    root: Path, tmp_path: Path, fake_apt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXRUNTIME_ROOT", str(tmp_path))
    command = ["sh", str(root / "scripts" / "system-deps.sh"), "--onnxruntime", str(tmp_path / "folder")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not fake_apt.exists()
