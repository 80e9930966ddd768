"""A runner's session, and beside it what it must hold: every answer is compared with float64 without a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from models import exact_logits, golden_of, largest, weights_of

from nanochat_x.session import RefusedRequest, RunnerSession

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

    def __init__(self, session: RunnerSession, rows: int, seed: int = 0) -> None:
        self.session = session
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.generator = torch.Generator().manual_seed(seed)
        session.new(rows)
        self.check_positions()

    def check_positions(self) -> None:
        """The session knows how long each row is."""
        assert self.session.positions == [len(row) for row in self.tokens]

    def draw(self, length: int) -> list[list[int]]:
        """Random ids, [rows, length]."""
        vocab = weights_of(NAME)[0].vocab_size
        ids: list[list[int]] = torch.randint(vocab, (len(self.tokens), length), generator=self.generator).tolist()
        return ids

    def append(self, length: int, counts: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Feeds `length` tokens, or of row b counts[b] alone; returns each row's logits [count, vocab]."""
        ids = self.draw(length)
        logits = self.session.append(ids, counts)
        got = []
        for b, (row, count) in enumerate(zip(self.tokens, counts or [length] * len(ids), strict=True)):
            begin = len(row)
            row += ids[b][:count]
            got.append(logits[b, :count])
            exact = exact_logits(NAME, torch.tensor([row]))[0, begin:]
            assert got[-1].shape == exact.shape
            assert largest(got[-1] - exact) <= FACTOR * eager_loss()
        self.check_positions()
        return got

    def append_last(self, length: int) -> None:
        """Feeds `length` tokens to each row, and asks for the logits after the first and the last of them alone."""
        ids, kept = self.draw(length), sorted({0, length - 1})
        logits = self.session.append(ids, logits_to_keep=kept)
        for b, row in enumerate(self.tokens):
            begin = len(row)
            row += ids[b]
            exact = exact_logits(NAME, torch.tensor([row]))[0, [begin + column for column in kept]]
            assert logits[b].shape == exact.shape
            assert largest(logits[b] - exact) <= FACTOR * eager_loss()
        self.check_positions()

    def rollback(self, row: int, position: int) -> None:
        """Takes a row back."""
        del self.tokens[row][position:]
        self.session.rollback(row, position)
        self.check_positions()

    def select(self, source: list[int]) -> None:
        """Row r continues row source[r]."""
        self.tokens = [list(self.tokens[row]) for row in source]
        self.session.select(source)
        self.check_positions()

    def reset(self) -> None:
        """Empties every row."""
        self.tokens = [[] for _ in self.tokens]
        self.session.reset()
        self.check_positions()


def refusal(request: Callable[[], object]) -> str:
    """The error that a request gives."""
    with pytest.raises(RefusedRequest) as caught:
        request()
    return str(caught.value)
