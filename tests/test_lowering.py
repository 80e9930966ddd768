"""`lower` around its compiler: what is written, what is refused, and that nothing is left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bundles import run_cli
from models import GENERATIONS, MAX_SEQ_LEN
from safetensors import safe_open
from safetensors.torch import load_file

from nanochat_x import lowering
from nanochat_x.bundle import list_files, write_manifest
from nanochat_x.capture import Captured
from nanochat_x.console import Progress, Silent
from nanochat_x.errors import BundleError, LoweringError, ParityError, UsageError
from nanochat_x.lowering import LowerRequest, lower
from nanochat_x.manifest import check_files, describe_bundle, read_manifest, sha256
from nanochat_x.safetensors_file import layout, write_safetensors
from nanochat_x.staging import only_writer, staged_folder
from nanochat_x.target import Lowered, Machine

NAME = "2026-01-lambdas"


class StubTarget:
    """Writes files at once instead of compiling."""

    name = "aoti"
    operators: frozenset[str] = frozenset()

    def lower(self, captured: Captured, folder: Path, progress: Progress) -> Lowered:
        for role in ("prefill", "decode", "full"):
            (folder / f"{role}.so").write_bytes(role.encode())
        return Lowered(
            programs={role: f"{role}.so" for role in ("prefill", "decode", "full")},
            weights={"model.x": torch.arange(6, dtype=torch.float32).view(2, 3), "cos": torch.ones(3).bfloat16()},
            machine=Machine(architecture="x86_64", march="native", cpu_features=("avx2",)),
        )


class FailingTarget(StubTarget):
    """Raises an error after it has written something."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def lower(self, captured: Captured, folder: Path, progress: Progress) -> Lowered:
        super().lower(captured, folder, progress)
        raise self.error


@pytest.fixture
def request_to(tmp_path: Path) -> LowerRequest:
    """Lower a small checkpoint to tmp_path/out, without a runner."""
    return LowerRequest(
        targets=("aoti",), output=tmp_path / "out", source=None, model_tag=None, step=None, base_dir=GENERATIONS / NAME,
        tokenizer_dir=None, dtype="float32", max_seq_len=64, cached=True, options={}, overrides={}, force=False,
        verify=False,
    )  # fmt: skip


@pytest.fixture
def use_target(monkeypatch: pytest.MonkeyPatch) -> Callable[[StubTarget], None]:
    """Puts a target in the place of the real one, and an empty capture before it."""

    def use(target: StubTarget) -> None:
        monkeypatch.setattr(lowering, "load_target", lambda name, request: target)
        monkeypatch.setattr(lowering, "capture", quick_capture)

    return use


def quick_capture(model: Any, max_seq_len: int, *, cached: bool = True) -> Captured:
    """What the manifest needs of a capture, without torch.export."""
    program: Any = None
    return Captured(model.spec, model.dtype, max_seq_len, program, program, program)


def test_what_a_bundle_holds(request_to: LowerRequest, use_target: Callable[[StubTarget], None]) -> None:
    use_target(StubTarget())
    (result,) = lower(request_to, Silent())
    manifest = json.loads((result.bundle / "manifest.json").read_text())
    assert manifest == result.manifest
    assert manifest["schema_version"] == 3
    assert manifest["max_seq_len"] == 64
    assert manifest["verification"] is None
    assert manifest["model"]["generation"] == "lambdas"
    assert manifest["checkpoint"]["tag"] == "d4"
    assert manifest["checkpoint"]["step"] == 20
    assert manifest["checkpoint"]["model_sha256"] == sha256(
        GENERATIONS / NAME / "base_checkpoints" / "d4" / "model_000020.pt"
    )
    assert manifest["special_tokens"]["<|bos|>"] == 263
    assert manifest["machine"] == {"architecture": "x86_64", "march": "native", "cpu_features": ["avx2"]}
    names = {"prefill.so", "decode.so", "full.so", "weights.safetensors", "tokenizer.json"}
    assert {path.name for path in result.bundle.iterdir()} == names | {"manifest.json", "manifest.sha256"}
    recorded = (result.bundle / "manifest.sha256").read_text()
    assert recorded == hashlib.sha256((result.bundle / "manifest.json").read_bytes()).hexdigest() + "\n"
    assert {entry["path"] for entry in manifest["files"]} == names
    for entry in manifest["files"]:
        path = result.bundle / entry["path"]
        assert entry["size"] == path.stat().st_size
        assert (
            entry["sha256"]
            == subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout[:64]
        )
    assert "every SHA-256 right" in describe_bundle(result.bundle)


def test_what_targets_lower_is_let_go_of_before_the_last_is_verified(
    request_to: LowerRequest, use_target: Callable[[StubTarget], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices that are written anew for targets are as large as the model; two targets with one need share them."""
    made: list[weakref.ref[Captured]] = []
    there: list[bool] = []

    def fit(captured: Captured, operators: frozenset[str], progress: Progress) -> Captured:
        fitting = replace(captured)
        made.append(weakref.ref(fitting))
        return fitting

    def see(*_: Any) -> dict[str, Any]:
        there.append(made[0]() is not None)
        return {"summary": ""}

    use_target(StubTarget())
    monkeypatch.setattr(lowering, "_with_operators", fit)
    monkeypatch.setattr(lowering, "ensure_built", lambda name, log: None)
    monkeypatch.setattr(lowering, "Runner", lambda folder, log: SimpleNamespace(forward=None))
    monkeypatch.setattr(lowering, "verify", see)
    results = lower(replace(request_to, targets=("aoti", "torchscript"), verify=True), Silent())
    assert [result.manifest["verification"] for result in results] == [{"summary": ""}] * 2
    assert len(made) == 1
    assert there == [True, False]


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 250, 300])
def test_large_files_have_a_hash_for_each_block(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat_x.bundle.BLOCK_SIZE", 100)
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(data)
    (entry,) = list_files(tmp_path)
    assert (entry["path"], entry["size"], entry["sha256"]) == ("file", size, hashlib.sha256(data).hexdigest())
    if size <= 100:
        assert "blocks" not in entry
    else:
        blocks = [data[begin : begin + 100] for begin in range(0, size, 100)]
        assert b"".join(blocks) == data
        assert entry["blocks"] == {"size": 100, "sha256": [hashlib.sha256(block).hexdigest() for block in blocks]}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ParityError("wrong")]
)
def test_failure_leaves_nothing(
    error: BaseException, request_to: LowerRequest, use_target: Callable[[StubTarget], None], tmp_path: Path
) -> None:
    use_target(FailingTarget(error))
    with pytest.raises(type(error)):
        lower(request_to, Silent())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ParityError("wrong")]
)
def test_failure_keeps_the_old_bundle(
    error: BaseException, request_to: LowerRequest, use_target: Callable[[StubTarget], None], tmp_path: Path
) -> None:
    use_target(StubTarget())
    before = lower(request_to, Silent())[0].bundle
    content = {path.name: path.read_bytes() for path in before.iterdir()}
    use_target(FailingTarget(error))
    with pytest.raises(type(error)):
        lower(replace(request_to, force=True), Silent())
    assert {path.name: path.read_bytes() for path in before.iterdir()} == content
    assert list(tmp_path.iterdir()) == [before]


def test_existing_output(request_to: LowerRequest, use_target: Callable[[StubTarget], None], tmp_path: Path) -> None:
    use_target(StubTarget())
    bundle = lower(request_to, Silent())[0].bundle
    with pytest.raises(BundleError, match=r"out exists; .*--force"):
        lower(request_to, Silent())
    (bundle / "prefill.so").write_bytes(b"old")
    lower(replace(request_to, force=True), Silent())
    assert (bundle / "prefill.so").read_bytes() == b"prefill"
    assert list(tmp_path.iterdir()) == [bundle]


def test_output_below_a_file(request_to: LowerRequest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file is not a folder; choose another --output"):
        lower(replace(request_to, output=tmp_path / "file" / "a" / "b"), Silent())


def test_absurd_context(request_to: LowerRequest, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_seq_len 9223372036854775807 is more than 1048576"):
        lower(replace(request_to, max_seq_len=2**63 - 1), Silent())
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bundle_is_never_replaced(request_to: LowerRequest, tmp_path: Path) -> None:
    """With --force too: it may hold anything."""
    mine = tmp_path / "out"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is no bundle, so it is never replaced"):
        lower(replace(request_to, force=True), Silent())
    assert (mine / "thesis.txt").read_text() == "years of work"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UsageError, match="is not a folder"):
        lower(replace(request_to, output=file, force=True), Silent())
    assert file.read_text() == "x"


def test_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def write_while_another_does() -> None:
        with staged_folder(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "other.txt").write_text("from elsewhere")

    with pytest.raises(FileExistsError):
        write_while_another_does()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "other.txt").exists()


def test_disk_full_for_real(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the line, the exit code, nothing left."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "sys.path.insert(0, sys.argv[1]);"
        "from test_lowering import quick_capture, StubTarget; from nanochat_x import lowering, bundle;"
        "import torch;"
        "lowering.capture = quick_capture;"
        "target = StubTarget(); plain = target.lower;"
        "lowering.load_target = lambda name, request: target;"
        "from dataclasses import replace;"
        "target.lower = lambda *a: replace(plain(*a), weights={'w': torch.zeros(1_000_000)});"
        "from nanochat_x.cli import main;"
        "sys.exit(main(['lower', '--base-dir', sys.argv[2], '--no-verify', '-o', sys.argv[3]]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(GENERATIONS / NAME), str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert os.strerror(errno.EFBIG) in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_interrupt_while_compiling(tmp_path: Path) -> None:
    """A real Ctrl-C in the middle of the real compiler."""
    command = [sys.executable, "-m", "nanochat_x", "lower", "--base-dir", str(GENERATIONS / NAME), "--no-verify"]
    process = subprocess.Popen(
        [*command, "-o", str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("compile prefill"):
            break
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the compiler gets it too
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr.strip() == "nanochat_x: interrupted"
    assert list(tmp_path.iterdir()) == []


HOLD = """
import os, signal, sys, time
from pathlib import Path
from nanochat_x.staging import only_writer
with only_writer(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@contextmanager
def another_process_writes(output: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the lock of an output."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(output)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_lower_learns_it_at_its_start(
    request_to: LowerRequest, use_target: Callable[[StubTarget], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_target(StubTarget())
    assert request_to.output is not None
    with another_process_writes(request_to.output) as process:
        monkeypatch.setattr(lowering, "load_checkpoint", None)  # nothing is read before
        with pytest.raises(BundleError, match="out is being written by another process; wait for that, or choose"):
            lower(request_to, Silent())
        with pytest.raises(BundleError, match="is being written by another process"):
            lower(replace(request_to, force=True), Silent())
        monkeypatch.undo()
        use_target(StubTarget())
        lower(replace(request_to, output=tmp_path / "other"), Silent())  # another output is free
        process.kill()  # as kill -9: its lock file stays, its lock does not
        process.wait()
    assert (tmp_path / ".out.lock").exists()
    lower(request_to, Silent())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_second_lower_on_the_command_line(tmp_path: Path) -> None:
    with another_process_writes(tmp_path / "a" / "out"):
        done = run_cli("lower", "--base-dir", GENERATIONS / NAME, "--no-verify", "-o", tmp_path / "a" / "out")
    assert done.returncode == 2
    assert done.stderr == (
        f"nanochat_x: error: {tmp_path}/a/out is being written by another process; wait for that, "
        "or choose another --output\n"
    )


def test_the_lock_takes_its_folders_along(tmp_path: Path) -> None:
    with only_writer(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b" / ".out.lock").exists()
    assert list(tmp_path.iterdir()) == []
    with only_writer(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "b" / "out").mkdir()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_weights_as_others_read_them(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(7, 2),
        "view": torch.arange(20, dtype=torch.float32).view(4, 5)[:2],
        "scalar": torch.tensor(2.5),
        "half": torch.ones(3).half(),
    }
    file = tmp_path / "w.safetensors"
    write_safetensors(file, tensors)
    read = load_file(file)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 64 == 0
    with safe_open(file, framework="numpy") as stream:
        assert stream.get_tensor("a").shape == (7, 2)
    with pytest.raises(BundleError, match=r"tensor x is torch\.complex64"):
        write_safetensors(file, {"x": torch.zeros(2, dtype=torch.complex64)})


def test_tensors_of_whole_cache_lines_begin_with_one() -> None:
    """In a file of 16-bit weights too, whose gates are float32."""
    tensors = {"gate": torch.ones(1, 12), "w": torch.ones(48, 64).bfloat16(), "v": torch.ones(8, 32).half()}
    places = layout(tensors).places
    assert list(places) == ["w", "v", "gate"]
    assert [places[name][0] % 64 for name in ("w", "v")] == [0, 0]
    odd = layout({"a": torch.ones(3).half(), "b": torch.ones(2), "c": torch.ones(1, dtype=torch.int64)}).places
    assert list(odd) == ["c", "b", "a"]


@pytest.fixture
def small_bundle(tmp_path: Path) -> Path:
    """A folder with a manifest that Python's reader takes."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "a.so").write_bytes(b"code")
    manifest = {
        "schema_version": 3, "target": "aoti", "dtype": "float32", "model": {}, "max_seq_len": 4, "checkpoint": {},
        "machine": {}, "programs": {}, "tokenizer": "t", "files": list_files(folder),
    }  # fmt: skip
    write_manifest(folder, manifest)
    return folder


def test_manifest_reader_takes_a_good_one(small_bundle: Path) -> None:
    assert check_files(small_bundle, read_manifest(small_bundle)["files"]) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not readable JSON"),
        ("[" * 100_000, "is not readable JSON"),
        ("[]", "has no schema_version"),
        ('{"schema_version": "1"}', "has no schema_version"),
        ('{"schema_version": true}', "has no schema_version"),
        ('{"schema_version": 4}', "has schema 4, this program reads 3; update nanochat_x"),
        ('{"schema_version": 1}', "has schema 1, this program reads 3; lower the model again"),
        ('{"schema_version": 3}', "target is missing or mistyped"),
    ],
)
def test_manifest_reader_refuses(text: str, message: str, small_bundle: Path) -> None:
    (small_bundle / "manifest.json").write_text(text)
    (small_bundle / "manifest.sha256").write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")
    with pytest.raises(BundleError, match=message):
        read_manifest(small_bundle)


def test_changed_manifest(small_bundle: Path) -> None:
    path = small_bundle / "manifest.json"
    path.write_text(path.read_text().replace('"max_seq_len": 4', '"max_seq_len": 5'))
    with pytest.raises(BundleError, match=r"manifest\.json was changed since it was written"):
        read_manifest(small_bundle)
    (small_bundle / "manifest.sha256").unlink()
    with pytest.raises(BundleError, match=r"has no readable manifest\.sha256"):
        read_manifest(small_bundle)


@pytest.mark.parametrize(
    "change",
    [{"model": {}}, {"files": ["x"]}, {"files": [{"path": "a\0b", "size": 1}]}, {"machine": {"cpu_features": 3}}],
)
def test_malformed_manifest_is_one_line(change: dict[str, Any], small_bundle: Path) -> None:
    write_manifest(small_bundle, read_manifest(small_bundle) | change)
    with pytest.raises(BundleError, match=r"manifest\.json is malformed .*; lower the model again$"):
        describe_bundle(small_bundle)


def test_changed_files_are_named(small_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(small_bundle)
    (small_bundle / "a.so").write_bytes(b"cod3")
    assert check_files(small_bundle, manifest["files"]) == ["a.so: changed since it was written (SHA-256 differs)"]
    (small_bundle / "a.so").unlink()
    assert check_files(small_bundle, manifest["files"]) == ["a.so: missing"]
    (tmp_path / "outside").write_bytes(b"code")
    (small_bundle / "a.so").symlink_to(tmp_path / "outside")
    assert check_files(small_bundle, manifest["files"]) == ["a.so: leaves the bundle"]
    assert check_files(small_bundle, [{"path": "../outside"}]) == ["../outside: leaves the bundle"]
    with pytest.raises(BundleError, match=r"a\.so: leaves the bundle; lower the model again"):
        describe_bundle(small_bundle)


def test_max_seq_len_default_is_the_models(request_to: LowerRequest, use_target: Callable[[StubTarget], None]) -> None:
    use_target(StubTarget())
    assert lower(replace(request_to, max_seq_len=None), Silent())[0].manifest["max_seq_len"] == 256
    assert MAX_SEQ_LEN > 256
    shutil.rmtree(str(request_to.output))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"opset": 23}}, "--opset is not for the target aoti; leave it out"),
        ({"options": {"max_batch": 4, "march": "native"}}, "--max-batch is not for the target aoti"),
        (
            {"options": {"opset": 23}, "targets": ("aoti", "torchscript")},
            "--opset is not for the targets aoti and torchscript; leave it out",
        ),
        ({"dtype": "float8"}, "the target aoti has no float8; choose --dtype bfloat16 or float16 or float32"),
        ({"options": {"march": "z80"}}, "knows no -march=z80"),
    ],
    ids=["foreign-option", "one-of-two", "nobody's", "dtype", "value"],
)
def test_what_a_target_does_not_have(
    change: dict[str, Any], message: str, request_to: LowerRequest, tmp_path: Path
) -> None:
    with pytest.raises((UsageError, LoweringError), match=message):
        lower(replace(request_to, **change), Silent())
    assert list(tmp_path.iterdir()) == []


def test_several_targets_from_one_capture(
    request_to: LowerRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    captures: list[Captured] = []

    def counted(*arguments: Any, **options: Any) -> Captured:
        captures.append(quick_capture(*arguments, **options))
        return captures[-1]

    monkeypatch.setattr(lowering, "load_target", lambda name, request: StubTarget())
    monkeypatch.setattr(lowering, "capture", counted)
    results = lower(replace(request_to, targets=("aoti", "onnx")), Silent())
    assert [result.bundle for result in results] == [tmp_path / "out" / "aoti", tmp_path / "out" / "onnx"]
    assert all((result.bundle / "manifest.json").is_file() for result in results)
    assert len(captures) == 1


def test_the_runner_knows_every_feature_that_a_manifest_can_name() -> None:
    """A name that it does not know is taken for lacking, and the bundle would be refused everywhere."""
    from nanochat_x.targets.aoti import _FEATURE_MACROS

    source = (Path(__file__).parent.parent / "runners" / "src" / "cpu_features.cpp").read_text()
    assert [name for name in _FEATURE_MACROS.values() if f'"{name}"' not in source] == []
