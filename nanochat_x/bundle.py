"""Writes what a bundle holds: weights, the list of files, the manifest. docs/bundle.md is the format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nanochat_x.errors import BundleError
from nanochat_x.manifest import MANIFEST, MANIFEST_HASH, sha256

WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"

_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
_ALIGNMENT = 64  # of the first tensor in the file: a cache line, and the widest vector
_BLOCK = 1 << 24  # bytes written at once


def write_weights(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors as safetensors, one block at a time: the peak of memory does not grow with the model.

    Larger elements come first, so that each tensor is aligned to its element. Raises BundleError for a dtype that the
    format lacks; OSError from the file system.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), -tensors[name].numel(), name))
    header: dict[str, Any] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _SAFETENSORS_DTYPES:
            raise BundleError(f"tensor {name} is {tensor.dtype}, which no bundle can hold")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name in names:
            for block in _blocks(tensors[name]):
                stream.write(block)


def _blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in row-major order, a block at a time."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _BLOCK):
        yield flat[start : start + _BLOCK].numpy().data


def list_files(folder: Path) -> list[dict[str, Any]]:
    """The manifest's `files`: path, size and SHA-256 of every file in the folder but the manifest and its hash."""
    return [
        {"path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, MANIFEST_HASH)
    ]


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes manifest.json and the hash of it, in a folder that nobody uses yet."""
    data = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    (folder / MANIFEST).write_bytes(data)
    (folder / MANIFEST_HASH).write_text(hashlib.sha256(data).hexdigest() + "\n", encoding="ascii")
