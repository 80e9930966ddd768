"""nanochat's tokenizer: read from its pickle without running it, and written in the portable form of docs/bundle.md.

`tokenizer.pkl` is a pickled `tiktoken.Encoding`, which is a class name and a dict of plain values. Only those are read
here: the pickle's opcodes must be of the few that such a file needs, and the one class that it may name is replaced by
a stand-in that only keeps what it is given. tiktoken itself is not needed.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat_x.errors import TokenizerError
from nanochat_x.quoting import quoted
from nanochat_x.regular_file import read_regular
from nanochat_x.torch_file import read_torch_file

#: nanochat's special tokens, in the order of their ids.
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)

_LARGEST_FILE = 64 << 20  # bytes; nanochat's 65,536 tokens take about 1 MB
_LONGEST_PATTERN = 10_000  # characters; nanochat's has about 120
_ENCODING = ("tiktoken.core", "Encoding")
_NOT_RUN = "nothing of it was run; get nanochat's own file, or name its folder with --tokenizer DIR"

# What pickle writes for an object with a dict of strings, bytes and small integers. No REDUCE, which calls; no EXT,
# which reaches classes by number; no persistent ids.
_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "NEWOBJ", "BUILD"),
    *("EMPTY_TUPLE", "EMPTY_DICT", "SETITEM", "SETITEMS"),
    *("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BININT", "BININT1", "BININT2"),
    *("MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
}


@dataclass(frozen=True)
class TokenizerData:
    """A byte-level BPE vocabulary with its split pattern."""

    pattern: str  # of the regular expression that splits a text into pieces
    tokens: tuple[bytes, ...]  # mergeable tokens; the index is rank and id
    special_tokens: dict[str, int]  # the ids after the mergeable ones, without a gap
    token_bytes: tuple[int, ...] | None  # bytes of each id's text, 0 for special tokens; None: no token_bytes.pt

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.tokens) + len(self.special_tokens)

    def counted_bytes(self) -> tuple[int, ...]:
        """`token_bytes`; where there is no such file, each token's own bytes."""
        if self.token_bytes is not None:
            return self.token_bytes
        return (*(len(token) for token in self.tokens), *(0 for _ in self.special_tokens))

    def to_portable_json(self) -> str:
        """The text of a bundle's tokenizer.json."""
        return json.dumps(
            {
                "version": 1,
                "pattern": self.pattern,
                "tokens": [base64.b64encode(token).decode("ascii") for token in self.tokens],
                "special_tokens": self.special_tokens,
                "token_bytes": self.counted_bytes(),
            },
            indent=0,
        )


def read_tokenizer(folder: Path) -> TokenizerData:
    """Reads tokenizer.pkl of `folder` and, where it is there, token_bytes.pt. Nothing in either is ever run.

    Raises TokenizerError if a file cannot be read or trusted, or is not a tokenizer as nanochat makes it.
    """
    path = folder / "tokenizer.pkl"
    try:
        data = read_regular(path, _LARGEST_FILE)
    except FileNotFoundError as error:
        raise TokenizerError(
            f"no tokenizer.pkl in {folder}", remedy="name the folder that holds it with --tokenizer DIR"
        ) from error
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) > _LARGEST_FILE:
        raise TokenizerError(
            f"{path}: larger than {_LARGEST_FILE >> 20} MiB", remedy="it is no tokenizer of nanochat's"
        )
    tokenizer = _from_state(_unpickle(data, path), path)
    if not (folder / "token_bytes.pt").exists():
        return tokenizer
    token_bytes = _read_token_bytes(folder / "token_bytes.pt", tokenizer)
    return TokenizerData(tokenizer.pattern, tokenizer.tokens, tokenizer.special_tokens, token_bytes)


class _Encoding:
    """Stands in for tiktoken.Encoding: keeps the state that the pickle gives it."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == _ENCODING:
            return _Encoding
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it names an object outside of itself")


def _unpickle(data: bytes, path: Path) -> object:
    """The state of the pickled Encoding: whatever value the pickle holds for it."""
    _check_opcodes(data, path)
    try:
        loaded = _Unpickler(io.BytesIO(data)).load()
    # Not broad by neglect: bytes from anywhere make the unpickler raise what they like, and all of it means the same.
    except Exception as error:
        raise TokenizerError(f"{path}: not a tokenizer of nanochat's ({quoted(error)})", remedy=_NOT_RUN) from error
    if not isinstance(loaded, _Encoding):
        raise TokenizerError(f"{path}: holds a {type(loaded).__name__}, not a tiktoken.Encoding", remedy=_NOT_RUN)
    return loaded.state


def _check_opcodes(data: bytes, path: Path) -> None:
    """Refuses opcodes that a tokenizer needs not, before any is obeyed; and memo numbers that would take gigabytes."""
    strings: list[str] = []
    named = ""  # the last class or function that the pickle asked for
    position = -1
    try:
        for number, (opcode, argument, at) in enumerate(pickletools.genops(data)):
            position = at or 0
            if opcode.name in ("SHORT_BINUNICODE", "BINUNICODE"):
                strings = [*strings[-1:], str(argument)]
            elif opcode.name == "STACK_GLOBAL":
                named = ".".join(strings)
            elif opcode.name == "GLOBAL":
                named = str(argument).replace(" ", ".")
            if opcode.name not in _OPCODES:
                what = f"pickle opcode {opcode.name}" + (f" on {named!r:.100}" if named else "")
                raise TokenizerError(f"{path}: {what}, which no tokenizer of nanochat's needs", remedy=_NOT_RUN)
            # The unpickler makes room for all numbers below the one it is told to use; pickle counts them from 0.
            if opcode.name in ("BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > number:
                raise TokenizerError(f"{path}: memo number {argument} at byte {position} is absurd", remedy=_NOT_RUN)
    except (ValueError, OverflowError) as error:
        raise TokenizerError(f"{path}: cut short or damaged ({quoted(error)})", remedy="copy it again") from error
    if position != len(data) - 1:
        raise TokenizerError(f"{path}: there are more bytes after the pickle's end", remedy=_NOT_RUN)


def _from_state(state: object, path: Path) -> TokenizerData:
    """Checks every value of an Encoding's state."""
    wanted = {"name", "pat_str", "mergeable_ranks", "special_tokens"}
    if not isinstance(state, dict) or set(state) != wanted:
        raise _malformed(path, f"its state is not the dict of {', '.join(sorted(wanted))}")
    pattern = state["pat_str"]
    if not isinstance(pattern, str) or not 0 < len(pattern) <= _LONGEST_PATTERN or not _is_utf8(pattern):
        raise _malformed(path, "pat_str is not a pattern")
    tokens = _tokens_by_rank(state["mergeable_ranks"], path)
    specials = state["special_tokens"]
    if not isinstance(specials, dict) or set(specials) != set(SPECIAL_TOKENS):
        raise _malformed(path, f"its special tokens are not nanochat's nine ({', '.join(SPECIAL_TOKENS)})")
    ids = range(len(tokens), len(tokens) + len(SPECIAL_TOKENS))
    if not all(type(value) is int for value in specials.values()) or sorted(specials.values()) != list(ids):
        raise _malformed(path, f"the ids of the special tokens are not {ids.start} to {ids.stop - 1}")
    in_order = dict(sorted(specials.items(), key=lambda item: int(item[1])))
    return TokenizerData(pattern=pattern, tokens=tokens, special_tokens=in_order, token_bytes=None)


def _tokens_by_rank(ranks: object, path: Path) -> tuple[bytes, ...]:
    if not isinstance(ranks, dict) or not all(type(token) is bytes and token for token in ranks):
        raise _malformed(path, "mergeable_ranks is not a dict of byte strings")
    if not all(type(rank) is int for rank in ranks.values()) or sorted(ranks.values()) != list(range(len(ranks))):
        raise _malformed(path, "the ranks of mergeable_ranks are not 0, 1, 2, ... without a gap")
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        raise _malformed(path, f"{len(lacking)} of the 256 bytes are no token, {lacking[0]:#04x} the first")
    return tuple(sorted(ranks, key=ranks.__getitem__))


def _read_token_bytes(path: Path, tokenizer: TokenizerData) -> tuple[int, ...]:
    tensor = read_torch_file(path, TokenizerError)
    size = tokenizer.vocab_size
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int32 or tuple(tensor.shape) != (size,):
        raise _malformed(path, f"not an int32 tensor of the tokenizer's {size} tokens")
    lengths = tuple(int(length) for length in tensor.tolist())
    for token_id, length in enumerate(lengths):
        token = tokenizer.tokens[token_id] if token_id < len(tokenizer.tokens) else b""
        # nanochat counts the bytes of the decoded text, where half a character is U+FFFD: three bytes.
        if length not in (len(token), len(token.decode("utf-8", "replace").encode())):
            raise _malformed(path, f"says {length} bytes for token {token_id}, which has {len(token)}")
    return lengths


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _malformed(path: Path, what: str) -> TokenizerError:
    return TokenizerError(
        f"{path}: {what}", remedy="take the tokenizer that the model was trained with (--tokenizer DIR)"
    )
