"""The sampler against its definition in NumPy: exact sets for top-k and top-p, probabilities, and draws by chi-square.

The sampler is reached through `engine_driver` (runners/tests/engine_driver.cpp). NANOCHAT_X_FUZZ_EXAMPLES sets how many
examples Hypothesis tries in each test (100).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from driver import Driver
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

FUZZ = settings(
    max_examples=int(os.environ.get("NANOCHAT_X_FUZZ_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
DRAWS = 20_000
#: A right sampler fails one test of draws in a million: all of them together, once in ten thousand runs with new seeds.
SIGNIFICANCE = 1e-6

Floats = npt.NDArray[np.float64]


def definition(logits: Sequence[float], temperature: float, top_k: int, top_p: float) -> Floats:
    """Temperature, then the k most likely (ties by the lower id), then the fewest of those that reach `top_p`."""
    values = np.array(logits, dtype=np.float32).astype(np.float64)
    order = np.argsort(-values, kind="stable")
    if top_k > 0:
        order = order[:top_k]
    weights = np.exp((values[order] - values.max()) / temperature)
    weights /= weights.sum()
    if top_p < 1:
        reached = np.cumsum(weights)
        order = order[: int(np.argmax(reached >= top_p)) + 1] if reached[-1] >= top_p else order
    result = np.zeros(len(values))
    result[order] = weights[: len(order)] / weights[: len(order)].sum()
    return result


@pytest.fixture(scope="session")
def sampler(runner_build: Path) -> Iterator[Driver]:
    """A running engine_driver."""
    driver = Driver(runner_build / "engine_driver")
    yield driver
    driver.close()


def check_probabilities(got: Sequence[float], logits: Sequence[float], temperature: float, k: int, p: float) -> None:
    """The kept tokens exactly, and their probabilities to 12 digits.

    Where a sum lies within rounding of `p`, the set of a `p` that much smaller or larger is right as well.
    """
    found = np.array(got)
    wanted = [definition(logits, temperature, k, min(1.0, max(0.0, near))) for near in (p, p - 1e-12, p + 1e-12)]
    right = [one for one in wanted if np.array_equal(one > 0, found > 0)]
    assert right, f"kept {np.flatnonzero(found).tolist()}, not {np.flatnonzero(wanted[0]).tolist()}"
    np.testing.assert_allclose(found, right[0], rtol=1e-12)


LOGITS = st.lists(st.sampled_from([0.0, 1.0, 2.0, -3.0, 5.0]) | st.floats(-20, 20, width=32), min_size=1, max_size=80)
OPTIONS = {
    "temperature": st.sampled_from([0.1, 0.6, 1.0]) | st.floats(0.1, 10),
    "top_k": st.integers(0, 90),
    "top_p": st.sampled_from([1.0, 0.5, 0.9, 0.25]) | st.floats(1e-6, 1),
}


@FUZZ
@given(logits=LOGITS, **OPTIONS)
@example(logits=[1.0, 3.0, 3.0, 2.0, 3.0, 0.0], temperature=1.0, top_k=2, top_p=1.0)
@example(logits=[2.0, 2.0, 2.0, 2.0], temperature=1.0, top_k=0, top_p=0.5)
def test_what_is_kept_is_the_definitions(
    sampler: Driver, logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    answer = sampler.ask(op="probabilities", logits=logits, temperature=temperature, top_k=top_k, top_p=top_p)
    check_probabilities(answer["probabilities"], logits, temperature, top_k, top_p)


def p_value(ids: Sequence[int], expected: Floats) -> float:
    """Pearson's chi-square test of draws, by Wilson and Hilferty's approximation; cells of fewer than 5 are joined.

    Raises AssertionError for a draw that the distribution does not have.
    """
    counts = np.bincount(ids, minlength=len(expected))
    assert len(counts) == len(expected)
    assert not counts[expected == 0].any(), "a token was drawn that is not kept"
    means = expected * len(ids)
    large = means >= 5
    observed = np.append(counts[large], counts[~large].sum())
    wanted = np.append(means[large], means[~large].sum())
    if wanted[-1] < 5:  # too few even together: with the smallest of the others
        observed, wanted = observed[:-1], wanted[:-1]
    freedom = len(wanted) - 1
    if freedom < 1:
        return 1.0
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return math.erfc(z / math.sqrt(2)) / 2


CASES = [
    (temperature, top_k, top_p, seed)
    for seed, (temperature, top_k, top_p) in enumerate(
        [(t, k, p) for t in (0.3, 0.6, 1.0, 2.0) for k in (0, 5, 50) for p in (1.0, 0.9, 0.4)] * 3
    )
]


def draw(sampler: Driver, logits: Sequence[float], seed: int, **options: Any) -> list[int]:
    answer = sampler.ask(op="draw", logits=list(logits), count=DRAWS, seed=seed, stream=seed % 7, **options)
    ids: list[int] = answer["ids"]
    return ids


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "seed"), CASES)
def test_draws_follow_the_definition(sampler: Driver, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, size=(1, 2, 30, 265)[seed % 4]).astype(np.float32).tolist()
    ids = draw(sampler, logits, seed, temperature=temperature, top_k=top_k, top_p=top_p)
    assert p_value(ids, definition(logits, temperature, top_k, top_p)) > SIGNIFICANCE


def test_a_distribution_a_little_off_is_seen(sampler: Driver) -> None:
    logits = np.random.default_rng(1).normal(0, 2, size=30).astype(np.float32).tolist()
    ids = draw(sampler, logits, 1, temperature=1.0)
    assert p_value(ids, definition(logits, 1.0, 0, 1.0)) > SIGNIFICANCE
    assert p_value(ids, definition(logits, 1.1, 0, 1.0)) < SIGNIFICANCE
    with pytest.raises(AssertionError, match="not kept"):
        p_value(ids, definition(logits, 1.0, 5, 1.0))


def test_another_set_is_seen(sampler: Driver) -> None:
    logits = [1.0, 3.0, 3.0, 2.0, 3.0, 0.0]
    got = sampler.ask(op="probabilities", logits=logits, top_k=2)["probabilities"]
    check_probabilities(got, logits, 1.0, 2, 1.0)
    for temperature, k, p in [(1.0, 3, 1.0), (1.0, 1, 1.0), (1.1, 0, 1.0), (1.0, 0, 0.9)]:
        with pytest.raises(AssertionError):
            check_probabilities(got, logits, temperature, k, p)


def test_half_of_equal_ones(sampler: Driver) -> None:
    """Ties at the border of top-p: the lower ids."""
    got = sampler.ask(op="probabilities", logits=[2.0] * 4, top_p=0.5)["probabilities"]
    assert got == [0.5, 0.5, 0, 0]
