"""Calibration texts, and whether a model's activations fit float16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiktoken
import torch
from models import GENERATIONS, exact_logits, weights_of

from nanochat_x.activation_range import activation_range, check_range
from nanochat_x.calibration import calibrate, write_samples
from nanochat_x.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from nanochat_x.console import Silent
from nanochat_x.errors import LoweringError, UsageError

NAME = "2026-07-smear"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """A small one."""
    return load_checkpoint(find_checkpoint(base_dir=GENERATIONS / NAME))


def test_a_text_of_the_users(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time, there were <|bos|> three bears. " * 500, encoding="utf-8")
    found = calibrate(checkpoint.spec, checkpoint.weights, checkpoint.tokenizer, file, 2000)
    length = min(512, checkpoint.spec.sequence_len)
    assert found.ids.shape == (2000 // length, length)
    bos = checkpoint.tokenizer.special_tokens["<|bos|>"]
    assert bool((found.ids[:, 0] == bos).all())
    assert not bool((found.ids[:, 1:] == bos).any())  # in a text it is five characters, and no token
    # The rows are the text, piece by piece.
    encoding = tiktoken.Encoding(
        "test", pat_str=checkpoint.tokenizer.pattern,
        mergeable_ranks={token: i for i, token in enumerate(checkpoint.tokenizer.tokens)}, special_tokens={},
    )  # fmt: skip
    text = encoding.decode(found.ids[:, 1:].flatten().tolist())
    assert file.read_text(encoding="utf-8").startswith(text)
    assert found.record["tokens"] == found.ids.numel()


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"short", "has fewer than"), (b"", "has fewer than"), (b"\xff\xfe" * 9999, "is not UTF-8")],
)
def test_texts_that_are_none(data: bytes, said: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(data)
    with pytest.raises(UsageError, match=said):
        calibrate(checkpoint.spec, checkpoint.weights, checkpoint.tokenizer, tmp_path / "text.txt")


def test_a_folder_is_no_text(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        calibrate(checkpoint.spec, checkpoint.weights, checkpoint.tokenizer, tmp_path)


def test_what_the_model_writes_follows_its_distribution() -> None:
    """Second tokens of many rows, against the probabilities of the model in float64 after BOS."""
    spec, weights = weights_of(NAME)
    bos, rows = 263, 4000
    second = write_samples(spec, weights, bos, rows, 2, seed=3)[:, 1]
    wanted = exact_logits(NAME, torch.tensor([[bos]]))[0, 0].softmax(-1)
    got = torch.bincount(second, minlength=spec.vocab_size) / rows
    # Each count is binomial: five standard deviations, for some hundred tokens, go wrong once in 10,000 seeds.
    allowed = 5 * (wanted * (1 - wanted) / rows).sqrt() + 1 / rows
    assert bool(((got - wanted).abs() <= allowed).all())


def test_what_the_model_writes_is_made_of_what_it_wrote() -> None:
    """Each token is drawn after those before it: fed at once, they are about as likely as the model finds its own."""
    spec, weights = weights_of(NAME)
    ids = write_samples(spec, weights, 263, 64, 40, seed=4)
    log = exact_logits(NAME, ids)[:, :-1].log_softmax(-1)
    nats = -log.gather(2, ids[:, 1:, None])[..., 0]
    entropy = -(log.exp() * log).sum(-1)
    # Cross-entropy of draws from a distribution is its entropy on average; 64 x 39 draws with a deviation below 2 nats.
    assert abs(float((nats - entropy).mean())) < 5 * 2 / (64 * 39) ** 0.5


def test_a_seed_is_a_text() -> None:
    spec, weights = weights_of(NAME)
    one, same, other = (write_samples(spec, weights, 263, 4, 20, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_model_that_fits_float16(checkpoint: Checkpoint) -> None:
    spec, weights = weights_of(NAME)
    largest = activation_range(spec, weights, torch.zeros(1, 8, dtype=torch.long))
    assert {"transformer.h.0.mlp.c_proj (input)", "lm_head (output)"} <= largest.keys()
    assert all(0 <= value < 1e4 for value in largest.values())
    check_range(checkpoint, None, Silent())


def test_the_layer_that_would_overflow_is_named(checkpoint: Checkpoint) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    loud = replace(checkpoint, weights={**checkpoint.weights, name: checkpoint.weights[name] * 1000})
    with pytest.raises(LoweringError, match=r"transformer\.h\.1\.mlp\.c_proj \(input\) reaches"):
        check_range(loud, None, Silent())
