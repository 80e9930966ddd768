"""Writes what a bundle holds beside programs and weights: list of files, manifest. docs/bundle.md is the format."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat_x.manifest import MANIFEST, MANIFEST_HASH, sha256_and_blocks

WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"

#: Of larger files every block has a hash of its own, so that a runner checks them on all cores: one SHA-256 is computed
#: on one. Small enough for the cores to end together, large enough for the manifest to stay small.
BLOCK_SIZE = 1 << 24


def list_files(folder: Path) -> list[dict[str, Any]]:
    """The manifest's `files`: path, size and SHA-256 of every file in the folder but the manifest and its hash."""
    return [
        describe_file(folder, path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, MANIFEST_HASH)
    ]


def settle(folder: Path) -> None:
    """Has large files written out, and dropped from the file cache where the system can: they are read from there next.

    What is written comes into that cache page by page, what is read in large pieces. A runner that maps a file's pieces
    has fewer of them in its own memory than it looks at (the peak of a new bundle of depth 12 was 1.2 times its
    weights and cache, then 1.04). Raises OSError.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size > BLOCK_SIZE:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def describe_file(folder: Path, path: Path) -> dict[str, Any]:
    """One entry of the manifest's `files`."""
    entry: dict[str, Any] = {"path": path.relative_to(folder).as_posix(), "size": path.stat().st_size}
    entry["sha256"], blocks = sha256_and_blocks(path, BLOCK_SIZE)
    if len(blocks) > 1:
        entry["blocks"] = {"size": BLOCK_SIZE, "sha256": blocks}
    return entry


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes manifest.json and the hash of it, in a folder that nobody uses yet."""
    data = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    (folder / MANIFEST).write_bytes(data)
    (folder / MANIFEST_HASH).write_text(hashlib.sha256(data).hexdigest() + "\n", encoding="ascii")
