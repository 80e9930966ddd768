"""The verb `bench`: what the C++ runner measures, beside this machine's matrix product, which PyTorch measures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from nanochat_x.cli_run import Integer, IntList, Number, model_options
from nanochat_x.console import progress_on
from nanochat_x.errors import UsageError
from nanochat_x.interrupts import ending_at_once
from nanochat_x.machine import usable_cores
from nanochat_x.runner import Runner, run_passthrough, run_printing

_BUNDLE = click.Path(path_type=Path)


@click.command()
@click.argument("bundle", type=_BUNDLE)
@click.option("--prompt-tokens", type=Integer(1), metavar="N",
              help="Tokens of the prompt. Default: 512, or fewer if the bundle takes fewer.")  # fmt: skip
@click.option("--decode-tokens", type=Integer(1), metavar="N",
              help="New tokens of each row. Default: 128, or fewer if the bundle takes fewer.")  # fmt: skip
@click.option("--batch", type=IntList(1), default="1,8", show_default=True, metavar="1,8",
              help="Rows that are computed together; one or several numbers.")  # fmt: skip
@click.option("--samples", type=IntList(1), metavar="8,64",
              help="Decode, rows that continue one prompt, too; one or several numbers of them.")  # fmt: skip
@click.option("--contexts", type=IntList(1), metavar="100,2000",
              help="Decode, one row, behind so many tokens too; one or several numbers.")  # fmt: skip
@click.option("--repeats", type=Integer(1, 1000), default=5, show_default=True, metavar="N",
              help="How often each is measured; the median is told, and the ends.")  # fmt: skip
@click.option("--matmul-gflops", type=Number(0, open_low=True), metavar="X",
              help="This machine's float32 matrix product in GFLOP/s, prefill's limit. Default: PyTorch measures "
                   "it.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The last line is one JSON object with the same figures.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png",
              help="A picture of the rates beside the limits.")  # fmt: skip
@model_options[0]
@model_options[1]
def bench(
    bundle: Path, prompt_tokens: int | None, decode_tokens: int | None, batch: tuple[int, ...],
    samples: tuple[int, ...] | None, contexts: tuple[int, ...] | None, repeats: int, matmul_gflops: float | None,
    as_json: bool, plot: Path | None, threads: int | None, device: str | None,
) -> int:  # fmt: skip
    """Measure how fast the C++ runner is here: load time, time to first token, prefill, decode, memory.

    Each rate stands beside the limit that this machine sets, measured in the same run: for decode the memory's speed
    over the bytes that a token reads, for prefill a float32 matrix product. What is counted how: docs/bench.md.

    \b
    nanochat_x bench nanochat-demo-aoti
    nanochat_x bench nanochat-d12-aoti --batch 1,8 --samples 8 --contexts 100,1900 --threads 2 --json
    nanochat_x bench nanochat-d12-onnx --batch 1,2,4,8,16 --plot d12.png
    """
    if plot is not None:
        _check_plot(plot)
    # Standard output is for what the runner answers; a build's progress goes to standard error.
    runner = Runner(bundle, device=device, log=progress_on(sys.stderr))
    threads = threads if threads is not None else usable_cores()
    arguments = [f"--batch={','.join(map(str, batch))}", f"--repeats={repeats}", f"--threads={threads}"]
    if prompt_tokens is not None:
        arguments.append(f"--prompt-tokens={prompt_tokens}")
    if decode_tokens is not None:
        arguments.append(f"--decode-tokens={decode_tokens}")
    if samples is not None:
        arguments.append(f"--samples={','.join(map(str, samples))}")
    if contexts is not None:
        arguments.append(f"--contexts={','.join(map(str, contexts))}")
    if device is not None:
        arguments.append(f"--device={device}")
    arguments.append(f"--matmul-gflops={matmul_gflops or _measured_matmul(threads) / 1e9!r}")
    if plot is None:
        return run_passthrough(runner.command("bench", *arguments, *["--json"] * as_json))
    code, lines = run_printing(runner.command("bench", *arguments, "--json"), keep_last=not as_json)
    if code == 0:
        with ending_at_once():
            from nanochat_x.bench_plot import write_plot

        write_plot(json.loads(lines[-1]), plot)
    return code


def _measured_matmul(threads: int) -> float:
    with ending_at_once():
        from nanochat_x.matmul_speed import matmul_flops

    return matmul_flops(threads)


def _check_plot(plot: Path) -> None:
    """Before minutes are spent. Raises UsageError."""
    if plot.suffix.lower() != ".png":
        raise UsageError(f"--plot writes a PNG, and {plot} is not named like one", remedy="name it FILE.png")
    if plot.is_dir():
        raise UsageError(f"{plot} is a folder", remedy="--plot takes a file's name")
    if not plot.absolute().parent.is_dir():
        raise UsageError(f"{plot.absolute().parent}, where --plot should go, is no folder", remedy="make it first")
