"""Writes a GGUF file: a llama with random weights, of the shape that a nanochat model is compared with.

    python llama_gguf.py OUTPUT.gguf SHAPE.json TYPE        TYPE: f32, f16, q8_0, q4_0

SHAPE.json: n_embd, n_layer, n_head, n_kv_head, ffn_width, vocab_size, context. Every matrix has the one type, the token
embedding and the output too (what `llama-quantize --pure` makes); norms are float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

TYPES = {"f32": Type.F32, "f16": Type.F16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}


def matrix_shapes(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Name -> [rows, columns] of every matrix."""
    width, kv_width = shape["n_embd"], shape["n_kv_head"] * (shape["n_embd"] // shape["n_head"])
    shapes = {"token_embd": (shape["vocab_size"], width), "output": (shape["vocab_size"], width)}
    for i in range(shape["n_layer"]):
        shapes |= {
            f"blk.{i}.attn_q": (width, width),
            f"blk.{i}.attn_k": (kv_width, width),
            f"blk.{i}.attn_v": (kv_width, width),
            f"blk.{i}.attn_output": (width, width),
            f"blk.{i}.ffn_gate": (shape["ffn_width"], width),
            f"blk.{i}.ffn_up": (shape["ffn_width"], width),
            f"blk.{i}.ffn_down": (width, shape["ffn_width"]),
        }
    return shapes


def write(output: Path, shape: dict[str, int], kind: str) -> None:
    """Writes the file."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_name("random")
    writer.add_context_length(shape["context"])
    writer.add_embedding_length(shape["n_embd"])
    writer.add_block_count(shape["n_layer"])
    writer.add_feed_forward_length(shape["ffn_width"])
    writer.add_head_count(shape["n_head"])
    writer.add_head_count_kv(shape["n_kv_head"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape["n_embd"] // shape["n_head"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("none")  # token ids go in, none comes out
    for name, (rows, columns) in matrix_shapes(shape).items():
        values = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(columns**-0.5)
        quantized = gguf.quants.quantize(values, TYPES[kind])
        writer.add_tensor(f"{name}.weight", quantized, raw_dtype=TYPES[kind])
    ones = np.ones(shape["n_embd"], dtype=np.float32)
    norms = [f"blk.{i}.{name}" for i in range(shape["n_layer"]) for name in ("attn_norm", "ffn_norm")]
    for name in [*norms, "output_norm"]:
        writer.add_tensor(f"{name}.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), sys.argv[3])
