"""Builds the C++ core and its tests under sanitizers, and runs them: one report of any of them is a failure.

    python scripts/sanitize.py                      address with undefined, then thread
    python scripts/sanitize.py thread               one of them

What runs: the doctest suites of the core, of the kernels and of the program (over the toy backend), and the fuzz
targets' checks on their seeds and on random changes of each.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from core_build import build_core
from fuzz_seeds import seeds, write_seeds

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "sanitize"
SANITIZERS = {"address": "address;undefined", "thread": "thread"}
#: Cases that a sanitizer cannot run, with the reason, which is printed.
LEFT_OUT = {
    "thread": {
        "Ctrl-C during a reply ends the reply, at the prompt the program": "ThreadSanitizer holds a signal back while"
        " the C library waits for a line, and delivers it when another handler is in place"
    }
}
SUITES = ("core_tests", "program_tests", "kernels_tests")
CHANGES = 200  # of each seed


def environment() -> dict[str, str]:
    """Every report ends the program with an exit code that no test takes for success.

    Memory that is not to be had is no fault in itself: a test asks for too much, and sees it refused.
    """
    return {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=1:exitcode=99:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=99",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=99:second_deadlock_stack=1:allocator_may_return_null=1",
    }


def run(command: list[str | Path]) -> tuple[bool, str]:
    """Whether a program ended well and without a report, and what it said."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment())
    text = done.stdout + done.stderr
    report = re.search(r"(AddressSanitizer|LeakSanitizer|ThreadSanitizer)(?! failed to allocate)|runtime error:", text)
    return done.returncode == 0 and report is None, text


def sanitize(name: str) -> bool:
    """Builds and runs all under one sanitizer; prints a line for each program."""
    began = time.monotonic()
    build = build_core(
        WORK / name, [*SUITES, "fuzz_replay"], NANOCHAT_X_SANITIZE=SANITIZERS[name], NANOCHAT_X_TESTS="ON",
        CMAKE_BUILD_TYPE="None", CMAKE_CXX_FLAGS="-O1",
    )  # fmt: skip
    print(f"{SANITIZERS[name]}: built in {time.monotonic() - began:.0f} s", flush=True)
    for case, reason in LEFT_OUT.get(name, {}).items():
        print(f"  left out: {case!r}: {reason}")
    good = True
    for suite in SUITES:
        excluded = [case.replace(",", "\\,") for case in LEFT_OUT.get(name, {})]
        passed, text = run([build / suite, "--no-colors", f"--test-case-exclude={','.join(excluded)}"])
        counts = re.search(r"test cases:.*", text)
        print(f"  {suite}: {counts[0] if counts else ''}{'' if passed else chr(10) + text[-4000:]}", flush=True)
        good = good and passed
    total = 0
    for check in seeds():
        passed, text = run([build / "fuzz_replay", check, str(CHANGES), WORK / "seeds" / check])
        tried = re.search(r"(\d+) inputs", text)
        total += int(tried[1]) if tried else 0
        if not passed:
            print(f"  fuzz_replay {check}:\n{text[-4000:]}")
        good = good and passed
    print(f"  fuzz_replay: {total} inputs of {len(seeds())} checks", flush=True)
    print(f"  {'no report' if good else 'FAILED'}", flush=True)
    return good


def main() -> int:
    """1 if there was any report or failure."""
    write_seeds(WORK / "seeds")
    results = [sanitize(name) for name in sys.argv[1:] or SANITIZERS]  # all of them, whatever the first one finds
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
