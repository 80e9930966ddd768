"""Reads a bundle's manifest.json and shows it. Imports no torch: the verbs that run a bundle start with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from nanochat_x.errors import BundleError
from nanochat_x.quoting import quoted
from nanochat_x.regular_file import open_regular, read_regular

#: 2: cached programs take `logits_to_keep`. 3: programs may call operators of this project, listed in `operators`.
SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 16 << 20  # bytes; a real one has about 100 kB, and the runner takes no larger one either
MANIFEST_HASH = "manifest.sha256"  # lower-case hex SHA-256 of manifest.json, and a newline


def sha256(file: Path) -> str:
    """Lower-case hex SHA-256 of a file."""
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_and_blocks(file: Path, block_size: int) -> tuple[str, list[str]]:
    """Lower-case hex SHA-256 of a file, and of its consecutive blocks of `block_size` bytes, the last one shorter."""
    whole, blocks = hashlib.sha256(), []
    with file.open("rb") as stream:
        while block := stream.read(block_size):
            whole.update(block)
            blocks.append(hashlib.sha256(block).hexdigest())
    return whole.hexdigest(), blocks


def is_bundle(folder: Path) -> bool:
    """True if the folder has a manifest that names a schema version."""
    try:
        manifest = json.loads(read_regular(folder / MANIFEST, _LARGEST_MANIFEST))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and "schema_version" in manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle. Raises BundleError if there is none, it is broken, or newer than this program.

    The C++ runner reads it more strictly still, before anything of the bundle is loaded.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"no bundle at {folder}", remedy="make one with: python -m nanochat_x lower")
    try:
        data = read_regular(path, _LARGEST_MANIFEST)
        if len(data) > _LARGEST_MANIFEST:
            raise BundleError(f"{path} is larger than {_LARGEST_MANIFEST >> 20} MiB", remedy="lower the model again")
        manifest = json.loads(data)
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror})", remedy="lower the model again") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not readable JSON", remedy="lower the model again") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if type(version) is not int:
        raise BundleError(f"{path} has no schema_version", remedy="lower the model again")
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema {version}, this program reads {SCHEMA_VERSION}",
            remedy="update nanochat_x" if version > SCHEMA_VERSION else "lower the model again",
        )
    try:
        recorded = read_regular(folder / MANIFEST_HASH, 100).decode("ascii").strip()
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder} has no readable {MANIFEST_HASH}", remedy="lower the model again") from error
    if len(recorded) != 64:
        raise BundleError(f"{folder / MANIFEST_HASH} is no SHA-256", remedy="lower the model again")
    if recorded != hashlib.sha256(data).hexdigest():
        raise BundleError(f"{path} was changed since it was written (SHA-256 differs)", remedy="lower the model again")
    for key, kind in _REQUIRED.items():
        if not isinstance(manifest.get(key), kind):
            raise BundleError(f"{path}: {key} is missing or mistyped", remedy="lower the model again")
    return dict(manifest)


_REQUIRED: dict[str, type] = {
    "target": str, "dtype": str, "model": dict, "max_seq_len": int, "checkpoint": dict, "machine": dict,
    "programs": dict, "tokenizer": str, "files": list,
}  # fmt: skip


def check_files(folder: Path, files: Iterable[Mapping[str, Any]]) -> list[str]:
    """What of `files` is not in the folder as the manifest says: one line each."""
    problems = []
    for entry in files:
        relative = PurePosixPath(str(entry.get("path")))
        path = folder / relative
        if relative.is_absolute() or ".." in relative.parts or not _is_inside(path, folder):
            problems.append(f"{relative}: leaves the bundle")
        elif not path.is_file():
            problems.append(f"{relative}: missing")
        elif path.stat().st_size != entry.get("size"):  # which costs nothing, however large it is
            problems.append(f"{relative}: changed since it was written (size differs)")
        elif sha256(path) != entry.get("sha256"):
            problems.append(f"{relative}: changed since it was written (SHA-256 differs)")
    return problems


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, links followed, is in the folder."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links that go in a circle; which of the two depends on Python's version
        return False


def describe_bundle(folder: Path) -> str:
    """What a person wants to know of a bundle, several lines. Raises BundleError if it is broken or was changed."""
    try:
        lines = _describe(folder, read_manifest(folder))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BundleError(f"{folder / MANIFEST} is malformed ({error})", remedy="lower the model again") from error
    return "\n".join(quoted(line, limit=1000, keep_spaces=True) for line in lines)


def _describe(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    problems = check_files(folder, manifest["files"])
    if problems:
        raise BundleError(f"{folder}: " + "; ".join(problems), remedy="lower the model again")
    model, checkpoint, machine = manifest["model"], manifest["checkpoint"], manifest["machine"]
    size = sum(entry["size"] for entry in manifest["files"])
    lines = [
        f"bundle      {folder} ({len(manifest['files'])} files, {size / 1e6:.1f} MB, every SHA-256 right)",
        f"target      {manifest['target']}, computes in {manifest['dtype']}, up to {manifest['max_seq_len']} tokens",
        f"model       generation {model['generation']}: {model['n_layer']} layers, width {model['n_embd']}, "
        f"{model['n_head']} heads over {model['n_kv_head']} KV heads, vocabulary {model['vocab_size']}, "
        f"trained on {model['sequence_len']} tokens",
        f"checkpoint  {checkpoint['source']} {checkpoint['tag']}{_step(checkpoint['step'])}",
        *(f"            {note}" for note in checkpoint.get("notes", [])),
        *([f"quantized   {_describe_quantization(manifest['quantization'])}"] if manifest.get("quantization") else []),
        f"machine     {_describe_machine(machine, manifest['target'])}",
        f"verified    {_describe_verification(manifest.get('verification'))}",
        *([f"proved      {_describe_parity(manifest['parity'])}"] if manifest.get("parity") else []),
    ]
    lines += [f"file        {entry['size']:>12,}  {entry['path']}" for entry in manifest["files"]]
    return lines


def _describe_machine(machine: Mapping[str, Any], target: str) -> str:
    """What the programs need of a machine; a target leaves out what does not matter to it."""
    needs = [
        " ".join(machine[key] for key in ("platform", "architecture") if machine.get(key)),
        machine.get("march", ""),
    ]
    if machine.get("torch_version"):
        needs.append(f"torch {machine['torch_version']}")
    if machine.get("runtime_version"):
        needs.append(f"{target} runtime {machine['runtime_version']} or newer")
    if machine.get("cpu_features"):
        needs.append(f"a CPU with {' '.join(machine['cpu_features'])}")
    return ", ".join(filter(None, needs)) or "any"


def _describe_quantization(quantization: Mapping[str, Any]) -> str:
    """`int4 in groups of 32, by gptq over 16384 tokens (written by the model)`."""
    calibration = quantization["calibration"]
    source = calibration["name"] if calibration["source"] == "file" else calibration["source"]
    return (
        f"{quantization['method']} in groups of {quantization['group_size']}, by {quantization['algorithm']} over "
        f"{calibration['tokens']} tokens ({source})"
    )


def _step(step: int | None) -> str:
    return "" if step is None else f" step {step}"


def _describe_parity(parity: Mapping[str, Any]) -> str:
    """What `verify` found."""
    return f"{'yes' if parity['passed'] else 'NO'}: {parity['summary']}"


def _describe_verification(verification: Mapping[str, Any] | None) -> str:
    return "no (--no-verify)" if verification is None else str(verification["summary"])
