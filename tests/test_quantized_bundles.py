"""`lower --quant`: bundles through the C++ runner, what is refused, and that a wrong weight is caught."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import edit_manifest, replace_file, run_cli
from models import GENERATIONS, MAX_SEQ_LEN, weights_of
from test_quantize import METHODS, Method, drawn

from nanochat_x.certificate import find_reference
from nanochat_x.checkpoint import find_checkpoint, load_checkpoint
from nanochat_x.console import Silent
from nanochat_x.errors import LoweringError, ParityError, UsageError
from nanochat_x.lowering import LowerRequest, load_target
from nanochat_x.manifest import read_manifest
from nanochat_x.parity_report import VerifyRequest, verify_bundle
from nanochat_x.quantize import Format, dequantized, matrices_of, round_to_nearest
from nanochat_x.quantizing import digest_of, reference_weights, relative_error
from nanochat_x.targets import aoti, onnx, torchscript
from nanochat_x.targets.onnx_quantized import matrices_in, operands_of

NAME = "2026-07-smear"
MODULES = {"aoti": aoti, "onnx": onnx, "torchscript": torchscript}


@pytest.fixture(scope="session")
def quantized_bundle(lowered: Callable[..., Path]) -> Callable[[str, Method], Path]:
    """The bundle of a small model for a target, which passed the comparison after lowering. Never write to it."""
    return lambda target, method: lowered(NAME, target, quant=f"{method}:16")


@pytest.fixture
def copied(quantized_bundle: Callable[[str, Method], Path], tmp_path: Path) -> Path:
    """A copy of an int4 TorchScript bundle that a test may spoil."""
    return Path(shutil.copytree(quantized_bundle("torchscript", "int4"), tmp_path / "copy"))


def verified(bundle: Path, examples: int = 12) -> dict[str, Any]:
    """The report of `verify`."""
    checkpoint = find_reference(read_manifest(bundle), GENERATIONS / NAME, None)
    return verify_bundle(VerifyRequest(bundle, examples, 0, None), checkpoint, Silent())


@pytest.mark.parametrize("target", ["torchscript", "onnx"])
@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_bundle_computes_the_dequantized_model(
    target: str, method: Method, quantized_bundle: Callable[[str, Method], Path]
) -> None:
    report = verified(quantized_bundle(target, method))
    assert report["passed"], report["summary"]


def test_an_aoti_bundle_too(quantized_bundle: Callable[[str, Method], Path]) -> None:
    report = verified(quantized_bundle("aoti", "int4"))
    assert report["passed"], report["summary"]


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_with_groups_that_are_multiplied_as_integers(method: Method, lowered: Callable[..., Path]) -> None:
    """The demo model: the small ones are too narrow for groups that fill vectors."""
    bundle = lowered("demo", "torchscript", "bfloat16", quant=f"{method}:32")
    manifest = read_manifest(bundle)
    assert (manifest["dtype"], manifest["quantization"]["method"]) == ("bfloat16", method)
    report = verify_bundle(VerifyRequest(bundle, 12, 0, None), find_reference(manifest, None, None), Silent())
    assert report["passed"], report["summary"]


@pytest.mark.parametrize("target", ["torchscript", "onnx"])
@pytest.mark.parametrize("method", METHODS)
def test_what_the_manifest_says(target: str, method: Method, quantized_bundle: Callable[[str, Method], Path]) -> None:
    bundle = quantized_bundle(target, method)
    record = read_manifest(bundle)["quantization"]
    assert record["method"] == method
    assert record["bits"] == {"int8": 8, "int4": 4}[method]
    assert record["group_size"] == 16
    assert record["algorithm"] == "gptq"
    assert record["calibration"]["source"] == "written by the model"
    assert record["calibration"]["tokens"] > 0
    assert len(record["relative_errors"]) == 1 + 6 * weights_of(NAME)[0].n_layer
    low, high = {"int8": (1e-3, 0.02), "int4": (0.02, 0.4)}[method]  # rounding to nearest: some 0.006 and 0.1
    assert all(low < error < high for error in record["relative_errors"].values())
    stored = MODULES[target].quantized_tensors(bundle)
    tensors = {k: v for name, m in matrices_of(stored).items() for k, v in m.tensors(name).items()}
    assert record["sha256"] == digest_of(tensors)
    shown = run_cli("inspect", bundle)
    assert f"quantized   {method} in groups of 16, by gptq over " in shown.stdout


def test_a_bundle_is_as_small_as_its_format(
    lowered: Callable[..., Path], quantized_bundle: Callable[[str, Method], Path]
) -> None:
    """Of every matrix: a byte or half a byte a weight, and for each group a scale of 2 bytes and a zero of one."""
    spec, weights = weights_of(NAME)
    matrices = 0
    for name, tensor in weights.items():
        if name.endswith(("c_q.weight", "c_k.weight", "c_v.weight", "c_proj.weight", "c_fc.weight")):
            matrices += tensor.numel()
    matrices += spec.vocab_size * spec.n_embd
    plain = (lowered(NAME, "torchscript") / "model.pt").stat().st_size
    sizes: dict[Method, int] = {"int8": matrices + matrices // 16 * 2, "int4": matrices // 2 + matrices // 16 * 3}
    for method, size in sizes.items():
        saved = plain - (quantized_bundle("torchscript", method) / "model.pt").stat().st_size
        # Files are padded to 64 bytes a tensor and their code differs: some tens of kB.
        assert abs(saved - (4 * matrices - size)) < 100_000


def test_a_weight_that_was_changed_is_caught(copied: Path) -> None:
    """Even where the manifest's list of files was changed to go with it."""
    module = torch.jit.load(str(copied / "model.pt"))  # type: ignore[no-untyped-call]
    module.state_dict()["model.lm_head.weight"][0, 0] ^= 1
    module.save(str(copied / "changed.pt"))
    data = (copied / "changed.pt").read_bytes()
    (copied / "changed.pt").unlink()
    replace_file(copied, "model.pt", data)
    with pytest.raises(ParityError, match="SHA-256 differs"):
        verified(copied, 1)
    done = run_cli("verify", copied, "--against", GENERATIONS / NAME, "--examples", "1")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_matrices_of_another_layer_are_caught(copied: Path) -> None:
    """With every hash made right: a matrix must be as far from the checkpoint's as when it was lowered."""
    module = torch.jit.load(str(copied / "model.pt"))  # type: ignore[no-untyped-call]
    state = module.state_dict()
    for part in ("weight", "scales", "zeros"):
        one, other = (state[f"model.transformer.h.{i}.mlp.c_fc.{part}"] for i in (0, 1))
        one.copy_(other)
    module.save(str(copied / "changed.pt"))
    data = (copied / "changed.pt").read_bytes()
    (copied / "changed.pt").unlink()
    replace_file(copied, "model.pt", data)
    stored = torchscript.quantized_tensors(copied)
    tensors = {k: v for name, m in matrices_of(stored).items() for k, v in m.tensors(name).items()}
    edit_manifest(copied, lambda manifest: manifest["quantization"].update(sha256=digest_of(tensors)))
    with pytest.raises(
        ParityError, match=r"transformer\.h\.0\.mlp\.c_fc\.weight of the bundle is not the checkpoint's"
    ):
        verified(copied, 1)


def test_the_reference_is_the_bundles_own_matrices(copied: Path) -> None:
    checkpoint = load_checkpoint(find_checkpoint(base_dir=GENERATIONS / NAME))
    weights = reference_weights(copied, read_manifest(copied), checkpoint, torch.float32)
    plain = dequantized(torchscript.quantized_tensors(copied))
    assert all(torch.equal(weights[name], plain[name]) for name in matrices_of(torchscript.quantized_tensors(copied)))
    assert weights.keys() == checkpoint.weights.keys()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [16, 32])
def test_onnx_operands_stand_for_the_same_matrix(method: Method, size: int) -> None:
    matrix = round_to_nearest(drawn(5, 96), Format(method, size))
    operands = {f"model.x.{key}": t for part in operands_of("y", matrix) for key, t in part.items()}
    operands = {key.replace(".y.", "."): t for key, t in operands.items()}
    back = matrices_of(matrices_in(operands))["x.weight"]
    assert torch.equal(back.weight, matrix.weight)
    assert torch.equal(back.scales, matrix.scales)
    assert torch.equal(back.dequantize(), matrix.dequantize())


def test_onnx_has_no_groups_of_24() -> None:
    with pytest.raises(LoweringError, match="no groups of 24 weights"):
        operands_of("x", round_to_nearest(drawn(2, 48), Format("int4", 24)))


def test_how_far_a_matrix_is_from_the_checkpoints() -> None:
    weight = drawn(64, 64)
    assert relative_error(weight, weight.clone()) == 0
    assert relative_error(weight, weight * 1.1) == pytest.approx(0.1, rel=1e-4)
    assert relative_error(drawn(70, 64), drawn(70, 64)[:64] * 0.5) == pytest.approx(0.5, rel=1e-6)
    assert relative_error(weight, drawn(64, 64, seed=1)) > 1
    assert relative_error(weight, drawn(64, 32)) == float("inf")


@pytest.fixture
def request_of(tmp_path: Path) -> Callable[..., LowerRequest]:
    """A request to lower a small checkpoint."""

    def make(**options: Any) -> LowerRequest:
        fields = {
            "targets": ("torchscript",), "output": tmp_path / "out", "source": None, "model_tag": None, "step": None,
            "base_dir": GENERATIONS / NAME, "tokenizer_dir": None, "dtype": "float32", "max_seq_len": MAX_SEQ_LEN,
            "cached": True, "options": {}, "overrides": {}, "force": False, "verify": False,
        }  # fmt: skip
        return LowerRequest(**{**fields, **options})

    return make


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": ("executorch",)}, "the target executorch has no --quant int4: XNNPACK"),
        ({"dtype": "float16"}, "--quant int4 computes in float32 or bfloat16, not in float16"),
        ({"quantization": None, "calibration": Path("x")}, "--calibration is for --quant and for --dtype float16"),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str, request_of: Callable[..., LowerRequest]) -> None:
    request = request_of(**{"quantization": Format("int4"), **options})
    with pytest.raises(UsageError) as raised:
        load_target(request.targets[0], request)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--group-size", "16"], "--group-size is for --quant"),
        (["--quant", "int4"], "--group-size 32 does not divide the width 48 of "),
        (["--quant", "int4", "--group-size", "0"], "'0' is not an integer of at least 1"),
        (["--quant", "int2"], "'int2' is not one of 'int8', 'int4'"),
        (["--quant", "int4", "--target", "all"], "the target executorch has no --quant int4"),
        (["--quant", "int4", "--group-size", "16", "--calibration", "nowhere"], "nowhere cannot be read"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    lower = ["lower", "--base-dir", str(GENERATIONS / NAME), "--target", "torchscript", "-o", str(tmp_path / "out")]
    done = run_cli(*lower, "--no-verify", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_calibration_text_is_recorded(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is 9325 + 33? " * 2000, encoding="utf-8")
    bundle = tmp_path / "out"
    done = run_cli(
        "lower", "--base-dir", GENERATIONS / NAME, "--target", "torchscript", "-o", bundle, "--no-verify", "--quant",
        "int8", "--group-size", "16", "--calibration", text,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["quantization"]["calibration"]
    assert (record["source"], record["name"]) == ("file", "text.txt")
    assert record["tokens"] > 0
