"""`compare`: its arithmetic against torch.distributions and by hand, and the whole verb on real bundles."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bundles import replace_file, run_cli
from hypothesis import given
from hypothesis import strategies as st
from models import GENERATIONS, MAX_SEQ_LEN, model_of
from safetensors.torch import load_file, save_file
from test_eval import CONTEXT, DOCS, NAME, encoding_of
from torch import Tensor

from nanochat_x import comparing
from nanochat_x.comparing import BundleModel, compare_models
from nanochat_x.comparison import Buckets, Positions, lines_of, measure
from nanochat_x.console import Silent
from nanochat_x.errors import ParityError
from nanochat_x.runner import Runner
from nanochat_x.wrappers import ExportableGPT

FIGURES = ("tokens", "bytes", "bits_per_byte_a", "bits_per_byte_b", "delta_bits_per_byte", "kl_mean", "kl_max",
           "top1_agreement", "largest_logit_difference", "rms_logit_difference")  # fmt: skip


# --- the arithmetic


def logits_of(*shape: int, seed: int = 0, scale: float = 4.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_by_hand() -> None:
    """B says 3/4 and 1/4, A says 1/2 and 1/2; the first token came."""
    a = torch.tensor([[0.0, 0.0]])
    b = torch.log(torch.tensor([[0.75, 0.25]]))
    got = measure(a, b, torch.tensor([0]))
    assert float(got.nats_a) == pytest.approx(math.log(2), rel=1e-12)
    assert float(got.nats_b) == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert float(got.kl) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert float(got.agree) == 1.0  # of equal logits the first is the most likely
    assert float(got.difference) == pytest.approx(math.log(4), rel=1e-6)
    assert float(got.squares) == pytest.approx((math.log(4 / 3) ** 2 + math.log(4) ** 2) / 2, rel=1e-6)


@pytest.mark.parametrize("steps", [1, 127, 128, 129, 300])
def test_against_torch_distributions(steps: int) -> None:
    a, b = logits_of(steps, 37, seed=1), logits_of(steps, 37, seed=2)
    targets = torch.arange(steps) % 37
    got = measure(a, b, targets)
    p_a, p_b = (torch.distributions.Categorical(logits=x.double()) for x in (a, b))
    assert torch.allclose(got.kl, torch.distributions.kl_divergence(p_b, p_a), rtol=1e-10, atol=1e-12)
    assert torch.allclose(got.nats_a, F.cross_entropy(a.double(), targets, reduction="none"), rtol=1e-12)
    assert torch.allclose(got.nats_b, F.nll_loss(p_b.logits, targets, reduction="none"), rtol=1e-12)
    assert got.agree.tolist() == [float(x.argmax() == y.argmax()) for x, y in zip(a, b, strict=True)]
    largest = [max(abs(x - y) for x, y in zip(*rows, strict=True)) for rows in zip(a.tolist(), b.tolist(), strict=True)]
    assert got.difference.tolist() == largest
    assert torch.allclose(got.squares, F.mse_loss(a.double(), b.double(), reduction="none").mean(1))


def test_the_reference_is_b() -> None:
    """KL is not symmetric: what B finds likely and A does not costs more than the other way round."""
    sure, unsure = torch.tensor([[10.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert float(measure(unsure, sure, torch.tensor([0])).kl) == pytest.approx(math.log(2), abs=1e-3)
    assert float(measure(sure, unsure, torch.tensor([0])).kl) > 4


def test_equal_logits_have_no_difference() -> None:
    a = logits_of(50, 11)
    got = measure(a, a.clone(), torch.zeros(50, dtype=torch.long))
    assert got.kl.abs().max() == 0
    assert got.difference.max() == got.squares.max() == 0
    assert got.agree.min() == 1


def test_a_constant_moves_logits_and_no_probability() -> None:
    a = logits_of(9, 11)
    got = measure(a + 3, a, torch.zeros(9, dtype=torch.long))
    assert torch.allclose(got.difference, torch.full((9,), 3.0, dtype=torch.float64), atol=1e-5)
    assert got.kl.max() < 1e-10


def test_a_perturbed_logit_and_a_swapped_row_are_seen() -> None:
    b = logits_of(40, 11)
    targets = torch.zeros(40, dtype=torch.long)
    a = b.clone()
    a[17, 3] += 1e-3
    assert (measure(a, b, targets).difference > 0).nonzero().flatten().tolist() == [17]
    assert (measure(a, b, targets).kl > 0).nonzero().flatten().tolist() == [17]
    a = b.clone()
    a[[5, 30]] = b[[30, 5]]
    assert (measure(a, b, targets).kl > 1e-2).nonzero().flatten().tolist() == [5, 30]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_refused(bad: float, side: int) -> None:
    pair = [logits_of(200, 7), logits_of(200, 7)]
    pair[side][150, 3] = bad
    with pytest.raises(ParityError, match=f"logits of {('ours', 'theirs')[side]} are not finite"):
        measure(pair[0], pair[1], torch.zeros(200, dtype=torch.long), ("ours", "theirs"))


@pytest.mark.parametrize(("a", "b", "steps"), [((3, 5), (3, 6), 3), ((3, 5), (2, 5), 3), ((3, 5), (3, 5), 4)])
def test_shapes_that_do_not_fit(a: tuple[int, int], b: tuple[int, int], steps: int) -> None:
    with pytest.raises(ParityError, match="gave logits of shapes"):
        measure(torch.zeros(a), torch.zeros(b), torch.zeros(steps, dtype=torch.long))


def positions_of(values: list[float]) -> Positions:
    """Each figure from one list, each with another factor."""
    base = torch.tensor(values, dtype=torch.float64)
    return Positions(nats_a=base, nats_b=2 * base, kl=3 * base, agree=(base > 2).double(), difference=5 * base,
                     squares=base.square())  # fmt: skip


def test_buckets() -> None:
    """Positions 1, 2-3, 4-7; two windows; a token without bytes is in no bits per byte."""
    buckets = Buckets()
    buckets.add(positions_of([1, 2, 3, 4, 5]), torch.tensor([1, 0, 2, 3, 4]))
    buckets.add(positions_of([10]), torch.tensor([5]))
    rows = buckets.figures()
    assert [(row["from"], row["to"], row["tokens"], row["bytes"]) for row in rows] == [
        (1, 1, 2, 6), (2, 3, 2, 2), (4, 7, 2, 7),
    ]  # fmt: skip
    first, second, third = rows
    assert list(first) == ["from", "to", *FIGURES]
    assert first["bits_per_byte_a"] == pytest.approx(11 / 6 / math.log(2))
    assert second["bits_per_byte_a"] == pytest.approx(3 / 2 / math.log(2))
    assert third["delta_bits_per_byte"] == pytest.approx(-9 / 7 / math.log(2))
    assert (first["kl_mean"], first["kl_max"]) == (16.5, 30)
    assert (second["top1_agreement"], third["top1_agreement"]) == (0.5, 1)
    assert (second["largest_logit_difference"], third["largest_logit_difference"]) == (15, 25)
    assert third["rms_logit_difference"] == pytest.approx(math.sqrt((16 + 25) / 2))
    total = buckets.total.figures()
    assert (total["tokens"], total["bytes"], total["kl_max"]) == (6, 15, 30)
    assert total["rms_logit_difference"] == pytest.approx(math.sqrt((1 + 4 + 9 + 16 + 25 + 100) / 6))


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_buckets_hold_every_position_once(lengths: list[int]) -> None:
    buckets = Buckets()
    for length in lengths:
        buckets.add(positions_of([float(i) for i in range(length)]), torch.arange(length))
    rows = buckets.figures()
    assert sum(row["tokens"] for row in rows) == buckets.total.tokens == sum(lengths)
    assert sum(row["bytes"] for row in rows) == buckets.total.bytes
    assert rows[-1]["from"] <= max(lengths) <= rows[-1]["to"]


def test_a_bucket_without_bytes_has_no_bits() -> None:
    buckets = Buckets()
    buckets.add(positions_of([1, 2]), torch.tensor([0, 0]))
    assert buckets.total.figures()["bits_per_byte_a"] is None
    report = {"a": "x", "b": "y", "documents": 1, "windows": 1, "context": 9, **buckets.total.figures(),
              "positions": buckets.figures()}  # fmt: skip
    assert " - " in list(lines_of(report))[-1]


# --- the whole verb


@pytest.fixture
def docs_file(tmp_path: Path) -> Path:
    file = tmp_path / "docs.json"
    file.write_text(json.dumps(DOCS), encoding="utf-8")
    return file


def run_compare(*arguments: str | Path) -> tuple[list[str], dict[str, Any]]:
    """Lines for people and the JSON line of a comparison that succeeds."""
    done = run_cli("compare", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    *people, line = done.stdout.splitlines()
    report: dict[str, Any] = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return people, report


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_bundle_and_its_checkpoint(dtype: str, lowered: Callable[..., Path], docs_file: Path) -> None:
    """They differ by roundings; bits per byte are those of `eval`."""
    bundle = lowered(NAME)
    people, report = run_compare(bundle, "--base-dir", GENERATIONS / NAME, "--docs", docs_file, "--dtype", dtype)
    evaluated = Runner(bundle).json("eval", f"--docs={docs_file}", "--json")
    assert report["bits_per_byte_a"] == pytest.approx(evaluated["bits_per_byte"], abs=1e-9)
    assert (report["tokens"], report["bytes"]) == (evaluated["tokens"], evaluated["bytes"])
    assert report["documents"] == len(DOCS)
    assert report["windows"] == len(DOCS) - 1
    assert report["context"] == CONTEXT
    assert abs(report["delta_bits_per_byte"]) < 1e-5
    assert 0 <= report["kl_mean"] <= report["kl_max"] < 1e-6
    assert report["top1_agreement"] > 0.99
    assert 0 < report["rms_logit_difference"] <= report["largest_logit_difference"] < 2e-4
    assert report["b"] == f"checkpoint rl d5 step 50, eager PyTorch in {dtype}"
    assert [row["to"] for row in report["positions"]] == [2 ** (i + 1) - 1 for i in range(9)]
    assert people[1] == f"B  {report['b']}  (the reference)"
    assert len(people) == 5 + len(report["positions"]) + 1


def test_two_bundles(lowered: Callable[..., Path], tmp_path: Path) -> None:
    """A 16-bit bundle against a float32 one, in several windows; the other way round the delta changes its sign."""
    (tmp_path / "text").write_text(" ".join(DOCS), encoding="utf-8")
    half, full = lowered(NAME, "onnx", "float16"), lowered(NAME)
    text = ("--text", tmp_path / "text", "--context", "200")
    _, report = run_compare(half, full, *text)
    _, back = run_compare(full, half, *text)
    assert report["windows"] > 2
    assert report["delta_bits_per_byte"] == pytest.approx(-back["delta_bits_per_byte"], abs=1e-12) != 0
    assert report["largest_logit_difference"] == back["largest_logit_difference"] > 1e-4
    assert report["kl_mean"] != back["kl_mean"]
    assert report["kl_max"] < 1e-2


def test_a_bundle_with_itself(lowered: Callable[..., Path], docs_file: Path) -> None:
    _, report = run_compare(lowered(NAME), lowered(NAME), "--docs", docs_file)
    assert (report["kl_max"], report["largest_logit_difference"], report["top1_agreement"]) == (0, 0, 1)


def test_in_groups(lowered: Callable[..., Path], docs_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many windows are computed at once, the figures are the same; nothing is left behind."""
    model = BundleModel(lowered(NAME), Silent())
    arguments = ([f"--docs={docs_file}"], None, Silent())
    at_once = compare_models(model, model, *arguments)
    scratch = docs_file.parent / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setattr(comparing, "_GROUP", 1)
    calls: list[int] = []
    forward = Runner.forward

    def counted(self: Runner, inputs: Path, output: Path, **options: Any) -> None:
        calls.append(len(load_file(inputs)))
        forward(self, inputs, output, **options)

    monkeypatch.setattr(Runner, "forward", counted)
    assert compare_models(model, model, *arguments) == at_once
    assert calls == [1] * (2 * at_once["windows"])
    assert list(scratch.iterdir()) == []


class Spoilt:
    """In the place of a second bundle: eager PyTorch, with one window's logits changed."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change
        self.name = "spoilt"
        self.longest: int | None = None
        self.vocab_size = model_of(NAME).spec.vocab_size
        self.tokenizer: dict[str, Any] = {}

    def logits(self, inputs: Sequence[Tensor]) -> Generator[Tensor]:
        for i, ids in enumerate(inputs):
            logits = ExportableGPT(model_of(NAME), MAX_SEQ_LEN)(ids[None])[0]
            yield self.change(logits.clone()) if i == 1 else logits


def perturb(logits: Tensor) -> Tensor:
    logits[70, 3] += 0.5
    return logits


def forget(logits: Tensor) -> Tensor:
    logits[70] = float("nan")
    return logits


def test_a_spoilt_model_is_seen_where_it_is_spoilt(lowered: Callable[..., Path], docs_file: Path) -> None:
    model, spoilt = BundleModel(lowered(NAME), Silent()), Spoilt(perturb)
    spoilt.tokenizer = model.tokenizer
    report = compare_models(model, spoilt, [f"--docs={docs_file}"], None, Silent())
    by_position = {row["from"]: row["largest_logit_difference"] for row in report["positions"]}
    assert by_position.pop(64) == pytest.approx(0.5, abs=1e-3) == report["largest_logit_difference"]
    assert max(by_position.values()) < 2e-4
    spoilt.change = forget
    with pytest.raises(ParityError, match="logits of spoilt are not finite"):
        compare_models(model, spoilt, [f"--docs={docs_file}"], None, Silent())


def test_the_tokens_are_tiktokens(lowered: Callable[..., Path], docs_file: Path) -> None:
    answer = Runner(lowered(NAME)).json("tokenize", f"--docs={docs_file}")
    encoding, _ = encoding_of(GENERATIONS / NAME / "tokenizer")
    bos = encoding.encode_single_token("<|bos|>")
    assert answer["windows"] == [
        {"document": i, "ids": [bos, *encoding.encode_ordinary(doc)[:CONTEXT]]} for i, doc in enumerate(DOCS) if doc
    ]


def refused(message: str, *arguments: str | Path) -> None:
    """One line at the end, exit code 2, no report."""
    done = run_cli("compare", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(message, done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_compared(
    lowered: Callable[..., Path], demo_bundle: Path, docs_file: Path, tmp_path: Path
) -> None:
    bundle, docs = lowered(NAME), ("--docs", docs_file)
    refused("a vocabulary of 272 tokens and .* one of 2048", bundle, demo_bundle, *docs)
    refused("a vocabulary of 272 tokens and checkpoint demo", bundle, "-i", "demo", *docs)
    refused("no bundle at .*nowhere", bundle, tmp_path / "nowhere", *docs)
    refused("--context 600 is more than the 512 tokens that both take", bundle, bundle, *docs, "--context", "600")
    refused("No such file", bundle, bundle, "--text", tmp_path / "nowhere")
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["pattern"] = r"\s+|\S+"
    replace_file(other, "tokenizer.json", json.dumps(tokenizer).encode())
    refused(r"different tokenizers \(pattern differs\)", bundle, other, *docs)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a", "one of --text and --docs"),
        ("a b", "one of --text and --docs"),
        ("a b --text x --docs y", "one of --text and --docs"),
        ("a --text x", "takes a second bundle, or options that choose a checkpoint"),
        ("a b -i demo --text x", "both given"),
        ("a b --dtype float64 --text x", "both given"),
        ("a --dtype float64 --text x", "takes a second bundle"),
        ("a -i demo --dtype float16 --text x", "'float16' is not one of"),
        ("a b c --text x", "unexpected extra argument"),
        ("a b --text x", "no bundle at a"),
    ],
)
def test_mistakes(line: str, message: str) -> None:
    refused(message, *line.split())


def test_old_bundles_without_token_bytes(copied_bundle: Path, docs_file: Path) -> None:
    """Either of the two may tell them."""
    tokenizer = json.loads((copied_bundle / "tokenizer.json").read_text())
    del tokenizer["token_bytes"]
    replace_file(copied_bundle, "tokenizer.json", json.dumps(tokenizer).encode())
    refused("has no token_bytes", copied_bundle, copied_bundle, "--docs", docs_file)
    _, report = run_compare(copied_bundle, "-i", "demo", "--docs", docs_file)
    assert report["bytes"] > 0


def test_saved_logits_are_what_is_compared(lowered: Callable[..., Path], tmp_path: Path) -> None:
    """The positions of the report are those of `forward`'s rows: the first predicts the token after <|bos|>."""
    (tmp_path / "text").write_text("hello")
    bundle = lowered(NAME)
    ids = Runner(bundle).json("tokenize", f"--text={tmp_path / 'text'}")["windows"][0]["ids"]
    save_file({"a.input_ids": torch.tensor([ids[:-1]])}, tmp_path / "in")
    Runner(bundle).forward(tmp_path / "in", tmp_path / "out")
    logits = load_file(tmp_path / "out")["a.logits"][0].double()
    losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    _, report = run_compare(bundle, bundle, "--text", tmp_path / "text")
    _, token_bytes = encoding_of(GENERATIONS / NAME / "tokenizer")
    first = report["positions"][0]
    assert first["bits_per_byte_a"] == pytest.approx(float(losses[0]) / math.log(2) / int(token_bytes[ids[1]]))
