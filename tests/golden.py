"""What every target's bundles are held to: nanochat's own logits, tokens and conversations, through the C++ runner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from models import exact_logits, golden_of, largest
from safetensors.torch import load_file, save_file

from nanochat_x.runner import Runner

MODES: dict[str, dict[str, Any]] = {
    "prefill": {},
    "no-cache": {"cache": False},
    "by-one": {"chunks": (1,)},
    "by-3-1-16": {"chunks": (3, 1, 16)},
}
# As in test_model.py: nanochat's own float32 loss against float64 measures what float32 can do.
FACTOR = 4.0


def assert_golden_logits(bundle: Path, name: str, mode: str, folder: Path) -> None:
    """The runner's logits are nanochat's own within 2e-4, and as good against float64 as nanochat's."""
    golden = golden_of(name)
    # int32, as the golden file has it: the runner takes both integer types
    save_file({f"{case}.input_ids": ids.int() for case, ids in golden.input_ids.items()}, folder / "in.safetensors")
    Runner(bundle).forward(folder / "in.safetensors", folder / "out.safetensors", **MODES[mode])
    got = load_file(folder / "out.safetensors")
    assert set(got) == {f"{case}.logits" for case in golden.logits}
    for case, want in golden.logits.items():
        exact = exact_logits(name, golden.input_ids[case])
        assert got[f"{case}.logits"].dtype == torch.float32
        assert largest(got[f"{case}.logits"] - exact) <= FACTOR * largest(want - exact)
        assert largest(got[f"{case}.logits"] - want) <= 2e-4


def assert_golden_tokens(bundle: Path, name: str) -> None:
    """A greedy continuation is nanochat's own."""
    golden = golden_of(name)
    prompt = ",".join(map(str, golden.greedy_prompt))
    options = ("--raw", "--temperature=0", f"--max-tokens={len(golden.greedy_tokens)}", "--json")
    answer = Runner(bundle).json("generate", f"--prompt-ids={prompt}", *options)
    assert answer["samples"][0]["ids"] == golden.greedy_tokens


def assert_transcripts(demo_bundle: Path, data_dir: Path, folder: Path) -> None:
    """Conversations by nanochat's own engine: prompts, tokens, masks and texts, with the calculator at work."""
    transcripts = json.loads((data_dir / "transcripts.json").read_text())
    script = folder / "script.json"
    script.write_text(json.dumps([[turn["user"] for turn in conversation] for conversation in transcripts]))
    options = (f"--script={script}", "--json", "--temperature=0", "--max-tokens=96")
    assert Runner(demo_bundle).json("chat", *options) == transcripts
    assert any(0 in turn["sampled_mask"] for conversation in transcripts for turn in conversation)
