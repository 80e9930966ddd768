"""The project's own operators as Python computes them: what a matrix in 8 or 4 bits stands for, number by number."""

from __future__ import annotations

import pytest
import torch
from models import largest

from nanochat_x import operators


def random_grid(rows: int, groups: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    scales = torch.rand(rows, groups, generator=generator).bfloat16()
    return scales, torch.randint(16, (rows, groups), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("group", [16, 24, 32])
def test_what_a_quantised_matrix_is(group: int) -> None:
    generator = torch.Generator().manual_seed(group)
    rows, groups = 3, 4
    scales, zeros = random_grid(rows, groups, generator)
    int8 = torch.randint(-127, 128, (rows, groups * group), generator=generator, dtype=torch.int8)
    packed = torch.randint(256, (rows, groups * group // 2), generator=generator, dtype=torch.uint8)
    whole, half = operators.dequantized_int8(int8, scales), operators.dequantized_int4(packed, scales, zeros)
    for n in range(rows):
        for k in range(groups * group):
            g, within = divmod(k, group)
            scale, zero = float(scales[n, g]), int(zeros[n, g])
            byte = int(packed[n, g * (group // 2) + within % (group // 2)])
            q = byte & 15 if within < group // 2 else byte >> 4
            assert float(whole[n, k]) == int(int8[n, k]) * scale
            assert float(half[n, k]) == (q - zero) * scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_the_dequantised_matrix(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    scales, zeros = random_grid(5, 2, generator)
    int8 = torch.randint(-127, 128, (5, 32), generator=generator, dtype=torch.int8)
    packed = torch.randint(256, (5, 16), generator=generator, dtype=torch.uint8)
    x = torch.randn(2, 3, 32, generator=generator).to(dtype)
    pairs = [
        (torch.ops.nanochat_x.linear_int8(x, int8, scales), operators.dequantized_int8(int8, scales)),
        (torch.ops.nanochat_x.linear_int4(x, packed, scales, zeros), operators.dequantized_int4(packed, scales, zeros)),
    ]
    for product, matrix in pairs:
        exact = x.double() @ matrix.double().T
        assert product.dtype == dtype
        # 32 roundings of float32 on the way, and one of the result's dtype
        unit = max(torch.finfo(dtype).eps, 2**-23 if dtype != torch.float64 else 0.0)
        assert largest(product - exact) <= largest(exact) * (unit + (0.0 if dtype == torch.float64 else 32 * 2**-23))
