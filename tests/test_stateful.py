"""Anything that one can do with a session, in any order, on every target: each answer is float64's without a cache.

NANOCHAT_X_STATEFUL_RUNS=200 pytest tests/test_stateful.py     # as long a search as one likes
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mirror import NAME, Mirror, refusal
from models import MAX_SEQ_LEN

from nanochat_x.build import PROGRAMS
from nanochat_x.session import RunnerSession

RUNS = int(os.environ.get("NANOCHAT_X_STATEFUL_RUNS", "5"))
STEPS = 50
MOST_ROWS = 5


class SessionMachine(RuleBasedStateMachine):
    """One session; what its rows hold lies in `mirror`."""

    session: RunnerSession
    mirror: Mirror

    @initialize(rows=st.integers(1, 3), seed=st.integers(0, 2**31))
    def begin(self, rows: int, seed: int) -> None:
        """A new session in the same process: nothing of the last may remain."""
        self.mirror = Mirror(self.session, rows, seed)

    def room(self) -> int:
        """Tokens that still fit in every row."""
        return MAX_SEQ_LEN - max(len(row) for row in self.mirror.tokens)

    @rule(length=st.integers(1, 20) | st.sampled_from([64, 127, 128, 129, 130, 200]))
    def prefill(self, length: int) -> None:
        """A chunk of any size, as far as there is room."""
        if self.room():
            self.mirror.append(min(length, self.room()))

    @rule(length=st.integers(1, 20) | st.sampled_from([64, 129, 200]))
    def prefill_for_the_last(self, length: int) -> None:
        """A prompt, of which one wants what comes behind it."""
        if self.room():
            self.mirror.append_last(min(length, self.room()))

    @precondition(lambda self: self.room() > 0)
    @rule(steps=st.integers(1, 4))
    def decode(self, steps: int) -> None:
        """Token by token."""
        for _ in range(min(steps, self.room())):
            self.mirror.append(1)

    @rule(length=st.integers(1, 40), spread=st.lists(st.integers(0, 39), min_size=MOST_ROWS, max_size=MOST_ROWS))
    def ragged(self, length: int, spread: list[int]) -> None:
        """Rows go on by counts of their own."""
        if length <= self.room():
            self.mirror.append(length, [1 + spread[row] % length for row in range(len(self.mirror.tokens))])

    @rule(source=st.lists(st.integers(0, MOST_ROWS - 1), min_size=1, max_size=MOST_ROWS))
    def select(self, source: list[int]) -> None:
        """Rows are forked into samples, change places, are dropped."""
        self.mirror.select([row % len(self.mirror.tokens) for row in source])

    @rule(row=st.integers(0, MOST_ROWS - 1), share=st.floats(0, 1))
    def rollback(self, row: int, share: float) -> None:
        """A row is taken back to any place."""
        row %= len(self.mirror.tokens)
        self.mirror.rollback(row, round(share * len(self.mirror.tokens[row])))

    @rule()
    def reset(self) -> None:
        """All rows empty."""
        self.mirror.reset()

    @rule(more=st.integers(1, 3))
    def overflow(self, more: int) -> None:
        """What does not fit is refused and changes nothing."""
        too_long = [[0] * (self.room() + more)] * len(self.mirror.tokens)
        assert "is longer than the model's context" in refusal(lambda: self.session.append(too_long))

    @rule()
    def whole(self) -> None:
        """The longest row through the program without a cache, in between."""
        row = max(self.mirror.tokens, key=len)
        if row:
            assert self.session.forward([row]).shape[1] == len(row)

    @invariant()
    def lengths(self) -> None:
        """A rule that was refused has changed nothing either."""
        if hasattr(self, "mirror"):
            self.mirror.check_positions()


def run_machine(session: RunnerSession, runs: int, machine: type[SessionMachine], *, shrink: bool = True) -> None:
    """Hypothesis plays `runs` games of up to STEPS moves."""
    concrete = type("Machine", (machine,), {"session": session})
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    run_state_machine_as_test(
        concrete, settings=settings(max_examples=runs, stateful_step_count=STEPS, deadline=None, phases=phases)
    )


@pytest.mark.parametrize("target", PROGRAMS)
def test_any_order(target: str, lowered: Callable[..., Path]) -> None:
    options = {"max_batch": 3} if target == "executorch" else {}
    with RunnerSession(lowered(NAME, target, **options)) as session:
        run_machine(session, RUNS, SessionMachine)


class ForgetfulMachine(SessionMachine):
    """A session whose rollback forgets a token too many: what the machine must notice."""

    @rule(row=st.integers(0, MOST_ROWS - 1))
    def rollback(self, row: int) -> None:
        """Keeps the length, but with another token."""
        row %= len(self.mirror.tokens)
        if self.mirror.tokens[row]:
            self.mirror.tokens[row][-1] ^= 1


def test_a_wrong_token_is_noticed(lowered: Callable[..., Path]) -> None:
    with RunnerSession(lowered(NAME, "torchscript")) as session, pytest.raises(AssertionError):
        run_machine(session, 50, ForgetfulMachine, shrink=False)
