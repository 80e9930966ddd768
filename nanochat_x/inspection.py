"""What `inspect` prints of a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from nanochat_x.checkpoint import Checkpoint, CheckpointFiles
from nanochat_x.console import format_size
from nanochat_x.find import HF_SOURCE
from nanochat_x.hf_config import ARCHITECTURE
from nanochat_x.spec import GENERATIONS, ModelSpec


def describe_checkpoint(checkpoint: Checkpoint) -> str:
    """Lines of `name  value`: files, generation, sizes, every constant, weights, tokenizer, and what was assumed."""
    files, spec = checkpoint.files, checkpoint.spec
    letter = "ABCDE"[GENERATIONS.index(spec.generation)]
    shipped = " (shipped with nanochat_x)" if files.is_demo else ""
    rows = [
        ("checkpoint", _origin(checkpoint) + shipped),
        ("model file", f"{files.model} ({format_size(files.model_bytes)}{_shards(files)})"),
        ("sha256", checkpoint.model_sha256),
        ("generation", f"{spec.generation} ({letter} of docs/generations.md)"),
        ("layers", f"{spec.n_layer}"),
        ("width", f"{spec.n_embd}: {_heads(spec)}; MLPs of {spec.mlp_width}"),
        ("vocabulary", f"{spec.vocab_size} tokens{_padding(spec)}"),
        ("sequence length", f"{spec.sequence_len} tokens"),
        ("windows", _windows(spec)),
        ("parameters", _weights(checkpoint.weights.values())),
        ("constants", _constants(spec)),
        ("value embeddings", _value_embeddings(spec)),
        ("smear and backout", _smear(spec)),
        ("tokenizer", f"{_tokenizer_file(files)}, split pattern {checkpoint.tokenizer.pattern}"),
        *(("note", note) for note in checkpoint.notes),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _origin(checkpoint: Checkpoint) -> str:
    files = checkpoint.files
    if files.source == HF_SOURCE:
        return f"source {files.source}, {ARCHITECTURE}"
    return f"source {files.source}, tag {files.tag}, step {files.step}"


def _shards(files: CheckpointFiles) -> str:
    return f" in {len(files.shards)} shards" if files.shards else ""


def _tokenizer_file(files: CheckpointFiles) -> Path:
    return files.tokenizer_dir / ("tokenizer.json" if files.source == HF_SOURCE else "tokenizer.pkl")


def _heads(spec: ModelSpec) -> str:
    return f"{spec.n_head} heads of {spec.head_dim}, {spec.n_kv_head} KV heads"


def _padding(spec: ModelSpec) -> str:
    return f", rows padded to {spec.padded_vocab_size}" if spec.padded_vocab_size != spec.vocab_size else ""


def _windows(spec: ModelSpec) -> str:
    """`128 128 128 256 tokens back, by layer`."""
    if set(spec.windows) == {None}:
        return "none: each token sees all before it"
    return f"{' '.join(str(window) for window in spec.windows)} tokens back, by layer"


def _weights(tensors: Iterable[torch.Tensor]) -> str:
    """`4.5 M in 33 tensors: bfloat16 4.5 M`."""
    numbers: Counter[str] = Counter()
    tensor_count = 0
    for tensor in tensors:
        numbers[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        tensor_count += 1
    by_dtype = ", ".join(f"{dtype} {_millions(number)}" for dtype, number in sorted(numbers.items()))
    return f"{_millions(numbers.total())} in {tensor_count} tensors: {by_dtype}"


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f} M"


def _constants(spec: ModelSpec) -> str:
    softcap = "none" if spec.softcap is None else f"{spec.softcap:g}"
    return (
        f"softcap {softcap}, rotary_base {spec.rotary_base:g}, rope_table_dtype {spec.rope_table_dtype},"
        f" qk_scale {spec.qk_scale:g}, norm_eps {spec.norm_eps:g}"
    )


def _value_embeddings(spec: ModelSpec) -> str:
    if not spec.value_embed_layers:
        return "none"
    layers = ", ".join(map(str, spec.value_embed_layers))
    return f"layers {layers}; gate_scale {spec.gate_scale:g}, {spec.gate_channels} gate channels"


def _smear(spec: ModelSpec) -> str:
    if not spec.smear_channels:
        return "none"
    return f"{spec.smear_channels} smear channels, backout of layer {spec.backout_layer}"
