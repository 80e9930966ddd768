"""Tell which of nanochat's five forward passes a checkpoint belongs to, and account for each of its tensors.

nanochat writes sizes into a checkpoint and no constants; docs/generations.md says how each generation is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nanochat_x.errors import CheckpointError
from nanochat_x.model_config import ModelConfig
from nanochat_x.quoting import quoted
from nanochat_x.spec import ModelSpec, RopeTableDtype

Shape = tuple[int, ...]

_PAD_TO = 64  # nanochat pads the vocabulary's rows to a multiple of this, from 2025-12-09 on
_SMEAR_CHANNELS = 24
_MLP_FACTOR = 4  # an MLP is so many times as wide as the model
_LISTED = 3  # an error names no more tensors of a kind than this
_REMEDY = "nanochat_x reads the generations of docs/generations.md; is the meta file this model's own?"


@dataclass(frozen=True)
class Generation:
    """The constants of one generation, as nanochat's code had them."""

    name: str
    letter: str
    rotary_base: float = 10_000.0
    rope_table_dtype: RopeTableDtype = "bfloat16"
    softcap: float = 15.0
    qk_scale: float = 1.0
    # What torch's rms_norm takes by default: float32's machine epsilon, for bfloat16 and float16 too (measured on torch
    # 2.13; its documentation names the epsilon of the input's dtype).
    norm_eps: float = 2.0**-23
    lambdas: bool = True
    gate_scale: float = 0.0
    gate_channels: int = 0
    smear_channels: int = 0
    short_window_parts: int = 2  # an S window is sequence_len / this ...
    short_window_tile: int = 1  # ... rounded up to a multiple of this; 1: rounded down to a whole number

    def short_window(self, sequence_len: int) -> int:
        """Tokens of an `S` window."""
        if self.short_window_tile == 1:
            return sequence_len // self.short_window_parts
        tile = self.short_window_tile
        return -(-sequence_len // (self.short_window_parts * tile)) * tile


CLASSIC = Generation("classic", "A", lambdas=False)
LAMBDAS = Generation("lambdas", "B")
VALUE_EMBEDS = Generation("value-embeds", "C", gate_scale=2.0, gate_channels=32)
WIDE_ROPE = Generation(
    "wide-rope",
    "D",
    rotary_base=100_000.0,
    rope_table_dtype="compute",
    qk_scale=1.15,
    gate_scale=3.0,
    gate_channels=12,
    short_window_parts=3,
    short_window_tile=128,
)
SMEAR = Generation(
    "smear",
    "E",
    rotary_base=100_000.0,
    rope_table_dtype="compute",
    qk_scale=1.2,
    gate_scale=3.0,
    gate_channels=12,
    smear_channels=_SMEAR_CHANNELS,
    short_window_parts=4,
    short_window_tile=128,
)


def tell_generation(shapes: Mapping[str, Shape], where: str) -> Generation:
    """The generation whose marks the tensors bear; whether all of them fit is `check_tensors`' question.

    Raises CheckpointError for marks that no generation has.
    """
    if "smear_gate.weight" in shapes:
        return SMEAR
    gates = sorted({shape[-1:] for name, shape in shapes.items() if name.endswith(".attn.ve_gate.weight")})
    if not gates and any(name.startswith("value_embeds.") for name in shapes):
        raise CheckpointError(f"{where}: value_embeds without ve_gate, a design of no known generation", remedy=_REMEDY)
    if not gates:
        return LAMBDAS if "resid_lambdas" in shapes else CLASSIC
    for generation in (VALUE_EMBEDS, WIDE_ROPE):
        if gates == [(generation.gate_channels,)]:
            return generation
    columns = " and ".join(str(gate[0]) if gate else "no" for gate in gates)
    raise CheckpointError(
        f"{where}: ve_gate has {columns} columns, known generations have 32 or 12 of them", remedy=_REMEDY
    )


def value_embed_layers(generation: Generation, n_layer: int) -> tuple[int, ...]:
    """Layers that have a value embedding: every other one, the last among them."""
    return tuple(range((n_layer - 1) % 2, n_layer, 2)) if generation.gate_channels else ()


def expected_shapes(
    generation: Generation, config: ModelConfig, rows: int, mlp_width: int | None = None
) -> dict[str, Shape]:
    """Name -> shape of every tensor of such a model; `rows` is the padded vocabulary, `mlp_width` None nanochat's."""
    inside = mlp_width if mlp_width is not None else _MLP_FACTOR * config.n_embd
    width, kv_width = config.n_embd, config.n_kv_head * config.head_dim
    shapes: dict[str, Shape] = {"transformer.wte.weight": (rows, width), "lm_head.weight": (rows, width)}
    for i in range(config.n_layer):
        layer = f"transformer.h.{i}"
        shapes[f"{layer}.attn.c_q.weight"] = (width, width)
        shapes[f"{layer}.attn.c_k.weight"] = (kv_width, width)
        shapes[f"{layer}.attn.c_v.weight"] = (kv_width, width)
        shapes[f"{layer}.attn.c_proj.weight"] = (width, width)
        shapes[f"{layer}.mlp.c_fc.weight"] = (inside, width)
        shapes[f"{layer}.mlp.c_proj.weight"] = (width, inside)
    if generation.lambdas:
        shapes["resid_lambdas"] = shapes["x0_lambdas"] = (config.n_layer,)
    for i in value_embed_layers(generation, config.n_layer):
        shapes[f"value_embeds.{i}.weight"] = (rows, kv_width)
        shapes[f"transformer.h.{i}.attn.ve_gate.weight"] = (config.n_kv_head, generation.gate_channels)
    if generation.smear_channels:
        shapes["smear_gate.weight"] = (1, generation.smear_channels)
        shapes["smear_lambda"] = shapes["backout_lambda"] = (1,)
    return shapes


def check_tensors(generation: Generation, config: ModelConfig, shapes: Mapping[str, Shape], where: str) -> int:
    """Every tensor must be one of the generation's, in its shape, and none may lack. Returns the padded vocabulary.

    Raises CheckpointError that names what is missing, unknown and misshapen, all in one line.
    """
    # Ahead of expected_shapes: a meta file that claims a billion layers must not make us list them.
    if config.n_layer > len(shapes):
        raise CheckpointError(
            f"{where}: {len(shapes)} tensors cannot be the {config.n_layer} layers of model_config", remedy=_REMEDY
        )
    if generation is CLASSIC and config.window_pattern is not None:
        raise CheckpointError(
            f"{where}: model_config has a window_pattern, but without resid_lambdas this is generation classic (A), "
            "which has no windows",
            remedy=_REMEDY,
        )
    widest_gate = max(generation.gate_channels, generation.smear_channels)
    if config.n_embd < widest_gate:
        raise CheckpointError(
            f"{where}: n_embd is {config.n_embd}, generation {generation.name} needs {widest_gate} or more",
            remedy=_REMEDY,
        )
    rows = _vocabulary_rows(config, shapes)
    expected = expected_shapes(generation, config, rows)
    problems = compare_shapes(expected, shapes)
    if problems:
        raise CheckpointError(
            f"{where}: the tensors are not those of generation {generation.name} ({generation.letter}) with this "
            f"model_config: {problems}",
            remedy=_REMEDY,
        )
    return rows


def compare_shapes(expected: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> str:
    """What is missing, unknown and misshapen among `shapes`, fit for an error's line; empty: nothing."""
    problems = _listed("missing", [name for name in expected if name not in shapes])
    problems += _listed("unknown", sorted(name for name in shapes if name not in expected))
    problems += _listed(
        "misshapen",
        [
            f"{name} {_shape(shapes[name])} instead of {_shape(shape)}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ],
    )
    return "; ".join(problems)


def make_spec(generation: Generation, config: ModelConfig, padded_vocab_size: int) -> ModelSpec:
    """The spec with the generation's own constants; `overrides` changes what a user knows better."""
    short = generation.short_window(config.sequence_len)
    pattern = config.window_pattern or "L"
    return ModelSpec(
        generation=generation.name,
        sequence_len=config.sequence_len,
        vocab_size=config.vocab_size,
        padded_vocab_size=padded_vocab_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_kv_head=config.n_kv_head,
        n_embd=config.n_embd,
        mlp_width=_MLP_FACTOR * config.n_embd,
        windows=layer_windows(pattern, short, config) if generation.lambdas else (None,) * config.n_layer,
        rotary_base=generation.rotary_base,
        rope_table_dtype=generation.rope_table_dtype,
        softcap=generation.softcap,
        norm_eps=generation.norm_eps,
        qk_scale=generation.qk_scale,
        lambdas=generation.lambdas,
        value_embed_layers=value_embed_layers(generation, config.n_layer),
        gate_scale=generation.gate_scale,
        gate_channels=generation.gate_channels,
        smear_channels=generation.smear_channels,
        backout_layer=config.n_layer // 2 if generation.smear_channels else None,
    )


def layer_letters(pattern: str, n_layer: int) -> str:
    """The pattern tiled over the layers; the last layer is always L."""
    return "".join(pattern[i % len(pattern)] for i in range(n_layer - 1)) + "L"


def layer_windows(pattern: str, short_window: int, config: ModelConfig) -> tuple[int, ...]:
    """The window of each layer: `short_window` for S, `sequence_len` for L."""
    window = {"S": short_window, "L": config.sequence_len}
    return tuple(window[letter] for letter in layer_letters(pattern, config.n_layer))


def padded_rows(vocab_size: int) -> int:
    """Rows of a vocabulary's tables where nanochat pads them."""
    return -(-vocab_size // _PAD_TO) * _PAD_TO


def _vocabulary_rows(config: ModelConfig, shapes: Mapping[str, Shape]) -> int:
    """Rows of wte where nanochat could have made it so many, else the number that it would make."""
    rows = shapes.get("transformer.wte.weight", ())[:1]
    return config.vocab_size if rows == (config.vocab_size,) else padded_rows(config.vocab_size)


def _listed(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return [f"{kind} {', '.join(quoted(name) for name in names[:_LISTED])}{more}"]


def _shape(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"
