"""Random checkpoints of nanochat's real shape."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiktoken._educational
import torch

import nanochat_x.initialize
from nanochat_x.checkpoint import load_checkpoint
from nanochat_x.errors import CheckpointError, UsageError
from nanochat_x.find import find_checkpoint
from nanochat_x.initialize import write_random_checkpoint
from nanochat_x.staging import staged_folder
from nanochat_x.synthetic_tokenizer import synthetic_tokens

SMALL: dict[str, Any] = {"sequence_len": 64, "vocab_size": 300, "head_dim": 32}


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_real_shape(tmp_path: Path) -> None:
    files = write_random_checkpoint(3, tmp_path / "nano")
    assert files.model == tmp_path / "nano/base_checkpoints/d3/model_000000.pt"
    assert json.loads(files.meta.read_text()) == {
        "step": 0,
        "model_config": {
            "sequence_len": 2048,
            "vocab_size": 32768,
            "n_layer": 3,
            "n_head": 2,  # 3 x 64 = 192, up to two heads of 128
            "n_kv_head": 2,
            "n_embd": 256,
            "window_pattern": "SSSL",
        },
    }
    assert {path.name for path in (tmp_path / "nano/tokenizer").iterdir()} == {"tokenizer.pkl", "token_bytes.pt"}
    checkpoint = load_checkpoint(find_checkpoint(base_dir=tmp_path / "nano"))
    assert checkpoint.spec.generation == "smear"
    assert checkpoint.spec.windows == (512, 512, 2048)
    # wte, lm_head, 2 value embeddings of 32768 x 256; 3 layers of 12 x 256^2; 2 gates of 2 x 12; 3 + 3 + 24 + 1 + 1
    assert sum(t.numel() for t in checkpoint.weights.values()) == 4 * 32768 * 256 + 36 * 256**2 + 48 + 32
    assert checkpoint.tokenizer.vocab_size == 32768


def test_dtypes_and_weights_that_do_something(tmp_path: Path) -> None:
    weights = load_checkpoint(write_random_checkpoint(4, tmp_path / "nano", **SMALL)).weights
    for name, tensor in weights.items():
        embedding = name.startswith(("transformer.wte", "value_embeds"))
        assert tensor.dtype == (torch.bfloat16 if embedding else torch.float32), name
        assert torch.count_nonzero(tensor) > 0.98 * tensor.numel(), name
        if tensor.numel() >= 10_000 and not embedding and name != "lm_head.weight":
            # A matrix applied to inputs of variance 1 gives outputs of variance 1.
            assert float(tensor.std()) == pytest.approx(1 / math.sqrt(tensor.shape[1]), rel=0.05), name
    assert float(weights["lm_head.weight"].std()) * math.sqrt(256) == pytest.approx(2, rel=0.05)  # logits
    assert weights["resid_lambdas"].tolist() == pytest.approx([1.15, 1.11667, 1.08333, 1.05], abs=1e-4)
    assert weights["x0_lambdas"].tolist() == pytest.approx([0.2, 0.15, 0.1, 0.05], abs=1e-4)


def test_a_seed_is_a_checkpoint(tmp_path: Path) -> None:
    folders = {}
    for name, seed in (("one", 7), ("same", 7), ("other", 8)):
        write_random_checkpoint(1, tmp_path / name, seed=seed, **SMALL)
        folders[name] = digests(tmp_path / name)
    assert folders["one"] == folders["same"]
    model = "base_checkpoints/d1/model_000000.pt"
    assert folders["one"][model] != folders["other"][model]


@pytest.mark.parametrize("number", [256, 257, 4096, 32_759])
def test_the_vocabulary_is_byte_pair_encodings_own(number: int) -> None:
    tokens = synthetic_tokens(number)
    assert len(tokens) == len(set(tokens)) == number
    assert tokens[:256] == tuple(bytes([byte]) for byte in range(256))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    # tiktoken's teaching implementation, which knows no shortcut: each token's bytes merge into that one token.
    for rank in random.Random(1).sample(range(number), min(number, 500)):
        assert tiktoken._educational.bpe_encode(ranks, tokens[rank], visualise=None) == [rank]


def test_tiktoken_reads_the_tokenizer(tmp_path: Path) -> None:
    write_random_checkpoint(1, tmp_path / "nano", vocab_size=32768, sequence_len=64, head_dim=32)
    with (tmp_path / "nano/tokenizer/tokenizer.pkl").open("rb") as file:
        encoding = pickle.load(file)
    assert isinstance(encoding, tiktoken.Encoding)
    assert encoding.n_vocab == 32768
    assert encoding.encode_single_token("<|bos|>") == 32759
    ids = encoding.encode("hello world, the nation's 1234 ways: naïve 日本")
    assert encoding.decode(ids) == "hello world, the nation's 1234 ways: naïve 日本"
    assert b" the" in encoding.decode_tokens_bytes(ids)
    assert encoding.encode("12345") == [*encoding.encode("12"), *encoding.encode("34"), *encoding.encode("5")]


def test_what_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "nano").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("nano", "file", "link"):
        with pytest.raises(UsageError, match=f"{name} exists already; choose another folder or remove it first"):
            write_random_checkpoint(1, tmp_path / name, **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "nano"]
    assert list((tmp_path / "nano").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth 0 is not a number of layers"),
        ({"depth": 2**63 - 1}, "is not a number of layers; it counts from 1 to 10000"),
        ({"depth": 1, "sequence_len": 1}, "sequence length 1 is too short"),
        ({"depth": 1, "head_dim": 33}, "heads of width 33"),
        ({"depth": 1, "window_pattern": "SX"}, "window pattern 'SX'"),
        ({"depth": 1, "vocab_size": 264}, "255 mergeable tokens do not hold the 256 bytes"),
    ],
)
def test_sizes_that_make_no_model(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        write_random_checkpoint(output=tmp_path / "new" / "nano", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_model_larger_than_the_disk_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the model takes \d+\.\d\d GB, .* are free there; make room"):
        write_random_checkpoint(2000, tmp_path / "nano")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError("writer")])
def test_nothing_is_left_of_what_was_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException | type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        assert len(list(tmp_path.rglob("tokenizer.pkl"))) == 1  # it was on its way
        raise stop

    monkeypatch.setattr(nanochat_x.initialize, "_random_weights", fail)
    expected = KeyboardInterrupt if stop is KeyboardInterrupt else CheckpointError
    with pytest.raises(expected):
        write_random_checkpoint(1, tmp_path / "new" / "nano", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """A real limit on the size of files, met by torch.save itself."""
    program = f"""if True:
        import resource, signal, sys
        from pathlib import Path
        from nanochat_x.errors import NanochatXError
        from nanochat_x.initialize import write_random_checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            write_random_checkpoint(2, Path({str(tmp_path / "nano")!r}), sequence_len=64, vocab_size=8192)
        except NanochatXError as error:
            print(error)
    """
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.count("\n") == 1
    assert "cannot be written" in result.stdout
    assert "make room" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_staged_folder_appears_whole_and_never_over_another(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with staged_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    with pytest.raises(FileExistsError), staged_folder(target):
        pytest.fail("the block must not begin")
    late = tmp_path / "c"
    with pytest.raises(FileExistsError), staged_folder(late):
        late.mkdir()  # someone else was faster
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]
