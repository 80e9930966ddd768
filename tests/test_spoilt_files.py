"""A bit flipped, or an end cut off, anywhere in any file of a bundle: refused before any of its programs is loaded.

A thousand of each go through `bundle_driver` (runners/tests/bundle_driver.cpp), which opens a bundle by the library's
own way and tells whether the backend would have been asked to load its programs; some through the real program, under
the dynamic linker's own log.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from driver import Driver

from nanochat_x.build import PROGRAMS

NAME = "2026-07-smear"
SPOILS = int(os.environ.get("NANOCHAT_X_SPOILS", "1000"))


@pytest.fixture(scope="module")
def bundle(lowered: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a small AOTInductor bundle: the target with the most files. Each test leaves it as it was."""
    return Path(shutil.copytree(lowered(NAME), tmp_path_factory.mktemp("spoilt") / "bundle"))


@pytest.fixture(scope="module")
def opener(runner_build: Path, bundle: Path) -> Iterator[Driver]:
    """Opens bundles as nanochat-aoti does, up to its backend."""
    version = json.loads((bundle / "manifest.json").read_text())["machine"]["torch_version"]
    driver = Driver(runner_build / "bundle_driver", "aoti", version)
    yield driver
    driver.close()


def check_refused(opener: Driver, bundle: Path) -> str:
    """The one line with which the bundle is refused, before its programs. Raises AssertionError."""
    answer = opener.ask(path=str(bundle))
    assert not answer["opened"], "its programs would have been loaded"
    message = str(answer["error"])
    assert len(message.splitlines()) == 1
    assert str(bundle) in message
    return message


def flip(file: Path, place: int, bit: int) -> None:
    """Flips a bit; a second time, it is as before."""
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1 << bit]))


def cut(file: Path, length: int) -> bytes:
    """Cuts a file; returns what to put back."""
    with file.open("r+b") as stream:
        stream.seek(length)
        rest = stream.read()
        stream.truncate(length)
    return rest


def put_back(file: Path, rest: bytes) -> None:
    with file.open("ab") as stream:
        stream.write(rest)


def spread(bundle: Path, seed: int) -> Iterator[tuple[Path, int, random.Random]]:
    """SPOILS places, evenly over the files: the first and the last of each, then any."""
    rng = random.Random(seed)
    files = sorted(file for file in bundle.iterdir() if file.is_file())
    assert {"manifest.json", "manifest.sha256", "full.so", "weights.safetensors"} <= {file.name for file in files}
    for number in range(SPOILS):
        file, size = files[number % len(files)], files[number % len(files)].stat().st_size
        turn = number // len(files)
        yield file, (0, size - 1)[turn] if turn < 2 else rng.randrange(size), rng


def test_the_bundle_itself_is_taken(opener: Driver, bundle: Path) -> None:
    """What the others spoil: its programs would be loaded, and `check_refused` says so."""
    assert opener.ask(path=str(bundle)) == {"opened": True}
    with pytest.raises(AssertionError, match="would have been loaded"):
        check_refused(opener, bundle)


def test_bit_flips(opener: Driver, bundle: Path) -> None:
    refused: dict[str, int] = {}
    for file, place, rng in spread(bundle, 1):
        bit = rng.randrange(8)
        flip(file, place, bit)
        check_refused(opener, bundle)
        flip(file, place, bit)
        refused[file.name] = refused.get(file.name, 0) + 1
    print(f"{sum(refused.values())} bit flips refused: {refused}")
    assert opener.ask(path=str(bundle)) == {"opened": True}


def test_truncations(opener: Driver, bundle: Path) -> None:
    refused: dict[str, int] = {}
    for file, length, _ in spread(bundle, 2):
        rest = cut(file, length)
        check_refused(opener, bundle)
        put_back(file, rest)
        refused[file.name] = refused.get(file.name, 0) + 1
    print(f"{sum(refused.values())} truncations refused: {refused}")
    assert opener.ask(path=str(bundle)) == {"opened": True}


def test_every_bit_of_the_manifests_hash(opener: Driver, bundle: Path) -> None:
    for place in range(65):
        for bit in range(8):
            flip(bundle / "manifest.sha256", place, bit)
            check_refused(opener, bundle)
            flip(bundle / "manifest.sha256", place, bit)


def test_bytes_behind_the_end(opener: Driver, bundle: Path) -> None:
    for file in sorted(bundle.iterdir()):
        size = file.stat().st_size
        put_back(file, b"\n")
        check_refused(opener, bundle)
        cut(file, size)
    assert opener.ask(path=str(bundle)) == {"opened": True}


# ---- through the real program ----


def loaded_from(bundle: Path, runner_build: Path, tmp_path: Path) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Runs `generate`; which of the bundle's files the dynamic linker loaded, by its own log."""
    log = tmp_path / "log"
    command: list[str | Path] = [
        runner_build / PROGRAMS["aoti"],
        "generate",
        bundle,
        "--prompt-ids=1",
        "--max-tokens=2",
        "--raw",
    ]
    environment = {**os.environ, "LD_DEBUG": "files", "LD_DEBUG_OUTPUT": str(log)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    text = "".join(file.read_text(errors="replace") for file in tmp_path.glob("log.*"))
    assert PROGRAMS["aoti"] in text, "the linker kept no log"
    for file in tmp_path.glob("log.*"):
        file.unlink()
    return done, {name for name in os.listdir(bundle) if f"file={bundle / name}" in text}


linux = pytest.mark.skipif(sys.platform != "linux", reason="LD_DEBUG is glibc's")


@linux
def test_a_good_bundles_programs_are_in_the_linkers_log(bundle: Path, runner_build: Path, tmp_path: Path) -> None:
    done, loaded = loaded_from(bundle, runner_build, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert {"prefill.so", "decode.so"} <= loaded


@linux
@pytest.mark.parametrize(
    "name",
    ["decode.so", "full.so", "prefill.so", "weights.safetensors", "tokenizer.json", "manifest.json", "manifest.sha256"],
)
def test_nothing_of_a_spoilt_bundle_is_loaded(name: str, bundle: Path, runner_build: Path, tmp_path: Path) -> None:
    """Flipped, and cut: one line, exit code 2, and nothing of the bundle in the linker's log."""
    file = bundle / name
    flip(file, file.stat().st_size // 2, 0)
    flipped = loaded_from(bundle, runner_build, tmp_path)
    flip(file, file.stat().st_size // 2, 0)
    rest = cut(file, file.stat().st_size - 1)
    shortened = loaded_from(bundle, runner_build, tmp_path)
    put_back(file, rest)
    for done, loaded in (flipped, shortened):
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert loaded == set()
