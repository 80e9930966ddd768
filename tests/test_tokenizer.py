"""Reading tokenizer.pkl without running it: equal to what tiktoken reads, and nothing else gets through."""

from __future__ import annotations

import base64
import io
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_x.errors import TokenizerError
from nanochat_x.find import DEMO_FOLDER
from nanochat_x.tokenizer import SPECIAL_TOKENS, read_tokenizer

DEMO = DEMO_FOLDER / "tokenizer"
SMALL = Path(__file__).parent / "data/generations/2026-07-smear/tokenizer"


def encoding(
    ranks: dict[Any, Any] | None = None, special_tokens: dict[str, int] | None = None, pattern: str = r"\S+|\s+"
) -> tiktoken.Encoding:
    """A small vocabulary of nanochat's form: the bytes, one merge, the nine special tokens."""
    if ranks is None:
        ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256}
    if special_tokens is None:
        special_tokens = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("rustbpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


class State:
    """Pickles as a tiktoken.Encoding with whatever state; tiktoken itself refuses to make most of them."""

    def __init__(self, state: object) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (tiktoken.Encoding,), self.state


def pickle_of_state(state: object) -> bytes:
    """NEWOBJ and BUILD, as pickle writes an Encoding."""
    body = pickle.dumps(state, protocol=3)[2:-1]
    return b"\x80\x03ctiktoken.core\nEncoding\n)\x81" + body + b"b."


def good_state() -> dict[str, Any]:
    state = encoding().__getstate__()
    assert isinstance(state, dict)
    return state


def write(folder: Path, data: bytes) -> Path:
    (folder / "tokenizer.pkl").write_bytes(data)
    return folder


def refused(folder: Path, match: str) -> str:
    with pytest.raises(TokenizerError, match=match) as caught:
        read_tokenizer(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("folder", [DEMO, SMALL], ids=["demo", "small"])
def test_equals_what_tiktoken_unpickles(folder: Path) -> None:
    with (folder / "tokenizer.pkl").open("rb") as file:
        theirs = pickle.load(file)
    ours = read_tokenizer(folder)
    assert ours.vocab_size == theirs.n_vocab
    assert ours.pattern == theirs._pat_str
    assert [theirs.decode_single_token_bytes(i) for i in range(len(ours.tokens))] == list(ours.tokens)
    assert ours.special_tokens == {name: theirs.encode_single_token(name) for name in SPECIAL_TOKENS}
    assert list(ours.special_tokens.values()) == list(range(len(ours.tokens), ours.vocab_size))
    assert ours.token_bytes is not None
    assert list(ours.token_bytes) == torch.load(folder / "token_bytes.pt", weights_only=True).tolist()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_every_protocol_that_knows_bytes(tmp_path: Path, protocol: int) -> None:
    tokenizer = read_tokenizer(write(tmp_path, pickle.dumps(encoding(), protocol=protocol)))
    assert tokenizer.tokens == (*(bytes([byte]) for byte in range(256)), b"th")
    assert tokenizer.pattern == r"\S+|\s+"
    assert tokenizer.special_tokens["<|output_end|>"] == 265
    assert tokenizer.token_bytes is None


def test_portable_json_as_docs_bundle_md_has_it() -> None:
    tokenizer = read_tokenizer(DEMO)
    portable = json.loads(tokenizer.to_portable_json())
    assert list(portable) == ["version", "pattern", "tokens", "special_tokens", "token_bytes"]
    assert portable["version"] == 1
    assert portable["pattern"].startswith("'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}{1,2}|")
    assert portable["tokens"][:2] == ["AA==", "AQ=="]
    assert [base64.b64decode(token) for token in portable["tokens"]] == list(tokenizer.tokens)
    assert portable["special_tokens"]["<|bos|>"] == 2039
    assert portable["token_bytes"] == torch.load(DEMO / "token_bytes.pt", weights_only=True).tolist()


def test_token_bytes_without_their_file_are_what_it_would_hold(tmp_path: Path) -> None:
    shutil.copy(DEMO / "tokenizer.pkl", tmp_path)
    alone = read_tokenizer(tmp_path)
    assert alone.token_bytes is None
    assert list(alone.counted_bytes()) == torch.load(DEMO / "token_bytes.pt", weights_only=True).tolist()


def test_reading_does_not_import_tiktoken() -> None:
    program = (
        "import sys; from pathlib import Path; from nanochat_x.tokenizer import read_tokenizer;"
        f"read_tokenizer(Path({str(DEMO)!r})); print('tiktoken' in sys.modules)"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


# Pickles that want to run something


class Call:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in the state"])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, protocol: int, inside: bool) -> None:
    sentinel = tmp_path / "ran"
    evil = Call(open, str(sentinel), "w")
    if inside and protocol < 3:  # bytes need a call themselves in these protocols, which is refused first
        data = pickle.dumps({"name": evil}, protocol=protocol)
    elif inside:
        state = good_state()
        state["special_tokens"] = {"<|bos|>": evil}
        out = io.BytesIO()
        pickle.Pickler(out, protocol=protocol).dump(state)
        data = out.getvalue()
    else:
        data = pickle.dumps(evil, protocol=protocol)
    message = refused(write(tmp_path, data), "nothing of it was run")
    assert "REDUCE" in message or "opcode" in message
    assert not sentinel.exists()
    pickle.loads(data)  # the same bytes do run there: this test can fail
    assert sentinel.exists()


def test_the_message_names_what_a_pickle_would_have_called(tmp_path: Path) -> None:
    refused(write(tmp_path, pickle.dumps(Call(print, "hello"))), r"opcode (TUPLE1|REDUCE) on 'builtins.print'")
    refused(write(tmp_path, b"cos\nsystem\n(S'true'\ntR."), r"opcode STRING on 'os.system'")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04cos\nsystem\n)\x81.", "it names os.system"),  # NEWOBJ of a function
        (b"\x80\x04cos\nsystem\n.", "it names os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "it names os.system"),
        (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93.", "it names os.system"),  # names from the memo
        (b"\x80\x04ctiktoken.core\nEncoding\n.", "holds a type, not a tiktoken.Encoding"),
        (b"\x80\x04ctiktoken.core\nEncoding\n}b.", "not a tokenizer of nanochat's"),  # BUILD on the class itself
        (b"\x80\x04ctiktoken.core\nEncoding.__setstate__\n.", "it names tiktoken.core.Encoding.__setstate__"),
        (b"\x80\x04ctiktoken.core\nEncoding\n)\x81.", "its state is not the dict"),
        (b"\x80\x04}.", "holds a dict, not a tiktoken.Encoding"),
        (b"\x80\x04\x82\x01.", "opcode EXT1"),
        (b"\x80\x04Pname\n.", "opcode PERSID"),
        (b"\x80\x04b.", "not a tokenizer of nanochat's"),  # BUILD on an empty stack
        (b"\x80\x04h\x05.", "not a tokenizer of nanochat's"),  # a memo that is not there
        (b"\x80\x04}.}.", "more bytes after the pickle's end"),
        (b"", "cut short or damaged"),
        (b"\x80\x04", "cut short or damaged"),
        (b"\xff", "cut short or damaged"),
        (b"hello", "cut short or damaged|opcode"),
    ],
)
def test_crafted_pickles(tmp_path: Path, data: bytes, message: str) -> None:
    refused(write(tmp_path, data), message)


def test_a_small_pickle_takes_no_gigabytes(tmp_path: Path) -> None:
    """pickle's memo is an array: one number near 2^32 makes it take 64 GB."""
    refused(write(tmp_path, b"\x80\x04}r\xf0\xff\xff\x7f."), "memo number 2147483632 at byte 3 is absurd")
    refused(write(tmp_path, b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x."), "cut short|opcode BINBYTES8")


@settings(max_examples=150)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")  # pickletools', of damaged bytes
def test_a_damaged_tokenizer_is_refused_or_still_one(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    spoiled = bytearray((SMALL / "tokenizer.pkl").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        spoiled[data.draw(st.integers(0, len(spoiled) - 1))] = data.draw(st.integers(0, 255))
    folder = write(tmp_path_factory.mktemp("tokenizer"), bytes(spoiled))
    try:
        tokenizer = read_tokenizer(folder)
    except TokenizerError as error:
        message = str(error)
    else:
        assert tokenizer.vocab_size == 272
        assert set(tokenizer.tokens) >= {bytes([byte]) for byte in range(256)}
        message = "read"
    assert message.isprintable()


@given(length=st.integers(0, 2004))
def test_a_tokenizer_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    whole = (SMALL / "tokenizer.pkl").read_bytes()
    assert len(whole) == 2006
    refused(write(tmp_path_factory.mktemp("tokenizer"), whole[:length]), "cut short or damaged")


# Pickles of something other than nanochat's tokenizer


def ranks_with(change: Callable[[dict[Any, Any]], object]) -> dict[Any, Any]:
    ranks: dict[Any, Any] = dict(good_state()["mergeable_ranks"])
    change(ranks)
    return ranks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mergeable_ranks": []}, "opcode EMPTY_LIST|not a dict of byte strings"),
        ({"mergeable_ranks": {}}, "256 of the 256 bytes are no token"),
        ({"mergeable_ranks": ranks_with(lambda r: r.update({"th": 256}))}, "not a dict of byte strings"),
        ({"mergeable_ranks": ranks_with(lambda r: r.update({b"": 257}))}, "not a dict of byte strings"),
        ({"mergeable_ranks": ranks_with(lambda r: r.update({b"he": 256}))}, "ranks of mergeable_ranks are not 0, 1, 2"),
        ({"mergeable_ranks": ranks_with(lambda r: r.update({b"he": 258}))}, "ranks of mergeable_ranks are not 0, 1, 2"),
        ({"mergeable_ranks": ranks_with(lambda r: r.update({b"he": -1}))}, "ranks of mergeable_ranks are not 0, 1, 2"),
        (
            {"mergeable_ranks": ranks_with(lambda r: r.update({b"he": "257"}))},
            "ranks of mergeable_ranks are not 0, 1, 2",
        ),
        (
            {"mergeable_ranks": ranks_with(lambda r: r.update({b"ab": r.pop(b"q")}))},
            "1 of the 256 bytes are no token, 0x71 the first",
        ),
        ({"special_tokens": {}}, "special tokens are not nanochat's nine"),
        ({"special_tokens": {name: 257 + i for i, name in enumerate(SPECIAL_TOKENS[1:])}}, "are not nanochat's nine"),
        (
            {"special_tokens": {name: 258 + i for i, name in enumerate(SPECIAL_TOKENS)}},
            "ids of the special tokens are not 257 to 265",
        ),
        ({"special_tokens": dict.fromkeys(SPECIAL_TOKENS, 257)}, "ids of the special tokens are not 257 to 265"),
        ({"special_tokens": dict.fromkeys(SPECIAL_TOKENS, "257")}, "ids of the special tokens are not 257 to 265"),
        ({"pat_str": ""}, "pat_str is not a pattern"),
        ({"pat_str": b"x"}, "pat_str is not a pattern"),
        ({"pat_str": "x" * 10_001}, "pat_str is not a pattern"),
        ({"pat_str": "\ud800"}, "pat_str is not a pattern"),
        ({"explicit_n_vocab": 3}, "its state is not the dict of mergeable_ranks, name, pat_str, special_tokens"),
    ],
)
def test_states_that_are_no_tokenizer(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert read_tokenizer(write(tmp_path, pickle_of_state(good_state()))).vocab_size == 266
    refused(write(tmp_path, pickle_of_state(good_state() | change)), message)


def test_a_state_that_is_a_registered_name(tmp_path: Path) -> None:
    """tiktoken pickles its own encodings by name and would download them when unpickled."""
    refused(write(tmp_path, pickle_of_state("gpt2")), "its state is not the dict")


def test_no_file_and_a_folder_in_its_place(tmp_path: Path) -> None:
    refused(tmp_path, r"no tokenizer.pkl in .*; name the folder that holds it with --tokenizer DIR")
    (tmp_path / "tokenizer.pkl").mkdir()
    refused(tmp_path, "tokenizer.pkl: cannot be read")


# token_bytes.pt


def with_token_bytes(tmp_path: Path, value: object) -> Path:
    write(tmp_path, pickle_of_state(good_state()))
    torch.save(value, tmp_path / "token_bytes.pt")
    return tmp_path


def test_token_bytes_of_raw_bytes_and_of_decoded_text(tmp_path: Path) -> None:
    raw = [1] * 256 + [2] + [0] * 9
    assert read_tokenizer(with_token_bytes(tmp_path, torch.tensor(raw, dtype=torch.int32))).token_bytes == tuple(raw)
    # Half a character decodes to U+FFFD, which is three bytes long: how nanochat's own script counts.
    decoded = [1] * 128 + [3] * 128 + [2] + [0] * 9
    folder = with_token_bytes(tmp_path, torch.tensor(decoded, dtype=torch.int32))
    assert read_tokenizer(folder).token_bytes == tuple(decoded)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            torch.tensor([1] * 256 + [2] + [0] * 8, dtype=torch.int32),
            "not an int32 tensor of the tokenizer's 266 tokens",
        ),
        (torch.tensor([1] * 256 + [2] + [0] * 9), "not an int32 tensor"),
        ([1, 2, 3], "not an int32 tensor"),
        (torch.tensor([1] * 256 + [3] + [0] * 9, dtype=torch.int32), "says 3 bytes for token 256, which has 2"),
        (torch.tensor([1] * 256 + [2] + [1] * 9, dtype=torch.int32), "says 1 bytes for token 257, which has 0"),
    ],
)
def test_token_bytes_that_do_not_fit(tmp_path: Path, value: object, message: str) -> None:
    assert "token_bytes.pt" in refused(with_token_bytes(tmp_path, value), message)


def test_token_bytes_run_nothing(tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    refused(with_token_bytes(tmp_path, Call(open, str(sentinel), "w")), "token_bytes.pt: holds something other than")
    assert not sentinel.exists()
    with zipfile.ZipFile(tmp_path / "token_bytes.pt") as archive:
        pickle.loads(archive.read("token_bytes/data.pkl"))
    assert sentinel.exists()
