"""bench/peers.py: the eager peer is the model, the llama has as many weights, turns, ratios; nothing is installed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import MAX_SEQ_LEN, NAMES, exact_logits, model_of

from nanochat_x.errors import RunnerError, UsageError

D12 = {"n_embd": 768, "n_layer": 12, "n_head": 6, "n_kv_head": 6, "mlp_width": 3072, "vocab_size": 32768}
#: Answers each line at once, with times that grow.
WORKER = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for number, _ in enumerate(sys.stdin, 1):
    print(json.dumps({"prefill_s": SCALE * number, "decode_s": SCALE * number * 2}), flush=True)
"""


def load(root: Path, name: str) -> ModuleType:
    """A file of bench/ as a module."""
    spec = importlib.util.spec_from_file_location(name, root / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def peers(root: Path) -> ModuleType:
    return load(root, "peers")


@pytest.fixture(scope="module")
def eager(root: Path) -> ModuleType:
    load(root, "peer_worker")  # which it imports
    return load(root, "peer_eager")


# --- eager PyTorch


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pieces", [[300], [200, 1, 1, 98], [1] * 5])
def test_the_eager_peer_is_the_model(eager: ModuleType, name: str, pieces: list[int]) -> None:
    """Behind each piece, the logits of the whole pass without a cache in float64; windows are shorter than that."""
    model = model_of(name)
    ids = torch.randint(0, model.spec.vocab_size, (1, sum(pieces)), generator=torch.Generator().manual_seed(3))
    want = exact_logits(name, ids)
    engine = eager.EagerEngine(model, MAX_SEQ_LEN)
    engine.feed(ids[:, :7])
    engine.clear()  # nothing of that may be left
    done = 0
    with torch.inference_mode():
        for piece in pieces:
            logits = engine.feed(ids[:, done : done + piece])
            done += piece
            assert logits.shape == (1, 1, model.spec.vocab_size)
            torch.testing.assert_close(logits[0, 0].double(), want[0, done - 1], atol=2e-4, rtol=0)


def test_random_weights_are_finite_and_of_the_shape(eager: ModuleType) -> None:
    spec = model_of(NAMES[-1]).spec
    model = eager.random_model(spec, torch.bfloat16)
    assert model.transformer.wte.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.bfloat16
    logits = eager.EagerEngine(model, 8).feed(torch.tensor([[1, 2, 3]]))
    assert bool(logits.isfinite().all())
    assert float(logits.std()) > 0


# --- the llama


def test_the_llama_has_as_many_weights(peers: ModuleType) -> None:
    shape = peers.llama_shape(D12, 640)
    assert shape["ffn_width"] == 2048
    per_layer = 4 * 768 * 768 + 2 * 768 * 3072
    assert peers.matrix_weights(D12) == peers.llama_weights(shape) == 12 * per_layer + 32768 * 768
    odd = {**D12, "n_embd": 320, "n_head": 5, "n_kv_head": 1, "mlp_width": 1280}  # 853.3 columns would be even
    shape = peers.llama_shape(odd, 4000)
    assert shape["ffn_width"] % 32 == 0
    assert peers.llama_weights(shape) == pytest.approx(peers.matrix_weights(odd), rel=0.01)
    assert shape["context"] == 4000


@pytest.mark.parametrize(
    ("manifest", "width"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "float16", "quantization": None}, "16 bit"),
        ({"dtype": "bfloat16"}, "16 bit"),
        ({"dtype": "float32", "quantization": {"bits": 8, "group_size": 32}}, "int8"),
        ({"dtype": "bfloat16", "quantization": {"bits": 4, "group_size": 32}}, "int4"),
    ],
)
def test_widths(peers: ModuleType, manifest: dict[str, Any], width: str) -> None:
    assert peers.width_of(manifest) == width
    assert width in peers.WIDTHS


# --- turns, figures, ratios


def entrant(peers: ModuleType, name: str, width: str, code: str) -> Any:
    return peers.Entrant(name, width, [sys.executable, "-c", code])


def test_rounds_and_ratios(peers: ModuleType) -> None:
    arguments = argparse.Namespace(prompt_tokens=10, decode_tokens=4)
    found = [
        entrant(peers, "ours", "float32", WORKER.replace("SCALE", "1")),
        entrant(peers, "theirs", "float32", WORKER.replace("SCALE", "4")),
        entrant(peers, "another width", "int8", WORKER.replace("SCALE", "8")),
    ]
    for one in found:
        one.start()
    for _ in range(3):
        for one in found:
            one.run()
    for one in found:
        one.stop()
    rows = [peers.figures(one, arguments) for one in found]
    # seconds 1, 2, 3 for ten tokens; 2, 4, 6 for four
    assert rows[0]["prefill_tokens_per_s"] == {"median": 5.0, "min": pytest.approx(10 / 3), "max": 10.0}
    assert rows[0]["decode_tokens_per_s"] == {"median": 1.0, "min": pytest.approx(2 / 3), "max": 2.0}
    assert peers.ratios(rows, 1) == [{"bundle": "ours", "peer": "theirs", "prefill": 4.0, "decode": 4.0}]


@pytest.mark.parametrize(
    "code", ["", "print('{}')", "print('no JSON')", WORKER.split("for number")[0] + "sys.stdin.readline()"]
)
def test_one_that_dies_is_told(peers: ModuleType, code: str) -> None:
    one = entrant(peers, "llama.cpp f32", "float32", code)

    def start_and_run() -> None:
        one.start()
        one.run()

    with pytest.raises(RunnerError, match=r"llama\.cpp f32"):
        start_and_run()
    one.stop()


def test_bundles_of_different_models(peers: ModuleType, lowered: Callable[..., Path]) -> None:
    bundles = [lowered(NAMES[0]), lowered(NAMES[-1])]
    arguments = argparse.Namespace(bundles=bundles, prompt_tokens=4, decode_tokens=2, threads=1, peers=["eager"])
    with pytest.raises(UsageError, match="different models"):
        peers.entrants(arguments, peers.progress_on(None))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/nowhere"], "peers.py: error: no bundle at /nowhere"),
        (["b", "--rounds", "0"], "'0' is not an integer of at least 1"),
        (["b", "--peers", "gpt"], "there is no peer gpt"),
        ([], "BUNDLE"),
    ],
)
def test_mistakes(root: Path, arguments: list[str], said: str) -> None:
    command = [sys.executable, str(root / "bench" / "peers.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr.splitlines()[-1]


def test_a_bundle_beside_eager_pytorch(peers: ModuleType, root: Path, lowered: Callable[..., Path]) -> None:
    bundle = lowered(NAMES[-1])
    command = [sys.executable, str(root / "bench" / "peers.py"), str(bundle), "--peers", "eager", "--rounds", "2",
               "--prompt-tokens", "8", "--decode-tokens", "4", "--threads", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert [row["name"] for row in report["rows"]] == [str(bundle), "eager PyTorch float32"]
    for row in report["rows"]:
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            assert 0 < row[key]["min"] <= row[key]["median"] <= row[key]["max"]
    (ratio,) = report["ratios"]
    decode = [row["decode_tokens_per_s"]["median"] for row in report["rows"]]
    assert ratio["decode"] == pytest.approx(decode[0] / decode[1])


def test_requirements_are_pinned(root: Path) -> None:
    setup = load(root, "setup_peers")
    lines = [
        line for line in (root / "bench" / "requirements.txt").read_text().splitlines() if line[:1] not in ("#", "")
    ]
    assert len(setup.requirements()) == len(lines) == 4
    assert setup.PEERS.relative_to(root).parts == ("build", "peers")
