"""Makes a folder that onnxruntime-genai runs: the llama of llama_gguf.py, random, by genai's own builder.

    python llama_genai.py OUTPUT SHAPE.json TYPE        TYPE: fp32, int8, int4 (groups of 32, activations in 8 bits)

Nothing is downloaded: the model is made here, and its tokenizer, which nobody asks, has three tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

OPTIONS = {"fp32": [], "int8": ["int4_block_size=32", "int4_accuracy_level=4"],
           "int4": ["int4_block_size=32", "int4_accuracy_level=4"]}  # fmt: skip


def write_model(folder: Path, shape: dict[str, int]) -> None:
    """A Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape["n_embd"],
        num_hidden_layers=shape["n_layer"],
        num_attention_heads=shape["n_head"],
        num_key_value_heads=shape["n_kv_head"],
        intermediate_size=shape["ffn_width"],
        vocab_size=shape["vocab_size"],
        max_position_embeddings=shape["context"],
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens = {"<s>": 0, "</s>": 1, "<pad>": 2}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                            pad_token="<pad>").save_pretrained(folder)  # fmt: skip


def main() -> int:
    """Writes the folder; returns the builder's exit code."""
    output, shape, kind = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), sys.argv[3]
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        write_model(Path(scratch, "model"), shape)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(Path(scratch, "model"))]
        command += ["-o", str(output), "-p", kind, "-e", "cpu", "-c", str(Path(scratch, "cache"))]
        if OPTIONS[kind]:
            command += ["--extra_options", *OPTIONS[kind]]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
