"""What a run of `verify` saw, summed up: errors, divergence, agreement, and where they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanochat_x.parity import Outcome, Row

WINDOW_SPAN = 8  # positions on either side of a window's edge that are told apart


@dataclass
class Bin:
    """The largest errors against float64 of some positions."""

    tokens: int = 0
    runner_error: float = 0.0
    eager_error: float = 0.0

    def add(self, runner: float, eager: float) -> None:
        """One position more."""
        self.tokens += 1
        self.runner_error = max(self.runner_error, runner)
        self.eager_error = max(self.eager_error, eager)


@dataclass
class Statistics:
    """Grows by one outcome at a time; holds no logits."""

    windows: Sequence[int]  # of the model
    examples: int = 0
    tokens: int = 0
    calls: int = 0
    logits: int = 0
    runner_error: float = 0.0  # largest, against float64
    eager_error: float = 0.0
    difference: float = 0.0  # largest, runner against eager
    squares: float = 0.0  # sum over all logits of (runner - float64) squared
    eager_squares: float = 0.0
    divergence: float = 0.0  # sum over tokens of KL(float64 || runner), nats
    largest_divergence: float = 0.0
    agreements: int = 0  # tokens at which runner and float64 find the same one most likely
    eager_agreements: int = 0
    worst: Outcome | None = None  # by ratio
    by_position: dict[int, Bin] = field(default_factory=dict)
    by_length: dict[int, Bin] = field(default_factory=dict)  # T of the call
    by_edge: dict[int, Bin] = field(default_factory=dict)  # position - first position that the window cuts

    def see(self, outcome: Outcome) -> None:
        """Takes in one outcome."""
        self.examples += 1
        self.calls += len(outcome.example.calls)
        self.runner_error = max(self.runner_error, outcome.runner_error)
        self.eager_error = max(self.eager_error, outcome.eager_error)
        if self.worst is None or outcome.ratio > self.worst.ratio:
            self.worst = Outcome(outcome.example, (), outcome.runner_error, outcome.eager_error, outcome.where)
        for row in outcome.rows:
            self._see_row(row)

    def _see_row(self, row: Row) -> None:
        got, eager = row.got.double(), row.eager.double()
        runner_error, eager_error = (got - row.exact).abs(), (eager - row.exact).abs()
        runner_error[runner_error.isnan()] = math.inf
        self.tokens += len(row.exact)
        self.logits += row.exact.numel()
        self.difference = max(self.difference, float((got - eager).abs().max()))
        self.squares += float(runner_error.square().sum())
        self.eager_squares += float(eager_error.square().sum())
        divergence = kl_divergence(row.exact, got)
        self.divergence += float(divergence.sum())
        self.largest_divergence = max(self.largest_divergence, float(divergence.max()))
        best = row.exact.argmax(-1)
        self.agreements += int((got.argmax(-1) == best).sum())
        self.eager_agreements += int((eager.argmax(-1) == best).sum())
        pairs = zip(runner_error.amax(-1).tolist(), eager_error.amax(-1).tolist(), strict=True)
        for position, length, (runner, plain) in zip(row.positions, row.calls, pairs, strict=True):
            self.by_position.setdefault(position, Bin()).add(runner, plain)
            self.by_length.setdefault(length, Bin()).add(runner, plain)
            for window in self.windows:
                distance = position - (window + 1)
                if abs(distance) <= WINDOW_SPAN:
                    self.by_edge.setdefault(distance, Bin()).add(runner, plain)

    def to_json(self) -> dict[str, Any]:
        """The figures, by the names of docs/verify.md."""
        tokens, logits = max(self.tokens, 1), max(self.logits, 1)
        return {
            "examples": self.examples,
            "calls": self.calls,
            "tokens": self.tokens,
            "logits": self.logits,
            "error": {
                "max": self.runner_error,
                "rms": math.sqrt(self.squares / logits),
                "eager_max": self.eager_error,
                "eager_rms": math.sqrt(self.eager_squares / logits),
            },
            "largest_difference_to_eager": self.difference,
            "kl_divergence_nats": {"mean": self.divergence / tokens, "max": self.largest_divergence},
            "top1_agreement": self.agreements / tokens,
            "eager_top1_agreement": self.eager_agreements / tokens,
            "worst": None if self.worst is None else describe(self.worst),
            "by_position": _bins(self.by_position),
            "by_call_length": _bins(self.by_length),
            "by_distance_to_window_edge": _bins(self.by_edge),
        }


def describe(outcome: Outcome) -> dict[str, Any]:
    """An outcome without its logits."""
    row, position, token = outcome.where
    return {
        "example": asdict(outcome.example),
        "ratio": outcome.ratio,
        "runner_error": outcome.runner_error,
        "eager_error": outcome.eager_error,
        "row": row,
        "position": position,
        "token_id": token,
    }


def kl_divergence(exact: Tensor, got: Tensor) -> Tensor:
    """KL(exact || got) in nats of the distributions that logits [n, vocab] give, for each of the n."""
    target, other = torch.log_softmax(exact, -1), torch.log_softmax(got, -1)
    # Two nearly equal distributions: rounding may leave a sum just below 0, which no divergence is.
    return (target.exp() * (target - other)).sum(-1).clamp(min=0)


def _bins(bins: dict[int, Bin]) -> list[dict[str, Any]]:
    return [{"at": at, **asdict(bins[at])} for at in sorted(bins)]
