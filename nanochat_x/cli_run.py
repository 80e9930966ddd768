"""The verbs that run a bundle: checked here, then handed over to the C++ program with the terminal and all signals."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nanochat_x.console import progress_on
from nanochat_x.errors import UsageError
from nanochat_x.runner import Runner, forward_arguments, run_passthrough

_BUNDLE = click.Path(path_type=Path)
_LARGEST = 2**63 - 1


class IntList(click.ParamType[tuple[int, ...]]):
    """`1,7,...`: integers of at least `minimum`, one or more."""

    name = "integers"

    def __init__(self, minimum: int) -> None:
        self.minimum = minimum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The integers. Fails, by click's own error, on anything else."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        for part in parts:
            if not part.isascii() or not part.isdigit() or len(part) > 20 or not self.minimum <= int(part) <= _LARGEST:
                self.fail(f"{part!r} is not an integer of at least {self.minimum} (as in 3,1,16)", param, ctx)
        return tuple(int(part) for part in parts)


class Integer(click.ParamType[int]):
    """An integer from `low` to `high`; unlike click's, it does not spell out a `high` that nobody meets."""

    name = "integer"

    def __init__(self, low: int, high: int = _LARGEST) -> None:
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The integer. Fails, by click's own error, on anything else."""
        text = str(value).strip()
        if not (text.isascii() and text.isdigit() and len(text) <= 20 and self.low <= int(text) <= self.high):
            high = f" and at most {self.high}" if text.isdigit() and len(text) > 1 else ""
            self.fail(f"{value!r} is not an integer of at least {self.low}{high}", param, ctx)
        return int(text)


class Number(click.ParamType[float]):
    """A finite number from `low` to `high`; `open_low`: `low` itself is none."""

    name = "number"

    def __init__(self, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
        self.low, self.high, self.open_low = low, high, open_low

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number. Fails, by click's own error, on anything else."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        above = number > self.low if self.open_low else number >= self.low
        if not (math.isfinite(number) and above and number <= self.high):
            low = f"{'above' if self.open_low else 'of at least'} {self.low:g}"
            high = f" and at most {self.high:g}" if math.isfinite(self.high) else ""
            self.fail(f"{value!r} is not a number {low}{high}", param, ctx)
        return number


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How tokens are drawn, and how many."""
    options = (
        click.option("--max-tokens", type=Integer(1, _LARGEST), default=256, show_default=True, metavar="N",
                     help="New tokens at most, those of the calculator included."),
        click.option("--temperature", type=Number(0), default=0.6, show_default=True, metavar="X",
                     help="0 takes the most likely token each time."),
        click.option("--top-k", type=Integer(0, _LARGEST), default=50, show_default=True, metavar="K",
                     help="Draw from the K most likely tokens; 0: from all."),
        click.option("--top-p", type=Number(0, 1, open_low=True), default=1.0, show_default=True, metavar="P",
                     help="Then from the fewest most likely ones that together have probability P."),
        click.option("--seed", type=Integer(0, 2**64 - 1), default=42, show_default=True, metavar="S",
                     help="The same seed draws the same tokens, on every machine."),
        *model_options,
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


model_options = (
    click.option("--threads", type=Integer(1, 4096), metavar="N", help="Threads that compute. Default: one a core."),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where to compute. Default: cpu."),
)


@click.command()
@click.argument("bundle", type=_BUNDLE)
@click.option("--input", "inputs", required=True, type=click.Path(path_type=Path), metavar="X.safetensors",
              help="Tensors NAME.input_ids, integers [B, T].")  # fmt: skip
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="Y.safetensors",
              help="Gets a tensor NAME.logits, float32 [B, T, vocab], for each.")  # fmt: skip
@click.option("--no-cache", is_flag=True, help="Take the program without a KV cache.")
@click.option("--chunks", type=IntList(1), metavar="1,7,...",
              help="Feed the sequence through the cache in pieces of these sizes, repeated to its end.")  # fmt: skip
@model_options[0]
@model_options[1]
def forward(
    bundle: Path, inputs: Path, output: Path, no_cache: bool, chunks: tuple[int, ...] | None, threads: int | None,
    device: str | None,
) -> int:  # fmt: skip
    """Compute logits with the C++ runner. Default: through the KV cache, in one prefill.

    \b
    nanochat_x forward nanochat-demo-aoti --input ids.safetensors --output logits.safetensors
    nanochat_x forward nanochat-demo-aoti --input ids.safetensors --output logits.safetensors --chunks 3,1,16
    """
    arguments = forward_arguments(inputs, output, cache=not no_cache, chunks=chunks or ())
    return _hand_over(bundle, "forward", arguments, threads, device)


@click.command()
@click.argument("bundle", type=_BUNDLE)
@click.option("--prompt", metavar="TEXT", help="The text to continue.")
@click.option("--prompt-ids", type=IntList(0), metavar="1,2,3", help="The same as token ids, taken as they are.")
@sampling_options
@click.option("--num-samples", type=Integer(1, _LARGEST), default=1, show_default=True, metavar="N",
              help="Continuations of the one prompt, which is computed once.")  # fmt: skip
@click.option("--raw", is_flag=True, help="Ignore stop tokens and the calculator: nothing but the model.")
@click.option("--json", "as_json", is_flag=True, help="The last line is one JSON object: samples and timing.")
def generate(
    bundle: Path, prompt: str | None, prompt_ids: tuple[int, ...] | None, num_samples: int, raw: bool, as_json: bool,
    threads: int | None, device: str | None, **sampling: float,
) -> int:  # fmt: skip
    """Continue a text, as a base model does it.

    \b
    nanochat_x generate nanochat-demo-aoti --prompt "Tom has 3 apples" --max-tokens 40
    nanochat_x generate nanochat-demo-aoti --prompt "Tom has 3 apples" --num-samples 4 --temperature 1 --json
    """
    if (prompt is None) == (prompt_ids is None):
        raise UsageError("generate takes one of --prompt and --prompt-ids", remedy='for instance --prompt "Once"')
    arguments = _sampling_arguments(sampling)
    if prompt is not None:
        arguments.append(_text_argument("--prompt", prompt))
    if prompt_ids is not None:
        arguments.append("--prompt-ids=" + ",".join(map(str, prompt_ids)))
    arguments.append(f"--num-samples={num_samples}")
    arguments += ["--raw"] * raw + ["--json"] * as_json
    return _hand_over(bundle, "generate", arguments, threads, device)


@click.command()
@click.argument("bundle", type=_BUNDLE)
@click.option("--prompt", metavar="TEXT", help="Give one reply to this, then end.")
@click.option("--script", type=click.Path(path_type=Path), metavar="FILE",
              help="A JSON list of conversations, each a list of user texts, to answer in order.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="With --script: the last line is a JSON list of all turns.")
@sampling_options
def chat(
    bundle: Path, prompt: str | None, script: Path | None, as_json: bool, threads: int | None, device: str | None,
    **sampling: float,
) -> int:  # fmt: skip
    """Talk with the model. Ctrl-C ends a reply, Ctrl-D the conversation.

    \b
    nanochat_x chat nanochat-demo-aoti
    nanochat_x chat nanochat-demo-aoti --prompt "What is 9325 + 33?" --temperature 0
    nanochat_x chat nanochat-demo-aoti --script talks.json --json --temperature 0
    """
    if prompt is not None and script is not None:
        raise UsageError("chat takes one of --prompt and --script", remedy="leave one of them out")
    if prompt == "":
        raise UsageError("--prompt is empty", remedy="leave it out to talk")
    if as_json and script is None:
        raise UsageError("--json reports on a script", remedy="add --script FILE, or take `generate --json`")
    arguments = _sampling_arguments(sampling)
    if prompt is not None:
        arguments.append(_text_argument("--prompt", prompt))
    if script is not None:
        arguments.append(f"--script={script}")
    arguments += ["--json"] * as_json
    return _hand_over(bundle, "chat", arguments, threads, device)


@click.command()
@click.argument("bundle", type=_BUNDLE)
@model_options[0]
@model_options[1]
def session(bundle: Path, threads: int | None, device: str | None) -> int:
    """Let another program drive a bundle.

    Requests come on standard input, a line of JSON each; answers, and logits as raw bytes, go to standard output. What
    they look like: docs/session.md.
    """
    return _hand_over(bundle, "session", [], threads, device)


def text_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The text that a report is about; `text_arguments` makes the runner's options of them."""
    options = (
        click.option("--text", type=click.Path(path_type=Path), metavar="FILE",
                     help="One text, UTF-8. Every token of it is predicted, in consecutive windows of the context, "
                          "each of which begins with <|bos|> and knows nothing of those before it."),
        click.option("--docs", type=click.Path(path_type=Path), metavar="FILE.json",
                     help='A JSON list of texts, or {"docs": [...]}: each with <|bos|> in front, cut to one window.'),
        click.option("--context", type=Integer(1, _LARGEST), metavar="N",
                     help="Predicted tokens of a window at most. Default: what the model was trained on, or fewer if "
                          "the bundle takes fewer."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def text_arguments(text: Path | None, docs: Path | None, context: int | None) -> list[str]:
    """Options of the runner's `eval` and `tokenize`. Raises UsageError unless one of the two files is named."""
    if (text is None) == (docs is None):
        raise UsageError("one of --text and --docs names the text", remedy="for instance --text book.txt")
    arguments = [f"--text={text}" if text is not None else f"--docs={docs}"]
    return arguments if context is None else [*arguments, f"--context={context}"]


@click.command("eval")
@click.argument("bundle", type=_BUNDLE)
@text_options
@click.option("--json", "as_json", is_flag=True, help="The last line is one JSON object with the same figures.")
@model_options[0]
@model_options[1]
def evaluate(
    bundle: Path, text: Path | None, docs: Path | None, context: int | None, as_json: bool, threads: int | None,
    device: str | None,
) -> int:  # fmt: skip
    """Compute bits per byte and perplexity of a text with the C++ runner.

    Bits per byte by nanochat's formula: the cross-entropy of the predicted tokens, over ln 2 times the bytes of their
    text. Perplexity: e to the mean cross-entropy of a token.

    \b
    nanochat_x eval nanochat-demo-aoti --text book.txt
    nanochat_x eval nanochat-demo-aoti --docs documents.json --json
    """
    arguments = text_arguments(text, docs, context) + ["--json"] * as_json
    return _hand_over(bundle, "eval", arguments, threads, device)


def _sampling_arguments(sampling: dict[str, float]) -> list[str]:
    # repr: the shortest digits that give the same double again
    return [f"--{name.replace('_', '-')}={value!r}" for name, value in sampling.items()]


def _text_argument(option: str, text: str) -> str:
    """`--option=text`, so that a text may begin with a dash. Raises UsageError if the text is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that Python could not decode
        raise UsageError(f"the text of {option} is not UTF-8", remedy="convert it to UTF-8") from None
    return f"{option}={text}"


def _hand_over(bundle: Path, verb: str, arguments: list[str], threads: int | None, device: str | None) -> int:
    if threads is not None:
        arguments.append(f"--threads={threads}")
    if device is not None:
        arguments.append(f"--device={device}")
    # Standard output is for what the runner answers; a build's progress goes to standard error.
    return run_passthrough(Runner(bundle, device=device, log=progress_on(sys.stderr)).command(verb, *arguments))
