"""Weights in 8 and 4 bits: the formats, choosing their grids, packing, and back to float32.

A matrix [N, K] is cut along K into groups of g weights, and each group has a grid of its own:

    int8   w = q * scale             q = -127 .. 127
    int4   w = (q - zero) * scale    q, zero = 0 .. 15

Scales are bfloat16 and are rounded before any q is chosen, so that no error is added afterwards. A 4-bit group lies in
g / 2 bytes: byte i holds value i in its low half and value i + g / 2 in its high half, so that a vector of bytes widens
to two vectors of neighbours.

Both products are exact in float32 (8 bits times 8 bits): `dequantize` is what the format means, not an approximation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nanochat_x.errors import UsageError
from nanochat_x.operators import dequantized_int4, dequantized_int8

Method = Literal["int8", "int4"]

BITS: Mapping[str, int] = {"int8": 8, "int4": 4}
GROUP_SIZE = 32  # the default: a scale and a zero add 0.75 bits to each weight
_GROUP_UNIT = 8  # kernels take whole vectors of 8
_SMALLEST_GROUP = 16
_LARGEST_Q = 127  # of int8; symmetric, so that -w is as exact as w
_LEVELS = 15  # of int4: the largest q

#: The weights of `model.Linear`, by the end of their names. Gates and lambdas stay as they are: they are small, and
#: what they scale is large; embedding tables are read a row at a time, and would gain nothing in speed.
_MATRICES = ("c_q.weight", "c_k.weight", "c_v.weight", "c_proj.weight", "c_fc.weight", "lm_head.weight")


@dataclass(frozen=True)
class Format:
    """How matrices are to be stored."""

    method: Method
    group_size: int = GROUP_SIZE

    @property
    def bits(self) -> int:
        """Of one weight, its share of scales and zeros not counted."""
        return BITS[self.method]


@dataclass(frozen=True)
class Grid:
    """The values that each group can take."""

    scales: Tensor  # bfloat16 [N, G], finite and positive
    zeros: Tensor | None  # uint8 [N, G], 0 to 15, of int4 alone

    def round(self, weight: Tensor) -> Tensor:
        """The nearest q of weights float32 [N, G, g], as float32."""
        steps = torch.round(weight / self.scales.float().unsqueeze(-1))
        if self.zeros is None:
            return steps.clamp_(*limits_of("int8"))
        return steps.add_(self.zeros.float().unsqueeze(-1)).clamp_(*limits_of("int4"))

    def value(self, q: Tensor) -> Tensor:
        """The weights float32 [N, G, g] that q stands for."""
        q = q.float()
        if self.zeros is not None:
            q = q - self.zeros.float().unsqueeze(-1)
        return q * self.scales.float().unsqueeze(-1)


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [N, K] as a bundle stores it."""

    weight: Tensor  # int8 [N, K], or two of int4 a byte: uint8 [N, K / 2]
    scales: Tensor  # bfloat16 [N, K / g]
    zeros: Tensor | None  # uint8 [N, K / g], of int4 alone

    @classmethod
    def from_grid(cls, q: Tensor, grid: Grid) -> QuantizedMatrix:
        """From q [N, G, g] of any dtype; all its tensors are row-major, as a file holds them."""
        if grid.zeros is None:
            return cls(q.to(torch.int8).flatten(1).contiguous(), grid.scales.contiguous(), None)
        return cls(pack_int4(q.to(torch.uint8)).contiguous(), grid.scales.contiguous(), grid.zeros.contiguous())

    def dequantize(self) -> Tensor:
        """The weights, float32 [N, K], exactly."""
        if self.zeros is None:
            return dequantized_int8(self.weight, self.scales)
        return dequantized_int4(self.weight, self.scales, self.zeros)

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.weight.shape[0], self.weight.shape[1] * (1 if self.zeros is None else 2)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """By their names in a state dict; `name` is the matrix's own, which ends in `.weight`."""
        stem = name.removesuffix(".weight")
        found = {name: self.weight, f"{stem}.scales": self.scales}
        return found if self.zeros is None else {**found, f"{stem}.zeros": self.zeros}


def in_groups(matrix: Tensor, size: int) -> Tensor:
    """A matrix [N, K] as [N, K / size, size]."""
    return matrix.reshape(matrix.shape[0], -1, size)


def limits_of(method: Method) -> tuple[int, int]:
    """The least and the largest q."""
    return (-_LARGEST_Q, _LARGEST_Q) if method == "int8" else (0, _LEVELS)


def pack_int4(q: Tensor) -> Tensor:
    """q uint8 [N, G, g], 0 to 15, as bytes [N, G * g / 2]."""
    low, high = q.chunk(2, dim=-1)
    return (low | (high << 4)).flatten(1)


def unpack_int4(packed: Tensor, groups: int) -> Tensor:
    """q uint8 [N, G, g] of bytes [N, G * g / 2]."""
    halves = packed.view(packed.shape[0], groups, -1)
    return torch.cat([halves & 15, halves >> 4], dim=-1)


def is_matrix(name: str) -> bool:
    """Whether the tensor of a state dict is a matrix that is quantised."""
    return name.endswith(_MATRICES)


def check_format(form: Format, weights: Mapping[str, Tensor]) -> None:
    """Raises UsageError for a group size that there is none of, or that a matrix's width is no multiple of."""
    size = form.group_size
    if size < _SMALLEST_GROUP or size % _GROUP_UNIT:
        raise UsageError(
            f"--group-size {size} is no multiple of {_GROUP_UNIT} from {_SMALLEST_GROUP} on",
            remedy=f"choose {GROUP_SIZE}",
        )
    for name, weight in weights.items():
        if is_matrix(name) and weight.shape[1] % size:
            raise UsageError(
                f"--group-size {size} does not divide the width {weight.shape[1]} of {name}",
                remedy="choose one that divides it",
            )


WHOLE = (1.0,)  # of a group's range
#: Clipping its few largest weights makes the steps of all others finer.
CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8)


def choose_grid(
    weight: Tensor, form: Format, importance: Tensor | None = None, parts: Sequence[float] = CLIPPED
) -> Grid:
    """The grid for groups of weights float32 [N, G, g]: of these parts of their range, that with the least error.

    The error is the sum of squares; `importance` float32 [G, g] weighs them: how strongly a column's input acts on the
    output.
    """
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    best: Grid | None = None
    least = torch.empty(0)
    for part in parts:
        grid = _grid_of_range(low * part, high * part, form)
        loss = (grid.value(grid.round(weight)) - weight).square_()
        error = loss.sum(-1) if importance is None else torch.einsum("ngk,gk->ng", loss, importance)
        if best is None:
            best, least = grid, error
            continue
        better = error < least
        zeros = None if grid.zeros is None or best.zeros is None else torch.where(better, grid.zeros, best.zeros)
        best, least = Grid(torch.where(better, grid.scales, best.scales), zeros), torch.minimum(error, least)
    assert best is not None
    return best


def _grid_of_range(low: Tensor, high: Tensor, form: Format) -> Grid:
    """The grid from `low` to `high`, float32 [N, G] around 0."""
    if form.method == "int8":
        return Grid(_scales(torch.maximum(-low, high) / _LARGEST_Q), None)
    scales = _scales((high - low) / _LEVELS)
    return Grid(scales, torch.round(-low / scales.float()).clamp_(0, _LEVELS).to(torch.uint8))


def _scales(steps: Tensor) -> Tensor:
    """Steps as they are stored. Groups of zeros, or of less than bfloat16's smallest normal step, get a step of 1."""
    rounded = steps.to(torch.bfloat16)
    return torch.where(rounded < torch.finfo(torch.bfloat16).tiny, torch.ones_like(rounded), rounded)


def round_to_nearest(weight: Tensor, form: Format, parts: Sequence[float] = WHOLE) -> QuantizedMatrix:
    """A matrix float32 [N, K], each weight to the nearest value of its group's grid: `choose_grid` of these parts."""
    groups = in_groups(weight.float(), form.group_size)
    grid = choose_grid(groups, form, parts=parts)
    return QuantizedMatrix.from_grid(grid.round(groups), grid)


def matrices_of(weights: Mapping[str, Tensor]) -> dict[str, QuantizedMatrix]:
    """The quantised matrices among the tensors of a state dict, by the names of their weights."""
    stems = (name.removesuffix(".scales") for name in weights if name.endswith(".scales"))
    return {
        f"{stem}.weight": QuantizedMatrix(
            weights[f"{stem}.weight"], weights[f"{stem}.scales"], weights.get(f"{stem}.zeros")
        )
        for stem in stems
    }


def grids_of(matrices: Iterable[str]) -> set[str]:
    """Names of the tensors that a state dict has beside the weights of these quantised matrices."""
    return {f"{name.removesuffix('.weight')}{end}" for name in matrices for end in (".scales", ".zeros")}


def dequantized(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a plain model that computes the same: quantised matrices become float32, all else stays."""
    matrices = matrices_of(weights)
    plain = {name: tensor for name, tensor in weights.items() if name not in matrices.keys() | grids_of(matrices)}
    return plain | {name: matrix.dequantize() for name, matrix in matrices.items()}


def with_matrices(weights: Mapping[str, Tensor], matrices: Iterable[tuple[str, QuantizedMatrix]]) -> dict[str, Tensor]:
    """A state dict with quantised matrices in the place of their float ones."""
    found = dict(weights)
    for name, matrix in matrices:
        found.update(matrix.tensors(name))
    return found
