"""A Hugging Face tokenizer.json as nanochat's tokenizer, where the two encode every text alike.

tokenizer.json lists merges in the order in which they are tried; nanochat (tiktoken) has no list, it merges any two
neighbours that make a token, the lowest id first. The two agree on every text if

- the ids of what the merges make never fall along the list, and
- the merges make each token out of its own bytes.

For suppose that they agree up to a token's id and then two neighbours make that token by no listed merge. What they
are came of the token's own bytes alone, by the merges before it; then the list can never make the token of its bytes.
So both are checked, and a tokenizer that fails is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nanochat_x.errors import TokenizerError
from nanochat_x.hf_config import read_json_object
from nanochat_x.quoting import quoted
from nanochat_x.tokenizer import SPECIAL_TOKENS, TokenizerData

#: Split patterns that all regular expression engines here read alike: nanochat's own, by the digits that a piece holds.
PATTERNS = tuple(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,"
    + digits
    + r"}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    for digits in "23"
)

_LARGEST_FILE = 64 << 20  # bytes; nanochat's 65,536 tokens take about 5 MB
_LONGEST_TOKEN = 1024  # bytes; a trained one has at most some dozens
_REMEDY = "nanochat_x reads tokenizers that transformers' conversion makes of nanochat's; docs/hf.md says which"


def read_hf_tokenizer(folder: Path) -> TokenizerData:
    """Reads tokenizer.json, and what tokenizer_config.json changes of it.

    Raises TokenizerError, naming the part, for a tokenizer that does not encode as nanochat's does.
    """
    path = folder / "tokenizer.json"
    data = read_json_object(path, TokenizerError, _LARGEST_FILE, _REMEDY)
    _check_config(folder / "tokenizer_config.json")
    known = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor"}
    _refuse_unknown(path, "", data, known | {"decoder", "model"})
    if data.get("normalizer") is not None:
        raise _malformed(path, "normalizer changes the text before it is split; only null is known")
    # What is put around a text (post_processor), cut or filled up plays no part: the runner does that by itself.
    _check_kind(path, "decoder", data.get("decoder"), "ByteLevel")
    pattern = _pattern(path, data.get("pre_tokenizer"))
    special = _special_tokens(path, data.get("added_tokens"))
    model = data.get("model")
    _check_kind(path, "model", model, "BPE")
    assert isinstance(model, dict)
    tokens = _tokens(path, model, special)
    ids = range(len(tokens), len(tokens) + len(SPECIAL_TOKENS))
    if sorted(special.values()) != list(ids):
        raise _malformed(path, f"the ids of the special tokens are not {ids.start} to {ids.stop - 1}")
    _check_merges(path, model.get("merges"), tokens)
    in_order = dict(sorted(special.items(), key=lambda item: item[1]))
    return TokenizerData(pattern=pattern, tokens=tokens, special_tokens=in_order, token_bytes=None)


def _check_config(path: Path) -> None:
    if path.exists() and read_json_object(path, TokenizerError, _LARGEST_FILE, _REMEDY).get("add_prefix_space"):
        raise _malformed(path, "add_prefix_space puts a space before each text; nanochat does not")


def _refuse_unknown(path: Path, place: str, part: Mapping[str, object], known: set[str]) -> None:
    if unknown := sorted(set(part) - known):
        raise _malformed(path, f"{place}{quoted(unknown[0])} is not known, and could mean another tokenizer")


def _check_kind(path: Path, name: str, part: object, kind: str) -> None:
    if not isinstance(part, dict) or part.get("type") != kind:
        found = part.get("type") if isinstance(part, dict) else part
        raise _malformed(path, f"{name} is {quoted(found, 40)}, not {kind}")


def _pattern(path: Path, part: object) -> str:
    """The pattern of Sequence [Split by the pattern, ByteLevel that splits no further]."""
    _check_kind(path, "pre_tokenizer", part, "Sequence")
    assert isinstance(part, dict)
    steps = part.get("pretokenizers")
    if not isinstance(steps, list) or len(steps) != 2:
        raise _malformed(path, "pre_tokenizer is not a Split and then a ByteLevel")
    split, byte_level = steps
    _check_kind(path, "pre_tokenizer 1", split, "Split")
    _check_kind(path, "pre_tokenizer 2", byte_level, "ByteLevel")
    if split.get("behavior") != "Isolated" or split.get("invert") is not False:
        raise _malformed(path, "pre_tokenizer Split does not keep pieces and gaps (behavior Isolated, invert false)")
    if byte_level.get("add_prefix_space") is not False or byte_level.get("use_regex") is not False:
        raise _malformed(path, "pre_tokenizer ByteLevel has add_prefix_space or use_regex, which nanochat has not")
    given = split.get("pattern")
    pattern = given.get("Regex") if isinstance(given, dict) else None
    if pattern not in PATTERNS:
        raise _malformed(path, f"the split pattern {quoted(pattern, 60)} is not one of nanochat's")
    return str(pattern)


def _special_tokens(path: Path, added: object) -> dict[str, int]:
    special: dict[str, int] = {}
    for entry in added if isinstance(added, list) else []:
        name, number = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or type(number) is not int or name in special:
            raise _malformed(path, f"added_tokens has {quoted(name, 40)} with id {quoted(number, 20)}")
        special[name] = number
    if set(special) != set(SPECIAL_TOKENS):
        odd = sorted(set(special) ^ set(SPECIAL_TOKENS))[0]
        raise _malformed(path, f"added_tokens are not nanochat's nine special tokens ({quoted(odd, 40)})")
    return special


def _tokens(path: Path, model: Mapping[str, object], special: Mapping[str, int]) -> tuple[bytes, ...]:
    """The bytes of each mergeable token, by id."""
    # Harmless here whatever they say: every byte is a token, and every token is what its own bytes become.
    harmless = {"byte_fallback", "fuse_unk", "ignore_merges", "unk_token"}
    _refuse_unknown(
        path, "model.", model,
        {"type", "vocab", "merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix"} | harmless,
    )  # fmt: skip
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _malformed(path, f"model.{key} is {quoted(model[key], 40)}; only null is known")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        raise _malformed(path, "model.vocab is no object")
    # Some writers list the special tokens here too.
    mergeable = {text: number for text, number in vocab.items() if special.get(text, -1) != number}
    if any(type(number) is not int for number in mergeable.values()):
        raise _malformed(path, "model.vocab has an id that is no integer")
    if sorted(mergeable.values()) != list(range(len(mergeable))):
        raise _malformed(path, "the ids of model.vocab are not 0, 1, 2, ... without a gap")
    tokens = tuple(_bytes(path, text) for text in sorted(mergeable, key=mergeable.__getitem__))
    lacking = set(range(256)) - {token[0] for token in tokens if len(token) == 1}
    if lacking:
        raise _malformed(path, f"{len(lacking)} of the 256 bytes are no token, {min(lacking):#04x} the first")
    return tokens


def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 stands for itself, the rest for U+0100 and on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


def _bytes(path: Path, text: str) -> bytes:
    if not 0 < len(text) <= _LONGEST_TOKEN or not all(char in _BYTE_OF for char in text):
        raise _malformed(path, f"model.vocab has {quoted(repr(text), 40)}, which is not of GPT-2's byte characters")
    return bytes(_BYTE_OF[char] for char in text)


def _check_merges(path: Path, merges: object, tokens: tuple[bytes, ...]) -> None:
    """The two conditions above, and that each merge is of two tokens to a third."""
    ids = {token: number for number, token in enumerate(tokens)}
    listed: set[tuple[bytes, bytes]] = set()
    last = 0
    for entry in merges if isinstance(merges, list) else []:
        pair = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise _malformed(path, f"model.merges has {quoted(entry, 40)}, which is not a pair")
        left, right = (_bytes(path, part) for part in pair)
        made = ids.get(left + right)
        if left not in ids or right not in ids or made is None:
            raise _malformed(path, f"merge {quoted(pair, 60)} is not of two tokens to a third")
        if made < last:
            raise _malformed(path, f"merge {quoted(pair, 60)} makes id {made} after id {last}: not in the ids' order")
        last = made
        listed.add((left, right))
    for number, token in enumerate(tokens):
        if len(token) > 1 and _last_pair(token, number, ids) not in listed:
            raise _malformed(path, f"no merge makes token {number} ({quoted(repr(token), 60)}) of its own bytes")


def _last_pair(token: bytes, number: int, ids: Mapping[bytes, int]) -> tuple[bytes, ...]:
    """What a token's bytes become by the merges that make ids below `number`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        lowest, at = number, -1
        for i in range(len(parts) - 1):
            if (made := ids.get(parts[i] + parts[i + 1], number)) < lowest:
                lowest, at = made, i
        if at < 0:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


def _malformed(path: Path, what: str) -> TokenizerError:
    return TokenizerError(f"{path}: {what}", remedy=_REMEDY)
