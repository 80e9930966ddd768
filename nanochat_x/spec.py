"""ModelSpec: every size and constant of one nanochat model's forward pass."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

RopeTableDtype = Literal["bfloat16", "float32", "compute"]

#: Generations of nanochat's forward pass, oldest first (the letters A to E of docs/generations.md).
GENERATIONS = ("classic", "lambdas", "value-embeds", "wide-rope", "smear")


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and constants; nothing here is a default of ours, `checkpoint` tells or asks for each.

    `windows[i]` is the attention window of layer i: the query at position p sees keys `p - window .. p`
    (window + 1 of them). `None` means no window at all (generation `classic`).
    """

    generation: str
    sequence_len: int  # tokens that the model was trained on
    vocab_size: int  # tokens that exist; logits have this many columns
    padded_vocab_size: int  # rows of wte, value_embeds and lm_head in the file (>= vocab_size)
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    mlp_width: int  # columns inside an MLP
    windows: tuple[int | None, ...]  # one a layer
    rotary_base: float
    rope_table_dtype: RopeTableDtype  # "compute": the tables are kept in the dtype of the computation
    softcap: float | None  # logits = softcap * tanh(logits / softcap); None: left as they are
    norm_eps: float  # added to the mean square in every norm
    qk_scale: float  # q and k are multiplied by it after their norm
    lambdas: bool  # x = resid_lambdas[i] * x + x0_lambdas[i] * x0 before layer i
    value_embed_layers: tuple[int, ...]  # layers whose values get a gated value embedding
    gate_scale: float  # v += gate_scale * sigmoid(ve_gate(h[..., :gate_channels])) * value_embeds[i][ids]
    gate_channels: int  # 0: no value embeddings
    smear_channels: int  # 0: no smear
    backout_layer: int | None  # x of this layer, times backout_lambda, is taken off before the last norm

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    def to_json(self) -> dict[str, Any]:
        """Plain dict for a manifest."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
