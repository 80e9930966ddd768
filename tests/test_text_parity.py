"""The runner's text functions against their originals: tiktoken, `bytes.decode`, and `eval` under nanochat's rules.

The C++ functions are reached through `text_driver` (runners/tests/text_driver.cpp), found in the runner's build folder
or by NANOCHAT_X_TEXT_DRIVER. NANOCHAT_X_FUZZ_EXAMPLES sets how many examples Hypothesis tries in each test (100).
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from driver import Driver
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nanochat_rules import nanochat_calculator

ROOT = Path(__file__).resolve().parent.parent
FUZZ = settings(
    max_examples=int(os.environ.get("NANOCHAT_X_FUZZ_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

PATTERNS = {
    "nanochat": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+""",  # noqa: E501
    "gpt4": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",  # noqa: E501
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "lossy": r"(?>\p{L}+)|[^\S\n]{2,}?|[(\-+]+?|(?=\p{N})..|^ | $",  # drops what it does not match
}

SPECIAL = [
    *["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"],
    *["<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"],
]


@pytest.fixture(scope="session")
def text_driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    """The driver, from NANOCHAT_X_TEXT_DRIVER or the build folder."""
    program = os.environ.get("NANOCHAT_X_TEXT_DRIVER")
    driver = Driver(Path(program) if program else request.getfixturevalue("runner_build") / "text_driver")
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def demo_encoding() -> tiktoken.Encoding:
    """The demo model's tokenizer; the pickle is the project's own."""
    encoding = pickle.loads((ROOT / "nanochat_x" / "demo" / "tokenizer" / "tokenizer.pkl").read_bytes())
    assert isinstance(encoding, tiktoken.Encoding)
    return encoding


def portable_json(encoding: tiktoken.Encoding) -> str:
    """tokenizer.json as docs/bundle.md has it."""
    ranks = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.__getitem__)
    return json.dumps(
        {
            "version": 1,
            "pattern": encoding._pat_str,
            "tokens": [base64.b64encode(token).decode() for token in ranks],
            "special_tokens": encoding._special_tokens,
        }
    )


@pytest.fixture(scope="module", params=sorted(PATTERNS))
def loaded(request: pytest.FixtureRequest, demo_encoding: tiktoken.Encoding, text_driver: Driver) -> tiktoken.Encoding:
    """tiktoken's encoding with one of the patterns and the demo's tokens; the driver has loaded the same."""
    encoding = tiktoken.Encoding(
        request.param,
        pat_str=PATTERNS[request.param],
        mergeable_ranks=demo_encoding._mergeable_ranks,
        special_tokens=demo_encoding._special_tokens,
    )
    assert text_driver.ask(op="tokenizer", json=portable_json(encoding)) == {
        "vocab_size": encoding.n_vocab,
        "special": list(range(encoding.n_vocab - 9, encoding.n_vocab)),
    }
    return encoding


# ---- tokenizer ----

#: What branches of the patterns, Unicode's odd ends and engines' disagreements are made of.
MORSELS = [
    *"'sSmMtTdDlLvVrReE ſK\u0130\u0131\t\r\n\v\f\x1c\x1f\x85\xa0\u1680\u180e\u2000\u200b\u2028\u202f\u205f\u3000\ufeff",
    *"0 9²¼٣Ⅷ㊿𝟘一é\u0301\u0345ªʰⓐDžßẞ!?.,;:-_+*/=<>()[]{}@#$%^&|~`\"\\",
    *["'ll", "'VE", "'Re", "'ſ", "don't", "  ", " " * 9, "\n\n", "\r\n", " \n", "\n ", "\t\t", "...", "123", " world"],
    *["👩‍👩‍👧", "🇩🇪", "\U0001f600", "\U00010d4a", "\U000323b0", "\U0002ebf0", "\ue000", "\U0010ffff", "\0"],
    *["<|bos|>", "<|python_end|>", "12345", "x" * 40, "ab" * 30, "!" * 20],
]  # fmt: skip


def check_encoding(driver: Driver, encoding: tiktoken.Encoding, text: str) -> None:
    """The driver gives tiktoken's ids."""
    assert driver.ask(op="encode", text=text) == {"ids": encoding.encode_ordinary(text)}


def test_a_wrong_token_table_is_noticed(text_driver: Driver, demo_encoding: tiktoken.Encoding) -> None:
    """The comparison itself can fail: with two tokens swapped it does."""
    table = json.loads(portable_json(demo_encoding))
    text_driver.ask(op="tokenizer", json=json.dumps(table))
    check_encoding(text_driver, demo_encoding, "see the theme")
    the = table["tokens"].index(base64.b64encode(b" the").decode())
    table["tokens"][the], table["tokens"][300] = table["tokens"][300], table["tokens"][the]
    text_driver.ask(op="tokenizer", json=json.dumps(table))
    with pytest.raises(AssertionError):
        check_encoding(text_driver, demo_encoding, "see the theme")


@FUZZ
@given(st.lists(st.sampled_from(MORSELS) | st.text(max_size=6)).map("".join))
def test_encode_equals_tiktoken(text_driver: Driver, loaded: tiktoken.Encoding, text: str) -> None:
    check_encoding(text_driver, loaded, text)


@FUZZ
@given(st.integers(0, 2**32), st.integers(1, 60))
def test_encode_of_token_sequences_equals_tiktoken(
    text_driver: Driver, loaded: tiktoken.Encoding, seed: int, length: int
) -> None:
    """Text made of the vocabulary's own tokens: many merges, and many that compete."""
    rng = random.Random(seed)
    ids = [rng.randrange(loaded.n_vocab) for _ in range(length)]
    text = loaded.decode(ids)
    assert text_driver.ask(op="decode", ids=ids)["text"] == text
    check_encoding(text_driver, loaded, text)


@pytest.mark.parametrize("seed", range(6))
def test_merges_of_a_random_vocabulary_equal_tiktoken(text_driver: Driver, seed: int) -> None:
    """Ranks in no order that training would give: merges that hinder and outlive each other, tokens never reached."""
    rng = random.Random(seed)
    tokens = {bytes([byte]) for byte in range(256)}
    tokens |= {bytes(rng.choices(b"abc", k=rng.randint(2, 6))) for _ in range(rng.choice([10, 100, 1000]))}
    order = sorted(tokens)
    rng.shuffle(order)
    encoding = tiktoken.Encoding(
        f"random {seed}",
        pat_str=PATTERNS["nanochat"],
        mergeable_ranks={token: rank for rank, token in enumerate(order)},
        special_tokens={name: len(order) + i for i, name in enumerate(SPECIAL)},
    )
    text_driver.ask(op="tokenizer", json=portable_json(encoding))
    for length in [*range(1, 200), 5000]:
        check_encoding(text_driver, encoding, "".join(rng.choices("abc", k=length)))


@pytest.mark.parametrize("context", [" {}a", "'{}1\n"])
def test_every_code_point_splits_as_with_tiktoken(text_driver: Driver, loaded: tiktoken.Encoding, context: str) -> None:
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    # letters and ideographs in bulk add nothing: every one where the classes change, and each sixteenth of the rest
    chosen = [c for i, c in enumerate(characters) if i < 0x3000 or i % 16 == 0 or c.isspace() or c.isnumeric()]
    for start in range(0, len(chosen), 10_000):
        check_encoding(text_driver, loaded, "".join(context.format(c) for c in chosen[start : start + 10_000]))


def test_every_token_decodes(text_driver: Driver, loaded: tiktoken.Encoding) -> None:
    for token in range(loaded.n_vocab):
        answer = text_driver.ask(op="decode", ids=[token])
        assert bytes.fromhex(answer["hex"]) == loaded.decode_single_token_bytes(token)
        assert answer["text"] == loaded.decode([token])


@pytest.mark.parametrize("loaded", ["nanochat", "gpt4", "gpt2"], indirect=True)  # tiktoken gives up on the lossy one
@pytest.mark.parametrize("unit", ["a", "!", "\n", "7", " \n", "ab ", "é", "<|bos|>"])
def test_long_text(text_driver: Driver, loaded: tiktoken.Encoding, unit: str) -> None:
    check_encoding(text_driver, loaded, unit * (200_000 // len(unit)))


def test_long_spaces(text_driver: Driver, demo_encoding: tiktoken.Encoding) -> None:
    """Where tiktoken's engine gives up (StackOverflow, about 300,000 spaces), the ids are those of a shorter text."""
    text_driver.ask(op="tokenizer", json=portable_json(demo_encoding))
    for tail in ("", "x", "\n"):
        short = demo_encoding.encode_ordinary(" " * 100_000 + tail)
        ids = text_driver.ask(op="encode", text=" " * 1_000_000 + tail)["ids"]
        assert text_driver.ask(op="decode", ids=ids)["text"] == " " * 1_000_000 + tail
        assert ids[:1000] == short[:1000]
        assert ids[-3:] == short[-3:]


def test_unicode_tables_are_tiktokens(tmp_path: Path) -> None:
    """The tables that the runner carries; and the check that says so notices a wrong one."""
    script = ROOT / "scripts" / "make_unicode_tables.py"
    subprocess.run([sys.executable, script, "--check"], check=True)
    broken = tmp_path / "unicode_tables.inc"
    tables = (ROOT / "runners" / "src" / "unicode_tables.inc").read_text(encoding="utf-8")
    broken.write_text(tables.replace("{0x00B5, 0x00B5", "{0x00B4, 0x00B5", 1), encoding="utf-8")
    assert subprocess.run([sys.executable, script, "--check", "--output", broken], check=False).returncode == 1


# ---- UTF-8 ----

#: Bytes around every limit of well-formed UTF-8.
EDGE_BYTES = bytes.fromhex("00 41 7f 80 8f 90 9f a0 bf c0 c1 c2 df e0 e1 ec ed ee ef f0 f1 f3 f4 f5 ff")
PARTS = st.binary(max_size=5) | st.lists(st.sampled_from(EDGE_BYTES), max_size=6).map(bytes)


@FUZZ
@given(st.lists(PARTS | st.text(max_size=3).map(str.encode), max_size=6).map(b"".join), st.data())
def test_utf8_equals_python(text_driver: Driver, whole: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    chunks = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    answer = text_driver.ask(op="utf8", chunks=[chunk.hex() for chunk in chunks])
    expected = whole.decode("utf-8", errors="replace")
    assert answer["whole"] == expected
    assert "".join(answer["pushed"]) + answer["end"] == expected
    assert answer["valid"] == (expected.encode() == whole)
    # Nothing is held back that is known: what was pushed so far is all but an unfinished character.
    so_far, pushed = b"", ""
    for chunk, text in zip(chunks, answer["pushed"], strict=True):
        so_far, pushed = so_far + chunk, pushed + text
        replaced = so_far.decode("utf-8", errors="replace")
        assert pushed in (replaced, replaced[:-1])
        if pushed != replaced:
            unfinished = so_far[len(so_far) - min(3, len(so_far)) :]
            assert any(is_start_of_character(unfinished[i:]) for i in range(len(unfinished)))


@FUZZ
@given(st.lists(PARTS | st.text(max_size=2).map(str.encode), max_size=3).map(b"".join))
@example(b"\xf0\x9f\x98")
@example("é😀".encode() + b"\xff")
def test_every_split_of_utf8_gives_the_same(text_driver: Driver, whole: bytes) -> None:
    """All 2^(n-1) ways to cut up to ten bytes; of more bytes, every place of one cut, and every byte by itself."""
    check_splits(text_driver, whole, whole.decode("utf-8", errors="replace"))


def check_splits(driver: Driver, whole: bytes, expected: str) -> None:
    """However the bytes are cut, the stream gives `expected`."""
    answer = driver.ask(op="utf8_splits", hex=whole.hex())
    assert answer == {
        "outcomes": [expected],
        "splits": 2 ** max(0, len(whole) - 1) if len(whole) <= 10 else len(whole) + 1,
    }


def test_a_wrong_split_is_noticed(text_driver: Driver) -> None:
    """The comparison itself can fail."""
    with pytest.raises(AssertionError):
        check_splits(text_driver, b"a\xc3\xa9", "a\ufffd\ufffd")


def is_start_of_character(tail: bytes) -> bool:
    """True if more bytes could make `tail` a character."""
    continuations = (bytes([second]) + b"\x80" * 2 for second in range(0x80, 0xC0, 0x08))
    for more in {c[:n] for c in continuations for n in (1, 2, 3)}:
        try:
            if len((tail + more).decode()) == 1:
                return True
        except UnicodeDecodeError:
            continue
    return False


# ---- calculator ----

INTEGERS = st.integers(0, 99) | st.integers(0, 10**20) | st.integers(0, 1 << 200)
INTEGERS |= st.builds(lambda p, d: max(0, (1 << p) + d), st.integers(0, 1100), st.integers(-2, 2))
LITERALS = (
    INTEGERS.map(str)
    | st.from_regex(r"0{0,2}[0-9]{0,25}\.?[0-9]{0,25}", fullmatch=True)
    | st.builds(lambda zeros, digits: "." + "0" * zeros + str(digits), st.integers(0, 330), st.integers(1, 10**18))
    | st.builds(lambda digits, zeros: f"{digits}{'0' * zeros}.", st.integers(1, 10**17), st.integers(0, 310))
    | st.sampled_from(["()", "...", "9007199254740993", "9223372036854775808", "1,000", "0.1", ".", "00", "1..5", "0."])
)


def extend(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Operations on expressions."""
    space = st.sampled_from(["", "", " "])
    operators = st.sampled_from(["+", "-", "*", "/", "//", "/", "//", "*"])
    return (
        st.tuples(inner, space, operators, space, inner).map("".join)
        | st.tuples(st.just("("), inner, space, st.just(")")).map("".join)
        | st.tuples(st.sampled_from("+-"), space, inner).map("".join)
    )


@FUZZ
@given(st.recursive(LITERALS, extend, max_leaves=12) | st.text("0123456789*+-/.() ,", max_size=12))
@example("0/-5")
@example("-0.0//1")
@example("5//-.0000001")
@example("1" + "0" * 400 + "/1" + "0" * 390)
@example("1" + "0" * 308 + ".*10-" + "1" + "0" * 308 + ".*10")
def test_arithmetic_equals_python(text_driver: Driver, expression: str) -> None:
    assert text_driver.ask(op="calculate", expression=expression) == {"result": nanochat_calculator(expression)}


LIMITS = {
    "parentheses": (lambda n: "(" * n + "1" + ")" * n, 200, 201),
    "busy parentheses": (lambda n: "(" * n + "2" + "-7//2)" * n, 200, 201),
    "signs": (lambda n: "-" * n + "1", 2001, 3001),
    "chain": (lambda n: "1" + "+1" * n, 2001, 3001),
    "signs in parentheses": (lambda n: "(" * 200 + "+" * n + "1" + ")" * 200, 375, 376),
    "parentheses in signs": (lambda n: "-" * n + "(3*" * 199 + "1" + ")" * 199, 403, 404),
    "digits": (lambda n: "9" * n, 4300, 4301),
    "digits of a result": (lambda n: "*".join(["1" + "0" * 99] * 43) + "*" + "1" + "0" * n, 42, 43),
    "zeros": (lambda n: "0" * n, 5000, None),
    "zeros of a float": (lambda n: "0" * n + "1.5", 5000, None),
    "parentheses in count": (lambda n: "'a'.count(" + "(" * n + "'a'" + ")" * n + ")", 199, 200),
}


@pytest.fixture
def default_recursion_limit() -> Iterator[None]:
    """nanochat runs with Python's default; torch raises it in the process of the other tests."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("default_recursion_limit")
@pytest.mark.parametrize(("make", "fits", "too_much"), LIMITS.values(), ids=LIMITS)
def test_limits_are_python_3_11s(text_driver: Driver, make: Any, fits: int, too_much: int | None) -> None:
    """Just within and just beyond what CPython 3.11 takes (clearly within and beyond in the depth of the syntax tree,
    which depends on the caller's own depth). Other versions have other limits, so only 3.11 is asked."""
    result = text_driver.ask(op="calculate", expression=make(fits))["result"]
    assert result is not None
    if sys.version_info[:2] == (3, 11):
        assert result == nanochat_calculator(make(fits))
    if too_much is not None:
        assert text_driver.ask(op="calculate", expression=make(too_much)) == {"result": None}
        if sys.version_info[:2] == (3, 11):
            assert nanochat_calculator(make(too_much)) is None


#: What expressions with `.count(` are made of, and what does not belong there.
WORDS = [
    *["'", '"', "'''", "''", "'banana'", '"a"', "a", "an", "r", "f", "u", "b", "Rf", "fr", " ", ".", "1", "_"],
    *["(", ")", ".count(", ".count", "'a'.count('a')", "upper()", "in", "or", "file", "eval", ",", "None", "é", "+"],
]  # fmt: skip
QUOTED = st.builds(
    lambda prefix, quote, text: prefix + quote + text + quote,
    st.sampled_from(["", "", "", "r", "u", "F", "fr", "b", "ur"]),
    st.sampled_from(["'", '"', "'''", '"""']),
    st.text("ab anc_.,0'\"", max_size=8),
)
TEXTS = st.recursive(QUOTED, lambda t: st.tuples(t, t).map(" ".join) | t.map("({})".format), max_leaves=3)


@FUZZ
@given(st.builds("{}.count({})".format, TEXTS, TEXTS) | st.lists(st.sampled_from(WORDS), max_size=12).map("".join))
@example("'banana'.count('an')")
@example("'profile'.count('e')")
@example("('.count(')")
@example("'aaa' .count ( 'aa' 'a' ) + 'a'.count('')")
def test_count_equals_python(text_driver: Driver, expression: str) -> None:
    assert text_driver.ask(op="calculate", expression=expression) == {"result": nanochat_calculator(expression)}
