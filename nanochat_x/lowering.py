"""From a checkpoint to a bundle: read, capture, lower, write, verify, publish."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat_x import __version__
from nanochat_x.build import ensure_built
from nanochat_x.bundle import TOKENIZER, WEIGHTS, list_files, write_manifest, write_weights
from nanochat_x.capture import Captured, capture, describe_contract
from nanochat_x.checkpoint import Checkpoint, CheckpointFiles, find_checkpoint, load_checkpoint
from nanochat_x.console import Progress, format_size
from nanochat_x.errors import BundleError, UsageError
from nanochat_x.manifest import SCHEMA_VERSION, is_bundle
from nanochat_x.model import GPT, prepare_weights
from nanochat_x.runner import Runner
from nanochat_x.staging import staged_folder
from nanochat_x.target import Lowered, Machine, Target
from nanochat_x.verification import verify

#: Longer contexts than any model here was trained on by a factor of 500; the rotary tables grow with it.
MOST_POSITIONS = 1 << 20

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LowerRequest:
    """What the command line asks for; `None` is a default that depends on the checkpoint."""

    target: str
    output: Path | None
    source: str | None
    model_tag: str | None
    step: int | None
    base_dir: Path | None
    tokenizer_dir: Path | None
    dtype: str
    max_seq_len: int | None
    march: str
    overrides: dict[str, str]
    force: bool
    verify: bool


@dataclass(frozen=True)
class LowerResult:
    """The finished bundle and its manifest."""

    bundle: Path
    manifest: dict[str, Any]


def lower(request: LowerRequest, progress: Progress) -> LowerResult:
    """Lowers a checkpoint. Nothing appears at the output path until all of it is there and has been verified.

    Raises a NanochatXError for whatever the user can mend, OSError from the file system; leaves nothing behind then.
    """
    target = load_target(request)
    files = find_checkpoint(request.source, request.model_tag, request.step, request.base_dir, request.tokenizer_dir)
    progress.note(describe_choice(files, request))
    output = request.output or default_output(files, request.target)
    check_output(output, request.force)

    with progress.stage("read checkpoint") as stage:
        checkpoint = load_checkpoint(files, request.overrides)
        stage.detail(f"generation {checkpoint.spec.generation}, {format_size(files.model.stat().st_size)}")
    for note in checkpoint.notes:
        progress.note(f"  {note}")

    if request.verify:
        ensure_built(request.target, log=progress)  # before the long work: what it lacks is better told now
    dtype = DTYPES[request.dtype]
    max_seq_len = request.max_seq_len or checkpoint.spec.sequence_len
    if max_seq_len > MOST_POSITIONS:
        raise UsageError(
            f"max_seq_len {max_seq_len} is more than {MOST_POSITIONS}", remedy="choose a smaller --max-seq-len"
        )
    weights = prepare_weights(checkpoint.weights, dtype)
    with progress.stage("capture"):
        captured = capture(GPT.from_weights(checkpoint.spec, weights, dtype), max_seq_len)

    with staged_folder(output, replace=is_bundle if request.force else None) as folder:
        lowered = target.lower(captured, folder, progress)
        with progress.stage("write weights") as stage:
            write_weights(folder / WEIGHTS, lowered.weights)
            stage.detail(format_size((folder / WEIGHTS).stat().st_size))
        (folder / TOKENIZER).write_text(checkpoint.tokenizer.to_portable_json(), encoding="utf-8")
        manifest = make_manifest(request, checkpoint, captured, lowered, folder)
        write_manifest(folder, manifest)
        if request.verify:
            runner = Runner(folder, log=progress)
            with progress.stage("verify") as stage:
                manifest["verification"] = verify(checkpoint.spec, weights, dtype, max_seq_len, runner.forward)
                stage.detail(manifest["verification"]["summary"])
            write_manifest(folder, manifest)
    return LowerResult(output, manifest)


def load_target(request: LowerRequest) -> Target:
    """The target by its name; its module, with its heavy imports, is loaded only now. Raises LoweringError."""
    module = importlib.import_module(f"nanochat_x.targets.{request.target}")
    target: Target = module.make_target(march=request.march, will_run=request.verify)
    return target


def describe_choice(files: CheckpointFiles, request: LowerRequest) -> str:
    """One line: which checkpoint was chosen, and why if nobody named it."""
    if files.is_demo:
        why = "" if request.source == "demo" else " (no nanochat folder found; -i, --base-dir choose another)"
        return f"checkpoint: the demo model that comes with nanochat_x{why}"
    return f"checkpoint: {files.source} {files.tag} step {files.step} ({files.model.parent})"


def default_output(files: CheckpointFiles, target: str) -> Path:
    """./nanochat-TAG-TARGET."""
    return Path(f"nanochat-{'demo' if files.is_demo else files.tag}-{target}")


def check_output(output: Path, force: bool) -> None:
    """Raises BundleError if writing there would lose something, UsageError if it cannot be written."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UsageError(f"{output} is not a folder", remedy="choose another --output")
    if not output.exists():
        above = next(folder for folder in output.absolute().parents if folder.exists())
        if not above.is_dir():
            raise UsageError(f"{above} is not a folder", remedy="choose another --output")
        return
    if not is_bundle(output):
        raise BundleError(
            f"{output} exists and is no bundle, so it is never replaced", remedy="choose another --output"
        )
    if not force:
        raise BundleError(f"{output} exists", remedy="choose another --output, or replace it with --force")


def make_manifest(
    request: LowerRequest, checkpoint: Checkpoint, captured: Captured, lowered: Lowered, folder: Path
) -> dict[str, Any]:
    """manifest.json as docs/bundle.md describes it, without a verification yet."""
    files = checkpoint.files
    return {
        "schema_version": SCHEMA_VERSION,
        "nanochat_x_version": __version__,
        "target": request.target,
        "dtype": request.dtype,
        "model": captured.spec.to_json(),
        "max_seq_len": captured.max_seq_len,
        "checkpoint": {
            "source": "demo" if files.is_demo else files.source,
            "tag": files.tag,
            "step": files.step,
            "model_sha256": checkpoint.model_sha256,
            "overrides": checkpoint.overrides,
            "notes": list(checkpoint.notes),
        },
        "contract": describe_contract(captured),
        "machine": _machine_json(lowered.machine),
        "programs": lowered.programs,
        "weights": WEIGHTS,
        "tokenizer": TOKENIZER,
        "special_tokens": dict(checkpoint.tokenizer.special_tokens),
        "verification": None,
        "files": list_files(folder),
    }


def _machine_json(machine: Machine) -> dict[str, Any]:
    """What does not matter to the target is left out."""
    values = asdict(machine) | {"cpu_features": list(machine.cpu_features)}
    return {key: value for key, value in values.items() if value}
