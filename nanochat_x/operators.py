"""The project's own torch operators, `torch.ops.nanochat_x.*`: what stock kernels do slowly, one token at a time.

    linear(x, weight)                                              x @ weight.T
    linear_compact(x, blocks, bases, starts, columns, values)      the same for a matrix of compact.py
    linear_int8(x, weight, scales)                                 for a matrix in 8 bits
    linear_int4(x, weight, scales, zeros)                          and in 4
    attention(q, k, v, past_k, past_v, position, window)           of new tokens over a row's past and themselves

They appear in the programs of targets whose C++ runner has a fast kernel for each (row_operators.py has more). Here is
what they compute, from ATen operators: whoever imports this module can run such a program in Python (slowly).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_x.compact import expanded

NAMESPACE = "nanochat_x"

#: Name -> schema. The runner has the same list (runners/backends/operators.cpp); a bundle names those that it needs.
SCHEMAS = {
    "linear": "(Tensor x, Tensor weight) -> Tensor",
    "linear_compact": "(Tensor x, Tensor blocks, Tensor bases, Tensor starts, Tensor columns, Tensor values) -> Tensor",
    "linear_int8": "(Tensor x, Tensor weight, Tensor scales) -> Tensor",
    "linear_int4": "(Tensor x, Tensor weight, Tensor scales, Tensor zeros) -> Tensor",
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor? past_k, Tensor? past_v, Tensor? position, SymInt window)"
    " -> Tensor",
}

_library: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


#: Operator -> name, as a graph's nodes call it: of all that are defined.
NAMES: dict[Any, str] = {}

#: What each operator is in ATen operators, for a target that has no kernels of ours.
COMPOSED: dict[Any, Callable[..., Tensor]] = {}


def define(name: str, schema: str, compute: Callable[..., Tensor], shape: Callable[..., Tensor]) -> None:
    """Defines an operator: what it computes, and an empty result of its shape and dtype."""
    _library.define(f"{name}{schema}", tags=(torch.Tag.needs_contiguous_strides, torch.Tag.pt2_compliant_tag))
    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", shape, lib=_library)
    operator = getattr(torch.ops.nanochat_x, name).default
    NAMES[operator], COMPOSED[operator] = name, compute


def attention_composed(
    q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor, Tensor] | None, window: int | None
) -> Tensor:
    """Causal attention of T new tokens over their row's past and themselves, scale 1 / sqrt(D), in ATen operators.

    q [B, T, H, D]; k, v [B, H_kv, T, D], row-major; past = (k, v [B, H_kv, S, D], position [B]), row b
    holding position[b] entries. The query at position p sees keys p - window .. p. Returns [B, T, H * D].

    Scores over the past and over the new tokens are computed apart and joined before the softmax, so that keys and
    values are never concatenated: that would copy the whole cache at every step.
    """
    batch, steps, heads, width = q.shape
    kv_heads = k.shape[1]
    q = row_major(q.transpose(1, 2))
    # The H / H_kv query heads of one KV head become more rows of one product: keys are never repeated. Products are
    # plain bmm: matmul's broadcasting would make torch.export guard against batches and sequences of length 1.
    rows = batch, kv_heads, heads // kv_heads, steps
    q = (q * width**-0.5).view(batch * kv_heads, -1, width)
    k, v = k.view(batch * kv_heads, steps, width), v.view(batch * kv_heads, steps, width)
    offsets = torch.arange(steps, device=q.device)
    distance = offsets[:, None] - offsets[None, :]  # [T, T]: how far key t' lies behind query t
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance <= window)
    scores = _masked(torch.bmm(q, k.transpose(1, 2)), visible, rows)
    if past is None:
        out = torch.bmm(_softmax(scores), v)
    else:
        past_k, past_v, position = past
        slots = past_k.shape[2]
        past_k, past_v = (p.view(batch * kv_heads, slots, width) for p in (past_k, past_v))
        behind = (position[:, None] + offsets)[..., None] - torch.arange(slots, device=q.device)  # [B, T, S]
        visible = behind > offsets[:, None]  # the slot is live: its index is below position[b]
        if window is not None:
            visible = visible & (behind <= window)
        past_scores = _masked(torch.bmm(q, past_k.transpose(1, 2)), visible[:, None, None], rows)
        weights = _softmax(torch.cat([past_scores, scores], dim=-1))
        out = torch.bmm(weights.narrow(-1, 0, slots), past_v) + torch.bmm(weights.narrow(-1, slots, steps), v)
    return row_major(out.view(batch, heads, steps, width).transpose(1, 2)).view(batch, steps, heads * width)


def dequantized_int8(weight: Tensor, scales: Tensor) -> Tensor:
    """The matrix float32 [N, K] that weight int8 [N, K] and scales bfloat16 [N, K / g] stand for: exactly q * scale."""
    rows, groups = scales.shape
    return (weight.view(rows, groups, -1).to(torch.float32) * scales.to(torch.float32).unsqueeze(-1)).view(rows, -1)


def dequantized_int4(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The matrix float32 [N, K] of (q - zero) * scale, exactly; scales bfloat16 and zeros uint8 [N, K / g].

    weight uint8 [N, K / 2]: byte i of a group holds its weight i in the low half, weight i + g / 2 in the high half.
    """
    rows, groups = scales.shape
    packed = weight.view(rows, groups, -1)
    q = torch.cat([packed & 15, packed >> 4], dim=-1).to(torch.float32)
    steps = q - zeros.to(torch.float32).unsqueeze(-1)
    return (steps * scales.to(torch.float32).unsqueeze(-1)).view(rows, -1)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` by the project's operator: x [..., K], weight [N, K] of the same dtype -> [..., N]."""
    out: Tensor = torch.ops.nanochat_x.linear(x, weight)
    return out


def attention(
    q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor, Tensor] | None, window: int | None
) -> Tensor:
    """`attention_composed` as the project's operator."""
    out: Tensor = torch.ops.nanochat_x.attention(q, k, v, *(past or (None,) * 3), -1 if window is None else window)
    return out


def _linear_compact(x: Tensor, *parts: Tensor) -> Tensor:
    return F.linear(x, expanded(*parts))


def _linear_int8(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    return _in_float32(x, dequantized_int8(weight, scales))


def _linear_int4(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return _in_float32(x, dequantized_int4(weight, scales, zeros))


def _in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` for a float32 weight, in float32 or wider, rounded to x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide)).to(x.dtype)


def _product_shape(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    position: Tensor | None,
    window: int,
) -> Tensor:
    past = None if past_k is None or past_v is None or position is None else (past_k, past_v, position)
    return attention_composed(q, k, v, past, None if window < 0 else window)


def _attention_shape(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2] * q.shape[3]))


def _masked(scores: Tensor, visible: Tensor, rows: tuple[int, int, int, int]) -> Tensor:
    """scores [B * H_kv, group * T, K] with -inf where `visible` (broadcast to [*rows, K]) is false."""
    return torch.where(visible, scores.view(*rows, scores.shape[2]), float("-inf")).view_as(scores)


def row_major(x: Tensor) -> Tensor:
    """x in row-major layout. (`x.contiguous()` and `x.reshape()` make torch.export guard against sizes of 1.)"""
    return x.clone(memory_format=torch.contiguous_format)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the keys; low precisions keep it in float32, as fused attention kernels do."""
    return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "linear": F.linear,
    "linear_compact": _linear_compact,
    "linear_int8": _linear_int8,
    "linear_int4": _linear_int4,
}
for _name, _compute in _PRODUCTS.items():
    define(_name, SCHEMAS[_name], _compute, _product_shape)
define("attention", SCHEMAS["attention"], _attention, _attention_shape)
