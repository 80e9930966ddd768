"""Fixtures that more than one file uses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

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
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`lowered(model, target, dtype, **options)`: a bundle, lowered when it is first asked for.

    `model` is "demo" or one of tests/data/generations; `options` are the target's. Never write to a bundle from here.
    """
    folder = tmp_path_factory.mktemp("lowered")

    def bundle(model: str, target: str = "aoti", dtype: str = "float32", **options: Any) -> Path:
        return made(model, target, dtype, **options)  # one key for a bundle, however it was asked for

    @cache
    def made(model: str, target: str, dtype: str, **options: Any) -> Path:
        output = folder / "-".join([model, target, dtype, *(f"{key}-{value}" for key, value in options.items())])
        if model == "demo":
            return lower_bundle(output, target, source="demo", dtype=dtype, options=options)
        checkpoint = GENERATIONS / model
        return lower_bundle(output, target, base_dir=checkpoint, max_seq_len=MAX_SEQ_LEN, dtype=dtype, options=options)

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
