"""Writes tests/data/hf-nanochat: a tiny NanoChatForCausalLM by transformers itself, and what it computes.

Run in an environment of its own, with transformers (5.23.0 made the committed files), torch, tiktoken and blobfile:

    python scripts/make_hf_golden.py tests/data/hf-nanochat

nanochat_x takes no part in it. The weights are random, and every constant differs from its default, so that a reader
who overlooks one computes something else. The tokenizer is trained on a few sentences and goes the way of
transformers' own conversion script: mergeable ranks -> tiktoken.Encoding -> convert_tiktoken_to_fast.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import tiktoken
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import NanoChatConfig, NanoChatForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.tiktoken import convert_tiktoken_to_fast

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL = [
    "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>", "<|python_start|>",
    "<|python_end|>", "<|output_start|>", "<|output_end|>",
]  # fmt: skip
MERGEABLE, ROWS, POSITIONS = 302, 320, 64
TEXTS = [
    "",
    "The rain in Spain stays mainly in the plain.",
    "It's 12345 o'clock; WE'LL see, won't we?",
    "  indented\n\n\tlines \r\n and trailing space   ",
    "Grüße, 世界! naïve café – 🙂🙂",
    "the then there other rather whether another",
]
MESSAGE = "What is the rain in the plain?"


def trained_ranks() -> dict[bytes, int]:
    """256 bytes in order, then the merges of a tokenizer trained on TEXTS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=MERGEABLE, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, *TEXTS[1:2], MESSAGE], trainer)
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    ranks = {bytes([byte]): byte for byte in range(256)}
    for left, right in json.loads(tokenizer.to_str())["model"]["merges"]:
        ranks[bytes(byte_of[char] for char in left + right)] = len(ranks)
    return ranks


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    ranks = trained_ranks()
    assert len(ranks) == MERGEABLE
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
    encoding = tiktoken.Encoding("rustbpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    convert_tiktoken_to_fast(encoding, str(folder))
    shutil.rmtree(folder / "tiktoken")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token=SPECIAL[0])
    tokenizer.save_pretrained(folder)
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == encoding.encode_ordinary(text), text
    return tokenizer


def write_model(folder: Path) -> NanoChatForCausalLM:
    """A random model in bfloat16, as transformers' conversion saves it. Returned in float32, as it was loaded again."""
    config = NanoChatConfig(
        vocab_size=ROWS, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, rms_norm_eps=1e-5, final_logit_softcapping=11.0,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0}, bos_token_id=MERGEABLE, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    model = NanoChatForCausalLM(config)
    generator = torch.Generator().manual_seed(2025)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # small embeddings: the epsilon of the first norm shows
            std = 0.02 if "embed_tokens" in name else (4 if "lm_head" in name else 1) / weight.shape[1] ** 0.5
            weight.normal_(std=std, generator=generator)
    model.to(torch.bfloat16).save_pretrained(folder)
    return NanoChatForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tied_logits(model: NanoChatForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Of the same weights with the embedding for lm_head, and without a softcap."""
    config = NanoChatConfig.from_dict(model.config.to_dict() | {"tie_word_embeddings": True})
    config.final_logit_softcapping = None
    tied = NanoChatForCausalLM(config).eval()
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    lacking, unknown = tied.load_state_dict(weights, strict=False)
    assert (lacking, unknown) in (([], []), (["lm_head.weight"], []))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    with torch.inference_mode():
        logits: torch.Tensor = tied(ids, use_cache=False).logits
    return logits.contiguous()


def main() -> None:
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer, model = write_tokenizer(folder), write_model(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    generator = torch.Generator().manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    for number, (batch, steps) in enumerate([(1, 1), (2, 17), (1, POSITIONS)]):
        ids = torch.randint(0, MERGEABLE + len(SPECIAL), (batch, steps), generator=generator)
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits
        tensors[f"case{number}.input_ids"], tensors[f"case{number}.logits"] = ids.int(), logits.contiguous()
    bos, user, user_end, assistant = (tokenizer.convert_tokens_to_ids(name) for name in SPECIAL[:4])
    prompt = [bos, user, *tokenizer.encode(MESSAGE, add_special_tokens=False), user_end, assistant]
    with torch.inference_mode():
        out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)
    greedy = out[0, len(prompt) :]
    # Ordinary tokens all: none that a chat stops at, or that a padded row stands for.
    assert len(greedy) == 24
    assert int(greedy.max()) < MERGEABLE
    assert len(set(greedy.tolist())) > 8
    tensors["greedy.prompt"], tensors["greedy.tokens"] = torch.tensor(prompt).int(), greedy.int()
    tensors["tied.input_ids"] = tensors["case1.input_ids"].clone()
    tensors["tied.logits"] = tied_logits(model, tensors["tied.input_ids"].long())
    save_file(tensors, folder / "golden.safetensors")
    texts = [{"text": text, "ids": tokenizer.encode(text, add_special_tokens=False)} for text in TEXTS]
    golden = {"message": MESSAGE, "texts": texts}
    (folder / "golden.json").write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
