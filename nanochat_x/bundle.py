"""Writes what a bundle holds beside programs and weights: list of files, manifest. docs/bundle.md is the format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat_x.manifest import MANIFEST, MANIFEST_HASH, sha256

WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"


def list_files(folder: Path) -> list[dict[str, Any]]:
    """The manifest's `files`: path, size and SHA-256 of every file in the folder but the manifest and its hash."""
    return [
        describe_file(folder, path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, MANIFEST_HASH)
    ]


def describe_file(folder: Path, path: Path) -> dict[str, Any]:
    """One entry of the manifest's `files`."""
    return {"path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "sha256": sha256(path)}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes manifest.json and the hash of it, in a folder that nobody uses yet."""
    data = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    (folder / MANIFEST).write_bytes(data)
    (folder / MANIFEST_HASH).write_text(hashlib.sha256(data).hexdigest() + "\n", encoding="ascii")
