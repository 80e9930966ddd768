"""`eval`: bits per byte by the C++ runner, against torch's cross-entropy on the model's own logits, on every target."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from bundles import replace_file, run_cli
from models import GENERATIONS, exact_logits
from safetensors.torch import load, save

from nanochat_x.build import PROGRAMS
from nanochat_x.find import DEMO_FOLDER
from nanochat_x.runner import Runner
from nanochat_x.tokenizer import read_tokenizer

NAME = "2026-07-smear"
CONTEXT = 256  # `sequence_len` of the tiny model
TOLERANCE = 2e-5  # bits per byte: a logit's float32 rounding
#: Ours; of lengths on both sides of a piece of 128 and of the context, and with characters that are cut into tokens.
DOCS = [
    "A small boat leaves the harbour at dawn.",
    "",
    "Zoë counts: 1, 22, 333; naïve – 世界 🙂 " * 3,
    "one two three four five six seven eight nine ten. " * 40,
    "x",
]


@dataclass(frozen=True)
class Sums:
    """What bits per byte are made of."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / (math.log(2) * self.bytes)


def encoding_of(folder: Path) -> tuple[tiktoken.Encoding, torch.Tensor]:
    """nanochat's own tokenizer by tiktoken, and its token_bytes.pt."""
    data = read_tokenizer(folder)
    ranks = {token: rank for rank, token in enumerate(data.tokens)}
    encoding = tiktoken.Encoding("t", pat_str=data.pattern, mergeable_ranks=ranks, special_tokens=data.special_tokens)
    return encoding, torch.load(folder / "token_bytes.pt", weights_only=True)


def expected(docs: Sequence[str], context: int, *, whole: bool) -> Sums:
    """nanochat's formula in float64: the oracle's logits, torch's cross-entropy, tiktoken's tokens."""
    encoding, token_bytes = encoding_of(GENERATIONS / NAME / "tokenizer")
    bos = encoding.encode_single_token("<|bos|>")
    nats, tokens, count = 0.0, 0, 0
    for doc in docs:
        ids = encoding.encode_ordinary(doc)
        for begin in range(0, len(ids), context)[: None if whole else 1]:
            targets = torch.tensor(ids[begin : begin + context])
            inputs = torch.cat([torch.tensor([bos]), targets[:-1]])
            losses = F.cross_entropy(exact_logits(NAME, inputs[None])[0], targets, reduction="none")
            kept = token_bytes[targets] > 0
            nats += float(losses[kept].sum())
            tokens += int(kept.sum())
            count += int(token_bytes[targets].sum())
    return Sums(nats, tokens, count)


def check(answer: dict[str, Any], want: Sums, documents: int) -> None:
    """The JSON line has these figures, and no others."""
    assert list(answer) == ["bits_per_byte", "perplexity", "nats_per_token", "documents", "tokens", "bytes", "seconds",
                            "tokens_per_second"]  # fmt: skip
    assert (answer["documents"], answer["tokens"], answer["bytes"]) == (documents, want.tokens, want.bytes)
    assert answer["bits_per_byte"] == pytest.approx(want.bits_per_byte, abs=TOLERANCE)
    assert answer["nats_per_token"] == pytest.approx(want.nats / want.tokens, abs=TOLERANCE)
    assert answer["perplexity"] == pytest.approx(math.exp(want.nats / want.tokens), rel=TOLERANCE)
    assert answer["seconds"] > 0
    assert answer["tokens_per_second"] == pytest.approx(want.tokens / answer["seconds"])


@pytest.fixture
def docs_file(tmp_path: Path) -> Path:
    file = tmp_path / "docs.json"
    file.write_text(json.dumps(DOCS), encoding="utf-8")
    return file


@pytest.mark.parametrize("target", PROGRAMS)
def test_documents(target: str, lowered: Callable[..., Path], docs_file: Path) -> None:
    answer = Runner(lowered(NAME, target)).json("eval", f"--docs={docs_file}", "--json")
    check(answer, expected(DOCS, CONTEXT, whole=False), len(DOCS))


def test_the_documents_cross_a_piece_and_a_window() -> None:
    """What is cut off would be seen, and so would a mistake at a piece's border."""
    encoding, _ = encoding_of(GENERATIONS / NAME / "tokenizer")
    assert max(len(encoding.encode_ordinary(doc)) for doc in DOCS) > CONTEXT > 128
    assert expected(DOCS, CONTEXT, whole=False) != expected(DOCS, CONTEXT, whole=True)
    assert Sums(1.0, 1, 1).bits_per_byte == pytest.approx(1.4426950408889634)


@pytest.mark.parametrize("context", [None, 100, 1])
def test_a_text_in_windows(context: int | None, lowered: Callable[..., Path], tmp_path: Path) -> None:
    text = "\r\n".join(DOCS)
    (tmp_path / "text").write_text(text, encoding="utf-8", newline="")
    options = [] if context is None else [f"--context={context}"]
    answer = Runner(lowered(NAME)).json("eval", f"--text={tmp_path / 'text'}", "--json", *options)
    check(answer, expected([text], context or CONTEXT, whole=True), 1)


def test_an_object_with_docs_and_a_context_beyond_the_training(lowered: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "docs").write_text(json.dumps({"note": {"a": [1]}, "docs": DOCS}), encoding="utf-8")
    answer = Runner(lowered(NAME)).json("eval", f"--docs={tmp_path / 'docs'}", "--json", "--context=400")
    check(answer, expected(DOCS, 400, whole=False), len(DOCS))


def test_special_tokens_in_a_text_are_text(lowered: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("<|bos|>hello<|user_end|>")
    answer = Runner(lowered(NAME)).json("eval", f"--text={tmp_path / 'text'}", "--json")
    assert answer["bytes"] == len("<|bos|>hello<|user_end|>")


def test_the_command_line(lowered: Callable[..., Path], docs_file: Path) -> None:
    """Lines for people; with --json the same figures in one line more; nothing on standard error."""
    done = run_cli("eval", lowered(NAME), "--docs", docs_file, "--json", "--threads", "1")
    assert (done.returncode, done.stderr) == (0, "")
    *people, line = done.stdout.splitlines()
    names = [row.split("  ")[0] for row in people]
    assert names == ["bits per byte", "perplexity", "nats per token", "documents", "time"]
    assert float(people[0].split()[-1]) == pytest.approx(json.loads(line)["bits_per_byte"], abs=1e-6)
    plain = run_cli("eval", lowered(NAME), "--docs", docs_file)
    assert len(plain.stdout.splitlines()) == len(people)


def run_on_terminal(command: Sequence[str], term: str) -> tuple[int, str]:
    """Exit code, and what came to a terminal that is standard output and standard error."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": term})
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    return process.wait(), shown.decode().replace("\r\n", "\n")


def test_progress_on_a_terminal(lowered: Callable[..., Path], docs_file: Path) -> None:
    """One line that is rewritten and taken away; none where TERM cannot."""
    command = Runner(lowered(NAME)).command("eval", f"--docs={docs_file}")
    code, shown = run_on_terminal(command, "xterm")
    assert code == 0
    assert re.search(r"\r +\d+ %  document \d of 5, \d+ of \d+ tokens, \d+ tokens/s\x1b\[K", shown)
    assert "\r\x1b[Kbits per byte " in shown
    code, shown = run_on_terminal(command, "dumb")
    assert code == 0
    assert shown.startswith("bits per byte ")


def refused(message: str, *arguments: str | Path) -> None:
    """One line, exit code 2."""
    done = run_cli("eval", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--text", None, "cannot read the text .*: No such file"),
        ("--text", b"", "is empty, there is no token to predict"),
        ("--text", b"abc\xff", "is not valid UTF-8"),
        ("--docs", None, "cannot read the JSON file of documents"),
        ("--docs", b"", "is not valid JSON"),
        ("--docs", b"[", "is not valid JSON"),
        ("--docs", b'"text"', "is no list of texts"),
        ("--docs", b"{}", "is no list of texts"),
        ("--docs", b'{"docs": "text"}', "is no list of texts"),
        ("--docs", b"[]", "holds no document"),
        ("--docs", b'["a", 1]', "document 2 is not a text"),
        ("--docs", b'["", ""]', "is empty, there is no token to predict"),
        ("--docs", b'["\xff"]', "is not valid JSON"),
        ("--docs", b'["\\ud800"]', "is not valid JSON"),
        ("--docs", b"[" * 100, "nests deeper than 32"),
    ],
)
def test_bad_input(
    option: str, content: bytes | None, message: str, lowered: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    refused(message, lowered(NAME), option, file)


def test_bad_options(lowered: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a")
    text = ("--text", tmp_path / "text")
    refused("one of --text and --docs", lowered(NAME))
    refused("one of --text and --docs", lowered(NAME), *text, "--docs", "x")
    refused("--context 513 is more than the 512 tokens", lowered(NAME), *text, "--context=513")
    refused("'0' is not an integer of at least 1", lowered(NAME), *text, "--context=0")
    refused("is a folder, not a text", lowered(NAME), "--text", tmp_path)


# --- token_bytes in the bundle


def change_tokenizer(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tokenizer = json.loads((bundle / "tokenizer.json").read_text())
    change(tokenizer)
    replace_file(bundle, "tokenizer.json", json.dumps(tokenizer).encode())


def test_the_bundle_has_nanochats_own_numbers(demo_bundle: Path) -> None:
    wanted = torch.load(DEMO_FOLDER / "tokenizer" / "token_bytes.pt", weights_only=True).tolist()
    tokenizer = json.loads((demo_bundle / "tokenizer.json").read_text())
    assert tokenizer["token_bytes"] == wanted
    assert wanted[-9:] == [0] * 9


def test_a_bundle_without_token_bytes(copied_bundle: Path, docs_file: Path) -> None:
    """One of before there were any: it generates, and is not evaluated."""
    change_tokenizer(copied_bundle, lambda tokenizer: tokenizer.pop("token_bytes"))
    refused(r"tokenizer\.json has no token_bytes.*lower the checkpoint again", copied_bundle, "--docs", docs_file)
    assert run_cli("generate", copied_bundle, "--prompt=a", "--max-tokens=1").returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["token_bytes"].pop(), "token_bytes: has 2047 numbers for 2048 tokens"),
        (lambda t: t["token_bytes"].__setitem__(300, 99), "token_bytes: says 99 for token 300"),
        (lambda t: t["token_bytes"].__setitem__(2047, 1), "token_bytes: says 1 for token 2047, which has 0"),
        (lambda t: t["token_bytes"].__setitem__(0, 1.5), "token_bytes: must hold integers alone"),
        (lambda t: t.update(token_bytes={}), "token_bytes: must be an array"),
    ],
)
def test_wrong_token_bytes(
    change: Callable[[dict[str, Any]], object], message: str, copied_bundle: Path, docs_file: Path
) -> None:
    change_tokenizer(copied_bundle, change)
    refused(message, copied_bundle, "--docs", docs_file)


def test_token_bytes_are_those_of_the_bundle(copied_bundle: Path, demo_bundle: Path, tmp_path: Path) -> None:
    """Part of a character counts as its own bytes, or as the three of U+FFFD: as nanochat's file has it."""
    (tmp_path / "text").write_text("世界" * 4, encoding="utf-8")
    option = f"--text={tmp_path / 'text'}"

    def count_decoded(tokenizer: dict[str, Any]) -> None:
        texts = [base64.b64decode(token).decode("utf-8", "replace") for token in tokenizer["tokens"]]
        tokenizer["token_bytes"] = [*(len(text.encode()) for text in texts), *[0] * 9]

    change_tokenizer(copied_bundle, count_decoded)
    own = Runner(demo_bundle).json("eval", option, "--json")
    decoded = Runner(copied_bundle).json("eval", option, "--json")
    assert own["bytes"] == 24 < decoded["bytes"]
    assert own["nats_per_token"] == decoded["nats_per_token"]
    assert own["bits_per_byte"] * 24 == pytest.approx(decoded["bits_per_byte"] * decoded["bytes"])


def test_a_model_that_is_not_finite(copied_bundle: Path, docs_file: Path) -> None:
    weights = load((copied_bundle / "weights.safetensors").read_bytes())
    weights["model.transformer.wte.weight"][:] = float("nan")
    replace_file(copied_bundle, "weights.safetensors", save(weights))
    refused("logits are not finite after 1 tokens of document 1", copied_bundle, "--docs", docs_file)


# --- the figure that came with the model

BPB = os.environ.get("NANOCHAT_X_BPB_JSON", "")


@pytest.mark.skipif(not BPB, reason="NANOCHAT_X_BPB_JSON names no bpb.json, whose texts are others' and not shipped")
@pytest.mark.parametrize("target", PROGRAMS)
def test_the_figure_of_the_demo_model(target: str, lowered: Callable[..., Path]) -> None:
    """By nanochat's own code: bits per byte of each document's first window."""
    wanted = json.loads(Path(BPB).read_text(encoding="utf-8"))
    answer = Runner(lowered("demo", target)).json("eval", f"--docs={BPB}", "--json")
    assert (answer["tokens"], answer["bytes"]) == (wanted["tokens"], wanted["bytes"])
    assert answer["bits_per_byte"] == pytest.approx(wanted["bpb_first_window"], abs=0.0005)
