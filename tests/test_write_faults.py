"""`lower` killed, or out of disk, at every single change that it makes to the disk; and many of it at once.

Whatever happens, the output is the old bundle or the new one, never a third thing. `lower_server.py` does the lowering;
a preloaded library (runners/tests/write_faults.cpp) counts its writes, renames and removals, and strikes at the n-th.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from driver import Driver
from models import GENERATIONS

from nanochat_x.manifest import check_files, read_manifest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD and RENAME_EXCHANGE are Linux'")

TEMPORARY = re.compile(r"\.out\.lock|\.out\.[0-9a-f]{8}\.unfinished")
#: Of a real target's changes, so many are struck; of the stub's, all.
STRIKES = int(os.environ.get("NANOCHAT_X_STRIKES", "6"))


def make_server(target: str, library: Path) -> Driver:
    """`lower_server.py`, under the library that strikes."""
    program = Path(__file__).parent / "lower_server.py"
    return Driver(Path(sys.executable), program, target, env={**os.environ, "LD_PRELOAD": str(library)})


@pytest.fixture(scope="module")
def library(runner_build: Path) -> Path:
    """The library that counts and strikes."""
    return runner_build / "libwrite_faults.so"


@pytest.fixture(scope="module")
def server(library: Path) -> Iterator[Driver]:
    """Lowers with files at once in the place of a compiler."""
    driver = make_server("stub", library)
    yield driver
    driver.close()


def lower(server: Driver, output: Path, *, count: int = 1, **options: Any) -> list[dict[str, Any]]:
    """`count` runs at once, to the same place."""
    run = {"output": str(output), "max_seq_len": 64, **options}
    answer: list[dict[str, Any]] = server.ask(runs=[run] * count)
    return answer


def content(folder: Path) -> dict[str, str] | None:
    """SHA-256 of every file; None if the folder is not there."""
    if not folder.exists():
        return None
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@dataclass
class Bundles:
    """An old bundle, and what a new one must hold."""

    old: Path
    old_content: dict[str, str] | None
    new_content: dict[str, str] | None

    def folder(self, at: Path, *, fresh: bool) -> Path:
        """A folder for an output, with the old bundle in it unless it is to be `fresh`."""
        shutil.rmtree(at, ignore_errors=True)
        at.mkdir()
        if not fresh:
            shutil.copytree(self.old, at / "out")
        return at


def make_bundles(server: Driver, folder: Path, stub: Driver) -> Bundles:
    """Lowered undisturbed: the old one by the stub and to a shorter context, so that they differ."""
    assert lower(stub, folder / "old", max_seq_len=32)[0]["code"] == 0
    assert lower(server, folder / "new")[0]["code"] == 0
    bundles = Bundles(folder / "old", content(folder / "old"), content(folder / "new"))
    assert bundles.old_content != bundles.new_content
    return bundles


@pytest.fixture(scope="module")
def bundles(server: Driver, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return make_bundles(server, tmp_path_factory.mktemp("bundles"), server)


def one_line(stderr: str) -> str:
    assert len(stderr.splitlines()) == 1, stderr
    return stderr


def check_outcome(folder: Path, result: dict[str, Any], bundles: Bundles, *, how: str, fresh: bool) -> None:
    """The old bundle or the new one, and an end of the kind that was asked for. Raises AssertionError."""
    found = content(folder / "out")
    allowed = (None if fresh else bundles.old_content, bundles.new_content)
    assert found in allowed, f"a third thing: {found}"
    others = [entry.name for entry in folder.iterdir() if entry.name != "out"]
    # libtorch's writer of TorchScript files knows no error but the end of the process: `lower` asks for room before,
    # but here the disk fills in between
    ended_by_libtorch = result["code"] == -signal.SIGABRT and "PyTorchStreamWriter" in result["stderr"]
    if how in ("kill", "kill-within") or ended_by_libtorch:
        assert result["code"] == -9 or ended_by_libtorch
        assert all(TEMPORARY.fullmatch(name) for name in others), others
        return
    assert others == []
    if result["code"] == 0:  # the disk was full where that did not matter
        assert found == bundles.new_content
    else:
        assert result["code"] == 2
        assert "No space left on device" in one_line(result["stderr"])


def strike(
    server: Driver, folder: Path, bundles: Bundles, *, how: str, fresh: bool, at: int, **options: Any
) -> dict[str, Any]:
    """Lowers into a folder, struck at one change, and checks what is there then and after the next `lower`."""
    bundles.folder(folder, fresh=fresh)
    options |= {"force": not fresh, "below": str(folder.resolve())}
    (result,) = lower(server, folder / "out", at=at, how=how, **options)
    if how == "count":
        return result
    check_outcome(folder, result, bundles, how=how, fresh=fresh)
    if result["code"] < 0:
        assert lower(server, folder / "out", force=True)[0]["code"] == 0
        assert content(folder / "out") == bundles.new_content
        assert [entry.name for entry in folder.iterdir()] == ["out"]  # what the killed one left is gone too
    return result


def count_changes(server: Driver, folder: Path, bundles: Bundles, *, fresh: bool) -> int:
    result = strike(server, folder, bundles, how="count", fresh=fresh, at=0)
    assert result["code"] == 0
    assert content(folder / "out") == bundles.new_content
    return int(result["changes"])


FAULTS = ("kill", "kill-within", "disk-full", "disk-full-once")


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "replacing"])
@pytest.mark.parametrize("how", FAULTS)
def test_every_change(server: Driver, bundles: Bundles, how: str, fresh: bool, tmp_path: Path) -> None:
    """The files that every target's bundle has, with a compiler that takes no time."""
    changes = count_changes(server, tmp_path / "a", bundles, fresh=fresh)
    assert changes > 20
    codes = [
        strike(server, tmp_path / "a", bundles, how=how, fresh=fresh, at=at)["code"] for at in range(1, changes + 1)
    ]
    print(
        f"{how}, {'fresh' if fresh else 'replacing'}: {changes} changes, each struck; ended with {sorted(set(codes))}"
    )
    assert {"kill": -9, "kill-within": -9, "disk-full": 2, "disk-full-once": 2}[how] in codes


def test_some_changes_of_a_real_target(library: Path, server: Driver, tmp_path: Path) -> None:
    """With a real compiler, TorchScript's; NANOCHAT_X_STRIKES of its changes, over all of them."""
    stub, server = server, make_server("torchscript", library)
    bundles = make_bundles(server, tmp_path, stub)
    for fresh in (True, False):
        changes = count_changes(server, tmp_path / "a", bundles, fresh=fresh)
        chosen = sorted({1 + round(i * (changes - 1) / max(1, STRIKES - 1)) for i in range(STRIKES)})
        for i, at in enumerate(chosen):
            strike(server, tmp_path / "a", bundles, how=FAULTS[i % len(FAULTS)], fresh=fresh, at=at)
        print(f"torchscript, {'fresh' if fresh else 'replacing'}: {changes} changes, struck at {chosen}")
    server.close()


def test_a_third_thing_is_seen(server: Driver, bundles: Bundles, tmp_path: Path) -> None:
    """A `lower` that writes where the bundle is to appear: the checks above notice."""

    def all_of_them() -> None:
        for at in range(1, 30):
            strike(server, tmp_path / "a", bundles, how="kill", fresh=False, at=at, sabotage="in-place")

    with pytest.raises(AssertionError, match="a third thing"):
        all_of_them()


def test_a_disk_that_is_really_full(server: Driver, tmp_path: Path) -> None:
    """A file system of 48 kB, which the bundle does not fit in."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", disk], capture_output=True, text=True, check=False
    ) if os.geteuid() == 0 and shutil.which("mount") else None  # fmt: skip
    if mount is None or mount.returncode != 0:
        pytest.skip("mounting a small file system takes root" if mount is None else f"mount: {mount.stderr.strip()}")
    try:
        (result,) = lower(server, disk / "out")
        assert result["code"] == 2
        assert "No space left on device" in one_line(result["stderr"])
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- several at once ----

BUSY = r"nanochat_x: error: .*/out is being written by another process; wait for that, or choose another --output\n"
THERE = r"nanochat_x: error: .*/out exists; choose another --output, or replace it with --force\n"


def check_one_won(results: list[dict[str, Any]], others: str) -> None:
    """One ended well, each other with a line that matches `others`. Raises AssertionError."""
    assert sorted(result["code"] for result in results) == [0] + [2] * (len(results) - 1)
    for result in results:
        if result["code"] == 2:
            assert re.fullmatch(others, result["stderr"]), result["stderr"]


def test_eight_to_one_place(server: Driver, bundles: Bundles, tmp_path: Path) -> None:
    check_one_won(lower(server, tmp_path / "out", count=8, hold=1.0), BUSY)
    assert content(tmp_path / "out") == bundles.new_content
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("attempt", range(5))
def test_eight_that_replace_one(attempt: int, server: Driver, bundles: Bundles, tmp_path: Path) -> None:
    """With --force, and no time between them: who comes when another is through replaces its bundle."""
    folder = bundles.folder(tmp_path / "a", fresh=False)
    results = lower(server, folder / "out", count=8, force=True)
    assert {result["code"] for result in results} in ({0}, {0, 2})
    assert all(re.fullmatch(BUSY, result["stderr"]) for result in results if result["code"] == 2)
    assert content(folder / "out") == bundles.new_content
    assert [entry.name for entry in folder.iterdir()] == ["out"]


def test_eight_to_eight_places(server: Driver, bundles: Bundles, tmp_path: Path) -> None:
    """All below a folder that is not there yet."""
    runs = [{"output": str(tmp_path / "a" / str(i) / "out"), "max_seq_len": 64} for i in range(8)]
    assert [result["code"] for result in server.ask(runs=runs)] == [0] * 8
    for run in runs:
        assert content(Path(str(run["output"]))) == bundles.new_content
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == [str(i) for i in range(8)]


def test_without_a_lock_the_race_is_seen(server: Driver, tmp_path: Path) -> None:
    results = lower(server, tmp_path / "out", count=8, hold=0.5, sabotage="no-lock")
    with pytest.raises(AssertionError):
        check_one_won(results, BUSY)


def test_eight_command_lines(tmp_path: Path, run_lower: Callable[..., subprocess.Popen[str]]) -> None:
    """Whole processes with a real target: who is late finds the place taken, or the bundle there."""
    processes = [run_lower(tmp_path / "out") for _ in range(8)]
    results = []
    for process in processes:
        _, stderr = process.communicate(timeout=300)
        results.append({"code": process.returncode, "stderr": stderr})
    check_one_won(results, f"{BUSY}|{THERE}")
    assert check_files(tmp_path / "out", read_manifest(tmp_path / "out")["files"]) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def run_lower() -> Callable[..., subprocess.Popen[str]]:
    """Starts `python -m nanochat_x lower` for TorchScript."""

    def start(output: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "nanochat_x", "lower", "--base-dir", str(GENERATIONS / "2026-01-lambdas")]
        command += ["--target", "torchscript", "--no-verify", "--max-seq-len", "64", "-o", str(output)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    return start
