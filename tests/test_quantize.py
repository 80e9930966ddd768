"""Weights in 8 and 4 bits: the formats against their definition, and the grids that are chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import NAMES, weights_of
from torch import Tensor

from nanochat_x.errors import UsageError
from nanochat_x.model import GPT
from nanochat_x.quantize import (
    Format,
    Grid,
    QuantizedMatrix,
    check_format,
    choose_grid,
    dequantized,
    in_groups,
    is_matrix,
    matrices_of,
    pack_int4,
    round_to_nearest,
    unpack_int4,
    with_matrices,
)
from nanochat_x.quantized_model import quantized_model
from nanochat_x.wrappers import ExportableGPT

Method = Literal["int8", "int4"]
METHODS: tuple[Method, ...] = ("int8", "int4")
NAME = "2026-07-smear"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """float32 numbers, distributed normally."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized_weights(name: str, form: Format) -> dict[str, Tensor]:
    """A generation's weights, rounded to nearest."""
    spec, weights = weights_of(name)
    rows = {"lm_head.weight": spec.vocab_size}
    return with_matrices(
        weights,
        ((key, round_to_nearest(t[: rows.get(key, t.shape[0])], form)) for key, t in weights.items() if is_matrix(key)),
    )


@given(rows=st.integers(1, 5), groups=st.integers(1, 4), size=st.sampled_from([16, 24, 32, 64]), data=st.data())
def test_packing_goes_there_and_back(rows: int, groups: int, size: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 15), min_size=rows * groups * size, max_size=rows * groups * size))
    q = torch.tensor(values, dtype=torch.uint8).view(rows, groups, size)
    packed = pack_int4(q)
    assert packed.shape == (rows, groups * size // 2)
    assert torch.equal(unpack_int4(packed, groups), q)


def test_where_a_packed_value_lies() -> None:
    q = torch.randint(16, (3, 2, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    packed = pack_int4(q)
    for n in range(3):
        for group in range(2):
            for i in range(16):
                byte = int(packed[n, group * 16 + i])
                assert (byte & 15, byte >> 4) == (int(q[n, group, i]), int(q[n, group, i + 16]))


@pytest.mark.parametrize("method", METHODS)
def test_dequantizing_is_the_definition(method: Method) -> None:
    form = Format(method, 16)
    matrix = round_to_nearest(drawn(5, 48), form)
    plain = matrix.dequantize()
    assert plain.dtype == torch.float32
    for n in range(5):
        for k in range(48):
            scale = float(matrix.scales[n, k // 16])
            if matrix.zeros is None:
                exact = int(matrix.weight[n, k]) * scale
            else:
                byte = int(matrix.weight[n, k // 16 * 8 + k % 8])
                q = byte & 15 if k % 16 < 8 else byte >> 4
                exact = (q - int(matrix.zeros[n, k // 16])) * scale
            assert float(plain[n, k]) == exact  # a product of 8 bits and 8 bits: float32 holds it


@pytest.mark.parametrize(
    ("method", "dtypes"),
    [("int8", (torch.int8, torch.bfloat16, None)), ("int4", (torch.uint8, torch.bfloat16, torch.uint8))],
)
def test_what_is_stored(method: Method, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None]) -> None:
    matrix = round_to_nearest(drawn(7, 96), Format(method, 32))
    assert (matrix.weight.dtype, matrix.scales.dtype) == dtypes[:2]
    assert matrix.weight.shape == (7, 96 if method == "int8" else 48)
    assert matrix.scales.shape == (7, 3)
    assert (matrix.zeros is None) == (dtypes[2] is None)
    if matrix.zeros is not None:
        assert (matrix.zeros.dtype, matrix.zeros.shape, int(matrix.zeros.max()) <= 15) == (torch.uint8, (7, 3), True)


@pytest.mark.parametrize("method", METHODS)
def test_nearest_is_nearest_on_the_rounded_grid(method: Method) -> None:
    """No other q of the group's grid is nearer: the scales were rounded before q was chosen."""
    weight = drawn(6, 64)
    matrix = round_to_nearest(weight, Format(method, 32))
    grid = Grid(matrix.scales, matrix.zeros)
    levels = torch.arange(-127, 128) if method == "int8" else torch.arange(16)
    values = grid.value(levels.float().expand(6, 2, -1))  # every value that a group can take
    distance = (in_groups(weight, 32)[..., None] - values[:, :, None, :]).abs().amin(-1).flatten(1)
    # A tie may go either way, by float32's rounding of weight / scale: half a unit in its last place.
    assert torch.allclose((matrix.dequantize() - weight).abs(), distance, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 1e-41, -3.0, 1e30])
def test_groups_of_one_value(method: Method, value: float) -> None:
    """Finite and near, also where bfloat16 has no normal step for the range."""
    matrix = round_to_nearest(torch.full((2, 32), value), Format(method))
    assert bool(matrix.scales.isfinite().all())
    assert bool((matrix.scales > 0).all())
    # bfloat16 has 8 significant bits: a scale is off by half a unit in its last place, 2^-8 of it, at most
    assert torch.allclose(matrix.dequantize(), torch.full((2, 32), value), rtol=2**-8, atol=1e-38)


def test_grids_weigh_errors() -> None:
    """Where one column counts for everything, its error is the least of all the ranges that are tried."""
    weight = drawn(50, 1, 32)
    importance = torch.full((1, 32), 1e-6)
    importance[0, 3] = 1.0
    form = Format("int4")
    plain, weighed = choose_grid(weight, form), choose_grid(weight, form, importance)

    def error(grid: Grid) -> Tensor:
        return (grid.value(grid.round(weight)) - weight).square()[:, 0]

    assert bool((error(weighed)[:, 3] <= error(plain)[:, 3]).all())
    assert float(error(weighed)[:, 3].sum()) < 0.5 * float(error(plain)[:, 3].sum())
    assert bool((error(plain).sum(1) <= error(weighed).sum(1)).all())


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (8, "--group-size 8 is no multiple of 8 from 16 on"),
        (20, "--group-size 20 is no multiple of 8 from 16 on"),
        (32, "--group-size 32 does not divide the width 48 of lm_head.weight"),
    ],
)
def test_group_sizes_that_cannot_be(size: int, said: str) -> None:
    _, weights = weights_of(NAME)
    with pytest.raises(UsageError) as raised:
        check_format(Format("int4", size), dict(sorted(weights.items())))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_matrix_and_nothing_else_is_quantized() -> None:
    _, weights = weights_of(NAME)
    quantized = quantized_weights(NAME, Format("int4", 16))
    left = {name for name in weights if name not in matrices_of(quantized)}
    assert all("gate" in name or "lambda" in name or "wte" in name or "value_embeds" in name for name in left)
    assert all(torch.equal(quantized[name], weights[name]) for name in left)
    assert len(matrices_of(quantized)) == 1 + 6 * weights_of(NAME)[0].n_layer


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_the_quantized_model_is_the_dequantized_one(name: str, method: Method) -> None:
    spec, _ = weights_of(name)
    weights = quantized_weights(name, Format(method, 16))
    ids = torch.randint(spec.vocab_size, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        got = ExportableGPT(quantized_model(spec, weights), 32)(ids)
        wanted = ExportableGPT(GPT.from_weights(spec, dequantized(weights)), 32)(ids)
    assert torch.equal(got, wanted)  # the same operators on the same numbers


def test_a_wrong_grid_is_seen() -> None:
    """The comparison above can fail: one zero of one group changes the logits."""
    spec, _ = weights_of(NAME)
    weights = quantized_weights(NAME, Format("int4", 16))
    matrix = matrices_of(weights)["lm_head.weight"]
    assert matrix.zeros is not None
    zeros = matrix.zeros.clone()
    zeros[0, 0] ^= 1
    spoilt = with_matrices(weights, [("lm_head.weight", replace(matrix, zeros=zeros))])
    ids = torch.zeros(1, 1, dtype=torch.long)
    one, other = (ExportableGPT(GPT.from_weights(spec, dequantized(w)), 32)(ids) for w in (weights, spoilt))
    assert not torch.equal(one, other)
    assert isinstance(matrix, QuantizedMatrix)
