"""Sessions on a lowered model: ragged rows, rollback, fork, chunks and overflow, against float64 without a cache.

The real programs are reached through `session_driver` (runners/tests/session_driver.cpp). `Mirror` does by plain lists
of tokens what the session does with its KV cache; the oracle then sees each row's whole text at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Driver
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MAX_SEQ_LEN, exact_logits, golden_of, largest, weights_of

from nanochat_x.build import PROGRAMS

NAME = "2026-07-smear"  # the generation with everything in it: windows, value embeddings, smear, backout
FACTOR = 4.0  # as in test_model.py
LONG = 150  # past the shortest window (128), and the session's first cache (128)


@cache
def eager_loss() -> float:
    """What nanochat's own float32 loses against float64 on this model: the largest error over all golden logits."""
    golden = golden_of(NAME)
    return max(largest(want - exact_logits(NAME, golden.input_ids[case])) for case, want in golden.logits.items())


class Mirror:
    """A session, and beside it the tokens that each row must hold; every answer is checked."""

    def __init__(self, driver: Driver, rows: int, seed: int = 0) -> None:
        self.driver = driver
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.generator = torch.Generator().manual_seed(seed)
        self.ask(op="new", rows=rows)

    def ask(self, **request: object) -> Any:
        """An answer that is no error, and knows how long each row is."""
        answer = self.driver.ask(**request)
        assert "error" not in answer
        if request["op"] != "append":
            assert answer["positions"] == [len(row) for row in self.tokens]
        return answer

    def draw(self, length: int) -> list[list[int]]:
        """Random ids, [rows, length]."""
        vocab = weights_of(NAME)[0].vocab_size
        ids: list[list[int]] = torch.randint(vocab, (len(self.tokens), length), generator=self.generator).tolist()
        return ids

    def append(self, length: int, counts: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Feeds `length` tokens, or of row b counts[b] alone; returns each row's logits [count, vocab]."""
        ids = self.draw(length)
        ragged = {} if counts is None else {"counts": list(counts)}
        answer = self.ask(op="append", ids=ids, **ragged)
        got = []
        for b, (row, count) in enumerate(zip(self.tokens, counts or [length] * len(ids), strict=True)):
            begin = len(row)
            row += ids[b][:count]
            got.append(torch.tensor(answer["logits"][b])[:count])
            exact = exact_logits(NAME, torch.tensor([row]))[0, begin:]
            assert got[-1].shape == exact.shape
            assert largest(got[-1] - exact) <= FACTOR * eager_loss()
        assert answer["positions"] == [len(row) for row in self.tokens]
        return got

    def rollback(self, row: int, position: int) -> None:
        """Takes a row back."""
        del self.tokens[row][position:]
        self.ask(op="rollback", row=row, position=position)

    def select(self, source: list[int]) -> None:
        """Row r continues row source[r]."""
        self.tokens = [list(self.tokens[row]) for row in source]
        self.ask(op="select", source=source)

    def reset(self) -> None:
        """Empties every row."""
        self.tokens = [[] for _ in self.tokens]
        self.ask(op="reset")

    def refused(self, **request: object) -> str:
        """The error that the request gives."""
        return str(self.driver.ask(**request)["error"])


@pytest.fixture(scope="module", params=PROGRAMS)
def driver(request: pytest.FixtureRequest, runner_build: Path, lowered: Callable[..., Path]) -> Iterator[Driver]:
    """The sessions of each target. ExecuTorch takes few rows at once here, so that its splitting is crossed."""
    options = {"max_batch": 3} if request.param == "executorch" else {}
    running = Driver(runner_build / f"session_driver-{request.param}", lowered(NAME, request.param, **options))
    yield running
    running.close()


@pytest.mark.parametrize("chunks", [(LONG,), (1,), (7, 1, 128)], ids=str)
def test_chunks(driver: Driver, chunks: tuple[int, ...]) -> None:
    """However a text is split, past the shortest window and past the cache's first size."""
    mirror = Mirror(driver, 2)
    step = 0
    while len(mirror.tokens[0]) < LONG:
        mirror.append(min(chunks[step % len(chunks)], LONG - len(mirror.tokens[0])))
        step += 1


def test_ragged_rows(driver: Driver) -> None:
    """Rows of several lengths, each fed on at its own position; padding leaves no trace."""
    mirror = Mirror(driver, 3)
    mirror.append(140, [140, 1, 33])
    mirror.append(9, [2, 9, 5])
    for _ in range(3):
        mirror.append(1)
    assert [len(row) for row in mirror.tokens] == [145, 13, 41]


def test_rollback(driver: Driver) -> None:
    """Other tokens after a rollback: neither keys nor the smeared token of what was taken back remain."""
    mirror = Mirror(driver, 2)
    mirror.append(LONG)
    mirror.rollback(1, 20)
    mirror.append(4)
    mirror.rollback(0, LONG - 1)
    mirror.rollback(1, 0)
    mirror.append(3)
    assert [len(row) for row in mirror.tokens] == [LONG + 2, 3]


def test_fork(driver: Driver) -> None:
    """Copies of a row go their own ways; rows change places; rows are dropped."""
    mirror = Mirror(driver, 1)
    mirror.append(LONG)
    mirror.select([0, 0, 0])
    first = mirror.append(2)
    assert not torch.equal(first[0][1], first[1][1])  # after different tokens
    mirror.append(3, [1, 3, 2])
    mirror.select([2, 0])
    mirror.append(2)
    mirror.select([1])
    mirror.append(1)


def test_reset(driver: Driver) -> None:
    mirror = Mirror(driver, 2)
    mirror.append(30)
    mirror.reset()
    mirror.append(5)


def test_overflow(driver: Driver) -> None:
    """The last position can be used; one more is an error that changes nothing."""
    mirror = Mirror(driver, 2)
    mirror.append(MAX_SEQ_LEN - 2, [MAX_SEQ_LEN - 2, 3])
    too_long = f"sequence of {MAX_SEQ_LEN + 1} tokens is longer than the model's context of {MAX_SEQ_LEN}"
    assert mirror.refused(op="append", ids=mirror.draw(3)).startswith(too_long)
    # padding takes room too
    assert mirror.refused(op="append", ids=mirror.draw(3), counts=[1, 3]).startswith(too_long)
    mirror.append(2)
    assert mirror.refused(op="append", ids=mirror.draw(1)).startswith(too_long)
    mirror.rollback(0, MAX_SEQ_LEN - 1)
    mirror.append(1)


def test_refusals_change_nothing(driver: Driver) -> None:
    mirror = Mirror(driver, 2)
    mirror.append(5)
    vocab = weights_of(NAME)[0].vocab_size
    assert "not in the vocabulary" in mirror.refused(op="append", ids=[[0], [vocab]])
    assert "not in the vocabulary" in mirror.refused(op="append", ids=[[-1], [0]])
    assert "cannot be filled" in mirror.refused(op="append", ids=[[1, 2, 3]])
    assert "count must be 1 to 2" in mirror.refused(op="append", ids=[[1, 2], [1, 2]], counts=[0, 2])
    assert "cannot be rolled back to 6" in mirror.refused(op="rollback", row=0, position=6)
    assert "not one of the session's 2 rows" in mirror.refused(op="rollback", row=2, position=0)
    assert "not one of the session's 2 rows" in mirror.refused(op="select", source=[0, 2])
    mirror.append(4)


def test_the_oracle_sees_a_wrong_token(driver: Driver) -> None:
    """The comparison can fail: one wrong token, far back, is seen."""
    mirror = Mirror(driver, 1)
    mirror.append(LONG)
    mirror.tokens[0][LONG - 40] ^= 1
    with pytest.raises(AssertionError):
        mirror.append(1)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 40), st.lists(st.integers(0, 39), min_size=5, max_size=5)),
        st.tuples(st.just("rollback"), st.integers(0, 3), st.floats(0, 1)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 3), min_size=1, max_size=5)),
        st.tuples(st.just("reset")),
    ),
    min_size=2,
    max_size=8,
)


@settings(max_examples=10)
@given(rows=st.integers(1, 3), seed=st.integers(0, 2**31), operations=OPERATIONS)
def test_any_sequence_of_operations(driver: Driver, rows: int, seed: int, operations: list[tuple[Any, ...]]) -> None:
    mirror = Mirror(driver, rows, seed)
    for name, *arguments in operations:
        count = len(mirror.tokens)
        if name == "append":
            length, spread = arguments
            mirror.append(length, [1 + spread[row] % length for row in range(count)])
        elif name == "rollback":
            row = arguments[0] % count
            mirror.rollback(row, round(arguments[1] * len(mirror.tokens[row])))
        elif name == "select":
            mirror.select([row % count for row in arguments[0]])
        else:
            mirror.reset()
    mirror.append(1)
