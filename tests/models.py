"""The checkpoints in tests/data as models, and the judgement that logits are as good as float32 allows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from nanochat_x.checkpoint import find_checkpoint, load_checkpoint
from nanochat_x.model import GPT, prepare_weights
from nanochat_x.spec import ModelSpec
from nanochat_x.wrappers import ExportableGPT, ExportableGPTWithCache, append_to_cache

GENERATIONS = Path(__file__).parent / "data" / "generations"
NAMES = tuple(sorted(folder.name for folder in GENERATIONS.iterdir()))
MAX_SEQ_LEN = 512


@dataclass(frozen=True)
class Golden:
    """What the real nanochat computed: logits in float32 for each case, and a greedy continuation."""

    input_ids: dict[str, Tensor]  # int64 [B, T]
    logits: dict[str, Tensor]  # float32 [B, T, vocab]
    greedy_prompt: list[int]
    greedy_tokens: list[int]


@cache
def weights_of(name: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Spec and float32 weights of a generation's checkpoint."""
    checkpoint = load_checkpoint(find_checkpoint(base_dir=GENERATIONS / name))
    return checkpoint.spec, prepare_weights(checkpoint.weights, torch.float32)


def model_of(name: str, dtype: torch.dtype = torch.float32) -> GPT:
    """The model of a generation."""
    return GPT.from_weights(*weights_of(name), dtype)


@cache
def golden_of(name: str) -> Golden:
    """golden.safetensors of a generation."""
    tensors = load_file(GENERATIONS / name / "golden.safetensors")
    cases = sorted({key.split(".")[0] for key in tensors if key.startswith("case")})
    return Golden(
        {case: tensors[f"{case}.input_ids"].long() for case in cases},
        {case: tensors[f"{case}.logits"] for case in cases},
        tensors["greedy.prompt"].flatten().tolist(),
        tensors["greedy.tokens"].flatten().tolist(),
    )


def feed(wrapper: ExportableGPTWithCache, ids: Tensor, chunks: list[int]) -> Tensor:
    """Logits [B, T, vocab] of ids [B, T], fed through the cache in pieces of these sizes, repeated to the end."""
    batch, total = ids.shape
    caches = wrapper.empty_cache(batch, total)
    done = 0
    pieces: list[Tensor] = []
    while done < total:
        steps = min(chunks[len(pieces) % len(chunks)], total - done)
        prev = ids[:, done - 1 : done] if done else torch.zeros(batch, 1, dtype=torch.long)
        position = torch.full((batch,), done)
        logits, *new = wrapper(ids[:, done : done + steps], prev, *caches, position)
        for cache_tensor, rows in zip(caches, new, strict=True):
            append_to_cache(cache_tensor, rows, position)
        pieces.append(logits)
        done += steps
    return torch.cat(pieces, 1)


def exact_logits(name: str, ids: Tensor) -> Tensor:
    """The oracle: no cache, float64."""
    with torch.inference_mode():
        out: Tensor = ExportableGPT(model_of(name, torch.float64), MAX_SEQ_LEN)(ids)
    return out


def largest(difference: Tensor) -> float:
    """The largest absolute value."""
    return float(difference.abs().max())
