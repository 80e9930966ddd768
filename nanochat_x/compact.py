"""Matrices of float32 without loss in 28 bits a value.

Nearly all exponents of a matrix's row are within 16 of one another, so 4 bits say which of 16 it is where the number
has 8. A row [K] of a matrix [N, K] is stored in blocks of 32 values, one behind the other:

    64 bytes   bits 0 to 15 of each
    32 bytes   bits 16 to 22, and in the highest bit the sign
    16 bytes   exponents less the row's base: in byte j, of value j in the low half, of value 16 + j in the high one

What has another exponent is an exception: it is listed with its column, and stands in its block as zeros, which is the
number 2^(base - 127) (0 for base 0). A one-token step reads weights once and little else: fewer bytes are less time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

#: Columns of a block; K is a multiple of it.
BLOCK = 32
_EXPONENTS = 16  # that 4 bits tell apart
#: A matrix with more exceptions than one in so many values is left as it is: they are slow, one by one.
_VALUES_AN_EXCEPTION = 256
#: Rows that are looked at together: a histogram of exponents is 2 KB each.
_ROWS = 4096
_DIGITS = 3 * BLOCK  # bytes of a block, before its exponents


class CompactMatrix(NamedTuple):
    """A matrix [N, K], row-major tensors as a file holds them; in the order of the operator `linear_compact`."""

    blocks: Tensor  # uint8 [N, K * 7 / 2]
    bases: Tensor  # uint8 [N], 0 to 239
    starts: Tensor  # int32 [N + 1]: exceptions of row n are starts[n] to starts[n + 1]
    columns: Tensor  # int32 [E], ascending in each row
    values: Tensor  # float32 [E]


def compact(matrix: Tensor) -> CompactMatrix | None:
    """A matrix float32 [N, K] in fewer bytes; None where that is not possible, or not worth while."""
    if matrix.dtype != torch.float32 or matrix.dim() != 2 or 0 in matrix.shape or matrix.shape[1] % BLOCK:
        return None
    return _written(matrix, matrix.numel() // _VALUES_AN_EXCEPTION)


def expanded(blocks: Tensor, bases: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """The matrix float32 [N, K] that the tensors of a `CompactMatrix` stand for, bit by bit."""
    rows = blocks.shape[0]
    blocks = blocks.view(rows, -1, _DIGITS + BLOCK // 2)
    halves = blocks[..., _DIGITS:]
    codes = torch.cat([halves & 15, halves >> 4], dim=-1).to(torch.int32)
    upper = blocks[..., 2 * BLOCK : _DIGITS].to(torch.int32)
    low = blocks[..., : 2 * BLOCK].contiguous().view(torch.uint16).to(torch.int32)
    bits = ((codes + bases.to(torch.int32).view(-1, 1, 1)) << 23) | ((upper & 0x7F) << 16) | ((upper >> 7) << 31) | low
    matrix = bits.view(rows, -1).view(torch.float32)
    row_of = torch.repeat_interleave(torch.arange(rows), starts.diff().long(), output_size=columns.shape[0])
    return matrix.index_put((row_of, columns.long()), values)


def _written(matrix: Tensor, most: int) -> CompactMatrix | None:
    """A matrix in blocks; None if it has more than `most` exceptions."""
    N, K = matrix.shape
    blocks = torch.empty(N, K // BLOCK, _DIGITS + BLOCK // 2, dtype=torch.uint8)
    bases, counts, columns, values = [], [torch.zeros(1, dtype=torch.int32)], [], []
    found = 0
    for rows, to in zip(_in_pieces(matrix), _in_pieces(blocks), strict=True):
        words = rows.contiguous().view(torch.int32)
        exponents = (words >> 23) & 0xFF
        base = _bases(exponents)
        codes = exponents - base[:, None]
        exceptional = (codes < 0) | (codes >= _EXPONENTS)
        count = exceptional.sum(1, dtype=torch.int32)
        found += int(count.sum())
        if found > most:
            return None
        bits = words.masked_fill(exceptional, 0).view(len(rows), -1, BLOCK)
        codes = codes.masked_fill(exceptional, 0).to(torch.uint8).view(len(rows), -1, BLOCK)
        # The lower of two bytes first: bundles are little-endian, as their machines.
        to[..., : 2 * BLOCK] = bits.to(torch.int16).view(torch.uint8)
        to[..., 2 * BLOCK : _DIGITS] = ((bits >> 16) & 0x7F) | ((bits >> 24) & 0x80)
        to[..., _DIGITS:] = codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)
        bases.append(base.to(torch.uint8))
        counts.append(count)
        columns.append(exceptional.nonzero()[:, 1].to(torch.int32))
        values.append(rows[exceptional])
    starts = torch.cat(counts).cumsum(0, dtype=torch.int32)
    return CompactMatrix(blocks.flatten(1), torch.cat(bases), starts, torch.cat(columns), torch.cat(values))


def _in_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Some rows after the other."""
    return (tensor[begin : begin + _ROWS] for begin in range(0, tensor.shape[0], _ROWS))


def _bases(exponents: Tensor) -> Tensor:
    """Of the 16 successive exponents that most values of each row have, the least: int32 [N], 0 to 239, of [N, K]."""
    rows = exponents.shape[0]
    of_row = (exponents + 256 * torch.arange(rows, dtype=torch.int32)[:, None]).flatten()
    counts = torch.bincount(of_row, minlength=256 * rows).view(rows, 256)
    before = torch.nn.functional.pad(counts.cumsum(1), (1, 0))[:, :256]  # [n, e]: values whose exponent is below e
    return (before[:, _EXPONENTS:] - before[:, :-_EXPONENTS]).argmax(1).to(torch.int32)
