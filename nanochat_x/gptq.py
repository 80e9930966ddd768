"""GPTQ: rounds a matrix column by column and lets the columns that are left make up for each error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022
(https://arxiv.org/abs/2210.17323), algorithm 1; then some sweeps of coordinate descent over what it found, in which
earlier columns answer to later ones too (Behdin et al., "QuantEase", 2023, https://arxiv.org/abs/2309.01885). What is
made small is the error of the layer's output, ||X W^T - X Q^T||^2, whose Hessian in each row of W is H = 2 X^T X for
the inputs X [tokens, K] of a calibration text.

A model is quantised in one pass over its calibration text: whatever reaches a matrix has gone through the quantised
ones before it, so that each sees what it will meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress

import torch
from torch import Tensor, nn

from nanochat_x.errors import LoweringError
from nanochat_x.model import GPT, Linear
from nanochat_x.quantize import (
    Format,
    Grid,
    QuantizedMatrix,
    choose_grid,
    in_groups,
    is_matrix,
    limits_of,
    with_matrices,
)
from nanochat_x.spec import ModelSpec
from nanochat_x.wrappers import ExportableGPT

#: Added to the Hessian's diagonal, as a share of its mean: the paper's.
DAMPING = 0.01
_MOST_DAMPING = 1.0
SWEEPS = 2  # of coordinate descent; further ones change next to nothing


def damped_hessian(inputs: Tensor, damping: float = DAMPING) -> Tensor:
    """2 X^T X with a share of its mean diagonal added to the diagonal, float32 [K, K], for X float32 [tokens, K].

    Inputs that are all zero give the identity. Raises LoweringError if they are not finite.
    """
    # numpy computes a matrix's product with its own transpose at half the cost (BLAS syrk).
    x = inputs.numpy()
    hessian: Tensor = torch.from_numpy(x.T @ x).mul_(2)
    mean = hessian.diagonal().mean()
    if not mean.isfinite():
        raise LoweringError("the calibration text drives the model to numbers that are not finite")
    if mean == 0:
        return torch.eye(hessian.shape[0])
    hessian.diagonal().add_(damping * mean)
    return hessian


def inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular float32 [K, K] with U^T U = the inverse of a damped Hessian.

    Adds more to its diagonal where float32 cannot factorise it. Raises LoweringError if that does not help.
    """
    mean, damping = hessian.diagonal().mean(), 0.0
    while True:
        # With rows and columns in reverse order the Cholesky factor L gives H = R R^T for the upper triangular R = L
        # turned around, and U = R^-1: one factorisation, and no inverse of H itself.
        turned = hessian.flip(0, 1)
        turned.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not failed:
            upper: Tensor = lower.flip(0, 1)
            factor: Tensor = torch.linalg.solve_triangular(upper, torch.eye(hessian.shape[0]), upper=True)
            return factor
        damping = 10 * max(damping, DAMPING)
        if damping > _MOST_DAMPING:
            raise LoweringError("the calibration text gives a Hessian that cannot be factorised")


def quantize_matrix(
    weight: Tensor, hessian: Tensor, factor: Tensor, form: Format, sweeps: int = SWEEPS
) -> QuantizedMatrix:
    """Quantises float32 [N, K] by the damped Hessian [K, K] of its inputs and the `inverse_factor` of that."""
    size = form.group_size
    # Column-major: a step takes a column, and updates those right of it.
    columns = weight.t().clone(memory_format=torch.contiguous_format)  # [K, N]
    # How much an error in a column costs once the later ones have made up for it.
    importance = factor.diagonal().square().reciprocal()
    q = torch.empty_like(columns)
    grids: list[Grid] = []
    for begin in range(0, columns.shape[0], size):
        end = begin + size
        group = columns[begin:end]
        grid = choose_grid(group.t().unsqueeze(1), form, importance[begin:end].unsqueeze(0))
        errors = _quantize_group(group, q[begin:end], factor[begin:end, begin:end], grid)
        columns[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
        grids.append(grid)
    scales = torch.cat([grid.scales for grid in grids], dim=1)
    zeros = [grid.zeros for grid in grids if grid.zeros is not None]
    grid = Grid(scales, torch.cat(zeros, dim=1) if zeros else None)
    if sweeps:
        _descend(weight, q, hessian, grid, form, sweeps)
    return QuantizedMatrix.from_grid(in_groups(q.t(), size), grid)


def _quantize_group(columns: Tensor, q: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """Sets q [g, N]; returns the errors in units of the factor's diagonal, [g, N]. Changes `columns` [g, N]."""
    errors = torch.empty_like(columns)
    for i in range(columns.shape[0]):
        column = columns[i]
        rounded = grid.round(column[:, None, None])
        q[i] = rounded[:, 0, 0]
        torch.sub(column, grid.value(rounded)[:, 0, 0], out=errors[i])
        errors[i] /= factor[i, i]
        columns[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return errors


def _descend(weight: Tensor, q: Tensor, hessian: Tensor, grid: Grid, form: Format, sweeps: int) -> None:
    """Coordinate descent: each column of q float32 [K, N] in turn to what is best, given all the others, in place."""
    size, (lowest, highest) = form.group_size, limits_of(form.method)
    groups = in_groups(q.t(), size)
    # H times what is lost: how a column would have to move, times the Hessian's diagonal.
    pull = hessian @ (weight - grid.value(groups).flatten(1)).t()  # [K, N]
    steps = grid.scales.float().t().contiguous()  # [G, N]
    for begin in sweeps * list(range(0, q.shape[0], size)):
        end, step = begin + size, steps[begin // size]
        own, moved = pull[begin:end], torch.empty(size, q.shape[1])
        for i in range(size):
            better = own[i] / (step * hessian[begin + i, begin + i])
            better.add_(q[begin + i]).round_().clamp_(lowest, highest)
            torch.sub(better, q[begin + i], out=moved[i])
            moved[i] *= step
            q[begin + i] = better
            own.addr_(hessian[begin:end, begin + i], moved[i], alpha=-1)
        for others in (slice(0, begin), slice(end, None)):
            pull[others].addmm_(hessian[others, begin:end], moved, alpha=-1)


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
    last: tuple[Tensor, Tensor, Tensor] | None = None  # inputs, Hessian, factor: q, k and v have one input

    def quantize(name: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal last
        assert isinstance(module, Linear)
        (x,) = inputs
        try:
            if last is None or last[0] is not x:
                hessian = damped_hessian(x.flatten(0, -2))
                last = x, hessian, inverse_factor(hessian)
        except LoweringError as error:
            raise LoweringError(f"{name} cannot be quantised: {error.what}") from error
        found[name] = quantize_matrix(module.weight.detach().float(), last[1], last[2], form)
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
