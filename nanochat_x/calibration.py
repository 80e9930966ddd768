"""Texts that show how a model's activations are distributed: a user's own, or what the model itself writes.

What a model writes needs no file and fits whatever it was trained on; it is drawn from the model's own distribution,
from BOS on, by a fixed seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_x.errors import UsageError
from nanochat_x.model import GPT
from nanochat_x.quoting import quoted
from nanochat_x.regular_file import read_regular
from nanochat_x.spec import ModelSpec
from nanochat_x.tokenizer import TokenizerData
from nanochat_x.wrappers import ExportableGPTWithCache, append_to_cache

TOKENS = 16_384  # several times the width of any matrix of the models that are lowered on one machine
LENGTH = 512  # of a row of a user's text
WRITTEN_LENGTH = 128  # of a row that the model writes: many short ones are written in the time of a few long ones
SEED = 20251013
_CACHE_BYTES = 1 << 29  # of the rows that are written at once: enough of them to keep matrices busy
_BOS = "<|bos|>"
_LARGEST_FILE = 64 << 20  # bytes
_BYTES_READ = 16  # of the file for each token that is wanted: no tokenizer's tokens are longer on average


@dataclass(frozen=True)
class Calibration:
    """Token ids, and where they are from."""

    ids: Tensor  # int64 [R, T]; each row begins with BOS
    record: dict[str, Any]  # for a manifest


def calibrate(
    spec: ModelSpec, weights: Mapping[str, Tensor], tokenizer: TokenizerData, file: Path | None, tokens: int = TOKENS
) -> Calibration:
    """The text of `file`; without one, what the model writes. `weights` are prepared for float32.

    Raises UsageError for a file that cannot be read, is no text, or is too short for one row.
    """
    bos = tokenizer.special_tokens[_BOS]
    if file is None:
        length = min(WRITTEN_LENGTH, spec.sequence_len)
        ids = write_samples(spec, weights, bos, max(1, tokens // length), length, SEED)
        return Calibration(ids, {"source": "written by the model", "seed": SEED, "tokens": ids.numel()})
    data = _read(file)
    ids = _rows(_encode(data, tokenizer, tokens), bos, min(LENGTH, spec.sequence_len), tokens)
    if not ids.numel():
        raise UsageError(
            f"{file} has fewer than {min(LENGTH, spec.sequence_len)} tokens, too few to calibrate by",
            remedy="name a longer text, or leave out --calibration",
        )
    digest = hashlib.sha256(data).hexdigest()
    return Calibration(ids, {"source": "file", "name": file.name, "sha256": digest, "tokens": ids.numel()})


def write_samples(
    spec: ModelSpec, weights: Mapping[str, Tensor], bos: int, rows: int, length: int, seed: int
) -> Tensor:
    """Token ids int64 [rows, length], drawn from the model's own distribution after BOS (temperature 1)."""
    generator = torch.Generator().manual_seed(seed)
    model = ExportableGPTWithCache(GPT.from_weights(spec, weights, torch.float32), length)
    ids = torch.full((rows, length), bos)
    bytes_a_row = 4 * 2 * spec.n_layer * spec.n_kv_head * spec.head_dim * length
    with torch.inference_mode():
        at_once = max(1, _CACHE_BYTES // bytes_a_row)
        for first in range(0, rows, at_once):
            _write(model, ids[first : first + at_once], generator)
    return ids


def _write(model: ExportableGPTWithCache, ids: Tensor, generator: torch.Generator) -> None:
    """Fills ids int64 [R, T] after their first column."""
    rows, length = ids.shape
    cache_k, cache_v = model.empty_cache(rows, length)
    for i in range(length - 1):
        position = torch.full((rows,), i)
        live = cache_k[:, :, :, :i], cache_v[:, :, :, :i]
        logits, new_k, new_v = model(ids[:, i : i + 1], ids[:, max(i - 1, 0) : max(i, 1)], *live, position)
        append_to_cache(cache_k, new_k, position)
        append_to_cache(cache_v, new_v, position)
        ids[:, i + 1] = _draw(logits[:, 0], generator)


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One id int64 [R] of each row of logits [R, vocab], by inverting the distribution.

    (torch.multinomial draws a number for every token of the vocabulary, which takes longer than a small model.)
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    uniform = torch.rand(logits.shape[0], 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, uniform, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)


def _read(file: Path) -> bytes:
    try:
        data = read_regular(file, _LARGEST_FILE)
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror or error})", remedy="name a text file") from error
    if len(data) > _LARGEST_FILE:
        raise UsageError(f"{file} is larger than {_LARGEST_FILE >> 20} MiB", remedy="a part of it is enough")
    return data


def _encode(data: bytes, tokenizer: TokenizerData, tokens: int) -> list[int]:
    """Ids of the beginning of a text; special tokens in it are plain text. Raises UsageError if it is not UTF-8."""
    import tiktoken

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"the calibration text is not UTF-8 ({quoted(error.reason)})", remedy="convert it") from error
    encoding = tiktoken.Encoding(
        "nanochat_x",
        pat_str=tokenizer.pattern,
        mergeable_ranks={token: rank for rank, token in enumerate(tokenizer.tokens)},
        special_tokens=tokenizer.special_tokens,
    )
    return encoding.encode_ordinary(text[: tokens * _BYTES_READ])


def _rows(ids: list[int], bos: int, length: int, tokens: int) -> Tensor:
    """int64 [R, length], each row BOS and the next piece of the text; what fills no row is left off."""
    piece = length - 1
    rows = min(len(ids) // piece, max(1, tokens // length))
    text = torch.tensor(ids[: rows * piece]).view(rows, piece)
    return torch.cat([torch.full((rows, 1), bos), text], dim=1)
