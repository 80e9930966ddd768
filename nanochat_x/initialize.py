"""Write a random checkpoint of nanochat's real shape, for trying and measuring without a trained model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch

from nanochat_x.console import Progress, Silent, format_size
from nanochat_x.errors import CheckpointError, UsageError
from nanochat_x.find import SOURCE_FOLDERS, CheckpointFiles, find_checkpoint
from nanochat_x.generations import SMEAR, Shape, expected_shapes
from nanochat_x.model_config import ModelConfig, is_window_pattern
from nanochat_x.quoting import quoted
from nanochat_x.staging import staged_folder
from nanochat_x.synthetic_tokenizer import synthetic_tokens, write_tokenizer
from nanochat_x.tokenizer import SPECIAL_TOKENS

_WIDTH_PER_LAYER = 64  # nanochat's aspect ratio
_MOST_LAYERS = 10_000  # already petabytes of weights
_PAD_TO = 64
_LOGIT_STD = 2.0  # of a random model: neither uniform nor one-hot after softmax


def write_random_checkpoint(
    depth: int,
    output: Path,
    *,
    seed: int = 1337,
    sequence_len: int = 2048,
    vocab_size: int = 32768,
    head_dim: int = 128,
    window_pattern: str = "SSSL",
    progress: Progress | None = None,
) -> CheckpointFiles:
    """Writes a nanochat base folder `output` with one model of `depth` layers (generation smear) and its tokenizer.

    The width is 64 x depth rounded up to whole heads of `head_dim`; each query head has its own KV head. Embeddings are
    bfloat16, all else float32, as nanochat saves them. One seed gives one checkpoint.

    Holds the weights once in memory. Raises UsageError for sizes that make no model or an `output` that exists,
    CheckpointError if the disk does not take it; then nothing is left behind.
    """
    progress = progress or Silent()
    config = _config(depth, sequence_len, vocab_size, head_dim, window_pattern)
    shapes = expected_shapes(SMEAR, config, -(-vocab_size // _PAD_TO) * _PAD_TO)
    output = output.absolute()
    if output.exists() or output.is_symlink():
        raise UsageError(f"{output} exists already", remedy="choose another folder or remove it first")
    _check_disk(output, shapes)
    try:
        with staged_folder(output) as folder:
            with progress.stage("make a tokenizer") as stage:
                (folder / "tokenizer").mkdir()
                write_tokenizer(folder / "tokenizer", synthetic_tokens(vocab_size - len(SPECIAL_TOKENS)))
                stage.detail(f"{vocab_size} tokens")
            tag_folder = folder / SOURCE_FOLDERS["base"] / f"d{depth}"
            tag_folder.mkdir(parents=True)
            with progress.stage("draw weights") as stage:
                weights = _random_weights(config, shapes, seed)
                stage.detail(f"{sum(tensor.numel() for tensor in weights.values()) / 1e6:.1f} M parameters")
            with progress.stage("write the model") as stage:
                torch.save(weights, tag_folder / "model_000000.pt")
                stage.detail(format_size((tag_folder / "model_000000.pt").stat().st_size))
            meta = {"step": 0, "model_config": vars(config)}
            (tag_folder / "meta_000000.json").write_text(json.dumps(meta, indent=2))
    # torch.save reports a full disk as a RuntimeError of its archive writer.
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{output}: cannot be written ({quoted(reason)})", remedy="make room, or choose another folder"
        ) from error
    return find_checkpoint("base", f"d{depth}", 0, base_dir=output)


def _config(depth: int, sequence_len: int, vocab_size: int, head_dim: int, window_pattern: str) -> ModelConfig:
    if not 1 <= depth <= _MOST_LAYERS:
        raise UsageError(f"depth {depth} is not a number of layers", remedy=f"it counts from 1 to {_MOST_LAYERS}")
    if sequence_len < 2:
        raise UsageError(f"sequence length {sequence_len} is too short", remedy="nanochat's is 2048")
    if head_dim < 2 or head_dim % 2:
        raise UsageError(f"heads of width {head_dim}: rotary embeddings need an even one", remedy="nanochat's is 128")
    if not is_window_pattern(window_pattern):
        raise UsageError(f"window pattern {window_pattern!r}", remedy="it must be letters S and L, like SSSL")
    n_head = -(-depth * _WIDTH_PER_LAYER // head_dim)
    return ModelConfig(
        sequence_len=sequence_len,
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=n_head,
        n_kv_head=n_head,
        n_embd=n_head * head_dim,
        window_pattern=window_pattern.upper(),
    )


def _is_embedding(name: str) -> bool:
    return name == "transformer.wte.weight" or name.startswith("value_embeds.")


def _check_disk(output: Path, shapes: dict[str, Shape]) -> None:
    """Refuses early what cannot fit: drawing the weights of a large model takes minutes."""
    needed = sum(math.prod(shape) * (2 if _is_embedding(name) else 4) for name, shape in shapes.items())
    existing = next(parent for parent in output.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{output}: the model takes {format_size(needed)}, {format_size(free)} are free there",
            remedy="make room, choose another folder or a smaller --depth",
        )


def _random_weights(config: ModelConfig, shapes: dict[str, Shape], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: _random_tensor(name, shape, config, generator) for name, shape in shapes.items()}


def _random_tensor(name: str, shape: Shape, config: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    """Scales of nanochat's initialisation; what it sets to zero (c_proj, smear_lambda) is as training leaves it."""
    tensor = torch.empty(shape, dtype=torch.bfloat16 if _is_embedding(name) else torch.float32)
    layers = torch.linspace(0, 1, config.n_layer)
    if name == "resid_lambdas":
        return tensor.copy_(1.15 - 0.1 * layers)
    if name == "x0_lambdas":
        return tensor.copy_(0.2 - 0.15 * layers)
    if name == "smear_lambda":
        return tensor.fill_(0.5)
    if name == "backout_lambda":
        return tensor.fill_(0.2)
    if name == "transformer.wte.weight":
        return tensor.normal_(std=0.8, generator=generator)
    if name == "lm_head.weight":
        return tensor.normal_(std=_LOGIT_STD / math.sqrt(config.n_embd), generator=generator)
    # A uniform distribution up to sqrt(3) has variance 1. Value embeddings have that of the values they are added to;
    # a matrix, gates included, keeps that of what it is applied to.
    bound = math.sqrt(3) if name.startswith("value_embeds.") else math.sqrt(3 / shape[1])
    return tensor.uniform_(-bound, bound, generator=generator)
