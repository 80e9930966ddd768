"""Sessions on a lowered model: ragged rows, rollback, fork, chunks and overflow, against float64 without a cache.

The real programs are driven by their verb `session`. `Mirror` (tests/mirror.py) does by plain lists of tokens what the
session does with its KV cache; the oracle then sees each row's whole text at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mirror import LONG, NAME, Mirror, refusal
from models import MAX_SEQ_LEN, weights_of

from nanochat_x.build import PROGRAMS
from nanochat_x.session import RunnerSession


@pytest.fixture(scope="module", params=PROGRAMS)
def session(request: pytest.FixtureRequest, lowered: Callable[..., Path]) -> Iterator[RunnerSession]:
    """The sessions of each target. ExecuTorch takes few rows at once here, so that its splitting is crossed."""
    options = {"max_batch": 3} if request.param == "executorch" else {}
    with RunnerSession(lowered(NAME, request.param, **options)) as running:
        yield running


@pytest.mark.parametrize("chunks", [(LONG,), (1,), (7, 1, 128)], ids=str)
def test_chunks(session: RunnerSession, chunks: tuple[int, ...]) -> None:
    """However a text is split, past the shortest window and past the cache's first size."""
    mirror = Mirror(session, 2)
    step = 0
    while len(mirror.tokens[0]) < LONG:
        mirror.append(min(chunks[step % len(chunks)], LONG - len(mirror.tokens[0])))
        step += 1


def test_ragged_rows(session: RunnerSession) -> None:
    """Rows of several lengths, each fed on at its own position; padding leaves no trace."""
    mirror = Mirror(session, 3)
    mirror.append(140, [140, 1, 33])
    mirror.append(9, [2, 9, 5])
    for _ in range(3):
        mirror.append(1)
    assert [len(row) for row in mirror.tokens] == [145, 13, 41]


def test_rollback(session: RunnerSession) -> None:
    """Other tokens after a rollback: neither keys nor the smeared token of what was taken back remain."""
    mirror = Mirror(session, 2)
    mirror.append(LONG)
    mirror.rollback(1, 20)
    mirror.append(4)
    mirror.rollback(0, LONG - 1)
    mirror.rollback(1, 0)
    mirror.append(3)
    assert [len(row) for row in mirror.tokens] == [LONG + 2, 3]


def test_fork(session: RunnerSession) -> None:
    """Copies of a row go their own ways; rows change places; rows are dropped."""
    mirror = Mirror(session, 1)
    mirror.append(LONG)
    mirror.select([0, 0, 0])
    first = mirror.append(2)
    assert not torch.equal(first[0][1], first[1][1])  # after different tokens
    mirror.append(3, [1, 3, 2])
    mirror.select([2, 0])
    mirror.append(2)
    mirror.select([1])
    mirror.append(1)


def test_reset(session: RunnerSession) -> None:
    mirror = Mirror(session, 2)
    mirror.append(30)
    mirror.reset()
    mirror.append(5)


def test_overflow(session: RunnerSession) -> None:
    """The last position can be used; one more is an error that changes nothing."""
    mirror = Mirror(session, 2)
    mirror.append(MAX_SEQ_LEN - 2, [MAX_SEQ_LEN - 2, 3])
    too_long = f"sequence of {MAX_SEQ_LEN + 1} tokens is longer than the model's context of {MAX_SEQ_LEN}"
    assert refusal(lambda: session.append(mirror.draw(3))).startswith(too_long)
    # padding takes room too
    assert refusal(lambda: session.append(mirror.draw(3), [1, 3])).startswith(too_long)
    mirror.append(2)
    assert refusal(lambda: session.append(mirror.draw(1))).startswith(too_long)
    mirror.rollback(0, MAX_SEQ_LEN - 1)
    mirror.append(1)


def test_refusals_change_nothing(session: RunnerSession) -> None:
    mirror = Mirror(session, 2)
    mirror.append(5)
    vocab = weights_of(NAME)[0].vocab_size
    assert "not in the vocabulary" in refusal(lambda: session.append([[0], [vocab]]))
    assert "not in the vocabulary" in refusal(lambda: session.append([[-1], [0]]))
    assert "cannot be filled" in refusal(lambda: session.append([[1, 2, 3]]))
    assert "count must be 1 to 2" in refusal(lambda: session.append([[1, 2], [1, 2]], [0, 2]))
    assert "cannot be rolled back to 6" in refusal(lambda: session.rollback(0, 6))
    assert "not one of the session's 2 rows" in refusal(lambda: session.rollback(2, 0))
    assert "not one of the session's 2 rows" in refusal(lambda: session.select([0, 2]))
    mirror.append(4)


def test_the_oracle_sees_a_wrong_token(session: RunnerSession) -> None:
    """The comparison can fail: one wrong token, far back, is seen."""
    mirror = Mirror(session, 1)
    mirror.append(LONG)
    mirror.tokens[0][LONG - 40] ^= 1
    with pytest.raises(AssertionError):
        mirror.append(1)
