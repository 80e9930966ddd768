"""The two faces of a model that are captured: without a cache, and with one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanochat_x.model import GPT, KVCache, rotary_tables
from nanochat_x.spec import ModelSpec


class _Exportable(nn.Module):
    """A model and its rotary tables for `max_seq_len` positions."""

    cos: Tensor
    sin: Tensor

    def __init__(self, model: GPT, max_seq_len: int) -> None:
        super().__init__()
        if max_seq_len < 1:
            raise ValueError(f"max_seq_len must be at least 1, got {max_seq_len}")
        self.model = model
        self.max_seq_len = max_seq_len
        cos, sin = rotary_tables(model.spec, max_seq_len, model.dtype)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)


class ExportableGPT(_Exportable):
    """`input_ids` int64 [B, T] -> float32 logits [B, T, vocab], the whole sequence at once; T <= max_seq_len."""

    def forward(self, input_ids: Tensor) -> Tensor:
        logits, _, _ = self.model(input_ids, self.cos, self.sin)
        out: Tensor = logits
        return out


class ExportableGPTWithCache(_Exportable):
    """The contract of docs/bundle.md: T new tokens a row, their keys and values for the caller to append, and logits.

    input_ids int64 [B, T]; prev_ids int64 [B, 1], the token before input_ids[:, 0], ignored in a row at position 0;
    cache_k, cache_v [L, B, H_kv, S, D] in the model's dtype, row b holding position[b] live entries
    (S >= max(position); S = 0 is an empty cache); position int64 [B], position + T <= max_seq_len; logits_to_keep int64
    [R], the columns of input_ids whose logits are wanted, R >= 1 (a prompt needs those of its last token alone).
    Captured programs always take it; without it here R = T.
    Returns logits float32 [B, R, vocab], new_k and new_v [L, B, H_kv, T, D].
    """

    def forward(
        self,
        input_ids: Tensor,
        prev_ids: Tensor,
        cache_k: Tensor,
        cache_v: Tensor,
        position: Tensor,
        logits_to_keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out: tuple[Tensor, Tensor, Tensor] = self.model(
            input_ids, self.cos, self.sin, prev_ids, KVCache(cache_k, cache_v, position), logits_to_keep
        )
        return out

    def empty_cache(self, batch: int, capacity: int) -> tuple[Tensor, Tensor]:
        """`empty_cache` for this model."""
        return empty_cache(self.model.spec, self.model.dtype, batch, capacity)


def empty_cache(spec: ModelSpec, dtype: torch.dtype, batch: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Zeroed cache_k and cache_v with room for `capacity` positions."""
    shape = (spec.n_layer, batch, spec.n_kv_head, capacity, spec.head_dim)
    return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)


def append_to_cache(cache: Tensor, new: Tensor, position: Tensor) -> None:
    """Writes new rows [L, B, H_kv, T, D] into cache [L, B, H_kv, S, D] at position[b] of row b, in place.

    Raises ValueError if a row would not fit.
    """
    steps = new.shape[3]
    if int(position.max()) + steps > cache.shape[3]:
        raise ValueError(f"position {int(position.max())} + {steps} tokens do not fit a cache of {cache.shape[3]}")
    for row, start in enumerate(position.tolist()):
        cache[:, row, :, start : start + steps] = new[:, row]
