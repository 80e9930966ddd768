"""A worker of peers.py: nanochat's own way, eager PyTorch with a KV cache, on random weights of a bundle's shape.

    python peer_eager.py BUNDLE PROMPT_TOKENS DECODE_TOKENS THREADS

The protocol is peer_worker.py's. Runs in nanochat_x's own environment.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peer_worker import serve
from torch import Tensor

from nanochat_x.manifest import read_manifest
from nanochat_x.model import GPT, rotary_tables
from nanochat_x.spec import ModelSpec


class EagerEngine:
    """A model and one row's cache, allocated at once and written in place, as nanochat's engine has it.

    Attention is torch's fused kernel over the live part of the cache, inside the window; of a prompt, the logits of the
    last position alone are computed (nanochat computes all of them).
    """

    def __init__(self, model: GPT, capacity: int, device: str = "cpu") -> None:
        spec = model.spec
        shape = (spec.n_layer, 1, spec.n_kv_head, capacity, spec.head_dim)
        self._model = model
        self._k, self._v = (torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(2))
        self._cos, self._sin = (table.to(device) for table in rotary_tables(spec, capacity, model.dtype))
        self._position = 0
        self._last = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._device = device

    def clear(self) -> None:
        """Forgets what was fed."""
        self._position = 0

    def feed(self, ids: Tensor) -> Tensor:
        """Feeds ids int64 [1, T]; returns float32 logits [1, 1, vocab] behind the last."""
        model, spec = self._model, self._model.spec
        begin, end = self._position, self._position + ids.shape[1]
        positions = torch.arange(begin, end, device=self._device)[None]
        rotary = (
            self._cos[begin:end].to(model.dtype)[None, :, None],
            self._sin[begin:end].to(model.dtype)[None, :, None],
        )
        x = model._embed(ids, self._last, positions)
        x0, x_mid = x, x
        for i, block in enumerate(model.transformer.blocks()):
            if spec.lambdas:
                x = model.resid_lambdas[i] * x + model.x0_lambdas[i] * x0
            q, k, v = model._project(i, block.attn, model._norm(x), ids, rotary)
            self._k[i, :, :, begin:end], self._v[i, :, :, begin:end] = k, v
            x = x + block.attn.c_proj(self._attention(i, q.transpose(1, 2), begin, end))
            x = x + block.mlp(model._norm(x))
            if i == spec.backout_layer:
                x_mid = x
        if spec.backout_layer is not None:
            x = x - model.backout_lambda[0] * x_mid
        logits = model.lm_head(model._norm(x[:, -1:])).float()
        self._position, self._last = end, ids[:, -1:]
        return spec.softcap * torch.tanh(logits / spec.softcap) if spec.softcap is not None else logits

    def _attention(self, layer: int, q: Tensor, begin: int, end: int) -> Tensor:
        """[1, T, H * D] for q [1, H, T, D] at the positions from `begin` to `end`, whose keys are in the cache."""
        spec = self._model.spec
        window = spec.windows[layer]
        first = 0 if window is None else max(0, begin - window)  # the oldest key that the oldest query sees
        k, v = self._k[layer, :, :, first:end], self._v[layer, :, :, first:end]
        grouped = spec.n_head != spec.n_kv_head
        steps = end - begin
        mask = None
        if steps > 1 and (begin > 0 or (window is not None and end > window + 1)):
            ends = (torch.arange(start, end, device=self._device) for start in (begin, first))
            distance = next(ends)[:, None] - next(ends)
            mask = (distance >= 0) & (distance <= (end if window is None else window))
        causal = steps > 1 and mask is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2).reshape(1, steps, -1)


def random_model(spec: ModelSpec, dtype: torch.dtype) -> GPT:
    """Random weights of that shape; embeddings in bfloat16, as nanochat keeps them."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = GPT(spec, dtype).state_dict()
    weights = {}
    for name, like in shapes.items():
        small = name.endswith(("gate.weight", "lambda", "lambdas"))
        table = name.startswith(("transformer.wte.", "value_embeds."))
        kind = torch.float32 if small else torch.bfloat16 if table else dtype
        scale = 0.1 if small or like.dim() < 2 else like.shape[1] ** -0.5
        weights[name] = (torch.randn(like.shape, generator=generator) * scale).to(kind)
    return GPT.from_weights(spec, weights, dtype)


def spec_of(bundle: Path) -> tuple[ModelSpec, str]:
    """The shape of a bundle's model, and its dtype. Raises BundleError."""
    manifest = read_manifest(bundle)
    model: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in manifest["model"].items()
    }
    return ModelSpec(**model), manifest["dtype"]


def main() -> None:
    """Serves until standard input ends."""
    bundle, prompt, decode, threads = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    torch.set_num_threads(threads)
    spec, dtype = spec_of(bundle)
    ids = torch.randint(0, spec.vocab_size, (prompt + decode,), generator=torch.Generator().manual_seed(1))
    engine = EagerEngine(random_model(spec, getattr(torch, dtype)), prompt + decode)

    def begin() -> Callable[[Tensor], Tensor]:
        engine.clear()
        return lambda row: engine.feed(row[None])

    with torch.inference_mode():
        serve(begin, ids, prompt)


if __name__ == "__main__":
    main()
