"""scripts/same_draws.py: one seed draws the same tokens on every target, or rounding is the whole reason."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nanochat_x.build import PROGRAMS


@pytest.fixture(scope="module")
def script(root: Path) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("same_draws", root / "scripts" / "same_draws.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["same_draws"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_all_targets_draw_alike(lowered: Callable[..., Path], root: Path) -> None:
    bundles = [str(lowered("demo", target)) for target in PROGRAMS]
    command = [sys.executable, str(root / "scripts" / "same_draws.py"), *bundles]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" prompts drew the same tokens") == len(PROGRAMS) - 1


def test_a_difference_that_rounding_explains(script: ModuleType) -> None:
    """u between two sums that differ a little; and tokens that no u gives both of."""
    logits = torch.zeros(script.TOP_K, dtype=torch.float64)
    other = logits.clone()
    other[10] += 1e-5
    sums = script.sums(logits), script.sums(other)
    assert sums[0][11] < sums[1][11], "a u between those two draws token 11 here and 10 there"
    assert script.explain("x", 0, (11, 10), (logits, other)).explained
    assert not script.explain("x", 0, (10, 11), (logits, other)).explained
    assert not script.explain("x", 0, (11, 30), (logits, other)).explained


def test_a_difference_in_kind_is_not_explained(script: ModuleType) -> None:
    """The same token on both sides of a large overlap was no matter of rounding."""
    logits = torch.zeros(script.TOP_K, dtype=torch.float64)
    assert not script.explain("x", 0, (7, 7), (logits, logits)).explained


def test_where_lists_differ(script: ModuleType) -> None:
    assert script.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert script.first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert script.first_difference([1, 2], [1, 2, 3]) == 2
