"""Quantises a checkpoint, records how, and finds the quantised matrices of a bundle again."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_x.calibration import Calibration, calibrate
from nanochat_x.checkpoint import Checkpoint
from nanochat_x.console import Progress
from nanochat_x.errors import BundleError, ParityError
from nanochat_x.gptq import quantize_model
from nanochat_x.interrupts import ending_at_once
from nanochat_x.model import prepare_weights
from nanochat_x.quantize import Format, check_format, dequantized, is_matrix, matrices_of

ALGORITHM = "gptq"

#: A quantised matrix may differ from its float one by this share of it, in the Frobenius norm. Rounding to nearest in 4
#: bits loses 0.08 to 0.12 of weights that are distributed normally; an error-compensating way up to 1.5 times as much.
#: A matrix of another layer, or with rows in another order, is wrong by 1.4.
MOST_CHANGE = {"int8": 0.05, "int4": 0.4}


def quantize_checkpoint(
    checkpoint: Checkpoint, form: Format, calibration: Path | None, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The checkpoint's weights with every matrix quantised, and the manifest's `quantization`.

    Raises UsageError for a group size or a calibration text that cannot be, LoweringError for numbers that cannot.
    """
    check_format(form, checkpoint.weights)
    weights = prepare_weights(checkpoint.weights, torch.float32)
    found = calibration_of(checkpoint, weights, calibration, progress)
    with progress.stage(f"quantize to {form.method}") as stage:
        quantized = quantize_model(
            checkpoint.spec, weights, form, found.ids, lambda done, count: stage.update(f"{done} of {count} matrices")
        )
        stage.detail(f"{len(matrices_of(quantized))} matrices in groups of {form.group_size}")
    return quantized, {
        "method": form.method,
        "bits": form.bits,
        "group_size": form.group_size,
        "algorithm": ALGORITHM,
        "calibration": found.record,
        "sha256": digest_of(quantized),
    }


def calibration_of(
    checkpoint: Checkpoint, weights: Mapping[str, Tensor], file: Path | None, progress: Progress
) -> Calibration:
    """`calibration.calibrate`, told to the user."""
    with progress.stage("read the calibration text" if file else "let the model write a calibration text") as stage:
        found = calibrate(checkpoint.spec, weights, checkpoint.tokenizer, file)
        stage.detail(f"{found.ids.numel()} tokens")
    return found


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """SHA-256, hex, over the names and bytes of the quantised matrices of a state dict."""
    digest = hashlib.sha256()
    for name, matrix in sorted(matrices_of(weights).items()):
        for part, tensor in sorted(matrix.tensors(name).items()):
            digest.update(f"{part} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def reference_weights(
    bundle: Path, manifest: Mapping[str, Any], checkpoint: Checkpoint, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The weights that a bundle is held to: the checkpoint's, prepared for `dtype`; its own where it is quantised.

    Quantising again would not give the same: sums in another order round another way. So the bundle's quantised
    matrices are taken, once they are those that were written (SHA-256) and near the checkpoint's; everything else is
    the checkpoint's. Raises ParityError, BundleError.
    """
    weights = prepare_weights(checkpoint.weights, dtype)
    record = manifest.get("quantization")
    if record is None:
        return weights
    with ending_at_once():
        target = importlib.import_module(f"nanochat_x.targets.{manifest['target']}")
    try:
        matrices = matrices_of(target.quantized_tensors(bundle))
        wanted = {name for name in weights if is_matrix(name)}
        if matrices.keys() != wanted:
            raise KeyError(min(matrices.keys() ^ wanted))
        tensors = {part: tensor for name, matrix in matrices.items() for part, tensor in matrix.tensors(name).items()}
        if digest_of(tensors) != record["sha256"]:
            raise ParityError("the bundle's quantised matrices are not those that were written (SHA-256 differs)",
                              remedy="lower the model again")  # fmt: skip
        plain = dequantized(tensors)
        limit = MOST_CHANGE[record["method"]]
    except (KeyError, RuntimeError, OSError, ValueError) as error:
        raise BundleError(f"{bundle}: its quantised matrices cannot be read ({error})",
                          remedy="lower the model again") from error  # fmt: skip
    for name, matrix in plain.items():
        change = relative_change(weights[name][: matrix.shape[0]], matrix)
        if not change <= limit:
            raise ParityError(
                f"{name} of the bundle is not the checkpoint's: it differs by {change:.2g} of it, where "
                f"{record['method']} loses at most {limit:g}",
                remedy="name the checkpoint that it was lowered from: --against DIR",
            )
    return weights | plain


def relative_change(matrix: Tensor, other: Tensor) -> float:
    """The Frobenius norm of the difference, as a share of the matrix's; infinite for other shapes."""
    if matrix.shape != other.shape:
        return float("inf")
    norm = float(matrix.float().norm())
    change = float((other - matrix.float()).norm())
    return change / norm if norm else change
