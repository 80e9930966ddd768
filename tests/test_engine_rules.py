"""The engine's masks, forced tokens and stops against nanochat's rules, told again in Python (`nanochat_rules.py`).

The engine runs on the toy model of the C++ tests, through `engine_driver` (runners/tests/engine_driver.cpp).
NANOCHAT_X_FUZZ_EXAMPLES sets how many examples Hypothesis tries in each test (100).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from driver import Driver
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nanochat_rules import check_sample, nanochat_calculator

FUZZ = settings(
    max_examples=int(os.environ.get("NANOCHAT_X_FUZZ_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

_ORDER = "bos user_start user_end assistant_start assistant_end python_start python_end output_start output_end"
NAMES = {f"<|{name}|>": 256 + number for number, name in enumerate(_ORDER.split())}
PROMPT = [256, 257, ord("h"), ord("i"), 258, 259]
MARKS = dict(zip(".{}[]^", [260, 261, 262, 263, 264, 256], strict=True))

#: What a model may say around its tool: "{" and "}" stand for python_start and python_end, "[" and "]" for output_start
#: and output_end, "." for assistant_end, "^" for bos.
PIECES = [
    *["{1+2}", "{12*(3-5)}", "{1/3}", "{7//2}", "{10000000000*99999999999}", "{1,000*2}", "{1/0}", "{2**8}", "{}"],
    *["{'banana'count('an')}", "{1+[1}", "{{1+1}", "{1+", "}", "{", "[", "]", "so ", "é", "2", "*3", "-", "{{", "}}"],
]
STOPS = [".", "^"]


def ids_of(text: str) -> list[int]:
    """Single bytes, and the special tokens that marks stand for."""
    return [token for c in text for token in ([MARKS[c]] if c in MARKS else c.encode())]


@pytest.fixture(scope="session")
def engine_driver(runner_build: Path) -> Iterator[Driver]:
    """A running engine_driver."""
    driver = Driver(runner_build / "engine_driver")
    yield driver
    driver.close()


def generate(driver: Driver, script: list[int], **options: Any) -> list[dict[str, Any]]:
    """The samples, each one that the rules allow."""
    asked = {"max_tokens": 60, "num_samples": 1, "raw": False, "max_seq_len": 400, "temperature": 0} | options
    answer = driver.ask(op="generate", scripts=[script], prompt=PROMPT, **asked)
    samples: list[dict[str, Any]] = answer["samples"]
    assert len(samples) == asked["num_samples"]
    for sample in samples:
        check_sample(
            sample, NAMES, prompt=len(PROMPT), max_tokens=asked["max_tokens"], context=asked["max_seq_len"],
            raw=asked["raw"],
        )  # fmt: skip
    return samples


SCRIPTS = st.lists(st.sampled_from(PIECES + STOPS) | st.text("0123456789+-*/(){}[].^ '", max_size=6), max_size=12)


@FUZZ
@given(SCRIPTS.map("".join), st.integers(1, 40), st.integers(6, 50), st.booleans(), st.integers(1, 3))
@example("{1+2}___{2*3}___.", 40, 50, False, 2)
def test_what_a_model_says(
    engine_driver: Driver, text: str, max_tokens: int, context: int, raw: bool, num_samples: int
) -> None:
    """Greedy: each drawn token is the one that the model wants there, in every sample."""
    script = ids_of(text + "_" * 60)
    options = {"max_tokens": max_tokens, "max_seq_len": context, "raw": raw, "num_samples": num_samples}
    for sample in generate(engine_driver, script, **options):
        for place, (token, drawn) in enumerate(zip(sample["ids"], sample["mask"], strict=True)):
            assert not drawn or token == script[place]


@FUZZ
@given(
    SCRIPTS.map("".join),
    st.integers(0, 2**64 - 1),
    st.sampled_from([15, 18, 22]),
    st.integers(1, 5),
    st.integers(0, 50),
)
def test_samples_that_go_their_own_ways(
    engine_driver: Driver, text: str, seed: int, temperature: float, num_samples: int, top_k: int
) -> None:
    """At a temperature at which the model says about half of what it wants to: rows differ, and end one by one."""
    options = {"seed": seed, "temperature": temperature, "num_samples": num_samples, "top_k": top_k}
    together = generate(engine_driver, ids_of(text + "_" * 60), **options)
    alone = generate(engine_driver, ids_of(text + "_" * 60), **{**options, "num_samples": 1})
    assert together[0] == alone[0]


def test_the_pieces_reach_the_calculator(engine_driver: Driver) -> None:
    """What the tests above are made of does force tokens."""
    (sample,) = generate(engine_driver, ids_of("{12*(3-5)}" + "_" * 60))
    assert sample["ids"][10:15] == ids_of("[-24]")
    assert sample["mask"][10:15] == [0] * 5
    assert sum(nanochat_calculator(piece[1:-1]) is not None for piece in PIECES if piece.startswith("{1")) >= 4


@pytest.mark.parametrize(
    "change",
    [
        {"mask": [1] * 9},  # a forced token that is said to be drawn
        {"ids": [*b"so ", 261, ord("1"), 262, 263, ord("2"), 264]},  # another result
        {"ids": [*b"so ", 261, ord("1"), 262, 263, ord("1"), 264, 260, 65], "mask": [1] * 6 + [0] * 3 + [1] * 2},
        {"ids": [*b"so "], "mask": [1] * 3},  # it ends for no reason
        {"stop": "context"},
        {"ids": [*b"so ", 261, ord("1"), 262], "mask": [1] * 6},
    ],
    ids=["mask", "result", "after-stop", "short", "reason", "not-forced"],
)
def test_a_sample_against_the_rules_is_seen(change: dict[str, Any]) -> None:
    good = {
        "ids": [*b"so ", 261, ord("1"), 262, 263, ord("1"), 264], "mask": [1] * 6 + [0] * 3, "stop": "max_tokens"
    }  # fmt: skip
    limits = {"prompt": 6, "max_tokens": 9, "context": 100, "raw": False}
    check_sample(good, NAMES, **limits)  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        check_sample(good | change, NAMES, **limits)  # type: ignore[arg-type]
