"""The project's operators for what stands between products: functions of rows, each several passes of stock kernels.

    norm(x, eps)                                       root mean square norm
    mix(x, x_scales, y, y_scales, index)               x_scales[index] * x + y_scales[index] * y
    rotary(x, cos, sin, eps, scale, heads_first)       rotated heads, normed, scaled
    gate_values(v, h, gate, table, ids, scale)         values plus their gated embeddings, heads first
    heads_first(x)                                     [B, T, H, D] as [B, H, T, D]
    relu_square(x)                                     relu(x)^2
    soft_cap(x, cap)                                   cap * tanh(x / cap)

Operators are for targets whose runtime runs a graph node by node, and for a compiler that would take long to fuse what
they are made of. All other programs have what they are here, in ATen operators.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_x import operators
from nanochat_x.operators import define, row_major

#: Name -> schema. The runner has each (runners/kernels/row_operators.h).
SCHEMAS = {
    "norm": "(Tensor x, float eps) -> Tensor",
    "mix": "(Tensor x, Tensor x_scales, Tensor y, Tensor y_scales, int index) -> Tensor",
    "rotary": "(Tensor x, Tensor cos, Tensor sin, float eps, float scale, bool heads_first) -> Tensor",
    "gate_values": "(Tensor v, Tensor h, Tensor gate, Tensor table, Tensor ids, float scale) -> Tensor",
    "heads_first": "(Tensor x) -> Tensor",
    "relu_square": "(Tensor x) -> Tensor",
    "soft_cap": "(Tensor x, float cap) -> Tensor",
}

#: Every operator of the project: what its runner has for libtorch (runners/backends/operators.h).
ALL = operators.SCHEMAS | SCHEMAS


class RowFunctions(NamedTuple):
    """What a model calls: of each function the operator, or what it is made of."""

    norm: Callable[[Tensor, float], Tensor]
    mix: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor, float, float, bool], Tensor]
    gate_values: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
    heads_first: Callable[[Tensor], Tensor]
    relu_square: Callable[[Tensor], Tensor]
    soft_cap: Callable[[Tensor, float], Tensor]


def norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32 or wider; in x's dtype."""
    # F.rms_norm spelled out: its kernel's layout check makes torch.export guard against sequences of length 1
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def mix(x: Tensor, x_scales: Tensor, y: Tensor, y_scales: Tensor, index: int) -> Tensor:
    """x_scales[index] * x + y_scales[index] * y: x, y of one shape and dtype, scales [L] float32."""
    return x_scales[index] * x + y_scales[index] * y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding with halves a, b of the last dimension: (a cos + b sin, b cos - a sin).

    x [B, T, H, D]; cos, sin [1 or B, T, 1, D / 2] of its dtype.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, eps: float, scale: float, heads_first: bool) -> Tensor:
    """`rotate`, `norm` of each head, times scale: x [B, T, H, D] -> the same, or [B, H, T, D] if heads_first."""
    y = norm(rotate(x, cos, sin), eps)
    y = y if scale == 1.0 else y * scale
    return _heads_first(y) if heads_first else y


def gate(x: Tensor, weight: Tensor) -> Tensor:
    """sigmoid(x[..., :channels] @ weight.T): x [..., C], weight [gates, channels] -> [..., gates].

    Written as a product and a sum, which fuse; F.linear on a slice takes a path that makes torch.export guard
    against T = 1.
    """
    x = x[..., : weight.shape[1]].unsqueeze(-2)
    return torch.sigmoid((x * weight.to(x.dtype)).sum(-1))


def gate_values(v: Tensor, h: Tensor, weight: Tensor, table: Tensor, ids: Tensor, scale: float) -> Tensor:
    """v + scale * gate(h, weight) * table[ids], heads first.

    v [B, T, H, D], h [B, T, C] of its dtype, weight float32 [H, channels], table [vocab, H * D] of any dtype, ids int64
    [B, T] -> [B, H, T, D].
    """
    embedded = F.embedding(ids, table).to(v.dtype).view_as(v)
    return _heads_first(v + (scale * gate(h, weight)).unsqueeze(-1) * embedded)


def relu_square(x: Tensor) -> Tensor:
    """relu(x)^2."""
    return F.relu(x).square()


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)."""
    return cap * torch.tanh(x / cap)


def _heads_first(x: Tensor) -> Tensor:
    return row_major(x.transpose(1, 2))


COMPOSED = RowFunctions(norm, mix, rotary, gate_values, _heads_first, relu_square, soft_cap)


def row_functions(operators: Collection[str]) -> RowFunctions:
    """Those that `operators` names are the operators, all others composed."""
    chosen = {name: getattr(torch.ops.nanochat_x, name) for name in SCHEMAS if name in operators}
    return COMPOSED._replace(**chosen)


def _like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _heads_first_shape(x: Tensor, *_: Any) -> Tensor:
    batch, steps, heads, width = x.shape
    return x.new_empty((batch, heads, steps, width))


def _rotary_shape(x: Tensor, _cos: Tensor, _sin: Tensor, _eps: float, _scale: float, heads_first: bool) -> Tensor:
    return _heads_first_shape(x) if heads_first else _like(x)


_SHAPES = {"rotary": _rotary_shape, "gate_values": _heads_first_shape, "heads_first": _heads_first_shape}
for _name, _schema in SCHEMAS.items():
    define(_name, _schema, getattr(COMPOSED, _name), _SHAPES.get(_name, _like))
