"""nanochat's forward pass, every generation of it, with or without a KV cache.

    x  = norm(wte[ids]);  x = smear(x);  x0 = x
    for i in layers:
        x = resid_lambdas[i] * x + x0_lambdas[i] * x0
        x = x + attention_i(norm(x))
        x = x + c_proj(relu(c_fc(norm(x)))^2)
    x = norm(x - backout_lambda * x_mid)
    logits = softcap * tanh(float32(lm_head(x)) / softcap)

What a generation lacks is left out; `ModelSpec` says what that is. Parameters carry nanochat's own names, so a
checkpoint's tensors are this module's state dict.

The forward pass is functional: with a cache it returns the keys and values of the new tokens, and the caller writes
them behind the live ones. So one graph serves compilers that keep mutations and compilers that drop them, and a step
copies its new rows, never the past.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_x import operators, row_operators
from nanochat_x.spec import ModelSpec


class KVCache(NamedTuple):
    """Keys and values of earlier tokens, as a call gets them."""

    k: Tensor  # [L, B, H_kv, S, D]; row b holds position[b] live entries, the rest is masked and must be finite
    v: Tensor  # the same shape
    position: Tensor  # int64 [B]: tokens already in each row


class Linear(nn.Module):
    """`x @ weight.T` without bias; the weight is brought to x's dtype, as nanochat does."""

    product: Callable[[Tensor, Tensor], Tensor] = staticmethod(F.linear)

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight.to(x.dtype))


class Gate(Linear):
    """`sigmoid(x[..., :channels] @ weight.T)`: a few channels to a few gates."""

    def forward(self, x: Tensor) -> Tensor:
        return row_operators.gate(x, self.weight)


class Embedding(nn.Module):
    """Rows of a table that stays in its stored dtype: only what is looked up is converted."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width), requires_grad=False)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.weight).to(dtype)


class Attention(nn.Module):
    """Parameters of one layer's attention; `GPT._project` and `GPT.attention` compute it."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        kv_width = spec.n_kv_head * spec.head_dim
        self.c_q = Linear(spec.n_embd, spec.n_embd)
        self.c_k = Linear(spec.n_embd, kv_width)
        self.c_v = Linear(spec.n_embd, kv_width)
        self.c_proj = Linear(spec.n_embd, spec.n_embd)
        self.ve_gate = Gate(spec.gate_channels, spec.n_kv_head) if layer in spec.value_embed_layers else None


class MLP(nn.Module):
    """c_proj(relu(c_fc(x))^2)."""

    activation: Callable[[Tensor], Tensor] = staticmethod(row_operators.relu_square)

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.c_fc = Linear(spec.n_embd, spec.mlp_width)
        self.c_proj = Linear(spec.mlp_width, spec.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(self.activation(self.c_fc(x)))
        return out


class Block(nn.Module):
    """One layer's parameters."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.attn = Attention(spec, layer)
        self.mlp = MLP(spec)


class Transformer(nn.Module):
    """The token embedding and the layers (nanochat's name for the two together)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.wte = Embedding(spec.vocab_size, spec.n_embd)
        self.h = nn.ModuleList(Block(spec, i) for i in range(spec.n_layer))

    def blocks(self) -> Iterator[Block]:
        """The layers in order, with their type."""
        return (block for block in self.h if isinstance(block, Block))


class GPT(nn.Module):
    """A nanochat model.

    `dtype` is the dtype of the computation: float32, bfloat16, float16, or float64 for a reference, which
    keeps float32's tables: the same function, computed more exactly. `own_operators` names those of operators.py and
    row_operators.py that it calls, for programs whose runner has kernels for them; all else is ATen's.
    """

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype = torch.float32, *, own_operators: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        self.rows = row_operators.row_functions(own_operators)
        self.transformer = Transformer(spec)
        self.lm_head = Linear(spec.n_embd, spec.vocab_size)
        if spec.lambdas:
            self.resid_lambdas = nn.Parameter(torch.ones(spec.n_layer), requires_grad=False)
            self.x0_lambdas = nn.Parameter(torch.zeros(spec.n_layer), requires_grad=False)
        kv_width = spec.n_kv_head * spec.head_dim
        if spec.value_embed_layers:
            self.value_embeds = nn.ModuleDict(
                {str(i): Embedding(spec.vocab_size, kv_width) for i in spec.value_embed_layers}
            )
        if spec.smear_channels:
            self.smear_gate = Gate(spec.smear_channels, 1)
            self.smear_lambda = nn.Parameter(torch.zeros(1), requires_grad=False)
        if spec.backout_layer is not None:
            self.backout_lambda = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.attention = operators.attention if "attention" in own_operators else operators.attention_composed
        for module in self.modules():
            if isinstance(module, Linear) and "linear" in own_operators:
                module.product = operators.linear
            elif isinstance(module, MLP):
                module.activation = self.rows.relu_square

    @classmethod
    def from_weights(
        cls,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        *,
        own_operators: Collection[str] = (),
    ) -> GPT:
        """A model over these tensors (not copied; rows beyond the vocabulary are left off by a view).

        Raises RuntimeError if a tensor is missing, unknown or of the wrong shape.
        """
        with torch.device("meta"):
            model = cls(spec, dtype, own_operators=own_operators)
        cropped = {
            name: tensor[: spec.vocab_size] if _has_vocab_rows(name) else tensor for name, tensor in weights.items()
        }
        model.load_state_dict(cropped, strict=True, assign=True)
        model.requires_grad_(False)
        return model.eval()

    def forward(
        self,
        ids: Tensor,
        cos: Tensor,
        sin: Tensor,
        prev_ids: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, and the new keys and values.

        ids int64 [B, T], T >= 1; cos and sin [P, D / 2] for P >= every position + T. With a cache, prev_ids int64
        [B, 1] is the token before ids[:, 0] (ignored in a row at position 0). logits_to_keep int64 [R] names columns of
        ids, in any order: of these alone logits are computed, the same for all rows; without it, of all T.
        Returns float32 logits [B, R, vocab] (float64 if that is the dtype) and k, v [L, B, H_kv, T, D].
        """
        spec, steps = self.spec, ids.shape[1]
        offsets = torch.arange(steps, device=ids.device)
        positions = offsets.unsqueeze(0) if cache is None else cache.position.unsqueeze(1) + offsets  # [1 or B, T]
        rotary = cos[positions].to(self.dtype).unsqueeze(2), sin[positions].to(self.dtype).unsqueeze(2)

        x = self._embed(ids, prev_ids, positions)
        x0, x_mid = x, x
        new_k, new_v = [], []
        for i, block in enumerate(self.transformer.blocks()):
            if spec.lambdas:
                x = self.rows.mix(x, self.resid_lambdas, x0, self.x0_lambdas, i)
            h = self._norm(x)
            q, k, v = self._project(i, block.attn, h, ids, rotary)
            past = None if cache is None else (cache.k[i], cache.v[i], cache.position)
            x = x + block.attn.c_proj(self.attention(q, k, v, past, spec.windows[i]))
            x = x + block.mlp(self._norm(x))
            if i == spec.backout_layer:
                x_mid = x
            new_k.append(k)
            new_v.append(v)
        if spec.backout_layer is not None:
            x = x - self.backout_lambda[0] * x_mid
        if logits_to_keep is not None:
            x = x.index_select(1, logits_to_keep)
        logits = self.lm_head(self._norm(x))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if spec.softcap is not None:
            logits = self.rows.soft_cap(logits, spec.softcap)
        return logits, torch.stack(new_k), torch.stack(new_v)

    def _norm(self, x: Tensor) -> Tensor:
        return self.rows.norm(x, self.spec.norm_eps)

    def _embed(self, ids: Tensor, prev_ids: Tensor | None, positions: Tensor) -> Tensor:
        """Normed token embeddings [B, T, C]; smeared with the token before, where there is one."""
        spec = self.spec
        if not spec.smear_channels:
            return self._norm(self.transformer.wte(ids, self.dtype))
        # The row's first token has nothing before it: any id will do there, its gate is shut below.
        before = ids[:, :1] if prev_ids is None else prev_ids
        x = self._norm(self.transformer.wte(torch.cat([before, ids], dim=1), self.dtype))  # [B, 1 + T, C]
        x, x_before = x[:, 1:], x[:, :-1]
        gate = self.smear_lambda[0] * self.smear_gate(x)
        gate = torch.where(positions.unsqueeze(-1) > 0, gate, 0.0)
        return x + gate * x_before

    def _project(
        self, layer: int, attn: Attention, h: Tensor, ids: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, D] and k, v [B, H_kv, T, D]: gated value embedding, rotary, norm and scale done."""
        spec = self.spec
        batch, steps = ids.shape
        q = attn.c_q(h).view(batch, steps, spec.n_head, spec.head_dim)
        k = attn.c_k(h).view(batch, steps, spec.n_kv_head, spec.head_dim)
        v = attn.c_v(h).view(batch, steps, spec.n_kv_head, spec.head_dim)
        if attn.ve_gate is None:
            v = self.rows.heads_first(v)
        else:
            table = self.value_embeds.get_parameter(f"{layer}.weight")
            v = self.rows.gate_values(v, h, attn.ve_gate.weight, table, ids, spec.gate_scale)
        q = self.rows.rotary(q, *rotary, spec.norm_eps, spec.qk_scale, False)
        k = self.rows.rotary(k, *rotary, spec.norm_eps, spec.qk_scale, True)
        return q, k, v


def rotary_tables(spec: ModelSpec, positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position / base^(2j / D), each [positions, D / 2], computed in float32 as nanochat does.

    Rounded to what the generation keeps its tables in (`rope_table_dtype`); never wider than float32.
    """
    channels = torch.arange(0, spec.head_dim, 2, dtype=torch.float32)
    inv_freq = 1.0 / (spec.rotary_base ** (channels / spec.head_dim))
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), inv_freq)
    compute = torch.float32 if dtype == torch.float64 else dtype
    table = {"bfloat16": torch.bfloat16, "float32": torch.float32, "compute": compute}[spec.rope_table_dtype]
    return angles.cos().to(table), angles.sin().to(table)


def prepare_weights(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights as a program that computes in `dtype` keeps them; tensors that need no change are not copied.

    Matrices are brought to `dtype`. Embedding tables keep their own where that loses nothing (a row is converted when
    it is looked up), so bfloat16 tables stay half as large. Gates and lambdas become float32.
    """
    prepared = {}
    for name, tensor in weights.items():
        if name.startswith(_TABLES) and torch.promote_types(tensor.dtype, dtype) == dtype:
            prepared[name] = tensor.contiguous()
        else:
            prepared[name] = tensor.contiguous().to(torch.float32 if name.endswith(_SMALL) else dtype)
    return prepared


_TABLES = ("transformer.wte.", "value_embeds.")
_SMALL = ("gate.weight", "lambda", "lambdas")


def _has_vocab_rows(name: str) -> bool:
    """True for the tensors whose rows are padded beyond the vocabulary."""
    return name in ("transformer.wte.weight", "lm_head.weight") or name.startswith("value_embeds.")
