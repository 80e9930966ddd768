"""Quantises a checkpoint, records how, and finds the quantised matrices of a bundle again."""

from __future__ import annotations

import hashlib
import importlib
import math
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

#: By how much, relatively, an error may differ from the recorded one: sums of float32 in another order.
_SAME_ERROR = 1e-3


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
        matrices = matrices_of(quantized)
        errors = {name: relative_error(weights[name], matrix.dequantize()) for name, matrix in matrices.items()}
        stage.detail(f"{len(matrices)} matrices in groups of {form.group_size}")
    return quantized, {
        "method": form.method,
        "bits": form.bits,
        "group_size": form.group_size,
        "algorithm": ALGORITHM,
        "calibration": found.record,
        "sha256": digest_of(quantized),
        "relative_errors": errors,
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
    matrices are taken, once they are those that were written (SHA-256) and as far from the checkpoint's as they were
    then; all else is the checkpoint's. Raises ParityError, BundleError.
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
        recorded = {name: float(record["relative_errors"][name]) for name in plain}
    except (KeyError, TypeError, RuntimeError, OSError, ValueError) as error:
        raise BundleError(f"{bundle}: its quantised matrices cannot be read ({error})",
                          remedy="lower the model again") from error  # fmt: skip
    # The distance is that from the checkpoint's own, whatever the bundle computes in.
    exact = weights if dtype == torch.float32 else prepare_weights(checkpoint.weights, torch.float32)
    for name, matrix in plain.items():
        distance = relative_error(exact[name], matrix)
        if not math.isclose(distance, recorded[name], rel_tol=_SAME_ERROR):
            raise ParityError(
                f"{name} of the bundle is not the checkpoint's: it differs by {distance:.3g} of it, and when it was "
                f"lowered by {recorded[name]:.3g}",
                remedy="name the checkpoint that it was lowered from: --against DIR",
            )
    return weights | plain


def relative_error(matrix: Tensor, other: Tensor) -> float:
    """The Frobenius norm of the difference from a matrix, as a share of the matrix's; infinite for other shapes.

    Rows of the matrix beyond those of the other are those that no token has, and do not count.
    """
    matrix = matrix[: other.shape[0]].float()
    if matrix.shape != other.shape:
        return math.inf
    norm, error = float(matrix.norm()), float((other - matrix).norm())
    return error / norm if norm else error
