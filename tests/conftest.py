"""Fixtures that more than one file uses."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import lower_bundle
from filelock import FileLock
from hypothesis import settings
from models import GENERATIONS, MAX_SEQ_LEN

from nanochat_x import cli_bench, cli_run
from nanochat_x.build import ensure_built
from nanochat_x.quantize import Format

# No deadline for one example: a busy machine is no failure. `print_blob`: a failure can be repeated from a CI log.
settings.register_profile("nanochat_x", deadline=None, print_blob=True)
settings.load_profile("nanochat_x")

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Makes processes that tests start alike, however the tests themselves were started."""
    # In the background (`make test &`, nohup) signals are ignored, in what is started too; the tests send them.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    # Workers that run side by side (pytest-xdist) share the cores: threads that wait for a core do so by spinning.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the processes that are started
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """tests/data: what the real nanochat computed."""
    return ROOT / "tests" / "data"


@pytest.fixture(scope="session")
def runner_build() -> Path:
    """The build folder with the C++ programs, tests included; built by need."""
    return ensure_built("aoti", tests=True).build_dir


@pytest.fixture(scope="session")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`lowered(model, target, dtype, **options)`: a bundle, lowered when it is first asked for.

    `model` is "demo" or one of tests/data/generations; `options` are the target's, but for `quant`: METHOD:GROUP_SIZE.
    Never write to a bundle from here. Workers that run side by side share them.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "lowered"
    folder.mkdir(exist_ok=True)

    def bundle(model: str, target: str = "aoti", dtype: str = "float32", **options: Any) -> Path:
        return made(model, target, dtype, **options)  # one key for a bundle, however it was asked for

    @cache
    def made(model: str, target: str, dtype: str, **options: Any) -> Path:
        output = folder / "-".join([model, target, dtype, *(f"{key}-{value}" for key, value in options.items())])
        checkpoint: dict[str, Any] = (
            {"source": "demo"} if model == "demo" else {"base_dir": GENERATIONS / model, "max_seq_len": MAX_SEQ_LEN}
        )
        with FileLock(folder / f"{output.name}.lock"):
            if output.exists():  # a bundle appears whole or not at all
                return output
            if quant := options.pop("quant", None):
                method, size = quant.split(":")
                checkpoint["quantization"] = Format(method, int(size))
            return lower_bundle(output, target, dtype=dtype, options=options, **checkpoint)

    return bundle


@pytest.fixture(scope="session")
def demo_bundle(lowered: Callable[..., Path]) -> Path:
    """The demo model for AOTInductor. `copied_bundle` is one that may be spoilt."""
    return lowered("demo")


@pytest.fixture
def copied_bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo bundle that a test may spoil."""
    return Path(shutil.copytree(demo_bundle, tmp_path / "copy"))


@pytest.fixture(scope="session")
def generation_bundle(lowered: Callable[..., Path]) -> Callable[[str], Path]:
    """The AOTInductor bundle of one of tests/data/generations."""
    return lowered


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines that a verb would have become; each ends with exit code 5."""
    commands: list[list[str]] = []

    class FakeRunner:
        def __init__(self, bundle: Path, *, device: str | None, log: object) -> None:
            self.bundle = bundle

        def command(self, verb: str, *arguments: str) -> list[str]:
            return [verb, str(self.bundle), *arguments]

    def fake_passthrough(command: list[str]) -> int:
        commands.append(command)
        return 5

    for module in (cli_run, cli_bench):
        monkeypatch.setattr(module, "Runner", FakeRunner)
        monkeypatch.setattr(module, "run_passthrough", fake_passthrough)
    return commands
