"""What `verify` feeds: examples that Hypothesis chooses, the edges of windows, context and vocabulary favoured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st

from nanochat_x.errors import UsageError
from nanochat_x.spec import ModelSpec

Vocabulary = Literal["any", "edges", "repeat"]

_VOCABULARIES: tuple[Vocabulary, ...] = ("any", "any", "any", "edges", "repeat")  # by how often they are drawn
MOST_ROWS = 9  # one more than ExecuTorch takes in one step by default, so that its splitting is crossed
MOST_CHUNKS = 8

#: float64 of that many operations takes some seconds on a small machine; longer texts of a large model are left out.
AFFORDABLE_OPERATIONS = 5e11


@dataclass(frozen=True)
class Limits:
    """What an example may be, for one bundle."""

    vocab_size: int
    max_seq_len: int  # longest text of a row
    tokens: int  # most tokens of an example, padding included
    windows: tuple[int, ...]  # distinct attention windows, shortest first
    cached: bool  # the bundle has programs with a KV cache


@dataclass(frozen=True)
class Example:
    """One script for a runner's session.

    Row b is fed prompts[b] tokens (all rows in one call, the shorter ones padded), then every row each of `chunks`.
    `last`: of each call only the logits after a row's last token are asked for. Not `cached`: the rows go through the
    program without a cache instead, in one call, and there are no chunks.
    """

    cached: bool
    prompts: tuple[int, ...]
    chunks: tuple[int, ...] = ()
    vocabulary: Vocabulary = "any"  # "edges": the first and last ids alone; "repeat": one id, over and over
    seed: int = 0  # of the tokens
    last: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row in the end."""
        return tuple(prompt + sum(self.chunks) for prompt in self.prompts)

    @property
    def calls(self) -> tuple[int, ...]:
        """T of each call."""
        return (max(self.prompts), *self.chunks)

    @property
    def size(self) -> tuple[int, int, int]:
        """What makes an example simple: fewer tokens, then fewer calls, then fewer rows."""
        return sum(self.lengths), len(self.calls), len(self.prompts)

    def rows(self, vocab_size: int) -> list[list[int]]:
        """The text of each row, as token ids."""
        generator = np.random.default_rng(self.seed)
        shape = (len(self.prompts), max(self.lengths))
        if self.vocabulary == "edges":
            ids = generator.choice(np.array([0, vocab_size - 1]), shape)
        elif self.vocabulary == "repeat":
            ids = np.broadcast_to(generator.integers(vocab_size, size=(shape[0], 1)), shape)
        else:
            ids = generator.integers(vocab_size, size=shape)
        return [row[:length].tolist() for row, length in zip(ids, self.lengths, strict=True)]

    def to_json(self) -> str:
        """One line, which `parse_example` reads."""
        return json.dumps(asdict(self))


def parse_example(text: str, limits: Limits) -> Example:
    """The example of `verify --example`. Raises UsageError if it is none, or does not fit the bundle."""
    remedy = "take it as `verify` printed it"
    try:
        value = dict(json.loads(text))
        parts: dict[str, Any] = {key: tuple(part) if isinstance(part, list) else part for key, part in value.items()}
        example = Example(**parts)
        numbers = [*example.prompts, *example.chunks, example.seed]
        fits = (
            isinstance(example.cached, bool)
            and isinstance(example.last, bool)
            and example.vocabulary in ("any", "edges", "repeat")
            and all(type(number) is int for number in numbers)
            and len(example.prompts) >= 1
            and min((*example.prompts, *example.chunks)) >= 1
            and example.seed >= 0
            and (example.cached or not (example.chunks or example.last))
        )
    except (ValueError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise UsageError(f"--example {text[:200]!r} is not an example", remedy=remedy)
    if max(example.lengths) > limits.max_seq_len:
        raise UsageError(f"--example has {max(example.lengths)} tokens in a row", remedy=f"up to {limits.max_seq_len}")
    if example.cached and not limits.cached:
        raise UsageError("--example is for a KV cache, which this bundle does not have", remedy=remedy)
    return example


def limits_of(spec: ModelSpec, max_seq_len: int, *, cached: bool) -> Limits:
    """The limits of a model's examples: never less than twice the shortest window, which must be crossed."""
    windows = tuple(sorted({window for window in spec.windows if window is not None}))
    operations = 2 * (spec.n_layer * 12 * spec.n_embd**2 + spec.n_embd * spec.vocab_size)  # of the products, a token
    affordable = max(int(AFFORDABLE_OPERATIONS / operations), 2 * min(windows, default=0), 64)
    tokens = min(affordable, 2 * max_seq_len)
    return Limits(spec.vocab_size, min(max_seq_len, tokens), tokens, windows, cached)


def first_examples(limits: Limits) -> list[Example]:
    """Those that every run begins with: each way through the runner, at each edge that is known to matter."""
    most = limits.max_seq_len
    around = [window + 1 for window in limits.windows if window + 2 < most] or [most // 2]
    wanted = [
        Example(False, (1,)),
        Example(False, (2,), vocabulary="edges"),
        Example(False, (most,)),
        *(Example(False, (edge + 1, 3), seed=edge) for edge in around),
    ]
    if limits.cached:
        wanted += [
            Example(True, (1,)),
            Example(True, (1,), (1, 1)),
            Example(True, (most,)),
            Example(True, (most - 1,), (1,)),
            Example(True, (3,), (5, 1, 3), vocabulary="repeat"),
            Example(True, (1,) * MOST_ROWS, (2, 1)),
            Example(True, (most - 4,), (3, 1), last=True),
            Example(True, (2, 5, 1), (4, 1), last=True),
        ]
        for edge in around:
            wanted += [
                Example(True, (edge - 1,), (1, 1, 1), seed=edge),
                Example(True, (edge + 1, 1, 3), (1, 4), seed=edge),
                Example(True, (2,), (edge, 1), seed=edge),
            ]
    return [example for example in wanted if fits(example, limits)]


def fits(example: Example, limits: Limits) -> bool:
    """True if the example is within the limits."""
    longest = max(example.lengths)
    whole = min((*example.prompts, *example.chunks)) >= 1
    return whole and longest <= limits.max_seq_len and len(example.prompts) * longest <= limits.tokens


@st.composite
def examples(draw: st.DrawFn, limits: Limits) -> Example:
    """Any example within the limits; they shrink to one row, one call, one token."""
    cached = limits.cached and draw(st.booleans())
    most = limits.max_seq_len
    edges = [1, 2, most - 1, most, *(w + d for w in limits.windows for d in (-1, 0, 1, 2))]
    rows = draw(st.integers(1, min(4, limits.tokens)) | st.integers(1, min(MOST_ROWS, limits.tokens)))
    room = min(most, limits.tokens // rows)
    length = st.integers(1, min(room, 40)) | _of(edges, room) | st.integers(1, room)
    prompts = draw(st.lists(length, min_size=rows, max_size=rows))
    chunks: list[int] = []
    if cached:
        room -= max(prompts)
        for size in draw(st.lists(st.integers(1, 5) | st.sampled_from([1, 1, 8, 64, 129]), max_size=MOST_CHUNKS)):
            if size <= room:
                chunks.append(size)
                room -= size
    vocabulary: Vocabulary = draw(st.sampled_from(_VOCABULARIES))
    seed = draw(st.integers(0, 2**32 - 1))
    last = draw(st.sampled_from([False, False, True]))  # drawn in any case, so that shrinking `cached` moves nothing
    return Example(cached, tuple(prompts), tuple(chunks), vocabulary, seed, cached and last)


def _of(edges: Sequence[int], room: int) -> st.SearchStrategy[int]:
    possible = sorted({edge for edge in edges if 1 <= edge <= room})
    return st.sampled_from(possible) if possible else st.nothing()
