"""The verb `verify`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import click

from nanochat_x.cli_run import Integer, Number, model_options
from nanochat_x.console import progress_on
from nanochat_x.errors import UsageError
from nanochat_x.interrupts import ending_at_once

EXIT_WRONG = 1  # the bundle was checked, and computes something else


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--examples", type=Integer(1, 1_000_000), default=100, show_default=True, metavar="N",
              help="Different examples to run.")  # fmt: skip
@click.option("--seed", type=Integer(0, 2**64 - 1), default=0, show_default=True, metavar="S",
              help="Another seed, other examples.")  # fmt: skip
@click.option("--deadline", type=Number(0, open_low=True), metavar="MIN",
              help="Begin no further example after so many minutes.")  # fmt: skip
@click.option("--against", type=click.Path(path_type=Path), metavar="CHECKPOINT",
              help="Folder of the checkpoint: nanochat's base folder, or one of transformers'. Default: where the "
                   "bundle's own came from.")  # fmt: skip
@click.option("--tokenizer", "tokenizer_dir", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder with tokenizer.pkl. Default: tokenizer in the base folder.")  # fmt: skip
@click.option("--example", metavar="JSON", help="Run one example alone, as a failed run printed it. Writes nothing.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR",
              help="Write parity.json and parity.html there. Default: into the bundle.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The last line is the report as one JSON object.")
@model_options[0]
def verify(
    bundle: Path, examples: int, seed: int, deadline: float | None, against: Path | None, tokenizer_dir: Path | None,
    example: str | None, output: Path | None, as_json: bool, threads: int | None,
) -> int:  # fmt: skip
    """Prove that a bundle computes what its checkpoint computes.

    The C++ runner's logits are judged against the model in float64, on examples that Hypothesis chooses: batches,
    ragged rows, chunks, lengths at the edges of windows and of the context. What is wrong is shrunk to the smallest
    example. The report, parity.json and parity.html, becomes a part of the bundle. Exit code 1: it computes something
    else.

    \b
    nanochat_x verify nanochat-demo-aoti
    nanochat_x verify nanochat-d20-aoti --examples 500 --deadline 30
    nanochat_x verify nanochat-d20-aoti --against /data/nanochat -o report
    """
    if example is not None and output is not None:
        raise UsageError("--example writes no report", remedy="leave out --output")
    with ending_at_once():
        from nanochat_x.certificate import certify, find_reference, write_report
        from nanochat_x.manifest import read_manifest
        from nanochat_x.parity_examples import Example
        from nanochat_x.parity_page import render_page
        from nanochat_x.parity_report import VerifyRequest, regression_test, verify_bundle

    progress = progress_on(sys.stdout)
    checkpoint = find_reference(read_manifest(bundle), against, tokenizer_dir)
    request = VerifyRequest(bundle, examples, seed, deadline, threads, example)
    report = verify_bundle(request, checkpoint, progress)
    if example is None:
        page = render_page(report)
        if output is None:
            certify(bundle, report, page)
        else:
            write_report(output, report, page)
        click.echo(f"report: {output or bundle}/parity.html")
    click.echo(report["summary"])
    if report["failure"] is not None:
        smallest = Example(**report["failure"]["example"])
        arguments = [str(bundle), *(["--against", str(against)] if against else []), "--example", smallest.to_json()]
        click.echo(f"\nAgain:\n  nanochat_x verify {shlex.join(arguments)}")
        click.echo(f"\nAs a test:\n\n{regression_test(bundle, smallest, against)}")
    if as_json:
        click.echo(json.dumps(report))
    return 0 if report["passed"] else EXIT_WRONG
