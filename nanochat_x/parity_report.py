"""`verify` from end to end: a bundle and its checkpoint in, a report out."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import torch

from nanochat_x import __version__
from nanochat_x.checkpoint import Checkpoint
from nanochat_x.console import Progress
from nanochat_x.errors import RunnerError, UsageError
from nanochat_x.machine import describe_machine
from nanochat_x.manifest import read_manifest
from nanochat_x.parity import Outcome, Reference, run_example, search
from nanochat_x.parity_examples import Example, Limits, limits_of, parse_example
from nanochat_x.parity_statistics import Statistics, describe
from nanochat_x.quantizing import reference_weights
from nanochat_x.session import RunnerSession
from nanochat_x.verification import FACTOR

RULE = (
    f"in every example, the runner's largest error against float64 is at most {FACTOR:g} x eager's in the same dtype,"
    " on the same texts or on one of the whole context"
)


@dataclass(frozen=True)
class VerifyRequest:
    """What the command line asks for."""

    bundle: Path
    examples: int
    seed: int
    minutes: float | None  # None: as long as it takes
    threads: int | None = None
    only: str | None = None  # one example, as `verify` printed it, in the place of all


def verify_bundle(request: VerifyRequest, checkpoint: Checkpoint, progress: Progress) -> dict[str, Any]:
    """Runs the examples; returns the report, `passed` or not. docs/verify.md says what is in it.

    Raises BundleError, RunnerError, UsageError; ParityError if the runner answers with logits of another shape.
    """
    manifest = read_manifest(request.bundle)
    if checkpoint.spec.vocab_size != manifest["model"]["vocab_size"]:
        raise UsageError(
            f"the bundle has a vocabulary of {manifest['model']['vocab_size']} tokens, the checkpoint one of "
            f"{checkpoint.spec.vocab_size}",
            remedy="name the checkpoint that it was lowered from: --against DIR",
        )
    dtype: torch.dtype = getattr(torch, manifest["dtype"])
    max_seq_len = manifest["max_seq_len"]
    weights = reference_weights(request.bundle, manifest, checkpoint, dtype)
    reference = Reference(checkpoint.spec, weights, dtype, max_seq_len)
    progress.note(f"against: {checkpoint.files.model}")
    start = time.monotonic()
    deadline = math.inf if request.minutes is None else start + 60 * request.minutes
    with RunnerSession(request.bundle, threads=request.threads, log=progress) as session:
        limits = limits_of(checkpoint.spec, max_seq_len, cached=session.cached)
        statistics = Statistics(limits.windows)

        def run(example: Example) -> Outcome:
            try:
                return run_example(example, session, reference, limits.max_seq_len)
            except RunnerError as error:
                raise RunnerError(f"{error} (while it was fed {example.to_json()})") from error

        with progress.stage(f"verify {1 if request.only else request.examples} examples") as stage:
            if request.only is not None:
                outcome = run(parse_example(request.only, limits))
                statistics.see(outcome)
                failure, in_time = (None if outcome.passed else outcome), True
            else:

                def see(outcome: Outcome) -> None:
                    statistics.see(outcome)
                    stage.update(f"{statistics.examples} of {request.examples}")

                found = search(limits, run, see, count=request.examples, seed=request.seed, deadline=deadline)
                failure, in_time = found.failure, found.in_time
            summary = summarize(statistics, failure, in_time)
            stage.detail(summary)
    report = {
        "schema_version": 1,
        "passed": failure is None,
        "summary": summary,
        "rule": RULE,
        "factor": FACTOR,
        "seed": request.seed,
        "examples_asked_for": 1 if request.only else request.examples,
        "ended_by_deadline": not in_time,
        "seconds": round(time.monotonic() - start, 1),
        **statistics.to_json(),
        "largest_ratio": statistics.worst.ratio if statistics.worst else None,
        "failure": None if failure is None else describe(failure),
        "limits": _limits_json(limits),
        "bundle": {
            **{key: manifest[key] for key in ("target", "dtype", "max_seq_len")},
            "generation": manifest["model"]["generation"],
            "files": {entry["path"]: entry["sha256"] for entry in manifest["files"] if "parity." not in entry["path"]},
        },
        "checkpoint": {
            "model": checkpoint.files.model.name,
            "model_sha256": checkpoint.model_sha256,
            "is_the_bundles_own": checkpoint.model_sha256 == manifest["checkpoint"]["model_sha256"],
        },
        "versions": _versions(),
        "machine": describe_machine(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return dict(_finite(report))


def summarize(statistics: Statistics, failure: Outcome | None, in_time: bool) -> str:
    """One line."""
    if failure is not None:
        return f"FAILED after {statistics.examples} examples: {failure}"
    ratio = statistics.worst.ratio if statistics.worst else 0.0
    late = "" if in_time else " (the deadline came)"
    return (
        f"{statistics.examples} examples{late}, {statistics.tokens} tokens: error against float64 at most {ratio:.2f} "
        f"x eager's (allowed {FACTOR:g} x), largest difference to eager {statistics.difference:.2g}, top-1 agreement "
        f"{statistics.agreements / max(statistics.tokens, 1):.4%}"
    )


def regression_test(bundle: Path, example: Example, against: Path | None) -> str:
    """The example as a test, ready to paste."""
    return f"""\
from pathlib import Path

from nanochat_x.certificate import find_reference
from nanochat_x.console import Silent
from nanochat_x.manifest import read_manifest
from nanochat_x.parity_report import VerifyRequest, verify_bundle


def test_parity() -> None:
    bundle = Path({str(bundle)!r})
    checkpoint = find_reference(read_manifest(bundle), {f"Path({str(against)!r})" if against else None}, None)
    example = {example.to_json()!r}
    report = verify_bundle(VerifyRequest(bundle, 1, 0, None, only=example), checkpoint, Silent())
    assert report["passed"], report["summary"]
"""


def _limits_json(limits: Limits) -> dict[str, Any]:
    return {"tokens_of_a_row": limits.max_seq_len, "tokens_of_an_example": limits.tokens, "cached": limits.cached}


def _versions() -> dict[str, str]:
    versions = {"nanochat_x": __version__, "python": platform.python_version(), "torch": torch.__version__}
    versions["hypothesis"] = hypothesis.__version__
    for package in ("onnxruntime", "executorch"):
        with suppress(importlib.metadata.PackageNotFoundError):  # not of interest then
            versions[package] = importlib.metadata.version(package)
    return versions


def _finite(value: Any) -> Any:
    """The same with None for what JSON has no number for: errors are infinite where the runner computed a NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
