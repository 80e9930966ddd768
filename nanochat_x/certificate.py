"""What `verify` holds a bundle to, and what it leaves there: parity.json, parity.html, an entry in the manifest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat_x.bundle import describe_file, write_manifest
from nanochat_x.checkpoint import Checkpoint, choose_checkpoint, load_checkpoint
from nanochat_x.errors import BundleError, CheckpointError, UsageError
from nanochat_x.find import HF_SOURCE
from nanochat_x.manifest import MANIFEST, MANIFEST_HASH, check_files, is_bundle, read_manifest
from nanochat_x.staging import only_writer, staged_folder

REPORT, PAGE = "parity.json", "parity.html"


def find_reference(manifest: Mapping[str, Any], against: Path | None, tokenizer: Path | None) -> Checkpoint:
    """The checkpoint that a bundle is held to: what it was lowered from.

    `against` is nanochat's folder that holds it, or a folder of transformers'; None: where nanochat keeps its own, and
    the shipped one for the demo model. Raises CheckpointError if it is not there, or, unasked, another one is.
    """
    origin = manifest["checkpoint"]
    source, overrides = origin["source"], dict(origin["overrides"])
    if against is not None and (against / "config.json").is_file():
        files = choose_checkpoint(against, None, None, None, None, None)
    elif source == "demo" and against is None:
        files = choose_checkpoint(None, "demo", None, None, None, None)
    elif source == HF_SOURCE and against is None:
        raise UsageError(
            f"the bundle was lowered from a folder of transformers' ({origin['tag']})",
            remedy="say where it is: --against DIR",
        )
    else:
        known = source not in ("demo", HF_SOURCE)
        tag, step = (origin["tag"], origin["step"]) if known else (None, None)
        try:
            files = choose_checkpoint(None, source if known else None, tag, step, against, tokenizer)
        except CheckpointError as error:
            if against is None:
                raise CheckpointError(
                    f"the checkpoint that the bundle was lowered from was not found ({error.what})",
                    remedy="say where it is: --against DIR, nanochat's folder",
                ) from error
            files = choose_checkpoint(None, None, None, None, against, tokenizer)  # another one, to be held to
    checkpoint = load_checkpoint(files, overrides)
    if against is None and checkpoint.model_sha256 != origin["model_sha256"]:
        raise CheckpointError(
            f"{files.model} is not the file that the bundle was lowered from (SHA-256 differs)",
            remedy="name the folder that holds that one with --against DIR, or lower this one",
        )
    return checkpoint


def write_report(folder: Path, report: Mapping[str, Any], page: str) -> None:
    """parity.json and parity.html into a folder, made if need be; older ones are replaced. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for name, data in ((REPORT, text), (PAGE, page)):
        unfinished = folder / f".{name}.unfinished"
        unfinished.write_text(data, encoding="utf-8")
        os.replace(unfinished, folder / name)


def certify(bundle: Path, report: Mapping[str, Any], page: str) -> None:
    """Puts the report into the bundle and names it in the manifest: the old bundle or the new one, nothing between.

    What else lies in the folder stays. Raises BundleError if the bundle is being written by somebody else or its files
    are not those of its manifest, OSError from the file system.
    """
    with only_writer(bundle), staged_folder(bundle, replace=is_bundle) as folder:
        manifest = read_manifest(bundle)
        if problems := check_files(bundle, manifest["files"]):
            raise BundleError(f"{bundle}: {'; '.join(problems)}", remedy="lower the model again")
        shutil.copytree(bundle, folder, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        for name in (MANIFEST, MANIFEST_HASH, REPORT, PAGE):
            (folder / name).unlink(missing_ok=True)  # or the old one would be written to, which is the same file
        write_report(folder, report, page)
        manifest["parity"] = {key: report[key] for key in _IN_MANIFEST} | {"report": REPORT, "page": PAGE}
        others = [entry for entry in manifest["files"] if entry["path"] not in (REPORT, PAGE)]
        manifest["files"] = [*others, *(describe_file(folder, folder / name) for name in (PAGE, REPORT))]
        write_manifest(folder, manifest)


_IN_MANIFEST = ("passed", "summary", "rule", "examples", "seed", "largest_ratio")


def _link(source: str, copy: str) -> None:
    """The same file under a second name; a copy where the file system has no such thing."""
    try:
        os.link(source, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, copy, follow_symlinks=False)
