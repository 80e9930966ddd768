"""Fuzzes for some minutes: the libFuzzer targets of runners/fuzz, and the C++ text code against Python's.

    python scripts/fuzz.py --minutes 10             each target gets 10 minutes, and so does the Python part
    python scripts/fuzz.py --minutes 1 session      the named targets alone

Two run at a time. What was found stays in build/fuzz/corpus and is where the next run begins; an input that breaks a
promise is left in build/fuzz/broken, and the exit code is 1. Without clang and its libFuzzer the Python part is all.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from core_build import build_core
from fuzz_seeds import seeds, write_seeds

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "fuzz"
PYTHON_TESTS = ["test_text_parity.py", "test_engine_rules.py", "test_sampler_definition.py"]
EXAMPLES = 2000  # of each test, in one turn of the Python part


def find_clang() -> Path | None:
    """CXX if that can link a fuzz target, else the newest clang++ that can."""
    names = [os.environ.get("CXX", ""), "clang++", *(f"clang++-{version}" for version in range(30, 15, -1))]
    probe = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }'
    for name in names:
        compiler = shutil.which(name) if name else None
        if compiler is None:
            continue
        command = [compiler, "-x", "c++", "-std=c++20", "-fsanitize=fuzzer,address", "-o", os.devnull, "-"]
        if subprocess.run(command, input=probe.encode(), capture_output=True, check=False).returncode == 0:
            return Path(compiler)
    return None


def run_target(check: str, program: Path, minutes: float) -> tuple[bool, str]:
    """Runs a target; whether it kept its promises, and a line of figures."""
    corpus, broken = WORK / "corpus" / check, WORK / "broken"
    for folder in (corpus, broken):
        folder.mkdir(parents=True, exist_ok=True)
    log = WORK / f"{check}.log"
    command: list[str | Path] = [
        program, corpus, WORK / "seeds" / check, f"-dict={WORK / 'seeds' / check}.dict",
        f"-max_total_time={round(minutes * 60)}", "-timeout=20", "-rss_limit_mb=4096", "-print_final_stats=1",
        f"-artifact_prefix={broken}/{check}-",
    ]  # fmt: skip
    with log.open("wb") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    text = log.read_text(errors="replace")
    files = [file.stat().st_size for file in corpus.iterdir()]
    runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", text)
    covered = re.findall(r" cov: (\d+) ft: (\d+)", text)
    figures = f"{int(runs[1]) if runs else 0:>12,} inputs, corpus {len(files):,} files, {sum(files):,} bytes"
    figures += f", {covered[-1][0]} edges covered" if covered else ""
    if code == 0:
        return True, figures
    said = re.search(r"^.*(broken promise|ERROR: \w+|runtime error).*$", text, flags=re.MULTILINE)
    return False, f"{figures}; FAILED: {said[0].strip() if said else f'exit code {code}'}; see {log}"


def run_python(minutes: float) -> tuple[bool, str]:
    """The differential tests on ever new input; whether all passed, and a line of figures."""
    end, turns = time.monotonic() + minutes * 60, 0
    tests = [str(ROOT / "tests" / name) for name in PYTHON_TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    while time.monotonic() < end:
        environment = {**os.environ, "NANOCHAT_X_FUZZ_EXAMPLES": str(EXAMPLES)}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            return False, f"FAILED:\n{done.stdout}{done.stderr}"
        turns += 1
    return True, f"{turns} turns of {EXAMPLES} examples of each property, no difference to Python, NumPy and tiktoken"


def main() -> int:
    """Fuzzes; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("targets", nargs="*", choices=[[], *seeds()], help="default: all, and the Python part")
    options = parser.parse_args()
    clang = find_clang()
    jobs = {}
    with ThreadPoolExecutor(max_workers=2) as pool:
        if not options.targets:
            jobs["python"] = pool.submit(run_python, options.minutes)
        if clang is None:
            print("libFuzzer is left out: it takes clang 16 or newer; apt-get install clang-16 libclang-rt-16-dev")
        else:
            checks = options.targets or list(seeds())
            write_seeds(WORK / "seeds")
            build = build_core(
                WORK / "build",
                [f"fuzz_{check}" for check in checks],
                NANOCHAT_X_FUZZ="ON",
                CMAKE_CXX_COMPILER=str(clang),
            )
            for check in checks:
                jobs[check] = pool.submit(run_target, check, build / f"fuzz_{check}", options.minutes)
        good = True
        for name, job in jobs.items():
            passed, figures = job.result()
            good = good and passed
            print(f"{name:<16}{figures}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
