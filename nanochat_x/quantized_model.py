"""The model over quantised matrices: what is captured for a bundle in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from nanochat_x.model import GPT, Linear, prepare_weights
from nanochat_x.quantize import QuantizedMatrix, grids_of, matrices_of
from nanochat_x.spec import ModelSpec

#: Names of the operators that its products are.
QUANTIZED_PRODUCTS = frozenset({"linear_int8", "linear_int4"})


class QuantizedLinear(Linear):
    """`x @ w.T` of a `QuantizedMatrix` w, by an operator of operators.py."""

    def __init__(self, matrix: QuantizedMatrix) -> None:
        nn.Module.__init__(self)  # not Linear's, which makes a float weight
        self.weight = nn.Parameter(matrix.weight, requires_grad=False)
        self.scales = nn.Parameter(matrix.scales, requires_grad=False)
        self.zeros = None if matrix.zeros is None else nn.Parameter(matrix.zeros, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.zeros is None:
            out: Tensor = torch.ops.nanochat_x.linear_int8(x, self.weight, self.scales)
        else:
            out = torch.ops.nanochat_x.linear_int4(x, self.weight, self.scales, self.zeros)
        return out


def in_dtype(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict with quantised matrices whose other tensors are prepared for `dtype`."""
    matrices = matrices_of(weights)
    quantized = matrices.keys() | grids_of(matrices)
    plain = {name: tensor for name, tensor in weights.items() if name not in quantized}
    return dict(weights) | prepare_weights(plain, dtype)


def quantized_model(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    *,
    own_operators: Collection[str] = (),
) -> GPT:
    """A model that computes in `dtype` over a state dict with quantised matrices (`in_dtype`), not copied.

    Products with them are operators of operators.py; `own_operators` names others, as GPT takes them. Raises
    RuntimeError if a tensor is missing, unknown or of the wrong shape.
    """
    matrices = matrices_of(weights)
    # A place holder for each matrix, so that all else goes through the model's own checks.
    plain = {name: tensor for name, tensor in weights.items() if name not in grids_of(matrices)}
    for name, matrix in matrices.items():
        plain[name] = torch.empty(matrix.shape, device="meta")
    model = GPT.from_weights(spec, plain, dtype, own_operators=own_operators)
    for name, matrix in matrices.items():
        model.set_submodule(name.removesuffix(".weight"), QuantizedLinear(matrix))
    return model.eval()
