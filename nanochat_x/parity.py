"""`verify`: the C++ runner of a bundle against the model in float64, on examples that Hypothesis chooses.

The rule, for every example: the runner's largest error against float64 is at most FACTOR times what eager PyTorch in
the bundle's dtype loses. `verification` has the reason for the factor.

What eager loses is its largest error on the same texts, or on one text of the whole context if that is larger. The
largest error of a few tokens is a matter of luck: on single tokens of the demo model eager's goes from 5e-6 to 1.9e-5,
and right runners were found up to 5.8 times as wrong as eager on a text of 3 tokens, never more than 3 times on all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from torch import Tensor

from nanochat_x.errors import ParityError
from nanochat_x.model import GPT
from nanochat_x.parity_examples import Example, Limits, examples, first_examples
from nanochat_x.session import RunnerSession
from nanochat_x.spec import ModelSpec
from nanochat_x.verification import FACTOR
from nanochat_x.wrappers import ExportableGPT

SHRINKING_SECONDS = 120.0  # a failure is shrunk no longer than that


@dataclass(frozen=True)
class Row:
    """Logits of one row of an example; each [n, vocab], float64 where it says exact."""

    got: Tensor
    eager: Tensor
    exact: Tensor
    positions: tuple[int, ...]  # of the n tokens in the row
    calls: tuple[int, ...]  # T of the call that fed each of them


@dataclass(frozen=True)
class Outcome:
    """An example that was run, and how far runner and eager are from float64: the largest error of any logit."""

    example: Example
    rows: tuple[Row, ...]
    runner_error: float
    eager_error: float  # at least that on a text of the whole context
    where: tuple[int, int, int]  # row, position and token id of the runner's largest error

    @property
    def ratio(self) -> float:
        """runner_error in units of eager_error."""
        if self.runner_error == 0:
            return 0.0
        return self.runner_error / self.eager_error if self.eager_error else math.inf

    @property
    def passed(self) -> bool:
        """The rule. False for NaN too."""
        return self.runner_error <= FACTOR * self.eager_error

    def __str__(self) -> str:
        row, position, token = self.where
        return (
            f"off by {self.runner_error:.3g} at row {row}, position {position}, token id {token}: {self.ratio:.3g} "
            f"times what eager loses ({self.eager_error:.3g}; allowed {FACTOR:g} times)"
        )


class Reference:
    """The model in the bundle's dtype, and in float64 over the same weights: whole texts, no cache."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Tensor], dtype: torch.dtype, max_seq_len: int) -> None:
        """`weights` are prepared for `dtype`, as those of the bundle are."""
        self._vocab_size = spec.vocab_size
        self._eager = ExportableGPT(GPT.from_weights(spec, weights, dtype), max_seq_len)
        self._exact = ExportableGPT(GPT.from_weights(spec, weights, torch.float64), max_seq_len)

    @cache  # noqa: B019 (there is one reference, as long as there is this program)
    def loss(self, length: int) -> float:
        """What eager loses on a random text of `length` tokens: its largest error against float64."""
        (row,) = Example(False, (length,)).rows(self._vocab_size)
        (eager,), (exact,) = self.logits([row])
        return float((eager.double() - exact).abs().max())

    def logits(self, rows: list[list[int]]) -> tuple[list[Tensor], list[Tensor]]:
        """Eager's and float64's logits [n, vocab] of each row.

        Rows are padded to one length: in a causal model what follows a token changes nothing before it.
        """
        length = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        with torch.inference_mode():
            eager, exact = self._eager(ids), self._exact(ids)
        return (
            [logits[: len(row)] for logits, row in zip(eager, rows, strict=True)],
            [logits[: len(row)].double() for logits, row in zip(exact, rows, strict=True)],
        )


def run_example(example: Example, session: RunnerSession, reference: Reference, longest: int) -> Outcome:
    """Feeds an example to the runner and compares. `longest`: tokens of the text that tells what eager loses at least.

    Raises RunnerError, and ParityError for logits of another shape.
    """
    rows = example.rows(session.vocab_size)
    got = feed(example, rows, session)
    eager, exact = reference.logits(rows)
    judged = []
    for row, logits in enumerate(got):
        positions, calls = places(example, row)
        ours, truth = eager[row][positions], exact[row][positions]
        if logits.shape != truth.shape:
            raise ParityError(f"the runner returned logits {list(logits.shape)}, not {list(truth.shape)}")
        judged.append(Row(logits, ours, truth, tuple(positions), tuple(calls)))
    return judge(example, tuple(judged), reference.loss(longest))


def places(example: Example, row: int) -> tuple[list[int], list[int]]:
    """The positions of a row whose logits the example asks for, and T of the call that feeds each."""
    fed = [(example.prompts[row], max(example.prompts)), *((size, size) for size in example.chunks)]
    ends = list(accumulate(count for count, _ in fed))
    if example.last:
        return [end - 1 for end in ends], [length for _, length in fed]
    return list(range(ends[-1])), [length for count, length in fed for _ in range(count)]


def feed(example: Example, rows: list[list[int]], session: RunnerSession) -> list[Tensor]:
    """The runner's logits [n, vocab] of each row, at the example's `places`."""
    longest = max(example.prompts)
    prompts = [row[:prompt] + [0] * (longest - prompt) for row, prompt in zip(rows, example.prompts, strict=True)]
    if not example.cached:
        return [logits[:prompt] for logits, prompt in zip(session.forward(prompts), example.prompts, strict=True)]
    session.new(len(rows))
    done = list(example.prompts)
    counts = done if min(example.prompts) < longest else None
    if example.last:
        ends = sorted({prompt - 1 for prompt in example.prompts})
        logits = session.append(prompts, counts, ends)
        pieces = [[row[[ends.index(n - 1)]]] for row, n in zip(logits, done, strict=True)]
    else:
        pieces = [[row[:n]] for row, n in zip(session.append(prompts, counts), done, strict=True)]
    for size in example.chunks:
        piece = [row[begin : begin + size] for row, begin in zip(rows, done, strict=True)]
        logits = session.append(piece, logits_to_keep=[size - 1] if example.last else None)
        done = [begin + size for begin in done]
        for row, piece in zip(pieces, logits, strict=True):
            row.append(piece)
    return [torch.cat(row) for row in pieces]


def judge(example: Example, rows: tuple[Row, ...], least: float = 0.0) -> Outcome:
    """How far off the rows are, and where most. `least`: what eager loses at least."""
    worst, where = -1.0, (0, 0, 0)
    for number, row in enumerate(rows):
        error = (row.got.double() - row.exact).abs()
        error[error.isnan()] = math.inf  # a NaN is as wrong as can be
        largest = float(error.max())
        if largest > worst:
            position, token = divmod(int(error.argmax()), error.shape[1])
            worst, where = largest, (number, row.positions[position], token)
    eager = max(float((row.eager.double() - row.exact).abs().max()) for row in rows)
    return Outcome(example, rows, worst, max(eager, least), where)


class _Failed(Exception):
    """An example broke the rule; for Hypothesis, which looks for a smaller one that does."""


class _Enough(BaseException):
    """The search is over; Hypothesis lets pass what is no Exception."""


@dataclass(frozen=True)
class Run:
    """What a search found: how many examples were run to the first failure, and the smallest that broke the rule."""

    done: int
    failure: Outcome | None
    in_time: bool  # False: the deadline came before all examples were run


def search(
    limits: Limits,
    run: Callable[[Example], Outcome],
    see: Callable[[Outcome], None],
    *,
    count: int,
    seed: int,
    deadline: float = math.inf,
) -> Run:
    """Runs `count` different examples, or until one fails or the clock (`time.monotonic`) reaches `deadline`.

    `see` is told of the outcomes up to the first failure, which is then shrunk by Hypothesis to the smallest that it
    finds within SHRINKING_SECONDS, beyond the deadline if need be. Raises what `run` raises.
    """
    done: set[Example] = set()
    failure: Outcome | None = None
    failed = False

    def attempt(example: Example) -> Outcome:
        nonlocal failed
        outcome = run(example)
        if not failed and example not in done:
            done.add(example)
            see(outcome)
        failed = failed or not outcome.passed
        return outcome

    for example in first_examples(limits)[:count]:
        if time.monotonic() >= deadline:
            return Run(len(done), None, in_time=False)
        outcome = attempt(example)
        if not outcome.passed:
            failure = outcome
            break
    if failure is None and len(done) == count:
        return Run(count, None, in_time=True)
    if failure is None:
        found = _hypothesis(limits, attempt, done, count, seed, deadline)
        return found if found.failure is None else replace(found, failure=_in_one_call(found.failure, attempt))
    # Hypothesis shrinks what it found itself: it looks for a failure of its own, and the smaller one is told.
    own = _hypothesis(limits, attempt, done, count + 100, seed, time.monotonic() + SHRINKING_SECONDS).failure
    smaller = min((failure, own or failure), key=lambda outcome: outcome.example.size)
    return Run(len(done), _in_one_call(smaller, attempt), in_time=True)


def _in_one_call(failure: Outcome, attempt: Callable[[Example], Outcome]) -> Outcome:
    """The same texts fed at once, without a cache or with it, if that fails too.

    Hypothesis makes one part of an example smaller at a time; here the prompt would grow as the chunks go.
    """
    example = failure.example
    for cached in (False, True):
        whole = replace(example, cached=cached, prompts=example.lengths, chunks=(), last=False)
        if whole.size < example.size:
            outcome = attempt(whole)
            if not outcome.passed:
                return outcome
    return failure


def _hypothesis(
    limits: Limits,
    attempt: Callable[[Example], Outcome],
    done: set[Example],
    count: int,
    seed: int,
    deadline: float,
) -> Run:
    """Hypothesis's part of `search`."""
    smallest: Outcome | None = None
    shrink_until = math.inf
    late = False
    broken: Exception | None = None

    @cache  # an example that comes again ends as before
    def passes(example: Example) -> bool:
        nonlocal smallest, shrink_until, late, broken
        late = smallest is None and time.monotonic() >= deadline
        over = len(done) >= count if smallest is None else time.monotonic() >= shrink_until
        if late or over:
            raise _Enough
        try:
            outcome = attempt(example)
        except Exception as error:  # no failure to be shrunk: a runner that died answers nothing more
            broken = error
            raise _Enough from error
        if not outcome.passed:
            if smallest is None:
                shrink_until = time.monotonic() + SHRINKING_SECONDS
            if smallest is None or example.size < smallest.example.size:
                smallest = outcome
        return outcome.passed

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=2 * count,  # some come twice, and count once
        phases=(Phase.generate, Phase.shrink),
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(examples(limits))
    def body(example: Example) -> None:
        if not passes(example):
            raise _Failed

    with suppress(_Failed, _Enough):
        body()
    if broken is not None:
        raise broken
    return Run(len(done), smallest, in_time=not late)
