"""Files that are no files, links, absurd sizes and pickles that explode: refused in one line, and never waited for."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import socket
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from bundles import edit_manifest
from driver import Driver
from models import GENERATIONS
from test_tokenizer import good_state, pickle_of_state

from nanochat_x.cli import main

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices in folders are POSIX'")

NAME = "2026-07-smear"
PATIENCE = 120  # seconds: far above what a busy machine needs
HF = Path(__file__).parent / "data" / "hf-nanochat"


class Hangs(BaseException):
    """Nothing that the code under test would take for an error of its own."""


@pytest.fixture(autouse=True)
def never_hangs() -> Iterator[None]:
    """A test that waits for a pipe or reads without end fails after two minutes."""

    def fail(number: int, frame: FrameType | None) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path has room for 100 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.chdir(here)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_huge(path: Path) -> None:
    """A terabyte that takes no room."""
    with path.open("wb") as file:
        file.truncate(1 << 40)


KINDS = [make_pipe, make_device, make_socket, make_folder, make_loop, make_huge]
kinds = pytest.mark.parametrize("make", KINDS, ids=[make.__name__.removeprefix("make_") for make in KINDS])


def put(make: Callable[[Path], None], path: Path) -> None:
    """Something else in a file's place."""
    path.unlink(missing_ok=True)
    make(path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line, with exit code 2, that the command line has for it."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1, stderr
    assert len(stderr) < 2000
    return stderr


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of a small checkpoint's base folder."""
    return Path(shutil.copytree(GENERATIONS / NAME, tmp_path / "base"))


def files_of(base: Path) -> dict[str, Path]:
    (model,) = base.glob("*_checkpoints/*/model_*.pt")
    (meta,) = base.glob("*_checkpoints/*/meta_*.json")
    tokenizer = base / "tokenizer"
    return {
        "model": model, "meta": meta, "tokenizer": tokenizer / "tokenizer.pkl", "bytes": tokenizer / "token_bytes.pt",
    }  # fmt: skip


@kinds
@pytest.mark.parametrize("which", ["model", "meta", "tokenizer", "bytes"])
def test_in_a_checkpoint(
    which: str, make: Callable[[Path], None], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = files_of(base)[which]
    put(make, path)
    if (which, make) == ("bytes", make_loop):  # a link to nowhere is not there, and this file need not be
        return
    assert path.name in refused(capsys, "inspect", "--base-dir", base)


@kinds
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_in_a_hugging_face_folder(
    name: str, make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(HF, tmp_path / "hf"))
    put(make, folder / name)
    assert name in refused(capsys, "inspect", "--hf", folder)


@pytest.fixture
def bundle(lowered: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a small bundle."""
    return Path(shutil.copytree(lowered(NAME), tmp_path / "bundle"))


@pytest.fixture(scope="module")
def opener(runner_build: Path, lowered: Callable[..., Path]) -> Iterator[Driver]:
    """Opens bundles as nanochat-aoti does, up to its backend."""
    version = json.loads((lowered(NAME) / "manifest.json").read_text())["machine"]["torch_version"]
    driver = Driver(runner_build / "bundle_driver", "aoti", version)
    yield driver
    driver.close()


def not_opened(opener: Driver, bundle: Path) -> str:
    answer = opener.ask(path=str(bundle))
    assert not answer["opened"]
    message = str(answer["error"])
    assert len(message.splitlines()) == 1
    return message


@kinds
@pytest.mark.parametrize(
    "name", ["full.so", "weights.safetensors", "tokenizer.json", "manifest.json", "manifest.sha256"]
)
def test_in_a_bundle(
    name: str, make: Callable[[Path], None], bundle: Path, opener: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the C++ program, and by Python's reader before it."""
    put(make, bundle / name)
    assert name in not_opened(opener, bundle)
    assert name in refused(capsys, "inspect", bundle)


def test_a_hard_link_is_a_file_like_others(bundle: Path, opener: Driver, tmp_path: Path) -> None:
    """It cannot be told from one; what counts is its content."""
    os.link(bundle / "full.so", tmp_path / "other")
    assert opener.ask(path=str(bundle)) == {"opened": True}
    with (tmp_path / "other").open("r+b") as file:
        file.write(b"\x7fELG")
    assert "SHA-256" in not_opened(opener, bundle)


@pytest.mark.parametrize("path", ["a/../../w", "../bundle/full.so", "./full.so", "a//b", "/etc/passwd", "\x00", "c:x"])
def test_paths_in_a_manifest(path: str, bundle: Path, opener: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a program and of a mere file; the program's would name the right bytes."""

    def lead_away(manifest: dict[str, Any]) -> None:
        (entry,) = (entry for entry in manifest["files"] if entry["path"] == "full.so")
        entry["path"] = manifest["programs"]["full"] = path

    edit_manifest(bundle, lead_away)
    assert "manifest.json" in not_opened(opener, bundle)
    if path != "./full.so":
        refused(capsys, "inspect", bundle)


@pytest.mark.parametrize("size", [2**63 - 1, 2**64 - 1, 2**70, -1, 1e300])
def test_sizes_in_a_manifest(size: float, bundle: Path, opener: Driver) -> None:
    edit_manifest(bundle, lambda manifest: manifest["files"][0].update(size=size))
    not_opened(opener, bundle)


@pytest.mark.parametrize("key", ["vocab_size", "n_layer", "n_kv_head", "n_embd", "sequence_len"])
@pytest.mark.parametrize("size", [2**31, 2**63, 0, -1])
def test_sizes_of_a_model(key: str, size: int, bundle: Path, opener: Driver) -> None:
    edit_manifest(bundle, lambda manifest: manifest["model"].update({key: size}))
    assert key in not_opened(opener, bundle)


# ---- pickles and archives that are small and mean much ----


def nested(depth: int) -> dict[str, Any]:
    """A dict that holds another twice, and so on: 2^depth leaves, in some hundred bytes of pickle."""
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value, "b": value}
    return value


@pytest.mark.parametrize("key", ["pat_str", "special_tokens", "mergeable_ranks", "name"])
def test_a_tokenizer_of_many_laughs(key: str, tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files_of(base)["tokenizer"].write_bytes(pickle_of_state(good_state() | {key: nested(60)}))
    if key != "name":  # which nobody looks at
        assert "tokenizer.pkl" in refused(capsys, "inspect", "--base-dir", base)


def test_a_tokenizer_that_is_nothing_but_depth(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"a": deep}
    files_of(base)["tokenizer"].write_bytes(pickle.dumps(deep, protocol=4))
    assert "tokenizer.pkl" in refused(capsys, "inspect", "--base-dir", base)


@pytest.mark.parametrize("place", ["whole", "value", "key"])
def test_a_model_of_many_laughs(place: str, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laughs = nested(60)
    values: dict[str, Any] = {"whole": laughs, "value": {"x": laughs}, "key": {("x", 1): torch.ones(1)}}
    torch.save(values[place], files_of(base)["model"])
    assert "model_" in refused(capsys, "inspect", "--base-dir", base)


def test_a_zip_that_unpacks_to_much(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(files_of(base)["model"], "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100 << 20))
    assert "is compressed" in refused(capsys, "inspect", "--base-dir", base)


def test_a_zip_that_claims_a_terabyte(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(files_of(base)["model"].read_bytes())
    central = data.rindex(b"PK\x01\x02")
    data[central + 20 : central + 28] = struct.pack("<2L", 0xFFFFFFF0, 0xFFFFFFF0)
    files_of(base)["model"].write_bytes(data)
    assert "damaged" in refused(capsys, "inspect", "--base-dir", base)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 100_000_000])
def test_a_safetensors_header_that_claims_much(length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(HF, tmp_path / "hf"))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    assert "model.safetensors" in refused(capsys, "inspect", "--hf", folder)


def test_numbers_of_a_million_digits(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = files_of(base)["meta"]
    for text in ('{"model_config": {"n_layer": ' + "9" * 1_000_000 + "}}", "[" * 1_000_000, '{"a":' * 1_000_000):
        meta.write_text(text)
        assert meta.name in refused(capsys, "inspect", "--base-dir", base)


def test_a_tokenizer_that_would_run_a_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The oldest trick, through `lower` itself."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/ran",)

    buffer = io.BytesIO()
    pickle.dump(Evil(), buffer)
    files_of(base)["tokenizer"].write_bytes(buffer.getvalue())
    stderr = refused(capsys, "lower", "--base-dir", base, "-o", tmp_path / "out", "--no-verify")
    assert "nothing of it was run" in stderr
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


# ---- where a bundle is to go ----


@pytest.mark.parametrize("what", ["bundle", "folder", "nowhere", "itself", "file"])
def test_an_output_that_is_a_link(
    what: str, bundle: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --force too: what it points to is not touched."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    target = {"bundle": bundle, "itself": Path("out"), "nowhere": tmp_path / "none"}.get(what, tmp_path / what)
    (tmp_path / "out").symlink_to(target)
    before = sorted(path for path in tmp_path.rglob("*") if not path.is_symlink())
    assert "is not a folder" in refused(capsys, "lower", "--base-dir", base, "-o", tmp_path / "out", "--force")
    assert (tmp_path / "out").is_symlink()
    assert sorted(path for path in tmp_path.rglob("*") if not path.is_symlink()) == before


@pytest.mark.parametrize("make", [make_pipe, make_device, make_socket])
def test_an_output_that_is_no_folder(
    make: Callable[[Path], None], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "out")
    for output in (tmp_path / "out", tmp_path / "out" / "below"):
        assert "is not a folder" in refused(capsys, "lower", "--base-dir", base, "-o", output, "--force")
