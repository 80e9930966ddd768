"""The verbs that report on bundles and on this machine."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from nanochat_x.cli_options import checkpoint_options
from nanochat_x.cli_run import text_arguments, text_options
from nanochat_x.console import progress_on
from nanochat_x.errors import UsageError
from nanochat_x.interrupts import ending_at_once

_BUNDLE = click.Path(path_type=Path)
EXIT_AMISS = 1


@click.command()
@click.argument("bundle", type=_BUNDLE)
@click.argument("other", required=False, type=_BUNDLE)
@checkpoint_options
@text_options
@click.option("--dtype", type=click.Choice(["float32", "float64"]),
              help="In which a checkpoint is computed. Default: float32.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The last line is one JSON object with the same figures.")
def compare(
    bundle: Path, other: Path | None, source: str | None, model_tag: str | None, step: int | None,
    base_dir: Path | None, tokenizer_dir: Path | None, override_pairs: tuple[str, ...], hf: Path | None,
    text: Path | None, docs: Path | None, context: int | None, dtype: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Compare the predictions of BUNDLE with those of OTHER, a bundle too, on a text.

    In the place of OTHER, the options of a checkpoint choose one, which eager PyTorch computes. OTHER, or the
    checkpoint, is the reference: differences are BUNDLE's minus its, and KL is KL(OTHER || BUNDLE), the nats that
    BUNDLE's distribution loses against it.

    \b
    nanochat_x compare nanochat-d20-onnx nanochat-d20-aoti --text book.txt
    nanochat_x compare nanochat-demo-onnx -i demo --docs documents.json --json
    nanochat_x compare nanochat-d20-aoti -i sft -g d20 --dtype float64 --text book.txt
    """
    arguments = text_arguments(text, docs, None)
    chosen = bool(override_pairs) or any(
        choice is not None for choice in (source, model_tag, step, base_dir, tokenizer_dir, hf)
    )
    if other is not None and (chosen or dtype is not None):
        raise UsageError("a second bundle and options of a checkpoint were both given", remedy="leave one of them out")
    if other is None and not chosen:
        raise UsageError(
            "compare takes a second bundle, or options that choose a checkpoint",
            remedy="for instance -i demo, or -i sft",
        )
    from nanochat_x.overrides import parse_overrides

    overrides = parse_overrides(override_pairs)
    with ending_at_once():
        from nanochat_x.checkpoint import choose_checkpoint, load_checkpoint
        from nanochat_x.comparing import BundleModel, CheckpointModel, compare_models
        from nanochat_x.comparison import lines_of

    # Standard output is for the report.
    progress = progress_on(sys.stderr)
    first = BundleModel(bundle, progress)
    second: BundleModel | CheckpointModel
    if other is not None:
        second = BundleModel(other, progress)
    else:
        files = choose_checkpoint(hf, source, model_tag, step, base_dir, tokenizer_dir)
        with progress.stage("read checkpoint"):
            second = CheckpointModel(load_checkpoint(files, overrides), dtype or "float32")
    report = compare_models(first, second, arguments, context, progress)
    for line in lines_of(report):
        click.echo(line)
    if as_json:
        click.echo(json.dumps(report, allow_nan=False))


@click.command()
@click.argument("bundle", required=False, type=_BUNDLE)
@click.option("--json", "as_json", is_flag=True, help="The last line is one JSON object with the same findings.")
def doctor(bundle: Path | None, as_json: bool) -> int:
    """Tell what is installed, and which targets can be lowered and run here.

    With BUNDLE, also whether it is whole and fits this machine. Below each thing that is missing or amiss stands what
    mends it. Nothing is built or changed.

    Exit code 0 if all is well; 1 if something is amiss; 2 for a mistake on the command line. What is missing but not
    needed (another target's packages, a runner that was not built yet) is told, and is not amiss.

    \b
    nanochat_x doctor
    nanochat_x doctor nanochat-demo-aoti
    """
    from nanochat_x.doctor import examine, lines_of
    from nanochat_x.doctor_bundle import examine_bundle

    # The bundle first: a path that is none is a mistake, which is told at once.
    of_bundle = list(examine_bundle(bundle)) if bundle is not None else []
    findings = [*examine(), *of_bundle]
    for line in lines_of(findings):
        click.echo(line)
    amiss = sum(finding.state == "amiss" for finding in findings)
    click.echo("\nall is well" if amiss == 0 else f"\nto be mended: {amiss}")
    if as_json:
        click.echo(json.dumps({"ok": amiss == 0, "findings": [asdict(finding) for finding in findings]}))
    return EXIT_AMISS if amiss else 0
