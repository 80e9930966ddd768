"""The arithmetic of `compare`: two models' logits of the same tokens, position by position, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat_x.errors import ParityError

_ROWS = 128  # positions whose distributions are in memory at once, some ten times vocab doubles each


@dataclass(frozen=True)
class Positions:
    """What T positions of a text show; every tensor is float64 [T]."""

    nats_a: Tensor  # cross-entropy of the token that came
    nats_b: Tensor
    kl: Tensor  # KL(B || A) in nats
    agree: Tensor  # 1 where both find the same token most likely
    difference: Tensor  # the largest |logit of A - logit of B|
    squares: Tensor  # mean of the squared differences of logits


def measure(a: Tensor, b: Tensor, targets: Tensor, names: tuple[str, str] = ("A", "B")) -> Positions:
    """Compares logits [T, vocab] of A and of B, the reference; targets int64 [T] are the tokens that came.

    Raises ParityError, with the model's name, if logits have another shape than the other's or are not finite.
    """
    if a.shape != b.shape or a.shape[:1] != targets.shape:
        raise ParityError(
            f"{names[0]} and {names[1]} gave logits of shapes {tuple(a.shape)} and {tuple(b.shape)} "
            f"for {targets.shape[0]} tokens"
        )
    for logits, name in ((a, names[0]), (b, names[1])):
        if not logits.isfinite().all():
            raise ParityError(f"logits of {name} are not finite", remedy="lower it in float32 and compare again")
    pieces = [
        _measure(a[first : first + _ROWS].double(), b[first : first + _ROWS].double(), targets[first : first + _ROWS])
        for first in range(0, targets.shape[0], _ROWS)
    ]
    return Positions(*(torch.cat(columns) for columns in zip(*pieces, strict=True)))


def _measure(a: Tensor, b: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    # Never below 0 but by rounding.
    kl = (log_b.exp() * (log_b - log_a)).sum(-1).clamp(min=0)
    difference = a - b
    return (
        -log_a.gather(1, targets[:, None])[:, 0],
        -log_b.gather(1, targets[:, None])[:, 0],
        kl,
        (a.argmax(-1) == b.argmax(-1)).double(),
        difference.abs().amax(-1),
        difference.square().mean(-1),
    )


@dataclass
class Tally:
    """Sums over positions."""

    tokens: int = 0
    bytes: int = 0
    nats_a: float = 0.0  # of tokens that have bytes, as those of `nats_b`
    nats_b: float = 0.0
    kl: float = 0.0
    largest_kl: float = 0.0
    agree: float = 0.0
    difference: float = 0.0
    squares: float = 0.0

    def add(self, positions: Positions, counts: Tensor, part: slice) -> None:
        """Adds the positions of `part`; counts int64 [T] are the bytes of each token that came."""
        has_bytes = (counts[part] > 0).double()
        self.tokens += int(has_bytes.numel())
        self.bytes += int(counts[part].sum())
        self.nats_a += float((positions.nats_a[part] * has_bytes).sum())
        self.nats_b += float((positions.nats_b[part] * has_bytes).sum())
        self.kl += float(positions.kl[part].sum())
        self.largest_kl = max(self.largest_kl, float(positions.kl[part].max()))
        self.agree += float(positions.agree[part].sum())
        self.difference = max(self.difference, float(positions.difference[part].max()))
        self.squares += float(positions.squares[part].sum())

    def figures(self) -> dict[str, Any]:
        """The figures of a report; bits per byte are None where no token has bytes."""
        per_byte = math.log(2) * self.bytes
        bits_a, bits_b = (nats / per_byte if self.bytes else None for nats in (self.nats_a, self.nats_b))
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "bits_per_byte_a": bits_a,
            "bits_per_byte_b": bits_b,
            "delta_bits_per_byte": None if bits_a is None or bits_b is None else bits_a - bits_b,
            "kl_mean": self.kl / self.tokens,
            "kl_max": self.largest_kl,
            "top1_agreement": self.agree / self.tokens,
            "largest_logit_difference": self.difference,
            "rms_logit_difference": math.sqrt(self.squares / self.tokens),
        }


class Buckets:
    """Tallies by position: the first predicted token of a window, the second and third, the 4th to 7th, ..."""

    def __init__(self) -> None:
        self.total = Tally()
        self._buckets: dict[int, Tally] = {}

    def add(self, positions: Positions, counts: Tensor) -> None:
        """Adds a window, whose first predicted token is the first of `positions`."""
        length = counts.shape[0]
        self.total.add(positions, counts, slice(0, length))
        first = 1
        while first <= length:
            self._buckets.setdefault(first, Tally()).add(positions, counts, slice(first - 1, 2 * first - 1))
            first *= 2

    def figures(self) -> list[dict[str, Any]]:
        """One object a bucket, nearest positions first."""
        return [
            {"from": first, "to": 2 * first - 1, **tally.figures()} for first, tally in sorted(self._buckets.items())
        ]


def lines_of(report: Mapping[str, Any]) -> Iterator[str]:
    """A report for people."""
    yield f"A  {report['a']}"
    yield f"B  {report['b']}  (the reference)"
    yield f"{report['documents']} documents in {report['windows']} windows of at most {report['context']} tokens"
    yield ""
    rows = [("position", *_HEADINGS), *((_range(row), *_cells(row)) for row in report["positions"])]
    rows.append(("all", *_cells(report)))
    yield from _table(rows)


_HEADINGS = ("tokens", "bpb A", "bpb B", "delta", "mean KL", "max KL", "top-1 same", "max |dlogit|", "RMS dlogit")


def _range(row: Mapping[str, Any]) -> str:
    return str(row["from"]) if row["from"] == row["to"] else f"{row['from']}-{row['to']}"


def _cells(figures: Mapping[str, Any]) -> tuple[str, ...]:
    def bits(key: str, form: str) -> str:
        return "-" if figures[key] is None else format(figures[key], form)

    return (
        str(figures["tokens"]),
        bits("bits_per_byte_a", ".5f"),
        bits("bits_per_byte_b", ".5f"),
        bits("delta_bits_per_byte", "+.1e"),
        *(format(figures[key], ".1e") for key in ("kl_mean", "kl_max")),
        f"{100 * figures['top1_agreement']:.2f} %",
        *(format(figures[key], ".1e") for key in ("largest_logit_difference", "rms_logit_difference")),
    )


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
