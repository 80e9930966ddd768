"""Drives the C++ runner of a bundle: the one way in which Python code here computes with a lowered model.

The interactive verbs hand the process over to the program (`run_passthrough`); reports and tests take its answer
(`Runner.forward`, `Runner.json`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat_x.build import PROGRAMS, ensure_built
from nanochat_x.console import Progress
from nanochat_x.cuda import program_for
from nanochat_x.errors import BundleError, RunnerError, UsageError
from nanochat_x.manifest import read_manifest


def bundle_target(bundle: Path) -> str:
    """The target of a bundle, which chooses the program that runs it. Raises BundleError."""
    target: str = read_manifest(bundle)["target"]
    if target not in PROGRAMS:
        raise BundleError(
            f"{bundle} is for the target {target!r}, for which there is no runner",
            remedy=f"update nanochat_x, or lower the checkpoint for one of: {', '.join(PROGRAMS)}",
        )
    return target


class Runner:
    """The program for one bundle, built by need. Every call is one process that opens the bundle anew."""

    def __init__(self, bundle: Path, *, device: str | None = None, log: Progress | None = None) -> None:
        """Raises BundleError if there is no bundle, RunnerError if its program cannot be built, or not for `device`."""
        self.bundle = bundle
        self.program = ensure_built(program_for(bundle_target(bundle), device), log=log).program

    def command(self, verb: str, *arguments: str) -> list[str]:
        """The command line of a verb on this bundle."""
        # A path that begins with "-" must not be read as an option.
        bundle = str(self.bundle)
        return [str(self.program), verb, f".{os.sep}{bundle}" if bundle.startswith("-") else bundle, *arguments]

    def run(self, verb: str, *arguments: str, stdin: str = "") -> str:
        """Standard output of a verb. Raises RunnerError with the program's own line when it fails."""
        command = self.command(verb, *arguments)
        try:
            done = subprocess.run(command, input=stdin.encode(), capture_output=True, check=False)
        except OSError as error:
            raise RunnerError(f"cannot start {self.program}: {error.strerror}") from None
        if done.returncode != 0:
            raise RunnerError(failure(done.returncode, done.stderr.decode("utf-8", "replace")))
        return done.stdout.decode("utf-8", "replace")

    def json(self, verb: str, *arguments: str, stdin: str = "") -> Any:
        """The JSON value in the last line of a verb's standard output. Raises RunnerError."""
        lines = self.run(verb, *arguments, stdin=stdin).splitlines()
        try:
            return json.loads(lines[-1])
        except (IndexError, ValueError):
            last = lines[-1][:80] if lines else ""
            raise RunnerError(f"{self.program.name} {verb} ended without a line of JSON: {last!r}") from None

    def forward(self, inputs: Path, output: Path, *, cache: bool = True, chunks: Sequence[int] = ()) -> None:
        """Writes `NAME.logits` float32 [B, T, vocab] to `output` for each `NAME.input_ids` [B, T] of `inputs`.

        `cache=False` takes the program without a cache; `chunks` feeds the sequence through the cache in pieces of
        those sizes, repeated to its end; neither: one prefill. Raises UsageError and RunnerError.
        """
        self.run("forward", *forward_arguments(inputs, output, cache=cache, chunks=chunks))


def forward_arguments(inputs: Path, output: Path, *, cache: bool = True, chunks: Sequence[int] = ()) -> list[str]:
    """Options of the verb `forward`. Raises UsageError for chunks without a cache."""
    if not cache and chunks:
        raise UsageError("chunks go through the cache", remedy="leave out --no-cache or --chunks")
    arguments = [f"--input={inputs}", f"--output={output}"]
    if not cache:
        arguments.append("--no-cache")
    if chunks:
        arguments.append("--chunks=" + ",".join(map(str, chunks)))
    return arguments


def run_passthrough(command: Sequence[str]) -> int:
    """Hands terminal, signals and exit code over to the program; on POSIX this process becomes it and never returns.

    Raises RunnerError if it cannot be started.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by whoever started us
            stream.flush()
    try:
        if os.name == "posix":
            os.execv(command[0], list(command))
        with subprocess.Popen(list(command)) as process:
            # Ctrl-C is for the program, which has this console too.
            previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                return process.wait()
            finally:
                signal.signal(signal.SIGINT, previous)
    except OSError as error:
        raise RunnerError(f"cannot start {command[0]}: {error.strerror}") from None


def run_printing(command: Sequence[str], *, keep_last: bool) -> tuple[int, list[str]]:
    """Runs the program with this terminal's standard error and prints its standard output once it has ended.

    `keep_last`: not the last line. Returns the exit code (128 + the number of a signal that ended it), and all lines.
    Ctrl-C is for the program, which says so. Raises RunnerError if it cannot be started.
    """
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
    except OSError as error:
        raise RunnerError(f"cannot start {command[0]}: {error.strerror}") from None
    try:
        out, _ = process.communicate()
    except KeyboardInterrupt:
        process.wait()
        out = b""
    lines = out.decode("utf-8", "replace").splitlines()
    for line in lines[: -1 if keep_last else None]:
        print(line, flush=True)
    return (process.returncode if process.returncode >= 0 else 128 - process.returncode), lines


def failure(returncode: int, stderr: str) -> str:
    """One line for a program that failed: its own last line without the prefix, or the signal that ended it."""
    if returncode < 0:
        try:
            name = signal.Signals(-returncode).name
        except ValueError:
            name = f"signal {-returncode}"
        return f"the runner was ended by {name}"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if not lines:
        return f"the runner ended with code {returncode} and said nothing"
    return re.sub(r"^[\w.-]+: (error: )?", "", lines[-1])
