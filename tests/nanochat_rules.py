"""nanochat's rules told again in Python, for the C++ code to be held to: the calculator, and the engine around it."""

from __future__ import annotations

import ast
import string
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

FORBIDDEN = (
    "__ import exec eval compile open file input raw_input globals locals vars dir getattr setattr delattr hasattr"
)


def is_string(node: ast.expr) -> bool:
    """True for a plain string literal."""
    if isinstance(node, ast.JoinedStr):
        return all(is_string(part) for part in node.values)
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def is_string_or_count(expression: str) -> bool:
    """True for `TEXT` and `TEXT.count(TEXT)`: what the runner evaluates of the expressions with letters."""
    node = ast.parse(expression.lstrip(" \t"), mode="eval").body
    if is_string(node):
        return True
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "count"
        and is_string(node.func.value)
        and len(node.args) == 1
        and is_string(node.args[0])
    )


def nanochat_calculator(expression: str) -> str | None:
    """What nanochat's calculator gives, by its rules; of expressions with letters only what `str.count` needs."""
    expression = expression.replace(",", "")
    arithmetic = all(c in "0123456789*+-/.() " for c in expression)
    if arithmetic and "**" in expression:
        return None
    if not arithmetic:
        if not all(c in string.ascii_letters + string.digits + "'\"()._ " for c in expression):
            return None
        if any(word in expression.lower() for word in FORBIDDEN.split()) or ".count(" not in expression:
            return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if not arithmetic and not is_string_or_count(expression):
                return None
            result = eval(expression, {"__builtins__": {}}, {})
            return None if result is None else str(result)
        except Exception:  # as nanochat has it
            return None


@dataclass
class Row:
    """nanochat's state machine of one sample, fed with the tokens that the engine gave.

    `names` are the special tokens; every other token is one byte. The engine is told from the rules, not from our code:
    a token waits in `forced` from the end of an expression on, and must come before anything is drawn.
    """

    names: dict[str, int]
    raw: bool = False
    forced: deque[int] = field(default_factory=deque)
    ended: bool = False
    _expression: list[int] | None = None

    def feed(self, token: int, drawn: bool) -> None:
        """Takes the next token. Raises AssertionError where the engine could not have given it."""
        assert not self.ended, "nothing follows a stop token"
        if self.forced:
            assert (token, drawn) == (self.forced.popleft(), False)
        else:
            assert drawn
        if self.raw:
            return
        if token in (self.names["<|assistant_end|>"], self.names["<|bos|>"]):
            self.ended = True
        if token == self.names["<|python_start|>"]:
            self._expression = []
        elif token == self.names["<|python_end|>"] and self._expression is not None:
            self._calculate(self._expression)
            self._expression = None
        elif self._expression is not None:
            self._expression.append(token)

    def _calculate(self, tokens: Sequence[int]) -> None:
        by_id = {number: name.encode() for name, number in self.names.items()}
        text = b"".join(by_id.get(token) or bytes([token]) for token in tokens).decode("utf-8", errors="replace")
        result = nanochat_calculator(text) if tokens else None
        if result is not None:
            self.forced += [self.names["<|output_start|>"], *result.encode(), self.names["<|output_end|>"]]


def check_sample(
    sample: dict[str, object], names: dict[str, int], *, prompt: int, max_tokens: int, context: int, raw: bool
) -> None:
    """A sample of the engine's (ids, mask, stop) is one that nanochat's rules allow. Raises AssertionError."""
    ids, mask = sample["ids"], sample["mask"]
    assert isinstance(ids, list)
    assert isinstance(mask, list)
    row = Row(names, raw)
    for token, drawn in zip(ids, mask, strict=True):
        row.feed(token, drawn == 1)
    if row.ended:
        stop = "stop_token"
    elif len(ids) == max_tokens:
        stop = "max_tokens"
    else:
        assert prompt + len(ids) - 1 == context, "it ended for no reason"
        stop = "context"
    assert len(ids) <= max_tokens
    assert prompt + len(ids) - 1 <= context
    assert sample["stop"] == stop
