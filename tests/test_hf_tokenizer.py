"""tokenizer.json of a Hugging Face folder: taken where it encodes as nanochat's tokenizer does, else refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanochat_x.errors import TokenizerError
from nanochat_x.find import DEMO_FOLDER
from nanochat_x.hf_tokenizer import PATTERNS, _byte_characters, read_hf_tokenizer
from nanochat_x.synthetic_tokenizer import PATTERN
from nanochat_x.tokenizer import SPECIAL_TOKENS, read_tokenizer

FOLDER = Path(__file__).parent / "data" / "hf-nanochat"
BYTES = tuple(bytes([byte]) for byte in range(256))

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tokenizer's files, to be spoiled."""
    (tmp_path / "model").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, tmp_path / "model")
    return tmp_path / "model"


def edit_json(path: Path, change: Change) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def refused(folder: Path, match: str) -> None:
    with pytest.raises(TokenizerError, match=match) as caught:
        read_hf_tokenizer(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_the_tokenizer_of_the_conversion() -> None:
    """tokenizer.json of transformers' conversion: the tokens, by hand from its vocabulary."""
    tokenizer = read_hf_tokenizer(FOLDER)
    assert tokenizer.pattern == PATTERN
    assert tokenizer.tokens[:256] == tuple(bytes([byte]) for byte in range(256))
    assert {b" the", b" rain", b"plain"} <= set(tokenizer.tokens)
    assert tokenizer.special_tokens == {name: 302 + i for i, name in enumerate(SPECIAL_TOKENS)}
    assert len(tokenizer.tokens) == 302
    assert PATTERN in PATTERNS


def hf_form(tokens: tuple[bytes, ...], merges: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    """A tokenizer.json around these tokens."""
    char = {byte: char for char, byte in _byte_characters().items()}
    data: dict[str, Any] = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))

    def text(token: bytes) -> str:
        return "".join(char[byte] for byte in token)

    data["model"]["vocab"] = {text(token): number for number, token in enumerate(tokens)}
    data["model"]["merges"] = [[text(left), text(right)] for left, right in merges]
    for i, entry in enumerate(data["added_tokens"]):
        entry["id"] = len(tokens) + i
    return data


def all_splits(tokens: tuple[bytes, ...]) -> list[tuple[bytes, bytes]]:
    """Every way to make each token of two, in the tokens' order: what transformers' conversion lists."""
    known = set(tokens)
    return [
        (token[:i], token[i:])
        for token in tokens
        for i in range(1, len(token))
        if token[:i] in known and token[i:] in known
    ]


def test_nanochats_own_tokenizer_survives(folder: Path) -> None:
    """The demo's vocabulary, trained by nanochat, in the form of the conversion: the same tokenizer comes back."""
    ours = read_tokenizer(DEMO_FOLDER / "tokenizer")
    merges = all_splits(ours.tokens)
    assert len(merges) > len(ours.tokens), "some tokens are made in several ways"
    (folder / "tokenizer.json").write_text(json.dumps(hf_form(ours.tokens, merges)))
    theirs = read_hf_tokenizer(folder)
    assert (theirs.pattern, theirs.tokens, theirs.special_tokens) == (ours.pattern, ours.tokens, ours.special_tokens)


@pytest.mark.parametrize(
    ("tokens", "merges", "message"),
    [
        ((b"ab",), [(b"a", b"b")], ""),
        ((b"ab", b"abc"), [(b"a", b"b"), (b"ab", b"c")], ""),
        ((b"ab", b"cd"), [(b"c", b"d"), (b"a", b"b")], "makes id 256 after id 257: not in the ids' order"),
        ((b"ab", b"abc"), [(b"a", b"b")], "no merge makes token 257 .*abc.* of its own bytes"),
        # "bc" comes first, so "abc" becomes a, bc: a list without that pair never makes the token
        ((b"bc", b"ab", b"abc"), [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")], "no merge makes token 258"),
        ((b"bc", b"ab", b"abc"), [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c"), (b"a", b"bc")], ""),
        ((b"abcd",), [], "no merge makes token 256"),
        ((b"ab",), [(b"a", b"b"), (b"a", b"c")], "is not of two tokens to a third"),
        ((b"abc",), [(b"ab", b"c")], "is not of two tokens to a third"),
    ],
)
def test_merges(tokens: tuple[bytes, ...], merges: list[tuple[bytes, bytes]], message: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(hf_form(BYTES + tokens, merges)))
    if not message:
        assert read_hf_tokenizer(folder).tokens == BYTES + tokens
        return
    refused(folder, message)


def set_pattern(pattern: object) -> Change:
    return lambda data: data["pre_tokenizer"]["pretokenizers"][0].update(pattern=pattern)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(normalizer={"type": "NFC"}), "normalizer changes the text"),
        (lambda t: t.update(decoder=None), "decoder is None, not ByteLevel"),
        (lambda t: t["model"].update(type="Unigram"), "model is Unigram, not BPE"),
        (lambda t: t.update(surprise=1), "surprise is not known"),
        (lambda t: t["model"].update(surprise=1), "model.surprise is not known"),
        (lambda t: t["model"].update(dropout=0.1), "model.dropout is 0.1"),
        (lambda t: t["model"].update(end_of_word_suffix="</w>"), "model.end_of_word_suffix is </w>"),
        (lambda t: t.update(pre_tokenizer={"type": "ByteLevel"}), "pre_tokenizer is ByteLevel, not Sequence"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"].pop(), "not a Split and then a ByteLevel"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "does not keep pieces and gaps"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True), "ByteLevel has add_prefix_space or"),
        (set_pattern({"Regex": r"\w+"}), r"the split pattern \\w\+ is not one of nanochat's"),
        (set_pattern({"String": " "}), "the split pattern None is not one of nanochat's"),
        (lambda t: t["added_tokens"].pop(), r"nanochat's nine special tokens \(<\|output_end\|>\)"),
        (lambda t: t["added_tokens"][0].update(content="<s>"), r"nine special tokens \(<s>\)"),
        (lambda t: t["added_tokens"][0].update(id=0), "ids of the special tokens are not 302 to 310"),
        (lambda t: t["added_tokens"][0].update(id=True), r"added_tokens has <\|bos\|> with id True"),
        (lambda t: t["model"]["vocab"].update(zz=5), "ids of model.vocab are not 0, 1, 2"),
        (lambda t: t["model"]["vocab"].update(zz="5"), "an id that is no integer"),
        (lambda t: t["model"]["vocab"].update({"\u4e16": 302}), "which is not of GPT-2's byte characters"),
        (lambda t: t["model"]["vocab"].update({"z" * 2000: 302}), "zzz.*, which is not of GPT-2's byte"),
        (lambda t: t["model"]["merges"].append(["a"]), "which is not a pair"),
        (lambda t: t["model"].update(merges=None), "no merge makes token 256"),
        (lambda t: t["model"]["vocab"].update(aqz=t["model"]["vocab"].pop("A")), "1 of the 256 bytes are no token"),
    ],
)
def test_a_tokenizer_that_is_not_nanochats(change: Change, message: str, folder: Path) -> None:
    edit_json(folder / "tokenizer.json", change)
    refused(folder, message)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["model"].update(merges=[" ".join(pair) for pair in t["model"]["merges"]]),  # of older versions
        lambda t: t["model"]["vocab"].update({entry["content"]: entry["id"] for entry in t["added_tokens"]}),
        lambda t: t["model"].update(byte_fallback=True, ignore_merges=False),
        lambda t: t.update(post_processor=None),
    ],
    ids=["merges-as-text", "special-in-vocab", "flags", "no-post-processor"],
)
def test_a_tokenizer_that_means_the_same(change: Change, folder: Path) -> None:
    edit_json(folder / "tokenizer.json", change)
    assert read_hf_tokenizer(folder) == read_hf_tokenizer(FOLDER)


def test_a_space_before_each_text(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(add_prefix_space=True))
    refused(folder, "tokenizer_config.json: add_prefix_space")
    (folder / "tokenizer_config.json").unlink()
    assert read_hf_tokenizer(folder) == read_hf_tokenizer(FOLDER)
