"""A made-up tokenizer in nanochat's format, for random checkpoints: real BPE merges, of letters instead of a text."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path

import torch

from nanochat_x.errors import UsageError
from nanochat_x.tokenizer import SPECIAL_TOKENS

#: How nanochat splits a text: GPT-4's pattern, with numbers of at most two digits.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

_BY_FREQUENCY = "etaoinshrdlucmfwypvbgkjqxz"  # of letters in English


def synthetic_tokens(number: int) -> tuple[bytes, ...]:
    """`number` tokens in the order of their ranks: the 256 bytes, then merges of two earlier tokens each.

    Common letters come first: " t", "th", then fours such as " the" and "tion". Each token is what byte-pair
    encoding makes of its own bytes, as in a vocabulary that was trained. Raises UsageError for a number out of reach.
    """
    if number < 256:
        raise UsageError(f"{number} mergeable tokens do not hold the 256 bytes", remedy="ask for a larger vocabulary")
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in _candidates():
        if len(ranks) == number:
            return tuple(ranks)
        if token not in ranks and _parts(token, ranks) == 2:
            ranks[token] = len(ranks)
    raise UsageError(f"{number} mergeable tokens are more than {len(ranks)}", remedy="ask for a smaller vocabulary")


def write_tokenizer(folder: Path, tokens: tuple[bytes, ...]) -> None:
    """Writes `tokenizer.pkl` (which tiktoken reads) and `token_bytes.pt` into `folder`, as nanochat would."""
    special_tokens = {name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}
    state = {
        "name": "rustbpe",
        "pat_str": PATTERN,
        "mergeable_ranks": {token: rank for rank, token in enumerate(tokens)},
        "special_tokens": special_tokens,
    }
    (folder / "tokenizer.pkl").write_bytes(_pickled_encoding(state))
    lengths = [len(token) for token in tokens] + [0] * len(special_tokens)
    torch.save(torch.tensor(lengths, dtype=torch.int32), folder / "token_bytes.pt")


def _pickled_encoding(state: Mapping[str, object]) -> bytes:
    """What `pickle.dumps` gives for a tiktoken.Encoding of that state, without tiktoken: new object, then its state."""
    # Protocol 3 frames nothing, so its pickle of the state (less the header and the final STOP) fits between opcodes.
    out = io.BytesIO()
    pickle.Pickler(out, protocol=3).dump(state)
    header, body = out.getvalue()[:2], out.getvalue()[2:-1]
    encoding_class = pickle.GLOBAL + b"tiktoken.core\nEncoding\n"
    return header + encoding_class + pickle.EMPTY_TUPLE + pickle.NEWOBJ + body + pickle.BUILD + pickle.STOP


def _candidates() -> Iterator[bytes]:
    """Pairs of letters, then pairs of pairs, the commoner first."""
    letters = _BY_FREQUENCY
    spaced = [f" {letter}" for letter in letters + letters.upper()]
    pairs = [first + second for first, second in _diagonally(list(letters), list(letters))]
    capitals = [first.upper() + second for first, second in _diagonally(list(letters), list(letters))]
    yield from (text.encode() for text in spaced + pairs + capitals)
    yield from ((first + second).encode() for first, second in _diagonally(spaced + pairs + capitals, pairs))


def _diagonally(first: list[str], second: list[str]) -> Iterator[tuple[str, str]]:
    """All pairs of the two, by the sum of their places."""
    for total in count():
        if total > len(first) + len(second) - 2:
            return
        for i in range(max(0, total - len(second) + 1), min(total, len(first) - 1) + 1):
            yield first[i], second[total - i]


def _parts(token: bytes, ranks: dict[bytes, int]) -> int:
    """Into how many tokens byte-pair encoding makes `token`: merges the pair of the lowest rank, again and again."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        merges = [(ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1)]
        rank, i = min(merges)
        if rank == len(ranks):
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return len(parts)
