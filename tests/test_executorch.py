"""ExecuTorch bundles through the C++ runner and through ExecuTorch's own Python runtime."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import change_byte, edit_manifest, lower_bundle, replace_file
from golden import FACTOR, MODES, assert_golden_logits, assert_golden_tokens, assert_transcripts
from models import GENERATIONS, NAMES, exact_logits, golden_of, largest
from safetensors.torch import load_file, save_file

from nanochat_x.build import ensure_built
from nanochat_x.errors import LoweringError, RunnerError, UsageError
from nanochat_x.runner import Runner
from nanochat_x.targets.executorch import MAX_STEPS, make_target
from nanochat_x.targets.executorch_operators import OWN

MAX_BATCH = 3  # small, so that tests cross it
LAMBDAS, SMEAR = "2026-01-lambdas", "2026-07-smear"


@pytest.fixture(scope="session")
def pte_bundle(lowered: Callable[..., Path]) -> Callable[[str], Path]:
    """The bundle of one of tests/data/generations."""
    return partial(lowered, target="executorch", max_batch=MAX_BATCH)


@pytest.fixture(scope="session")
def stock_pte(lowered: Callable[..., Path]) -> Callable[[str], Path]:
    """The same without operators of ours."""
    return partial(lowered, target="executorch", kernels="stock", max_batch=MAX_BATCH)


@pytest.fixture(scope="session")
def demo_pte(lowered: Callable[..., Path]) -> Path:
    """The demo model."""
    return lowered("demo", "executorch")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_golden_logits(name: str, mode: str, pte_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    assert_golden_logits(pte_bundle(name), name, mode, tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_stock_kernels(mode: str, stock_pte: Callable[[str], Path], tmp_path: Path) -> None:
    assert_golden_logits(stock_pte(LAMBDAS), LAMBDAS, mode, tmp_path)


def test_operators_are_listed_and_an_unknown_one_is_refused(
    pte_bundle: Callable[[str], Path], stock_pte: Callable[[str], Path], tmp_path: Path
) -> None:
    own, stock = pte_bundle(SMEAR), stock_pte(LAMBDAS)
    assert set(json.loads((own / "manifest.json").read_text())["operators"]) == OWN
    assert "operators" not in json.loads((stock / "manifest.json").read_text())
    assert called_operators(own) == OWN
    assert called_operators(stock) == set()
    copy = Path(shutil.copytree(own, tmp_path / "copy"))
    edit_manifest(copy, lambda manifest: manifest["operators"].append("magic"))
    assert "call the operator nanochat_x::magic, which this runner has not; build the runner anew" in refusal(copy)


def called_operators(bundle: Path) -> set[str]:
    """Own operators that the program itself names."""
    return {name.decode() for name in re.findall(rb"nanochat_x::(\w+)", (bundle / "model.pte").read_bytes())}


@pytest.mark.parametrize("name", NAMES)
def test_golden_greedy_tokens(name: str, pte_bundle: Callable[[str], Path]) -> None:
    assert_golden_tokens(pte_bundle(name), name)


@pytest.mark.parametrize("mode", MODES)
def test_more_rows_than_one_call_takes(mode: str, pte_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """Two full groups of rows and one row more, each row another text."""
    name = "2026-07-smear"
    ids = torch.randint(256, (2 * MAX_BATCH + 1, 21), generator=torch.Generator().manual_seed(5))
    save_file({"many.input_ids": ids}, tmp_path / "in.safetensors")
    Runner(pte_bundle(name)).forward(tmp_path / "in.safetensors", tmp_path / "out.safetensors", **MODES[mode])
    got = load_file(tmp_path / "out.safetensors")["many.logits"]
    assert largest(got - exact_logits(name, ids)) <= 5e-5


def test_samples_do_not_depend_on_each_other(pte_bundle: Callable[[str], Path]) -> None:
    options = ("--raw", "--prompt-ids=1,2,3", "--max-tokens=16", "--seed=7", "--json")
    runner = Runner(pte_bundle("2026-07-smear"))
    several = runner.json("generate", *options, f"--num-samples={MAX_BATCH + 2}")["samples"]
    assert runner.json("generate", *options)["samples"] == several[:1]
    assert len({tuple(sample["ids"]) for sample in several}) == MAX_BATCH + 2


def test_transcripts(demo_pte: Path, data_dir: Path, tmp_path: Path) -> None:
    assert_transcripts(demo_pte, data_dir, tmp_path)


def test_weights_are_in_the_file_once(demo_pte: Path) -> None:
    manifest = json.loads((demo_pte / "manifest.json").read_text())
    assert manifest["programs"] == {"prefill": "model.pte", "decode": "model.pte", "full": "model.pte"}
    assert manifest["weights"] == ""
    assert manifest["limits"] == {"batch": 8, "steps": MAX_STEPS}
    assert manifest["machine"] == {"runtime_version": "1.5.1"}
    stored = sum(file["size"] for file in manifest["files"] if file["path"] == "model.pte")
    checkpoint = 4.5e6 * 4  # parameters in float32; a part of them stays bfloat16
    assert stored < 1.1 * checkpoint


def test_the_runner_needs_neither_python_nor_torch() -> None:
    program = ensure_built("executorch").program
    libraries = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    names = re.sub(r"=> \S+", "", libraries)  # a folder may be named so
    assert "libexecutorch.so" in names
    assert "python" not in names
    assert "torch_cpu" not in names
    assert "libc10" not in names


PYTHON_RUNTIME = """
import sys, torch
from executorch.runtime import Runtime, Verification
from safetensors.torch import load_file, save_file
ids = load_file(sys.argv[2])["ids"]
layers, heads, width = map(int, sys.argv[4:7])
program = Runtime.get().load_program(sys.argv[1], verification=Verification.InternalConsistency)
assert set(program.method_names) == {"prefill", "decode", "full"}
prefill, decode = program.load_method("prefill"), program.load_method("decode")
split = ids.shape[1] - 3
cache = [torch.zeros(1, heads, ids.shape[1], width) for _ in range(2 * layers)]
def step(method, begin, end):
    before = ids[:, max(begin - 1, 0) : max(begin, 1)]
    rows = ids[:, begin:end].contiguous(), before.contiguous(), torch.tensor([begin])
    logits, *new = method.execute([*rows, torch.arange(end - begin), *cache])
    for layer in range(layers):
        for kind in (0, 1):
            cache[2 * layer + kind][:, :, begin:end] = new[kind][layer]
    return logits.clone()
parts = [step(prefill, 0, split)] + [step(decode, t, t + 1) for t in range(split, ids.shape[1])]
full = program.load_method("full").execute([ids])[0]
save_file({"cached": torch.cat(parts, 1), "full": full.clone()}, sys.argv[3])
"""


def test_under_executorchs_own_python(stock_pte: Callable[[str], Path], tmp_path: Path) -> None:
    """The way that docs/executorch.md describes, without anything of ours; a process of its own for its libraries."""
    name = LAMBDAS
    bundle = stock_pte(name)
    model = json.loads((bundle / "manifest.json").read_text())["model"]
    ids = golden_of(name).input_ids["case1"][:1].contiguous()
    save_file({"ids": ids}, tmp_path / "in.safetensors")
    sizes = (model["n_layer"], model["n_kv_head"], model["n_embd"] // model["n_head"])
    subprocess.run(
        [sys.executable, "-c", PYTHON_RUNTIME, bundle / "model.pte", tmp_path / "in.safetensors",
         tmp_path / "out.safetensors", *map(str, sizes)],
        check=True, capture_output=True,
    )  # fmt: skip
    got = load_file(tmp_path / "out.safetensors")
    exact = exact_logits(name, ids)
    assert largest(got["full"] - exact) <= 5e-5
    assert largest(got["cached"] - exact) <= 5e-5


@pytest.fixture
def spoilt(pte_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a bundle that a test may spoil."""
    return Path(shutil.copytree(pte_bundle("2025-12-classic"), tmp_path / "copy"))


def refusal(bundle: Path) -> str:
    """What the runner says instead of generating."""
    with pytest.raises(RunnerError) as caught:
        Runner(bundle).run("generate", "--raw", "--prompt-ids=1", "--max-tokens=1", "--temperature=0")
    return str(caught.value)


def test_a_corrupted_file_is_refused_by_its_hash(spoilt: Path) -> None:
    change_byte(spoilt / "model.pte")
    assert "model.pte" in refusal(spoilt)
    assert re.search("SHA-256|hash", refusal(spoilt))


def test_garbage_with_the_right_hash_is_one_line(spoilt: Path) -> None:
    replace_file(spoilt, "model.pte", b"no program" * 100)
    assert "cannot read model.pte" in refusal(spoilt)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["machine"].update(runtime_version="99.0"), r"needs version 99\.0 or newer of the executorch"),
        (lambda m: m.pop("limits"), r"has no limits\.batch"),
        (lambda m: m["limits"].update(batch=99), "method decode has other inputs than the manifest says"),
        (lambda m: m["model"].update(vocab_size=99), "tokenizer has 272 tokens and its model 99"),
        (lambda m: m.update(max_seq_len=100_000), "has other inputs than the manifest says"),
        (lambda m: m.update(dtype="bfloat16"), "float32 and float16, not in bfloat16"),
    ],
)
def test_a_manifest_that_does_not_fit(spoilt: Path, change: Callable[[dict[str, Any]], object], said: str) -> None:
    edit_manifest(spoilt, change)
    assert re.search(said, refusal(spoilt))


def test_no_other_device(pte_bundle: Callable[[str], Path]) -> None:
    with pytest.raises(RunnerError, match=r"for the CPU .*not for the device 'cuda'"):
        Runner(pte_bundle("2025-12-classic")).run("generate", "--raw", "--prompt-ids=1", "--device=cuda")


def test_threads(pte_bundle: Callable[[str], Path]) -> None:
    options = ("--raw", "--temperature=0", "--prompt-ids=1,2,3", "--max-tokens=8", "--json")
    runner = Runner(pte_bundle("2025-12-classic"))
    answers = [runner.json("generate", *options, f"--threads={n}")["samples"][0]["ids"] for n in (1, 3)]
    assert answers[0] == answers[1]


def test_half_precision(tmp_path: Path) -> None:
    """float16, verified by the rule; without a cache, which spares two lowerings."""
    name = "2025-12-classic"
    bundle = lower_bundle(
        tmp_path / "half", "executorch", base_dir=GENERATIONS / name, max_seq_len=64, dtype="float16", cached=False
    )
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["programs"] == {"full": "model.pte"}
    assert 0 < manifest["verification"]["largest_ratio"] <= FACTOR


def test_what_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no bfloat16.*float16 or float32"):
        lower_bundle(tmp_path / "b", "executorch", source="demo", dtype="bfloat16")
    for number in (0, 1025):
        with pytest.raises(UsageError, match=f"--max-batch {number} is not 1 to 1024"):
            make_target(max_batch=number)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LoweringError, match=r"needs the package executorch; pip install executorch==1\.5\.1"):
        make_target()
    assert not (tmp_path / "b").exists()
