"""Runs the differential tests at the counts that docs/robustness.md gives, and prints what each one tried.

python scripts/fuzz_shows.py                    all: about half an hour on two cores
python scripts/fuzz_shows.py tokenizer utf8     some
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT, ENGINE, SAMPLER = "test_text_parity.py", "test_engine_rules.py", "test_sampler_definition.py"

#: What is shown -> the file, the tests in it (pytest's -k), and how many examples each gets.
SHOWS = {
    "tokenizer": (TEXT, "nanochat and encode_equals", 50_000),
    "tokenizer-ids": (TEXT, "nanochat and encode_of_token_sequences", 50_000),
    "vocabulary": (TEXT, "nanochat and (every_token or every_code_point)", 1),
    "calculator": (TEXT, "arithmetic", 100_000),
    "calculator-count": (TEXT, "count_equals", 20_000),
    "utf8": (TEXT, "every_split", 10_000),
    "utf8-stream": (TEXT, "utf8_equals", 10_000),
    "sampler": (SAMPLER, "kept or draws", 10_000),
    "engine": (ENGINE, "says or own_ways", 5_000),
}


def show(name: str) -> bool:
    """Runs one; prints a line for each property, or pytest's words when one fails."""
    file, tests, examples = SHOWS[name]
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "--hypothesis-show-statistics", str(ROOT / "tests" / file)]
    done = subprocess.run(
        [*command, "-k", tests], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "NANOCHAT_X_FUZZ_EXAMPLES": str(examples)},
    )  # fmt: skip
    tried = re.findall(r"(\d+) passing(?: examples)?, (\d+) failing", done.stdout)
    counts = " + ".join(f"{int(passing):,}" for passing, _ in tried)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    print(f"{name:<18}{counts or '-'} examples; {summary}; {time.monotonic() - began:.0f} s", flush=True)
    if done.returncode != 0:
        print(done.stdout + done.stderr)
    return done.returncode == 0


def main() -> int:
    """1 if any differed."""
    results = [show(name) for name in sys.argv[1:] or SHOWS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
