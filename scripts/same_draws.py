"""Do bundles of one model draw the same tokens from the same seed? Where not, is a rounding error the whole reason?

    python scripts/same_draws.py BUNDLE BUNDLE...

Every bundle answers ten messages at temperature 0.8, top-k 50, from one seed, and is compared with the first one. A
draw takes the first token at which the sum of the probabilities so far passes a random number u. Two bundles' sums
differ by what their logits differ; so at the first token that differs, the two must agree about u: the interval of u
for which the one draws its token must overlap that of the other, and by no more than the sums differ: u lies there.
Ends with code 1 if a difference is not explained so.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nanochat_x.runner import Runner

TEMPERATURE, TOP_K, TOKENS = 0.8, 50, 64
PROMPTS = (
    "Tom has 3 apples and", "What is 12 * 7?", "The weather in", "How many letters are in", "Once upon a time",
    "A train leaves at 9", "Why is the sky", "Count to five:", "My name is", "If x = 4 then",
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """The first token at which two bundles differ."""

    prompt: str
    position: int  # of the new tokens
    tokens: tuple[int, int]
    logits: float  # largest difference of the two bundles' logits there
    sums: float  # largest difference of their sums of probabilities
    overlap: float  # of the two intervals of u; negative: there is none

    @property
    def explained(self) -> bool:
        """True if one u gives both tokens, in an interval that the rounding made."""
        return 0 < self.overlap <= self.sums


def encoded(runner: Runner, folder: Path) -> list[list[int]]:
    """The ids of each prompt, as the runner lays out a user's message."""
    script = folder / "prompts.json"
    script.write_text(json.dumps([[prompt] for prompt in PROMPTS]), encoding="utf-8")
    answer = runner.json("chat", f"--script={script}", "--json", "--max-tokens=1")
    return [conversation[0]["prompt_ids"] for conversation in answer]


def drawn(runner: Runner, prompt: list[int], seed: int) -> list[int]:
    """The new ids."""
    options = [f"--temperature={TEMPERATURE}", f"--top-k={TOP_K}", f"--seed={seed}", f"--max-tokens={TOKENS}"]
    answer = runner.json("generate", "--prompt-ids=" + ",".join(map(str, prompt)), *options, "--json")
    ids: list[int] = answer["samples"][0]["ids"]
    return ids


def logits_after(runner: Runner, prompt: list[int], new: list[int], folder: Path) -> torch.Tensor:
    """Float64 [vocab]: the logits that the next token is drawn from, fed as `generate` feeds them."""
    save_file({"a.input_ids": torch.tensor([prompt + new])}, folder / "in.safetensors")
    chunks = (len(prompt), *(1 for _ in new))
    runner.forward(folder / "in.safetensors", folder / "out.safetensors", chunks=chunks)
    return load_file(folder / "out.safetensors")["a.logits"][0, -1].double()


def sums(logits: torch.Tensor) -> torch.Tensor:
    """Float64 [vocab + 1]: the probabilities of all tokens before each, as the sampler adds them up: by id."""
    kept = logits >= logits.topk(TOP_K).values[-1]
    weights = torch.where(kept, ((logits - logits.max()) / TEMPERATURE).exp(), 0.0)
    return torch.cat([torch.zeros(1, dtype=torch.float64), (weights / weights.sum()).cumsum(0)])


def explain(
    prompt: str, position: int, tokens: tuple[int, int], logits: tuple[torch.Tensor, torch.Tensor]
) -> Difference:
    """Which u the two draws need, from the logits that they were made of."""
    first, second = (sums(part) for part in logits)
    low = max(float(first[tokens[0]]), float(second[tokens[1]]))
    high = min(float(first[tokens[0] + 1]), float(second[tokens[1] + 1]))
    return Difference(
        prompt,
        position,
        tokens,
        float((logits[0] - logits[1]).abs().max()),
        float((first - second).abs().max()),
        high - low,
    )


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Where two lists differ first; a list that ends earlier differs there."""
    pairs = enumerate(zip(a, b, strict=False))
    found = next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
    return None if found == len(a) == len(b) else found


def compare(reference: Runner, other: Runner, seed: int, folder: Path) -> list[Difference]:
    """The prompts after which not the same is drawn."""
    differences = []
    for text, prompt in zip(PROMPTS, encoded(reference, folder), strict=True):
        a, b = (drawn(runner, prompt, seed) for runner in (reference, other))
        at = first_difference(a, b)
        if at is None:
            continue
        if at == min(len(a), len(b)):  # the same tokens, but another end: no draw explains that
            differences.append(Difference(text, at, (-1, -1), math.nan, math.nan, math.nan))
            continue
        logits = logits_after(reference, prompt, a[:at], folder), logits_after(other, prompt, a[:at], folder)
        differences.append(explain(text, at, (a[at], b[at]), logits))
    return differences


def main() -> int:
    """Prints a line a bundle and a line a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    reference, *others = [Runner(bundle) for bundle in arguments.bundles]
    good = True
    with tempfile.TemporaryDirectory(prefix="nanochat_x-draws-") as scratch:
        for runner in others:
            differences = compare(reference, runner, arguments.seed, Path(scratch))
            same = len(PROMPTS) - len(differences)
            print(f"{runner.bundle} and {reference.bundle}: {same} of {len(PROMPTS)} prompts drew the same tokens")
            for one in differences:
                verdict = "explained by rounding" if one.explained else "NOT EXPLAINED"
                print(f"  {one.prompt!r}, token {one.position}: {one.tokens[0]} or {one.tokens[1]}; logits differ by "
                      f"{one.logits:.2g}, sums by {one.sums:.2g}; one u draws both in an interval of "
                      f"{one.overlap:.2g}: {verdict}")  # fmt: skip
                good = good and one.explained
    print(json.dumps({"explained": good}))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
