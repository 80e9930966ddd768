"""`verify`: what it accepts, that every kind of wrong is caught and shrunk, and what it leaves in the bundle."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import lower_bundle, refused, run_cli
from hypothesis import given
from hypothesis import strategies as st
from mirror import NAME
from models import GENERATIONS, MAX_SEQ_LEN, model_of, weights_of
from torch import Tensor

from nanochat_x.certificate import PAGE, REPORT, certify, find_reference
from nanochat_x.errors import BundleError, CheckpointError, ParityError, RunnerError, UsageError
from nanochat_x.manifest import check_files, read_manifest
from nanochat_x.model import GPT
from nanochat_x.parity import Outcome, Reference, Row, judge, run_example, search
from nanochat_x.parity_examples import (
    MOST_ROWS,
    Example,
    Limits,
    examples,
    first_examples,
    fits,
    limits_of,
    parse_example,
)
from nanochat_x.parity_statistics import Statistics, kl_divergence
from nanochat_x.spec import ModelSpec
from nanochat_x.wrappers import ExportableGPT

SPEC, WEIGHTS = weights_of(NAME)
LIMITS = limits_of(SPEC, MAX_SEQ_LEN, cached=True)
TINY = Limits(vocab_size=SPEC.vocab_size, max_seq_len=40, tokens=80, windows=(8,), cached=True)

Spoil = Callable[[Tensor, list[list[int]]], Tensor]  # logits [B, T, V] and each row's whole text -> other logits


def keep(logits: Tensor, texts: list[list[int]]) -> Tensor:
    """Spoils nothing."""
    return logits


class FakeSession:
    """Answers as a runner's session does, by eager PyTorch one row at a time, and then spoils its answer."""

    vocab_size, max_seq_len, cached = SPEC.vocab_size, MAX_SEQ_LEN, True

    def __init__(self, spoil: Spoil = keep) -> None:
        self.model = ExportableGPT(model_of(NAME), MAX_SEQ_LEN)
        self.spoil = spoil
        self.texts: list[list[int]] = []

    def new(self, rows: int) -> None:
        self.texts = [[] for _ in range(rows)]

    def append(
        self, ids: list[list[int]], counts: list[int] | None = None, logits_to_keep: list[int] | None = None
    ) -> Tensor:
        length = len(ids[0])
        answers = []
        for row, (text, new) in enumerate(zip(self.texts, ids, strict=True)):
            count = length if counts is None else counts[row]
            answer = torch.full((length, self.vocab_size), math.nan)  # of padding: nobody may look at it
            answer[:count] = self.model(torch.tensor([text + new[:count]]))[0, len(text) :]
            answers.append(answer)
            text += new[:count]
        logits = self.spoil(torch.stack(answers), self.texts)
        return logits if logits_to_keep is None else logits[:, logits_to_keep]

    def forward(self, ids: list[list[int]]) -> Tensor:
        return self.spoil(torch.cat([self.model(torch.tensor([row])) for row in ids]), ids)


@pytest.fixture(scope="module")
def reference() -> Reference:
    """The smear generation, in float32."""
    return Reference(SPEC, WEIGHTS, torch.float32, MAX_SEQ_LEN)


def look(reference: Reference, spoil: Spoil, count: int = 60, limits: Limits = TINY, **options: Any) -> Any:
    """A search over a fake runner; also the statistics of what it saw."""
    session: Any = FakeSession(spoil)
    statistics = Statistics(limits.windows)
    options = {"count": count, "seed": 1, **options}
    run = search(
        limits, lambda example: run_example(example, session, reference, limits.max_seq_len), statistics.see, **options
    )
    return run, statistics


# --- the search


def test_what_is_right_passes(reference: Reference) -> None:
    run, statistics = look(reference, keep)
    assert (run.done, run.failure, run.in_time) == (60, None, True)
    assert statistics.examples == 60
    assert statistics.agreements >= 0.99 * statistics.tokens
    assert 0 < statistics.runner_error < 4 * statistics.eager_error


def perturb(logits: Tensor, texts: list[list[int]]) -> Tensor:
    """One logit of one position."""
    if max(map(len, texts)) >= 21:
        logits[0, -1, 7] += 1e-3
    return logits


def swap_rows(logits: Tensor, texts: list[list[int]]) -> Tensor:
    """The first two rows."""
    return logits[[1, 0, *range(2, len(logits))]] if len(logits) > 1 else logits


def insert_nan(logits: Tensor, texts: list[list[int]]) -> Tensor:
    """One NaN, in the last row."""
    if logits.shape[1] == 1:
        logits[-1, 0, 0] = math.nan
    return logits


@pytest.mark.parametrize(
    ("spoil", "smallest"),
    [
        (perturb, (21, 1, 1)),  # tokens, calls, rows
        (swap_rows, (2, 1, 2)),
        (insert_nan, (1, 1, 1)),
    ],
)
def test_every_kind_of_wrong_is_caught_and_shrunk(
    spoil: Spoil, smallest: tuple[int, int, int], reference: Reference
) -> None:
    run, statistics = look(reference, spoil, 200)
    assert run.failure is not None
    assert not run.failure.passed
    assert statistics.examples == run.done <= 200
    assert run.failure.example.size == smallest


def test_a_dropped_row_is_caught(reference: Reference) -> None:
    with pytest.raises((ParityError, ValueError)):
        look(reference, lambda logits, texts: logits[:-1] if len(logits) > 1 else logits)


def test_a_dropped_position_is_caught(reference: Reference) -> None:
    with pytest.raises(ParityError, match=r"the runner returned logits \[\d+, \d+\], not"):
        look(reference, lambda logits, texts: logits[:, :-1] if logits.shape[1] > 1 else logits)


def test_the_place_of_the_error_is_told(reference: Reference) -> None:
    def spoil(logits: Tensor, texts: list[list[int]]) -> Tensor:
        logits[1, 2, 7] += 1
        return logits

    session: Any = FakeSession(spoil)
    outcome = run_example(Example(False, (3, 5, 4)), session, reference, 40)
    assert outcome.where == (1, 2, 7)
    assert outcome.runner_error == pytest.approx(1, abs=1e-4)
    assert "off by 1 at row 1, position 2, token id 7" in str(outcome)


def test_the_deadline_ends_the_search(reference: Reference) -> None:
    run, _ = look(reference, keep, deadline=time.monotonic())
    assert (run.done, run.failure, run.in_time) == (0, None, False)
    run, _ = look(reference, keep, 100_000, deadline=time.monotonic() + 3)
    assert 0 < run.done < 100_000
    assert (run.failure, run.in_time) == (None, False)


def test_a_failure_that_comes_and_goes_is_one(reference: Reference) -> None:
    """A runner that is wrong once: Hypothesis asks again and sees it right, and the failure stays."""
    calls = 0

    def spoil(logits: Tensor, texts: list[list[int]]) -> Tensor:
        nonlocal calls
        calls += 1
        return logits + (calls == 45)

    run, _ = look(reference, spoil, 200)
    assert run.failure is not None


def test_a_runner_that_dies_ends_the_search(reference: Reference) -> None:
    """It is not fed again and again in search of a smaller example."""
    calls = 0

    def die(logits: Tensor, texts: list[list[int]]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls >= 45:
            raise RunnerError("the runner was ended by SIGSEGV")
        return logits

    with pytest.raises(RunnerError, match="the runner was ended by SIGSEGV"):
        look(reference, die, 200)
    assert calls == 45


# --- examples


@given(st.data(), st.integers(1, 60), st.booleans())
def test_examples_are_within_the_limits(data: st.DataObject, max_seq_len: int, cached: bool) -> None:
    limits = Limits(50, max_seq_len, 2 * max_seq_len, (8, 16), cached)
    example = data.draw(examples(limits))
    assert fits(example, limits)
    assert example.cached <= cached
    rows = example.rows(limits.vocab_size)
    assert tuple(map(len, rows)) == example.lengths
    assert all(0 <= token < limits.vocab_size for row in rows for token in row)
    assert parse_example(example.to_json(), limits) == example
    assert all(fits(first, limits) for first in first_examples(limits))


def test_the_first_examples_cover_the_edges() -> None:
    first = first_examples(LIMITS)
    assert {max(example.lengths) for example in first} >= {1, LIMITS.windows[0] + 2, MAX_SEQ_LEN}
    assert any(not example.cached for example in first)
    assert any(len(example.prompts) == MOST_ROWS for example in first)
    assert any(len(set(example.prompts)) > 1 and example.chunks for example in first)


def test_edges_of_the_vocabulary() -> None:
    (row,) = Example(True, (400,), vocabulary="edges").rows(50)
    assert set(row) == {0, 49}
    assert len(set(Example(True, (400,), vocabulary="repeat").rows(50)[0])) == 1


def test_a_large_model_gets_shorter_texts() -> None:
    large = replace(SPEC, n_layer=20, n_embd=1280, vocab_size=32768, windows=(768, 2048))
    limits = limits_of(large, 2048, cached=True)
    assert 2 * 768 <= limits.tokens < 2 * 2048


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"cached": true}', '{"cached": true, "prompts": []}', '{"cached": true, "prompts": [0]}',
        '{"cached": 1, "prompts": [1]}', '{"cached": false, "prompts": [1], "chunks": [1]}', "[" * 100_000,
        '{"cached": true, "prompts": [1.5]}', '{"cached": true, "prompts": [1], "seed": -1}',
        '{"cached": true, "prompts": [1], "vocabulary": "x"}', '{"cached": true, "prompts": [1], "more": 1}',
        '{"cached": true, "prompts": [500], "chunks": [13]}',
    ],
)  # fmt: skip
def test_what_is_no_example(text: str) -> None:
    with pytest.raises(UsageError, match="--example"):
        parse_example(text, LIMITS)


def test_what_eager_loses_is_not_left_to_a_few_tokens() -> None:
    exact = torch.zeros(1, 8, dtype=torch.float64)
    row = Row(exact.float() + 1e-5, exact.float() + 1e-6, exact, (0,), (1,))
    lucky, fair = (judge(Example(True, (1,)), (row,), least) for least in (0.0, 4e-6))
    assert (lucky.passed, fair.passed) == (False, True)
    assert not judge(Example(True, (1,)), (Row(exact.float() + 1e-4, row.eager, exact, (0,), (1,)),), 4e-6).passed


# --- statistics


def outcome_of(got: Tensor, eager: Tensor, exact: Tensor, calls: tuple[int, ...]) -> Outcome:
    """The outcome of one row."""
    return judge(Example(True, (len(exact),)), (Row(got, eager, exact, tuple(range(len(exact))), calls),))


def test_statistics() -> None:
    """Against the definitions, on logits that nobody computed."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(12, 30, dtype=torch.float64, generator=generator)
    got, eager = (
        (exact + scale * torch.randn(12, 30, dtype=torch.float64, generator=generator)).float() for scale in (0.3, 0.1)
    )
    statistics = Statistics(windows=(3,))
    statistics.see(outcome_of(got, eager, exact, (8,) * 8 + (4,) * 4))
    report = statistics.to_json()
    assert report["error"]["max"] == float((got - exact).abs().max())
    assert report["error"]["rms"] == pytest.approx(float((got - exact).square().mean().sqrt()))
    assert report["largest_difference_to_eager"] == pytest.approx(float((got - eager).abs().max()))
    divergences = [
        torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=exact[i]), torch.distributions.Categorical(logits=got[i].double())
        )
        for i in range(12)
    ]
    assert report["kl_divergence_nats"]["mean"] == pytest.approx(float(sum(divergences)) / 12)
    assert report["kl_divergence_nats"]["max"] == pytest.approx(float(max(divergences)))
    assert 0 < report["top1_agreement"] < 1
    assert report["top1_agreement"] == float((got.argmax(-1) == exact.argmax(-1)).double().mean())
    assert [entry["at"] for entry in report["by_position"]] == list(range(12))
    assert report["by_position"][5]["runner_error"] == float((got - exact)[5].abs().max())
    assert [(entry["at"], entry["tokens"]) for entry in report["by_call_length"]] == [(4, 4), (8, 8)]
    assert [entry["at"] for entry in report["by_distance_to_window_edge"]] == list(range(-4, 8))


def test_divergence_of_equal_logits_is_zero() -> None:
    logits = torch.randn(5, 9, dtype=torch.float64)
    assert float(kl_divergence(logits, logits + 3).abs().max()) < 1e-12


# --- real bundles


@pytest.fixture
def copied(lowered: Callable[..., Path], tmp_path: Path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(lowered(NAME, "torchscript"), tmp_path / "copy"))


def test_the_certificate(copied: Path, tmp_path: Path) -> None:
    (copied / "notes.txt").write_text("mine")
    before = read_manifest(copied)
    done = run_cli("verify", copied, "--against", GENERATIONS / NAME, "--examples=40", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((copied / REPORT).read_text())
    assert report == json.loads(done.stdout.splitlines()[-1])
    assert report["passed"] is True
    assert report["examples"] == 40
    assert 0 < report["largest_ratio"] <= 4
    assert report["checkpoint"]["is_the_bundles_own"] is True
    after = read_manifest(copied)
    assert check_files(copied, after["files"]) == []
    assert [entry for entry in after["files"] if "parity" not in entry["path"]] == before["files"]
    assert after["parity"]["passed"] is True
    assert report["bundle"]["files"] == {entry["path"]: entry["sha256"] for entry in before["files"]}
    assert (copied / "notes.txt").read_text() == "mine"
    # a bundle like any other: it runs, tells of its certificate, and can be verified anew
    assert run_cli("generate", copied, "--prompt-ids=1", "--max-tokens=1", "--raw").returncode == 0
    assert f"proved      yes: {report['summary']}" in run_cli("inspect", copied).stdout
    again = run_cli("verify", copied, "--against", GENERATIONS / NAME, "--examples=3", "--seed=7")
    assert again.returncode == 0
    assert json.loads((copied / REPORT).read_text())["seed"] == 7
    (copied / REPORT).write_text("{}")
    assert REPORT in refused(copied)


def test_the_page(copied: Path, tmp_path: Path) -> None:
    done = run_cli("verify", copied, "--against", GENERATIONS / NAME, "--examples=25", "-o", tmp_path / "report")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [PAGE, REPORT]
    assert not (copied / REPORT).exists()
    page = (tmp_path / "report" / PAGE).read_text()
    assert page.count("<svg") == 3
    for begin in [at for at in range(len(page)) if page.startswith("<svg", at)]:
        ElementTree.fromstring(page[begin : page.index("</svg>", begin) + len("</svg>")])
    assert "passed" in page.split("</title>")[0]
    assert read_manifest(copied)["checkpoint"]["model_sha256"] in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", "")


# --- lowerings that are wrong on purpose


def wrong_spec(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """What is lowered has other constants than the checkpoint."""
    right = GPT.from_weights

    def wrong(spec: ModelSpec, *others: Any, **options: Any) -> GPT:
        return right(replace(spec, **changes), *others, **options)

    monkeypatch.setattr(GPT, "from_weights", wrong)


def window_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each window sees one key less."""
    wrong_spec(monkeypatch, windows=tuple(None if window is None else window - 1 for window in SPEC.windows))


def rope_base_of_another_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the first."""
    wrong_spec(monkeypatch, rotary_base=weights_of("2025-12-classic")[0].rotary_base)


def smear_dropped_at_a_chunks_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token of a call is embedded as if nothing stood before it."""
    right = GPT._embed

    def embed(self: GPT, ids: Tensor, prev_ids: Tensor | None, positions: Tensor) -> Tensor:
        if prev_ids is not None:
            positions = positions * (torch.arange(ids.shape[1]) > 0)
        return right(self, ids, prev_ids, positions)

    monkeypatch.setattr(GPT, "_embed", embed)


@pytest.mark.parametrize(
    ("wrong", "smallest"),
    [
        (window_off_by_one, (LIMITS.windows[0] + 1, 1, 1)),  # the first text of which a key is out of sight
        (rope_base_of_another_generation, (2, 1, 1)),
        (smear_dropped_at_a_chunks_edge, (2, 2, 1)),
    ],
)
def test_a_wrong_lowering_is_caught(
    wrong: Callable[[pytest.MonkeyPatch], None], smallest: tuple[int, int, int], tmp_path: Path
) -> None:
    """Within 100 examples, by the command that a user has; what it prints fails again, and is as small as can be."""
    bundle = tmp_path / "wrong"
    with pytest.MonkeyPatch.context() as monkeypatch:
        wrong(monkeypatch)
        lower_bundle(bundle, "torchscript", base_dir=GENERATIONS / NAME, max_seq_len=MAX_SEQ_LEN, verify=False)
    done = run_cli("verify", bundle, "--against", GENERATIONS / NAME, "--examples=100", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["passed"] is False
    assert report["examples"] <= 100
    failure = parse_example(json.dumps(report["failure"]["example"]), LIMITS)
    assert failure.size == smallest
    assert read_manifest(bundle)["parity"]["passed"] is False
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("  nanochat_x verify"))
    again = run_cli(*shlex.split(line)[1:])
    assert again.returncode == 1
    assert "FAILED" in again.stdout
    test = done.stdout[done.stdout.index("from pathlib") : done.stdout.rindex("\n{")]
    (tmp_path / "test_again.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_again.py")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "1 failed" in run.stdout


# --- what cannot be verified


def test_the_reference_is_the_bundles_own(copied: Path, tmp_path: Path) -> None:
    manifest = read_manifest(copied)
    with pytest.raises(CheckpointError, match=r"was not found .*say where it is: --against DIR"):
        find_reference({**manifest, "checkpoint": manifest["checkpoint"] | {"source": "rl"}}, None, None)
    demo = {"checkpoint": {"source": "demo", "tag": "d4", "step": 3000, "overrides": {}, "model_sha256": "0" * 64}}
    with pytest.raises(CheckpointError, match=r"is not the file that the bundle was lowered from \(SHA-256 differs\)"):
        find_reference(demo, None, None)
    with pytest.raises(UsageError, match=r"folder of transformers' .*--against DIR"):
        find_reference({"checkpoint": demo["checkpoint"] | {"source": "hf"}}, None, None)


def test_another_checkpoint_is_told_from_the_right_one(copied: Path) -> None:
    done = run_cli("verify", copied, "--against", GENERATIONS / "2025-12-classic", "--examples=5", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["checkpoint"]["is_the_bundles_own"] is False


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--examples=0"], "--examples"),
        (["--deadline=0"], "--deadline"),
        (["--against", "nowhere"], "nowhere"),
        (["--example={}"], "is not an example"),
        (["--example={}", "-o", "report"], "--example writes no report"),
    ],
)
def test_bad_options_are_one_line(options: list[str], said: str, copied: Path) -> None:
    against = [] if "--against" in options else ["--against", str(GENERATIONS / NAME)]
    done = run_cli("verify", copied, *against, *options)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_a_changed_bundle_gets_no_certificate(copied: Path) -> None:
    before = (copied / "manifest.json").read_bytes()
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: changed since it was written"):
        certify(copied, {}, "")
    assert (copied / "manifest.json").read_bytes() == before
    assert not (copied / REPORT).exists()
    assert {path.name for path in copied.parent.iterdir()} == {"copy"}
