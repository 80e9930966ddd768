"""Products with quantised matrices as ONNX: onnxruntime's MatMulNBits, which computes in float32.

Standard operators (DequantizeLinear, then MatMul) could say the same, but onnxruntime turns them into a MatMulNBits
that rounds activations to 8 bits, unless its user forbids it. The operator itself carries that choice:
`accuracy_level` 1, float32.

Its kernels in float32 are for 4 bits only; 8-bit weights are widened whole at each call, some 50 times slower. So a
matrix in 8 bits is the sum of two in 4, q = 16 * (high - 8) + low, and its product that of two products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx import defs
from onnxscript.values import Op, Opset
from torch import Tensor

from nanochat_x.errors import LoweringError
from nanochat_x.quantize import QuantizedMatrix, in_groups, pack_int4, unpack_int4

_DOMAIN = "nanochat_x"  # of nodes that `expand` replaces
_RUNTIME_DOMAIN = "com.microsoft"
_MARK = ".quantized."  # in the name of every tensor that `expand` makes
_FLOAT32 = 1  # accuracy_level


def _operator(name: str, *parameters: tuple[str, str]) -> Op:
    """An operator of our own for the exporter, y = name(x, ...); it wants a schema of each."""
    schema = defs.OpSchema(
        name,
        _DOMAIN,
        1,
        inputs=[defs.OpSchema.FormalParameter(*parameter) for parameter in (("x", "tensor(float)"), *parameters)],
        outputs=[defs.OpSchema.FormalParameter("y", "tensor(float)")],
    )
    return Op(Opset(_DOMAIN, 1), name, schema)


_SCALES, _ZEROS = ("scales", "tensor(bfloat16)"), ("zeros", "tensor(uint8)")
_int8 = _operator("LinearInt8", ("weight", "tensor(int8)"), _SCALES)
_int4 = _operator("LinearInt4", ("weight", "tensor(uint8)"), _SCALES, _ZEROS)


def _linear_int8(x: Any, weight: Any, scales: Any) -> Any:
    return _int8(x, weight, scales)


def _linear_int4(x: Any, weight: Any, scales: Any, zeros: Any) -> Any:
    return _int4(x, weight, scales, zeros)


#: For torch's exporter: a node a product, which `expand` replaces.
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.nanochat_x.linear_int8.default: _linear_int8,
    torch.ops.nanochat_x.linear_int4.default: _linear_int4,
}


def is_quantized(name: str) -> bool:
    """Whether a graph's tensor is a part of a quantised matrix."""
    return _MARK in name


def expand(model: ir.Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replaces the products with quantised matrices of `tensors` by MatMulNBits. Returns the tensors that those take.

    Raises LoweringError for groups that it does not have.
    """
    graph, found = model.graph, dict[str, Tensor]()
    for node in list(graph):
        if node.domain != _DOMAIN:
            continue
        x, *inputs = node.inputs
        name, *grid = (str(value.name) for value in inputs if value is not None)
        scales, zeros = tensors[grid[0]], tensors[grid[1]] if len(grid) > 1 else None
        matrix = QuantizedMatrix(tensors[name], scales, zeros)
        results: Sequence[ir.Value] = []
        for operands in operands_of(name.removesuffix(".weight"), matrix):
            found |= operands
            product = _product(graph, x, operands)
            graph.insert_before(node, product)
            results = [*results, *product.outputs]
        if len(results) > 1:
            addition = ir.node("Add", results)
            graph.insert_before(node, addition)
            results = addition.outputs
        out, (result,) = node.outputs[0], results
        result.name, result.shape, result.type = out.name, out.shape, out.type
        out.replace_all_uses_with(result, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    if found:
        for name in [name for name, value in graph.initializers.items() if not value.uses()]:
            del graph.initializers[name]
        model.opset_imports.pop(_DOMAIN, None)
        model.opset_imports[_RUNTIME_DOMAIN] = 1
    return found


def operands_of(stem: str, matrix: QuantizedMatrix) -> list[dict[str, Tensor]]:
    """The tensors of each MatMulNBits whose sum is the product with a matrix: weight, scales and perhaps zeros.

    Raises LoweringError for groups that it does not have.
    """
    groups = matrix.scales.shape[1]
    scales = matrix.scales.float()
    prefix = f"{stem}{_MARK}"
    size = matrix.shape[1] // groups
    if size & (size - 1):
        raise LoweringError(
            f"onnxruntime has no groups of {size} weights", remedy="choose a --group-size of 16, 32, 64 or 128"
        )
    if matrix.zeros is not None:
        q = unpack_int4(matrix.weight, groups)
        return [{f"{prefix}weight": _pairs(q), f"{prefix}scales": scales, f"{prefix}zeros": _zeros(matrix.zeros)}]
    q = (in_groups(matrix.weight, size).short() + 128).to(torch.uint8)
    return [
        {f"{prefix}high": _pairs(q >> 4), f"{prefix}high_scales": scales * 16},  # without zeros they are 8
        {
            f"{prefix}low": _pairs(q & 15),
            f"{prefix}low_scales": scales,
            f"{prefix}low_zeros": torch.zeros(q.shape[0], -(-groups // 2), dtype=torch.uint8),
        },
    ]


def matrices_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of quantised matrices as `quantize` names them, from those that `expand` returned."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, mark, part = name.removeprefix("model.").partition(_MARK)
        if not mark:
            continue
        if part == "weight":
            scales, zeros = tensors[_sibling(name, "scales")], tensors[_sibling(name, "zeros")]
            both = torch.stack([zeros & 15, zeros >> 4], dim=-1).flatten(1)
            found[f"{stem}.weight"] = pack_int4(_unpaired(tensor))
            found[f"{stem}.zeros"] = both[:, : scales.shape[1]].contiguous()
        elif part == "high":
            scales = tensors[_sibling(name, "low_scales")]
            low = tensors[_sibling(name, "low")]
            q = (_unpaired(tensor).short() << 4) + _unpaired(low).short() - 128
            found[f"{stem}.weight"] = q.to(torch.int8).flatten(1)
        else:
            continue
        found[f"{stem}.scales"] = scales.to(torch.bfloat16)
    return found


def _sibling(name: str, part: str) -> str:
    return name.partition(_MARK)[0] + _MARK + part


def _pairs(q: Tensor) -> Tensor:
    """q uint8 [N, G, g] as MatMulNBits takes it: neighbours in a byte, the first one low; [N, G, g / 2]."""
    return q[..., 0::2] | (q[..., 1::2] << 4)


def _unpaired(pairs: Tensor) -> Tensor:
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(2)


def _zeros(zeros: Tensor) -> Tensor:
    """Zeros uint8 [N, G], two in a byte: [N, (G + 1) / 2]."""
    even = torch.nn.functional.pad(zeros, (0, zeros.shape[1] % 2))
    return even[:, 0::2] | (even[:, 1::2] << 4)


def _product(graph: ir.Graph, x: ir.Value | None, operands: Mapping[str, Tensor]) -> ir.Node:
    """A MatMulNBits of x and operands, which become initialisers of the graph."""
    weight = next(iter(operands.values()))
    rows, groups, half = weight.shape
    inputs = [x, *(_initializer(graph, name, tensor) for name, tensor in operands.items())]
    attributes = {"K": groups * half * 2, "N": rows, "bits": 4, "block_size": half * 2, "accuracy_level": _FLOAT32}
    return ir.node("MatMulNBits", inputs, attributes, domain=_RUNTIME_DOMAIN)


def _initializer(graph: ir.Graph, name: str, tensor: Tensor) -> ir.Value:
    value = ir.tensor(tensor.contiguous().numpy(), name=name)
    made = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(value.dtype), const_value=value)
    graph.register_initializer(made)
    return made
