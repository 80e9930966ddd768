"""What it costs to lower and to run a model of nanochat's shape, on every target: the table of the README.

    python scripts/measure.py --depth 12
    python scripts/measure.py --depth 12 --target onnx

Makes a random checkpoint, lowers it and lets `bench` measure it (docs/bench.md), each in a process of its own, in a
folder that is removed afterwards. Of lowering, times are wall clock, and peak memory is the operating system's own
account of the process, its compilers apart.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_x.build import PROGRAMS, ensure_built
from nanochat_x.console import tree_size
from nanochat_x.machine import describe_machine

RUNS = 5
PROMPT = 512  # tokens that are read, and
TOKENS = 128  # tokens that are written, in each run


@dataclass(frozen=True)
class Cost:
    """One finished process."""

    seconds: float
    peak_bytes: int
    stdout: str


def run(command: Sequence[str], folder: Path) -> Cost:
    """Runs a command to its end. Raises SystemExit with its own message when it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}")
        output.seek(0)
        text = output.read().decode()
    scale = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, kilobytes elsewhere
    return Cost(seconds, usage.ru_maxrss * scale, text)


def library_bytes(program: Path) -> int:
    """Size of the program, stripped, and of the shared libraries that it loads and that the system does not bring.

    A library of the compiler or the C library counts as the system's: it lies in /lib or /usr.
    """
    with tempfile.TemporaryDirectory() as scratch:
        stripped = Path(scratch) / program.name
        subprocess.run(["strip", "-o", str(stripped), str(program)], check=True)
        size = stripped.stat().st_size
    text = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    paths = {Path(match).resolve() for match in re.findall(r"=> (/\S+)", text)}
    if program.stem.endswith("-onnx"):  # loads its library when it runs
        cache = (program.parent / "CMakeCache.txt").read_text(encoding="utf-8")
        paths |= {Path(match).resolve() for match in re.findall(r"^ONNXRUNTIME_LIBRARY:\w+=(.+)$", cache, re.MULTILINE)}
    return size + sum(path.stat().st_size for path in paths if path.parts[1] not in ("lib", "lib64", "usr"))


def measure(target: str, bundle: Path) -> dict[str, Any]:
    """The row of one target, from `bench`: RUNS rounds, each of which reads PROMPT tokens and writes TOKENS."""
    program = ensure_built(target).program
    options = ["--batch=1", f"--repeats={RUNS}", f"--prompt-tokens={PROMPT}", f"--decode-tokens={TOKENS}", "--json"]
    report = json.loads(run([str(program), "bench", bundle.name, *options], bundle.parent).stdout.splitlines()[-1])
    prefill, decode = (line["tokens_per_s"]["median"] for line in report["lines"])
    return {
        "bundle MB": tree_size(bundle) // 10**6,
        "runner and libraries MB": library_bytes(program) // 10**6,
        "load s": round(report["start"]["load_s"]["median"], 2),
        "first token s": round(report["start"]["first_token_of_1_s"]["median"], 2),
        "prefill tokens/s": round(prefill),
        "decode tokens/s": round(decode, 1),
        "peak memory MB": report["memory"]["peak_bytes"] // 10**6,
    }


def main() -> None:
    """Prints a table, and one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12, help="layers of the model (default: 12)")
    parser.add_argument("--target", action="append", choices=list(PROGRAMS), help="repeatable (default: all)")
    arguments = parser.parse_args()
    verb = [sys.executable, "-m", "nanochat_x"]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="nanochat_x-measure-") as scratch:
        folder = Path(scratch)
        run([*verb, "init", "--depth", str(arguments.depth), "-o", "model"], folder)
        for target in arguments.target or PROGRAMS:
            output = folder / "bundle"
            cost = run([*verb, "lower", "--base-dir", "model", "--target", target, "-o", output.name], folder)
            lowering = {"lower s": round(cost.seconds), "lower peak MB": cost.peak_bytes // 10**6}
            rows[target] = lowering | measure(target, output)
            shutil.rmtree(output)
    machine = describe_machine()
    print(
        f"\ndepth {arguments.depth}, float32, prompt {PROMPT} tokens, {TOKENS} new ones, medians of {RUNS}; {machine}\n"
    )
    print(f"{'':26}" + "".join(f"{target:>13}" for target in rows))
    for name in next(iter(rows.values())):
        print(f"{name:26}" + "".join(f"{row[name]:>13}" for row in rows.values()))
    print(json.dumps({"machine": machine, "depth": arguments.depth, "targets": rows}))


if __name__ == "__main__":
    main()
