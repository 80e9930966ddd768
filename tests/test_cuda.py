"""`--device cuda`: which program runs, what a machine without a card is told, and on a card the kernels' parity."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nanochat_x import cuda
from nanochat_x.cli import main
from nanochat_x.errors import RunnerError

ROOT = Path(__file__).resolve().parent.parent

on_a_card = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda.find_nvcc() is None, reason="takes a CUDA card, torch with CUDA, and nvcc"
)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the driver's version would be told; not there yet."""
    monkeypatch.setattr(cuda, "DRIVER", tmp_path / "version")
    return tmp_path / "version"


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_nvcc", lambda: None)


def test_only_aoti_on_a_card_has_a_program_of_its_own(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.write_text("NVRM")
    monkeypatch.setattr(cuda, "find_nvcc", lambda: Path("nvcc"))
    assert cuda.program_for("aoti", "cuda") == "cuda"
    assert cuda.program_for("onnx", "cuda") == "onnx"
    assert cuda.program_for("aoti", "cpu") == cuda.program_for("aoti", None) == "aoti"


def test_a_machine_without_a_driver(driver: Path, no_nvcc: None) -> None:
    with pytest.raises(RunnerError, match="no NVIDIA driver"):
        cuda.check_cuda()
    driver.write_text("NVRM")
    with pytest.raises(RunnerError, match="nvcc, which the CUDA kernels are compiled with, was not found"):
        cuda.check_cuda()


def test_it_is_one_line(driver: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("nanochat_x.runner.bundle_target", lambda bundle: "aoti")
    assert main(["chat", "anywhere", "--device", "cuda"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "nanochat_x: error: this machine has no NVIDIA driver; leave out --device, or use a machine with a card\n"
    )


def test_nvcc_is_looked_for_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda.find_nvcc() == nvcc
    monkeypatch.setenv("CUDACXX", str(tmp_path / "none"))
    assert cuda.find_nvcc() == nvcc, "a variable that names nothing is passed over"


def h100() -> ModuleType:
    """bench/h100.py, which is no package."""
    spec = importlib.util.spec_from_file_location("h100", ROOT / "bench" / "h100.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@on_a_card
def test_kernels_on_the_card(tmp_path: Path) -> None:
    """`lower`'s rule: at most 4 times what eager loses against float64, whole, in pieces and in batches."""
    bench = h100()
    programs = bench.build(tmp_path / "build")
    bench.check_parity(programs / "nanochat-cuda", tmp_path, 4)
