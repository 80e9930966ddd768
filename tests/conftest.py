"""Fixtures that more than one file uses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from bundles import lower_bundle
from hypothesis import settings
from models import GENERATIONS, MAX_SEQ_LEN

from nanochat_x.build import ensure_built

# No deadline for one example: a busy machine is no failure. `print_blob`: a failure can be repeated from a CI log.
settings.register_profile("nanochat_x", deadline=None, print_blob=True)
settings.load_profile("nanochat_x")

ROOT = Path(__file__).resolve().parent.parent


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
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, lowered once for all tests. Never write to it: `copied_bundle` is there for that."""
    return lower_bundle(tmp_path_factory.mktemp("demo") / "bundle", source="demo")


@pytest.fixture
def copied_bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo bundle that a test may spoil."""
    return Path(shutil.copytree(demo_bundle, tmp_path / "copy"))


@pytest.fixture(scope="session")
def generation_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of one of tests/data/generations, lowered when it is first asked for."""
    folder = tmp_path_factory.mktemp("generations")

    @cache
    def bundle(name: str) -> Path:
        return lower_bundle(folder / name, base_dir=GENERATIONS / name, max_seq_len=MAX_SEQ_LEN)

    return bundle
