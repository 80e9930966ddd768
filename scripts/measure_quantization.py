"""What a model loses in 16, 8 and 4 bits: the table of docs/quantization.md.

    python scripts/measure_quantization.py --docs bpb.json                     the demo model
    python scripts/measure_quantization.py --docs bpb.json --base-dir DIR -i base

Each document is cut to the tokens that the model was trained on, BOS first, as nanochat's own evaluation does. Losses
are against float32; KL is KL(float32 || quantised) in nats a token, top-1 the share of tokens at which both find the
same next token most likely.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

from nanochat_x.calibration import TOKENS, calibrate
from nanochat_x.checkpoint import Checkpoint, choose_checkpoint, load_checkpoint
from nanochat_x.comparison import Buckets, measure
from nanochat_x.errors import NanochatXError
from nanochat_x.gptq import quantize_model
from nanochat_x.model import GPT, prepare_weights
from nanochat_x.quantize import BITS, Format, Method, dequantized, is_matrix, round_to_nearest, with_matrices
from nanochat_x.wrappers import ExportableGPT


def windows_of(checkpoint: Checkpoint, documents: Sequence[str]) -> list[Tensor]:
    """Token ids int64 [T + 1] of each document: BOS and at most the tokens that the model was trained on."""
    tokenizer = checkpoint.tokenizer
    encoding = tiktoken.Encoding(
        "nanochat", pat_str=tokenizer.pattern, special_tokens=tokenizer.special_tokens,
        mergeable_ranks={token: rank for rank, token in enumerate(tokenizer.tokens)},
    )  # fmt: skip
    bos = tokenizer.special_tokens["<|bos|>"]
    longest = checkpoint.spec.sequence_len + 1
    return [torch.tensor([bos, *encoding.encode_ordinary(text)][:longest]) for text in documents]


def logits_of(
    checkpoint: Checkpoint, weights: dict[str, Tensor], dtype: torch.dtype, ids: list[Tensor]
) -> list[Tensor]:
    """Logits [T, vocab] of each window."""
    model = ExportableGPT(GPT.from_weights(checkpoint.spec, weights, dtype), checkpoint.spec.sequence_len)
    with torch.inference_mode():
        return [model(window[None, :-1])[0] for window in ids]


def nearest(checkpoint: Checkpoint, weights: dict[str, Tensor], form: Format) -> dict[str, Tensor]:
    """Every matrix rounded to nearest."""
    rows = {"lm_head.weight": checkpoint.spec.vocab_size}
    return with_matrices(
        weights,
        ((n, round_to_nearest(t[: rows.get(n, t.shape[0])], form)) for n, t in weights.items() if is_matrix(n)),
    )


def ways(
    checkpoint: Checkpoint, group_size: int, calibration: Path | None, tokens: int
) -> Iterator[tuple[str, dict[str, Tensor], torch.dtype, float]]:
    """Name, weights, dtype of the computation, and the seconds that quantising took."""
    for dtype in (torch.bfloat16, torch.float16):
        yield str(dtype).removeprefix("torch."), prepare_weights(checkpoint.weights, dtype), dtype, 0.0
    weights = prepare_weights(checkpoint.weights, torch.float32)
    start = time.perf_counter()
    text = calibrate(checkpoint.spec, weights, checkpoint.tokenizer, calibration, tokens)
    print(f"calibration: {text.record}, {time.perf_counter() - start:.1f} s\n")
    methods: list[Method] = ["int8", "int4"]
    for method in methods:
        form = Format(method, group_size)
        start = time.perf_counter()
        plain = dequantized(nearest(checkpoint, weights, form))
        yield f"{method}, nearest", plain, torch.float32, time.perf_counter() - start
        start = time.perf_counter()
        plain = dequantized(quantize_model(checkpoint.spec, weights, form, text.ids))
        yield f"{method}, GPTQ", plain, torch.float32, time.perf_counter() - start
    assert set(methods) == set(BITS)


def main() -> None:
    """Prints the table, a row a way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, required=True, help="JSON: a list of texts, or an object with `docs`")
    parser.add_argument("-i", "--source", default="demo")
    parser.add_argument("--base-dir", type=Path)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    arguments = parser.parse_args()
    try:
        found = json.loads(arguments.docs.read_text(encoding="utf-8"))
        docs = found["docs"] if isinstance(found, dict) else found
        checkpoint = load_checkpoint(choose_checkpoint(None, arguments.source, None, None, arguments.base_dir, None))
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{arguments.docs} cannot be read: {error}")
    except NanochatXError as error:
        parser.error(str(error))
    windows = windows_of(checkpoint, docs)
    counts = torch.tensor(checkpoint.tokenizer.counted_bytes())
    exact = logits_of(checkpoint, prepare_weights(checkpoint.weights, torch.float32), torch.float32, windows)
    base = math.nan
    lines = []
    for name, weights, dtype, seconds in ways(
        checkpoint, arguments.group_size, arguments.calibration, arguments.tokens
    ):
        buckets = Buckets()
        for ids, a, b in zip(windows, logits_of(checkpoint, weights, dtype, windows), exact, strict=True):
            buckets.add(measure(a, b, ids[1:]), counts[ids[1:]])
        figures = buckets.total.figures()
        base = figures["bits_per_byte_b"]
        bits = figures["bits_per_byte_a"]
        lines.append(
            f"| {name} | {bits:.5f} | {100 * (bits / base - 1):+.3f} % | {figures['kl_mean']:.2g} | "
            f"{100 * figures['top1_agreement']:.2f} % | {seconds:.1f} |"
        )
    print(f"float32: {base:.5f} bits per byte\n")
    print("| | bits per byte | against float32 | mean KL | top-1 same | s |\n|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
