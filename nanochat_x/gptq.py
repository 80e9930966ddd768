"""GPTQ: rounds a matrix column by column and lets the columns that are left make up for each error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022
(https://arxiv.org/abs/2210.17323), algorithm 1. What is made small is the error of the layer's output,
||X W^T - X Q^T||^2, whose Hessian in each row of W is H = 2 X^T X for the inputs X [tokens, K] of a calibration text.

A model is quantised in one pass over its calibration text: whatever reaches a matrix has gone through the quantised
ones before it, so that each makes up for what they lost as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress

import numpy as np
import torch
from torch import Tensor, nn

from nanochat_x.errors import LoweringError
from nanochat_x.model import GPT, Linear
from nanochat_x.quantize import Format, Grid, QuantizedMatrix, choose_grid, is_matrix, with_matrices
from nanochat_x.spec import ModelSpec
from nanochat_x.wrappers import ExportableGPT

#: Added to the Hessian's diagonal, as a share of its mean: the paper's.
DAMPING = 0.01
_MOST_DAMPING = 1.0


def inverse_factor(inputs: Tensor) -> Tensor:
    """U, upper triangular float32 [K, K] with U^T U = inverse of (2 X^T X + damping), for inputs X float32 [tokens, K].

    Inputs that are all zero give the identity. Raises LoweringError if they are not finite.
    """
    hessian = _hessian(inputs)
    mean = float(hessian.diagonal().mean())
    if not np.isfinite(mean):
        raise LoweringError("the calibration text drives the model to numbers that are not finite")
    if mean == 0.0:
        return torch.eye(hessian.shape[0])
    damping = DAMPING
    while True:
        # With rows and columns in reverse order the Cholesky factor L gives H = R R^T for the upper triangular R = L
        # turned around, and U = R^-1: one factorisation, and no inverse of H itself.
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        if damping >= _MOST_DAMPING:
            raise LoweringError("the calibration text gives a Hessian that cannot be factorised")
        damping *= 10  # float32 was not enough for a Hessian this badly conditioned
    identity = torch.eye(hessian.shape[0])
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)


def _hessian(inputs: Tensor) -> Tensor:
    """2 X^T X, float32. numpy computes a matrix times its own transpose at half the cost (BLAS syrk)."""
    x = inputs.numpy()
    return torch.from_numpy(x.T @ x).mul_(2)


def quantize_matrix(weight: Tensor, factor: Tensor, form: Format) -> QuantizedMatrix:
    """Quantises float32 [N, K] by the `inverse_factor` [K, K] of its inputs."""
    size = form.group_size
    # Column-major: a step takes a column, and updates those right of it.
    columns = weight.t().contiguous()  # [K, N]
    if columns.data_ptr() == weight.data_ptr():
        columns = columns.clone()
    # How much an error in a column costs once the later ones have made up for it.
    importance = factor.diagonal().square().reciprocal()
    found: list[Tensor] = []
    grids: list[Grid] = []
    for begin in range(0, columns.shape[0], size):
        end = begin + size
        group = columns[begin:end]
        grid = choose_grid(group.t().unsqueeze(1), form, importance[begin:end].unsqueeze(0))
        q, errors = _quantize_group(group, factor[begin:end, begin:end], grid)
        columns[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
        found.append(q)
        grids.append(grid)
    scales = torch.cat([grid.scales for grid in grids], dim=1)
    zeros = [grid.zeros for grid in grids if grid.zeros is not None]
    q = torch.stack(found).permute(2, 0, 1)  # [G, g, N] -> [N, G, g]
    return QuantizedMatrix.from_grid(q, Grid(scales, torch.cat(zeros, dim=1) if zeros else None))


def _quantize_group(columns: Tensor, factor: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """q and the errors in units of the factor's diagonal, both float32 [g, N]. Changes `columns` [g, N]."""
    q, errors = torch.empty_like(columns), torch.empty_like(columns)
    for i in range(columns.shape[0]):
        column = columns[i]
        rounded = grid.round(column[:, None, None])
        q[i] = rounded[:, 0, 0]
        torch.sub(column, grid.value(rounded)[:, 0, 0], out=errors[i])
        errors[i] /= factor[i, i]
        columns[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return q, errors


class _Finished(BaseException):
    """The last matrix was quantised: the rest of the forward pass is of no interest."""


def quantize_model(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    form: Format,
    ids: Tensor,
    see: Callable[[int, int], object] = lambda done, count: None,
) -> dict[str, Tensor]:
    """The state dict with every matrix quantised, from weights prepared for float32 and calibration ids int64 [R, T].

    Rows of lm_head beyond the vocabulary are left off. `see` is told how many matrices of how many are done. Memory:
    the activations of the whole text, and one matrix at a time beside the result. Raises LoweringError naming the
    matrix whose inputs cannot be used.
    """
    model = GPT.from_weights(spec, weights, torch.float32)
    modules = {f"{name}.weight": module for name, module in model.named_modules() if is_matrix(f"{name}.weight")}
    found: dict[str, QuantizedMatrix] = {}
    last: tuple[Tensor, Tensor] | None = None  # q, k and v have one input

    def quantize(name: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal last
        assert isinstance(module, Linear)
        (x,) = inputs
        try:
            factor = last[1] if last is not None and last[0] is x else inverse_factor(x.flatten(0, -2))
        except LoweringError as error:
            raise LoweringError(f"{name} cannot be quantised: {error.what}") from error
        last = x, factor
        found[name] = quantize_matrix(module.weight.detach().float(), factor, form)
        see(len(found), len(modules))
        if len(found) == len(modules):
            raise _Finished
        module.weight = nn.Parameter(found[name].dequantize(), requires_grad=False)

    def release(module: nn.Module) -> None:
        module.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # used once in the pass

    with ExitStack() as hooks, torch.inference_mode():
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(lambda m, args, name=name: quantize(name, m, args))
            hooks.callback(hook.remove)
            hooks.callback(module.register_forward_hook(lambda m, args, out: release(m)).remove)
        with suppress(_Finished):
            ExportableGPT(model, ids.shape[1])(ids)
    return with_matrices(weights, found.items())
