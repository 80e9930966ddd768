"""GPTQ: against its definition, on problems whose answer is known, and on a whole model."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from models import weights_of
from test_quantize import METHODS, drawn, quantized_weights
from torch import Tensor

from nanochat_x.calibration import write_samples
from nanochat_x.errors import LoweringError
from nanochat_x.gptq import DAMPING, damped_hessian, inverse_factor, quantize_matrix, quantize_model
from nanochat_x.model import GPT
from nanochat_x.quantize import (
    CLIPPED,
    Format,
    QuantizedMatrix,
    dequantized,
    matrices_of,
    round_to_nearest,
    unpack_int4,
)
from nanochat_x.wrappers import ExportableGPT

Method = Literal["int8", "int4"]
NAME = "2026-07-smear"


def correlated(tokens: int, width: int) -> Tensor:
    """Inputs whose columns go together, as those of a model's matrices do."""
    return drawn(tokens, width // 4, seed=1) @ drawn(width // 4, width, seed=2) + 0.1 * drawn(tokens, width, seed=3)


def output_error(weight: Tensor, other: Tensor, inputs: Tensor) -> float:
    """Mean squared error of the products with the inputs."""
    return float((inputs @ (weight - other).T).square().mean())


def compensated(weight: Tensor, inputs: Tensor, form: Format, **options: int) -> QuantizedMatrix:
    """`quantize_matrix` for inputs."""
    hessian = damped_hessian(inputs)
    return quantize_matrix(weight, hessian, inverse_factor(hessian), form, **options)


def test_the_hessian_is_damped() -> None:
    x = correlated(500, 64)
    exact = 2 * x.double().T @ x.double()
    exact.diagonal().add_(DAMPING * exact.diagonal().mean())
    assert torch.allclose(damped_hessian(x).double(), exact, rtol=1e-4, atol=1e-4 * float(exact.diagonal().mean()))


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = damped_hessian(correlated(500, 64))
    factor = inverse_factor(hessian).double()
    assert torch.equal(factor, factor.triu())
    # The damped Hessian's condition is some 1e4 here: float32 leaves 3 digits of its inverse.
    assert torch.allclose(factor.T @ factor @ hessian.double(), torch.eye(64, dtype=torch.float64), atol=1e-2)


def test_a_hessian_that_float32_cannot_factorise_is_damped_more() -> None:
    x = drawn(100, 1).expand(100, 32)  # every column alike: of rank 1
    hessian = damped_hessian(x.contiguous(), damping=0.0)
    assert bool(inverse_factor(hessian).isfinite().all())


def test_inputs_of_zeros_give_the_identity() -> None:
    assert torch.equal(damped_hessian(torch.zeros(10, 32)), torch.eye(32))
    assert torch.equal(inverse_factor(torch.eye(32)), torch.eye(32))


def test_inputs_that_are_not_finite_are_refused() -> None:
    x = drawn(10, 32)
    x[3, 4] = torch.inf
    with pytest.raises(LoweringError, match="not finite"):
        damped_hessian(x)


@pytest.mark.parametrize("method", METHODS)
def test_on_an_identity_hessian_it_rounds_to_nearest(method: Method) -> None:
    weight, form = drawn(20, 96), Format(method)
    got = quantize_matrix(weight, torch.eye(96), torch.eye(96), form)
    wanted = round_to_nearest(weight, form, CLIPPED)
    assert torch.equal(got.weight, wanted.weight)
    assert torch.equal(got.scales, wanted.scales)
    assert (got.zeros is None) == (wanted.zeros is None)
    if got.zeros is not None and wanted.zeros is not None:
        assert torch.equal(got.zeros, wanted.zeros)


@pytest.mark.parametrize("method", METHODS)
def test_it_halves_the_loss_on_correlated_inputs(method: Method) -> None:
    weight, x, form = drawn(64, 128), correlated(2000, 128), Format(method)
    nearest = output_error(weight, round_to_nearest(weight, form, CLIPPED).dequantize(), x)
    assert output_error(weight, compensated(weight, x, form).dequantize(), x) < nearest / 2


@pytest.mark.parametrize("method", METHODS)
def test_each_sweep_loses_less(method: Method) -> None:
    weight, x, form = drawn(64, 128), correlated(2000, 128), Format(method)
    errors = [output_error(weight, compensated(weight, x, form, sweeps=n).dequantize(), x) for n in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.97 * errors[0]


def test_a_sweep_moves_no_column_that_is_best() -> None:
    """After many sweeps no single q can be changed by one and lose less (the damped Hessian counts, in float64)."""
    weight, x, form = drawn(4, 32), correlated(500, 32), Format("int4", 16)
    hessian = damped_hessian(x).double()
    matrix = compensated(weight, x, form, sweeps=50)
    plain, scales = matrix.dequantize().double(), matrix.scales.double().repeat_interleave(16, 1)

    def loss(values: Tensor) -> Tensor:
        left = weight.double() - values
        return torch.einsum("nk,kl,nl->n", left, hessian, left)

    best = loss(plain)
    q = unpack_int4(matrix.weight, 2).flatten(1)
    for k in range(32):
        for step in (-1, 1):
            other = plain.clone()
            other[:, k] += step * scales[:, k]
            inside = (q[:, k].int() + step >= 0) & (q[:, k].int() + step <= 15)
            # float32 rounds the pull of a column by 1e-6 of it: near a tie it may stay where it is.
            assert bool((loss(other) >= best * (1 - 1e-3))[inside].all())


def test_it_is_the_algorithm_written_plainly() -> None:
    """Column by column over the whole matrix, on the grids that were found, in float64; without sweeps."""
    weight, x, form = drawn(8, 64), correlated(500, 64), Format("int4", 16)
    matrix = compensated(weight, x, form, sweeps=0)
    scales, zeros = matrix.scales.double(), matrix.zeros
    assert zeros is not None
    left, u = weight.double(), inverse_factor(damped_hessian(x)).double()
    plain = torch.zeros_like(left)
    for k in range(64):
        scale, zero = scales[:, k // 16], zeros[:, k // 16].double()
        plain[:, k] = (torch.round(left[:, k] / scale + zero).clamp(0, 15) - zero) * scale
        error = (left[:, k] - plain[:, k]) / u[k, k]
        left[:, k:] -= error[:, None] * u[k, k:]
    # A weight that float32 rounds to the other side of a tie changes all after it in its row: few rows may.
    same = (matrix.dequantize().double() == plain).all(1)
    assert int(same.sum()) >= 7


def test_a_model_loses_less_than_by_rounding_to_nearest() -> None:
    spec, weights = weights_of(NAME)
    form = Format("int4", 16)
    ids = write_samples(spec, weights, 263, 32, 64, seed=1)
    other = write_samples(spec, weights, 263, 8, 64, seed=2)
    seen: list[tuple[int, int]] = []
    quantized = quantize_model(spec, weights, form, ids, lambda done, count: seen.append((done, count)))
    count = 1 + 6 * spec.n_layer
    assert seen == [(i + 1, count) for i in range(count)]
    assert len(matrices_of(quantized)) == count

    def loss(state: dict[str, Tensor]) -> float:
        with torch.inference_mode():
            a, b = (ExportableGPT(GPT.from_weights(spec, w), 64)(other).log_softmax(-1) for w in (weights, state))
        return float((a.exp() * (a - b)).sum(-1).mean())  # KL divergence, nats

    nearest, compensated = loss(dequantized(quantized_weights(NAME, form))), loss(dequantized(quantized))
    assert compensated < 0.7 * nearest


def test_the_weights_that_came_in_are_left_alone() -> None:
    spec, weights = weights_of(NAME)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    quantize_model(spec, weights, Format("int8", 16), torch.zeros(1, 8, dtype=torch.long))
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())


def test_the_matrix_that_cannot_be_quantized_is_named() -> None:
    spec, weights = weights_of(NAME)
    spoilt = dict(weights)
    spoilt["transformer.h.1.mlp.c_fc.weight"] = torch.full_like(weights["transformer.h.1.mlp.c_fc.weight"], 1e30)
    with pytest.raises(LoweringError, match=r"transformer\.h\.1\.mlp\.c_proj\.weight cannot be quantised"):
        quantize_model(spec, spoilt, Format("int4", 16), torch.zeros(1, 8, dtype=torch.long))
