"""Bundles for tests: lowering one, spoiling a copy of one, and asking the command line about it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanochat_x.console import Silent
from nanochat_x.lowering import LowerRequest, lower


def lower_bundle(output: Path, target: str = "aoti", **options: Any) -> Path:
    """A bundle for this machine; `options` are fields of LowerRequest."""
    # With verification: what a fixture hands out has passed the comparison that every user's bundle passes.
    request = LowerRequest(
        targets=(target,), output=output, source=None, model_tag=None, step=None, base_dir=None, tokenizer_dir=None,
        dtype="float32", max_seq_len=None, cached=True, options={}, overrides={}, force=False, verify=True,
    )  # fmt: skip
    (result,) = lower(replace(request, **options), Silent())
    return result.bundle


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest on purpose: its own hash is made right again, so that what was changed is what is judged."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    data = json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n"
    (bundle / "manifest.json").write_bytes(data)
    (bundle / "manifest.sha256").write_text(hashlib.sha256(data).hexdigest() + "\n", encoding="ascii")


def replace_file(bundle: Path, name: str, data: bytes) -> None:
    """Another file in its place, with the right size and hash in the manifest."""
    (bundle / name).write_bytes(data)

    def rehash(manifest: dict[str, Any]) -> None:
        (entry,) = (entry for entry in manifest["files"] if entry["path"] == name)
        entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())

    edit_manifest(bundle, rehash)


def change_byte(file: Path) -> None:
    """Flips one bit in the middle."""
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))


def refused(bundle: Path, *options: str) -> str:
    """The one line with which `generate` refuses a bundle."""
    done = run_cli("generate", bundle, "--prompt-ids=1", "--max-tokens=1", "--raw", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def run_cli(*arguments: str | bytes | Path) -> subprocess.CompletedProcess[str]:
    """`python -m nanochat_x ...`, as a user calls it."""
    command = [os.fsencode(part) for part in (sys.executable, "-m", "nanochat_x", *arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
