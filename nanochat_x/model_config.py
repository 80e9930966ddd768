"""`model_config` of a nanochat meta file, read strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nanochat_x.errors import CheckpointError
from nanochat_x.quoting import quoted
from nanochat_x.regular_file import read_regular

_SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
_LARGEST_FILE = 16 << 20  # bytes; nanochat's are a few kB, its run's settings included
_LARGEST_SIZE = 2**31 - 1


@dataclass(frozen=True)
class ModelConfig:
    """All that nanochat itself records of a model's form; every size is at least 1."""

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str | None  # letters S and L; None before 2026-01-11

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head


def read_meta(path: Path) -> tuple[int | None, ModelConfig]:
    """The step that a meta file names (None: it names none) and its model_config.

    Raises CheckpointError if it is not nanochat's JSON or its sizes make no model.
    """
    try:
        text = read_regular(path, _LARGEST_FILE)
        if len(text) > _LARGEST_FILE:
            raise CheckpointError(f"{path}: larger than {_LARGEST_FILE >> 20} MiB, so not a meta file of nanochat's")
        meta = json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(
            f"{path}: cut short or not JSON ({quoted(error)})",
            remedy="take another step with -s STEP or copy the file again",
        ) from error
    config = meta.get("model_config") if isinstance(meta, dict) else None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds no model_config", remedy="it is not a meta file of nanochat's")
    step = meta.get("step")
    return (step if type(step) is int else None), parse_model_config(config, f"{path}: model_config")


def parse_model_config(config: Mapping[str, object], where: str) -> ModelConfig:
    """Checks types, ranges and divisibility; a key that nanochat does not have is refused, it could mean anything."""
    unknown = sorted(set(config) - {*_SIZES, "window_pattern"})
    if unknown:
        names = ", ".join(repr(name) for name in unknown[:8])
        raise CheckpointError(
            f"{where} has unknown keys {names}", remedy="nanochat_x reads the generations of docs/generations.md"
        )
    sizes: dict[str, int] = {}
    for name in _SIZES:
        value = config.get(name)
        if name not in config:
            raise CheckpointError(f"{where} lacks {name}", remedy="it is not a meta file of nanochat's")
        if type(value) is not int or not 1 <= value <= _LARGEST_SIZE:  # type(): True is an int to isinstance
            raise CheckpointError(f"{where}: {name} is {value!r:.40}", remedy="it must be a positive integer")
        sizes[name] = value
    parsed = ModelConfig(window_pattern=_window_pattern(config, where), **sizes)
    _check_heads(parsed, where)
    return parsed


def _window_pattern(config: Mapping[str, object], where: str) -> str | None:
    if "window_pattern" not in config:
        return None
    pattern = config["window_pattern"]
    if not isinstance(pattern, str) or not is_window_pattern(pattern):
        raise CheckpointError(f"{where}: window_pattern is {pattern!r:.40}", remedy="it must be letters S and L")
    return pattern.upper()  # as nanochat does


def is_window_pattern(text: str) -> bool:
    """Whether `text` is one or more of the letters S and L, in either case."""
    return text != "" and set(text) <= set("SLsl")


def _check_heads(config: ModelConfig, where: str) -> None:
    if config.n_embd % config.n_head:
        raise CheckpointError(f"{where}: n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
    if config.n_head % config.n_kv_head:
        raise CheckpointError(f"{where}: n_head {config.n_head} is not a multiple of n_kv_head {config.n_kv_head}")
    if config.head_dim % 2:
        raise CheckpointError(f"{where}: heads of odd width {config.head_dim}; rotary embeddings need an even one")
