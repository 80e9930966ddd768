"""What it costs to lower and to run a model of nanochat's shape: the figures of the README.

    python scripts/measure.py --depth 12

Makes a random checkpoint, lowers it and generates from it, each in a process of its own, in a folder that is removed
afterwards. Times are wall clock; peak memory is the operating system's own account of the process, its compilers apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_x.build import ensure_built
from nanochat_x.console import tree_size

RUNS = 5
TOKENS = 128


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


def weights_in_float32(bundle: Path) -> int:
    """Bytes of the bundle's weights if each element took 4."""
    with (bundle / "weights.safetensors").open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    width = {"F32": 4, "BF16": 2, "F16": 2}
    spans = [(t["data_offsets"][1] - t["data_offsets"][0], width[t["dtype"]]) for t in header.values()]
    return sum(size // one * 4 for size, one in spans)


def main() -> None:
    """Prints a table, and one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12, help="layers of the model (default: 12)")
    depth = parser.parse_args().depth
    program = str(ensure_built("aoti").program)
    verb = [sys.executable, "-m", "nanochat_x"]
    with tempfile.TemporaryDirectory(prefix="nanochat_x-measure-") as scratch:
        folder = Path(scratch)
        run([*verb, "init", "--depth", str(depth), "-o", "model"], folder)
        lower = run([*verb, "lower", "--base-dir", "model", "-o", "bundle"], folder)
        generate = [program, "generate", "bundle", "--prompt=Once upon a time", f"--max-tokens={TOKENS}", "--raw"]
        runs = [run([*generate, "--temperature=0", "--json"], folder) for _ in range(RUNS)]
        timings = [json.loads(one.stdout.splitlines()[-1])["timing"] for one in runs]
        bundle, weights = tree_size(folder / "bundle"), (folder / "bundle" / "weights.safetensors").stat().st_size
        full = weights_in_float32(folder / "bundle")
    figures: dict[str, Any] = {
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}",
        "depth": depth,
        "lower_s": round(lower.seconds, 1),
        "lower_peak_mb": lower.peak_bytes // 10**6,
        "bundle_mb": bundle // 10**6,
        "bundle_to_float32_weights": round(bundle / full, 3),
        "runner_peak_mb": max(one.peak_bytes for one in runs) // 10**6,
        "runner_peak_to_weights_file": round(max(one.peak_bytes for one in runs) / weights, 3),
        "first_token_s": round(statistics.median(t["first_token_s"] for t in timings), 2),
        "tokens_per_s": round(statistics.median(t["tokens_per_s"] for t in timings), 1),
    }
    for name, value in figures.items():
        print(f"{name:30} {value}")
    print(json.dumps(figures))


def cpu_name() -> str:
    """What the processor calls itself, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
