"""The command line: every verb is a function here or in a `cli_*` module; it composes what the other modules do.

Torch is imported inside the verbs that need it, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import errno
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import click

from nanochat_x import __version__
from nanochat_x.build import PROGRAMS, build_all, program_of
from nanochat_x.cli_bench import bench
from nanochat_x.cli_options import checkpoint_options
from nanochat_x.cli_reports import compare, doctor
from nanochat_x.cli_run import Integer, chat, evaluate, forward, generate, session
from nanochat_x.cli_verify import verify
from nanochat_x.console import format_size, progress_on, tree_size
from nanochat_x.errors import NanochatXError, UsageError
from nanochat_x.interrupts import ending_at_once

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(arguments: Sequence[str]) -> int:
    """Runs one command line (without the program's name) and returns its exit code.

    Whatever a user can cause is one line on standard error; only a mistake of ours ends in a traceback.
    """
    try:
        # An empty command line asks what there is.
        result = cli.main(list(arguments) or ["--help"], prog_name="nanochat_x", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, click.Abort):
        _complain("interrupted", prefix="nanochat_x: ")
        return EXIT_INTERRUPTED
    except NanochatXError as error:
        _complain(str(error))
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "nanochat_x"
        _complain(f"{error.format_message().rstrip('.')}; `{command} --help` tells what there is")
    except click.ClickException as error:
        _complain(error.format_message())
    except OSError as error:
        _complain(_describe_os_error(error))
    except MemoryError:
        _complain("this machine has not enough free memory for that")
    return EXIT_ERROR


def _complain(text: str, *, prefix: str = "nanochat_x: error: ") -> None:
    if sys.stderr is None:  # closed by whoever started us; print would take standard output for it
        return
    print(prefix + " ".join(text.split()), file=sys.stderr, flush=True)


def _describe_os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    text = f"{where}{error.strerror or error}"
    return f"{text}; free some space and try again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else text


class _Group(click.Group):
    """A group that leaves out the empty line which click prints for Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the verb."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message=f"nanochat_x {__version__}")
def cli() -> None:
    """Takes a nanochat checkpoint out of Python: capture it, lower it, chat with it from a C++ program.

    \b
    First steps, with the small model that is shipped:
      nanochat_x lower -i demo                    -> the folder nanochat-demo-aoti
      nanochat_x chat nanochat-demo-aoti
    \b
    With yours:
      nanochat_x inspect -i sft -g d20            what is in the checkpoint
      nanochat_x lower -i sft -g d20              -> the folder nanochat-d20-aoti
      nanochat_x chat nanochat-d20-aoti
    \b
    When something does not work:
      nanochat_x doctor

    Errors are one line on standard error and exit code 2.
    """


def target_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of single targets; `None` where the user gave none. Which target takes which is its module's OPTIONS."""
    options = (
        click.option("--march", metavar="ISA",
                     help="aoti: instruction set, as the C++ compiler calls it; x86-64-v3 runs on every CPU with "
                          "AVX2. Default: this machine's."),
        click.option("--kernels", type=click.Choice(["own", "stock"]),
                     help="aoti, torchscript, executorch: own takes this project's fast kernels, which its runner has; "
                          "stock takes the runtime's alone, for programs that any such runtime loads. Default: own."),
        click.option("--opset", type=Integer(1), metavar="N",
                     help="onnx: version of the operators, 18 to 23; older runtimes take older ones. Default: 23."),
        click.option("--optimize", is_flag=True, default=None,
                     help="onnx: let onnxruntime fuse operators beforehand, to some that it alone has."),
        click.option("--max-batch", type=Integer(1), metavar="N",
                     help="executorch: rows that one step of one token takes; larger batches are split. Default: 8."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@cli.command()
@checkpoint_options
@click.option("--target", "targets", type=click.Choice([*PROGRAMS, "all"]), multiple=True, default=["aoti"],
              show_default=True, help="What to lower to; repeatable. aoti: AOTInductor, machine code; torchscript: one "
                   "file for libtorch; onnx: graphs for onnxruntime; executorch: a .pte for phones too.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR",
              help="The bundle to write; with several targets, the folder that gets one a target. "
                   "Default: ./nanochat-TAG-TARGET.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
              help="Of the computation, the weights and the KV cache.")  # fmt: skip
@click.option("--quant", type=click.Choice(["int8", "int4"]),
              help="Store the matrices in 8 or 4 bits.")  # fmt: skip
@click.option("--group-size", type=Integer(1), metavar="N",
              help="With --quant: weights that share a scale. Default: 32.")  # fmt: skip
@click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE",
              help="With --quant, a text like those that the model will meet: errors are kept small on it. With "
                   "--dtype float16, what activations are measured on. Default: what the model writes.")  # fmt: skip
@click.option("--max-seq-len", type=Integer(1), metavar="N",
              help="Positions that the programs take. Default: what the model was trained on.")  # fmt: skip
@click.option("--no-cache", is_flag=True,
              help="One program alone, ids to logits: without a KV cache, every token computes all anew.")  # fmt: skip
@target_options
@click.option("--force", is_flag=True, help="Replace the bundle if it exists.")
@click.option("--no-verify", is_flag=True, help="Do not compare the C++ runner's logits with eager PyTorch's.")
def lower(
    source: str | None, model_tag: str | None, step: int | None, base_dir: Path | None, tokenizer_dir: Path | None,
    override_pairs: tuple[str, ...], targets: tuple[str, ...], output: Path | None, dtype: str,
    quant: Literal["int8", "int4"] | None, group_size: int | None, calibration: Path | None,
    max_seq_len: int | None, no_cache: bool, force: bool, no_verify: bool, hf: Path | None,
    **options_of_targets: Any,
) -> None:  # fmt: skip
    """Lower a checkpoint to a bundle for C++.

    A bundle is a folder with programs, weights and tokenizer, which the C++ runner runs without Python.

    \b
    nanochat_x lower                              the most finished checkpoint, else the demo model
    nanochat_x lower -i sft -g d20 --dtype bfloat16
    nanochat_x lower -i sft -g d20 --quant int4
    nanochat_x lower -i base --max-seq-len 4096 --march x86-64-v3 -o portable
    nanochat_x lower --target all -o bundles      one bundle for each target, from one capture
    nanochat_x lower --hf nanochat-d20            a folder of transformers'
    nanochat_x lower --override softcap=20        trained from 2026-03-02 to 03-08
    """
    from nanochat_x.overrides import parse_overrides

    overrides = parse_overrides(override_pairs)
    if quant is None and group_size is not None:
        raise UsageError("--group-size is for --quant", remedy="leave it out, or add --quant int8 or int4")
    with ending_at_once():
        from nanochat_x.lowering import LowerRequest
        from nanochat_x.lowering import lower as run_lower
        from nanochat_x.quantize import GROUP_SIZE, Format

    request = LowerRequest(
        targets=tuple(PROGRAMS) if "all" in targets else tuple(dict.fromkeys(targets)), output=output,
        source=source, model_tag=model_tag, step=step, base_dir=base_dir, tokenizer_dir=tokenizer_dir,
        dtype=dtype, max_seq_len=max_seq_len, cached=not no_cache,
        options={name: value for name, value in options_of_targets.items() if value is not None},
        overrides=overrides, force=force, verify=not no_verify, hf=hf,
        quantization=None if quant is None else Format(quant, group_size or GROUP_SIZE), calibration=calibration,
    )  # fmt: skip
    results = run_lower(request, progress_on(sys.stdout))
    click.echo()
    for result in results:
        click.echo(f"{result.bundle}: {format_size(tree_size(result.bundle))}.{' Now:' if len(results) == 1 else ''}")
    folder = shlex.quote(str(results[0].bundle))
    # A base model was never taught to converse.
    converses = results[0].manifest["checkpoint"]["source"] != "base"
    click.echo(
        f"  {invocation()} " + (f"chat {folder}" if converses else f'generate {folder} --prompt "Once upon a time"')
    )


@cli.command()
@click.option("--depth", type=Integer(1), required=True, metavar="N",
              help="Layers; the width is 64 x N, rounded up to whole heads of 128.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR",
              help="A new folder, laid out like nanochat's own. Default: ./nanochat-dN.")  # fmt: skip
@click.option("--seed", type=Integer(0), default=1337, show_default=True, metavar="S",
              help="The same seed gives the same weights.")  # fmt: skip
def init(depth: int, output: Path | None, seed: int) -> None:
    """Write a checkpoint with random weights.

    It has nanochat's real shape for the depth: to try and to measure without a trained model.

    \b
    nanochat_x init --depth 12                    -> the folder nanochat-d12
    nanochat_x lower --base-dir nanochat-d12
    """
    with ending_at_once():
        from nanochat_x.initialize import write_random_checkpoint

    folder = output if output is not None else Path(f"nanochat-d{depth}")
    write_random_checkpoint(depth, folder, seed=seed, progress=progress_on(sys.stdout))
    click.echo(f"\n{folder}: {format_size(tree_size(folder))}. Now:")
    click.echo(f"  {invocation()} lower --base-dir {shlex.quote(str(folder))}")


@cli.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@checkpoint_options
def inspect(
    bundle: Path | None, source: str | None, model_tag: str | None, step: int | None, base_dir: Path | None,
    tokenizer_dir: Path | None, override_pairs: tuple[str, ...], hf: Path | None,
) -> None:  # fmt: skip
    """Tell what is in a bundle or a checkpoint.

    \b
    nanochat_x inspect nanochat-demo-aoti         a bundle
    nanochat_x inspect                            the checkpoint that `lower` would take
    nanochat_x inspect -i base -g d12 -s 1000
    """
    if bundle is not None:
        if override_pairs or any(
            choice is not None for choice in (source, model_tag, step, base_dir, tokenizer_dir, hf)
        ):
            raise UsageError(
                "a bundle's folder and options that choose a checkpoint were both given", remedy="leave one of them out"
            )
        from nanochat_x.manifest import describe_bundle

        _answer(describe_bundle(bundle))
        return
    from nanochat_x.overrides import parse_overrides

    overrides = parse_overrides(override_pairs)
    with ending_at_once():
        from nanochat_x.checkpoint import choose_checkpoint, load_checkpoint
        from nanochat_x.inspection import describe_checkpoint

    files = choose_checkpoint(hf, source, model_tag, step, base_dir, tokenizer_dir)
    _answer(describe_checkpoint(load_checkpoint(files, overrides)))


@cli.command("build-runners")
@click.option("--tests", is_flag=True, help="The C++ tests too (they stay on in later builds).")
@click.option("--werror", is_flag=True, help="Take every compiler warning for an error (stays on in later builds).")
def build_runners(tests: bool, werror: bool) -> None:
    """Build the C++ programs. Other verbs do it by need; this does it now and says where they are.

    It takes a C++20 compiler. A target is left out where its runtime (torch, onnxruntime, executorch) is not installed.
    Sources that did not change are not compiled again. The folder is in the virtual environment, else in your cache
    folder; NANOCHAT_X_BUILD_DIR names another.
    """
    progress = progress_on(sys.stdout)
    build_dir, missing = build_all(tests=tests, werror=werror, log=progress)
    for target in PROGRAMS:
        click.echo(
            f"{target}: "
            + (f"not built: {missing[target]}" if target in missing else str(program_of(target, build_dir)))
        )


def _answer(text: str) -> None:
    """Prints what a verb was asked for, and nothing less. Raises OSError where that cannot be done."""
    if sys.stdout is None:  # click.echo would say nothing, and be content
        raise OSError(errno.EBADF, "standard output is closed")
    click.echo(text)


def invocation() -> str:
    """How this program was started, ready to paste: `nanochat_x`, or `PYTHON -m nanochat_x`."""
    started = Path(sys.argv[0])
    if started.name != "__main__.py":
        on_path = shutil.which(started.name)
        return started.name if on_path and Path(on_path).resolve() == started.resolve() else shlex.quote(str(started))
    python = Path(sys.executable)
    if (on_path := shutil.which(python.name)) and Path(on_path) == python:
        return f"{python.name} -m nanochat_x"
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return f"{shlex.quote(str(python))} -m nanochat_x"


for _verb in (forward, generate, chat, session, verify, evaluate, compare, bench, doctor):
    cli.add_command(_verb)
