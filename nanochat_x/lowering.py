"""From a checkpoint to a bundle: read, capture, lower, write, verify, publish."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanochat_x import __version__
from nanochat_x.activation_range import check_range
from nanochat_x.build import ensure_built
from nanochat_x.bundle import TOKENIZER, WEIGHTS, list_files, settle, write_manifest
from nanochat_x.capture import Captured, capture, describe_contract, without_operators
from nanochat_x.checkpoint import Checkpoint, CheckpointFiles, choose_checkpoint, load_checkpoint
from nanochat_x.compact_program import with_compact_matrices
from nanochat_x.console import Progress, format_size
from nanochat_x.errors import BundleError, UsageError
from nanochat_x.find import HF_SOURCE
from nanochat_x.hf_config import ARCHITECTURE
from nanochat_x.interrupts import ending_at_once
from nanochat_x.manifest import SCHEMA_VERSION, is_bundle
from nanochat_x.model import GPT, prepare_weights
from nanochat_x.quantize import Format, dequantized
from nanochat_x.quantized_model import QUANTIZED_PRODUCTS, in_dtype, quantized_model
from nanochat_x.quantizing import quantize_checkpoint
from nanochat_x.runner import Runner
from nanochat_x.safetensors_file import write_safetensors
from nanochat_x.staging import only_writer, staged_folder
from nanochat_x.target import Lowered, Machine, Target
from nanochat_x.verification import verify

#: Longer contexts than any model here was trained on by a factor of 500; the rotary tables grow with it.
MOST_POSITIONS = 1 << 20

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LowerRequest:
    """What the command line asks for; `None` is a default that depends on the checkpoint."""

    targets: tuple[str, ...]
    output: Path | None  # one target: its bundle; several: the folder that gets a bundle a target
    source: str | None
    model_tag: str | None
    step: int | None
    base_dir: Path | None
    tokenizer_dir: Path | None
    dtype: str
    max_seq_len: int | None
    cached: bool
    options: dict[str, Any]  # of single targets: only those that were given
    overrides: dict[str, str]
    force: bool
    verify: bool
    hf: Path | None = None  # a folder of transformers' in the place of the five that choose a checkpoint
    quantization: Format | None = None  # of the matrices; None: they have the dtype
    calibration: Path | None = None  # a text; None: what the model itself writes


@dataclass(frozen=True)
class LowerResult:
    """A finished bundle and its manifest."""

    bundle: Path
    manifest: dict[str, Any]


@dataclass(frozen=True)
class _Model:
    """What all targets of one request share."""

    checkpoint: Checkpoint
    weights: Mapping[str, torch.Tensor]
    captured: Captured
    quantization: Mapping[str, Any] | None  # of the manifest


def lower(request: LowerRequest, progress: Progress) -> list[LowerResult]:
    """Lowers a checkpoint to one bundle a target, from one capture.

    Nothing appears at an output path until all of it is there and has been verified. Raises a NanochatXError for
    whatever the user can mend, OSError from the file system; leaves nothing half-written then (bundles of targets that
    were finished before stay).
    """
    targets = {name: load_target(name, request) for name in request.targets}
    files = choose_checkpoint(
        request.hf, request.source, request.model_tag, request.step, request.base_dir, request.tokenizer_dir
    )
    progress.note(describe_choice(files, request))
    outputs = {name: output_of(name, files, request) for name in targets}
    with ExitStack() as locks:
        for output in outputs.values():
            check_output(output, request.force)
            locks.enter_context(only_writer(output))
            check_output(output, request.force)  # a process that had the lock may have finished in between
        return _lower(request, targets, files, outputs, progress)


def _lower(
    request: LowerRequest,
    targets: Mapping[str, Target],
    files: CheckpointFiles,
    outputs: Mapping[str, Path],
    progress: Progress,
) -> list[LowerResult]:
    """`lower`, where nobody else writes to the outputs."""
    with progress.stage("read checkpoint") as stage:
        checkpoint = load_checkpoint(files, request.overrides)
        stage.detail(f"generation {checkpoint.spec.generation}, {format_size(files.model_bytes)}")
    for note in checkpoint.notes:
        progress.note(f"  {note}")

    if request.verify:
        for name in targets:
            ensure_built(name, log=progress)  # before the long work: what it lacks is better told now
    max_seq_len = request.max_seq_len or checkpoint.spec.sequence_len
    if max_seq_len > MOST_POSITIONS:
        raise UsageError(
            f"max_seq_len {max_seq_len} is more than {MOST_POSITIONS}", remedy="choose a smaller --max-seq-len"
        )
    own = frozenset().union(*(target.operators for target in targets.values())) - QUANTIZED_PRODUCTS
    model = _prepare(request, checkpoint, max_seq_len, own, progress)
    captured = model.captured
    fitting: dict[frozenset[str], Captured] = {}  # by the own operators that a target has, for those still to come
    results = []
    for number, (name, target) in enumerate(targets.items(), 1):
        if len(targets) > 1:
            progress.note(f"{name}:")
        if target.operators not in fitting:
            fitting[target.operators] = _with_operators(captured, target.operators, progress)
        wanted_again = any(other.operators == target.operators for other in list(targets.values())[number:])
        take = partial(fitting.__getitem__ if wanted_again else fitting.pop, target.operators)
        results.append(_write_bundle(request, target, model, take, outputs[name], progress))
    return results


def _with_operators(captured: Captured, operators: frozenset[str], progress: Progress) -> Captured:
    """What was captured, by the own operators that a target has: others composed, and products over fewer bytes."""
    if not captured.operators() <= operators:
        with progress.stage("compose own operators"):
            captured = without_operators(captured, operators)
    if "linear_compact" in operators and "linear" in captured.operators():
        with progress.stage("write matrices compactly"):
            captured = with_compact_matrices(captured)
    return captured


def _prepare(
    request: LowerRequest, checkpoint: Checkpoint, max_seq_len: int, own_operators: frozenset[str], progress: Progress
) -> _Model:
    """Quantises, if that is asked for, and captures with the operators that any target wants."""
    spec, dtype = checkpoint.spec, DTYPES[request.dtype]
    record: dict[str, Any] | None = None
    if request.quantization is not None:
        weights, record = quantize_checkpoint(checkpoint, request.quantization, request.calibration, progress)
        weights = in_dtype(weights, dtype)
        gpt = quantized_model(spec, weights, dtype, own_operators=own_operators)
    else:
        if request.dtype == "float16":
            check_range(checkpoint, request.calibration, progress)
        weights = prepare_weights(checkpoint.weights, dtype)
        gpt = GPT.from_weights(spec, weights, dtype, own_operators=own_operators)
    with progress.stage("capture"):
        captured = capture(gpt, max_seq_len, cached=request.cached)
    return _Model(checkpoint, weights, captured, record)


def _write_bundle(
    request: LowerRequest, target: Target, model: _Model, take: Callable[[], Captured], output: Path, progress: Progress
) -> LowerResult:
    """Lowers to one target, verifies, and publishes the bundle at `output`.

    `take` gives what the target lowers. It is not kept: matrices that were written anew for a target take about as much
    memory as the model's, and the verification needs none of them.
    """
    with staged_folder(output, replace=is_bundle if request.force else None) as folder:
        manifest = _write_programs(request, target, model, take(), folder, progress)
        write_manifest(folder, manifest)
        if request.verify:
            runner = Runner(folder, log=progress)
            of = model.captured
            with progress.stage("verify") as stage:
                manifest["verification"] = verify(
                    of.spec, dequantized(model.weights), of.dtype, of.max_seq_len, runner.forward
                )
                stage.detail(manifest["verification"]["summary"])
            write_manifest(folder, manifest)
    return LowerResult(output, manifest)


def _write_programs(
    request: LowerRequest, target: Target, model: _Model, captured: Captured, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Writes all but the manifest, and returns that, without a verification yet."""
    lowered = target.lower(captured, folder, progress)
    if lowered.weights:
        with progress.stage("write weights") as stage:
            write_safetensors(folder / WEIGHTS, lowered.weights)
            stage.detail(format_size((folder / WEIGHTS).stat().st_size))
    (folder / TOKENIZER).write_text(model.checkpoint.tokenizer.to_portable_json(), encoding="utf-8")
    settle(folder)
    manifest = make_manifest(request, target.name, model.checkpoint, captured, lowered, folder)
    if model.quantization is not None:
        manifest["quantization"] = model.quantization
    return manifest


def load_target(name: str, request: LowerRequest) -> Target:
    """The target by its name; its module, with its heavy imports, is loaded only now.

    Raises UsageError for a dtype or an option that it does not have (with several targets, an option is for those that
    have it), LoweringError if it cannot be lowered to here.
    """
    module = _module_of(name)
    if request.dtype not in module.DTYPES:
        raise UsageError(
            f"the target {name} has no {request.dtype}", remedy=f"choose --dtype {' or '.join(sorted(module.DTYPES))}"
        )
    _check_quantization(name, module, request)
    # With several targets, an option is for those that have it; one must.
    foreign = sorted(request.options.keys() - frozenset().union(*(_module_of(one).OPTIONS for one in request.targets)))
    if foreign:
        targets = f"target{'s' if len(request.targets) > 1 else ''} {' and '.join(request.targets)}"
        raise UsageError(f"--{foreign[0].replace('_', '-')} is not for the {targets}", remedy="leave it out")
    own = {option: value for option, value in request.options.items() if option in module.OPTIONS}
    target: Target = module.make_target(will_run=request.verify, **own)
    return target


def _check_quantization(name: str, module: Any, request: LowerRequest) -> None:
    """Raises UsageError for quantised weights that the target, or any, does not have."""
    if request.quantization is None:
        if request.calibration is not None and request.dtype != "float16":
            raise UsageError("--calibration is for --quant and for --dtype float16", remedy="leave it out")
        return
    method = request.quantization.method
    if method not in module.QUANTIZATION:
        raise UsageError(f"the target {name} has no --quant {method}: {module.WHY_NOT_QUANTIZED}",
                         remedy="choose another --target")  # fmt: skip
    if request.dtype == "float16":
        raise UsageError(
            f"--quant {method} computes in float32 or bfloat16, not in float16", remedy="choose another --dtype"
        )


def _module_of(target: str) -> Any:
    with ending_at_once():
        return importlib.import_module(f"nanochat_x.targets.{target}")


def describe_choice(files: CheckpointFiles, request: LowerRequest) -> str:
    """One line: which checkpoint was chosen, and why if nobody named it."""
    if files.is_demo:
        why = "" if request.source == "demo" else " (no nanochat folder found; -i, --base-dir choose another)"
        return f"checkpoint: the demo model that comes with nanochat_x{why}"
    if files.source == HF_SOURCE:
        return f"checkpoint: {ARCHITECTURE} in {files.meta.parent}"
    return f"checkpoint: {files.source} {files.tag} step {files.step} ({files.model.parent})"


def output_of(target: str, files: CheckpointFiles, request: LowerRequest) -> Path:
    """Where a target's bundle goes: --output, or below it; by default ./nanochat-TAG-TARGET."""
    if request.output is not None:
        return request.output if len(request.targets) == 1 else request.output / target
    tag = "demo" if files.is_demo else files.tag
    return Path(f"nanochat-{tag}-{target}{'' if request.cached else '-no-cache'}")


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
    request: LowerRequest, target: str, checkpoint: Checkpoint, captured: Captured, lowered: Lowered, folder: Path
) -> dict[str, Any]:
    """manifest.json as docs/bundle.md describes it, without a verification yet."""
    files = checkpoint.files
    return {
        "schema_version": SCHEMA_VERSION,
        "nanochat_x_version": __version__,
        "target": target,
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
        "contract": describe_contract(captured, cache_by_layer=lowered.cache_by_layer),
        "machine": _machine_json(lowered.machine),
        "programs": lowered.programs,
        **({"operators": sorted(called)} if (called := captured.operators() - lowered.translated) else {}),
        **({"limits": lowered.limits} if lowered.limits else {}),
        "weights": WEIGHTS if lowered.weights else "",
        "tokenizer": TOKENIZER,
        "special_tokens": dict(checkpoint.tokenizer.special_tokens),
        "verification": None,
        "files": list_files(folder),
    }


def _machine_json(machine: Machine) -> dict[str, Any]:
    """What does not matter to the target is left out."""
    values = asdict(machine) | {"cpu_features": list(machine.cpu_features)}
    return {key: value for key, value in values.items() if value}
