"""Writes safetensors files block by block, and tells where in the file each tensor will lie.

Other files of a bundle refer to tensors by those places, which the safetensors package does not tell beforehand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat_x.errors import BundleError

_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32",
    torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
_ALIGNMENT = 64  # of the first tensor in the file: a cache line, and the widest vector
_BLOCK = 1 << 24  # bytes written at once


@dataclass(frozen=True)
class Layout:
    """Where things lie in a file: `places[name]` is (offset from the file's beginning, length), both in bytes."""

    header: bytes
    places: dict[str, tuple[int, int]]  # in the order of the file


def layout(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """The file that `write_safetensors` writes for these tensors.

    Tensors of whole cache lines come first, so that each of them begins with one: what is read with vectors is never
    split between two. Then larger elements, so that each tensor is aligned to its element. Raises BundleError for a
    dtype that the format lacks.
    """

    def order(name: str) -> tuple[bool, int, int, str]:
        size, count = tensors[name].element_size(), tensors[name].numel()
        return size * count % _ALIGNMENT != 0, -size, -count, name

    names = sorted(tensors, key=order)
    header: dict[str, Any] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise BundleError(f"tensor {name} is {tensor.dtype}, which no bundle can hold")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    spans = {name: header[name]["data_offsets"] for name in names}
    return Layout(head, {name: (len(head) + begin, end - begin) for name, (begin, end) in spans.items()})


def write_safetensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors one block at a time: the peak of memory does not grow with the model.

    Raises BundleError for a dtype that the format lacks; OSError from the file system.
    """
    planned = layout(tensors)
    with file.open("wb") as stream:
        stream.write(planned.header)
        for name in planned.places:
            for block in _blocks(tensors[name]):
                stream.write(block)


def _blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in row-major order, a block at a time."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _BLOCK):
        yield flat[start : start + _BLOCK].numpy().data
