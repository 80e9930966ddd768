"""Writes what the fuzz targets (runners/fuzz) begin with: a folder of seeds for each, and its dictionary.

    python scripts/fuzz_seeds.py build/fuzz/seeds

Everything is made from what the repository has: the demo model's tokenizer, and small texts of the formats' own words.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat_x.find import DEMO_FOLDER
from nanochat_x.tokenizer import SPECIAL_TOKENS, TokenizerData, read_tokenizer

PATTERNS = [
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+""",  # noqa: E501
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    r"(?>\p{L}+)|[^\S\n]{2,}?|[(\-+]+?|(?=\p{N})..|^ | $",
    r"\S+|\s+",
    r"(a|aa)+$|.",
]
TEXTS = ["Don't  stop,\n\n 12345!", "é\u0301 \u2028ſK٣😀", "a" * 40, " \t\r\n"]


def manifests() -> Iterator[dict[str, Any]]:
    """One for each kind of bundle (docs/bundle.md)."""
    files = ["prefill.so", "decode.so", "full.so", "weights.safetensors", "tokenizer.json"]
    manifest = {
        "schema_version": 3, "nanochat_x_version": "0.1.0", "target": "aoti", "dtype": "float32",
        "model": {"generation": "smear", "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 256,
                  "vocab_size": 2048, "sequence_len": 512},
        "max_seq_len": 512, "checkpoint": {"source": "sft", "tag": "d4", "step": 1, "notes": []}, "contract": {},
        "machine": {"platform": "linux", "architecture": "x86_64", "march": "native", "cpu_features": ["avx2"],
                    "torch_version": "2.13.0"},
        "programs": {"prefill": "prefill.so", "decode": "decode.so", "full": "full.so"},
        "weights": "weights.safetensors", "tokenizer": "tokenizer.json",
        "special_tokens": {name: 2039 + i for i, name in enumerate(SPECIAL_TOKENS)}, "verification": None,
        "files": [{"path": path, "size": 3, "sha256": "0123456789abcdef" * 4} for path in files],
    }  # fmt: skip
    yield manifest
    yield manifest | {"target": "onnx", "machine": {}, "dtype": "float16"}
    yield manifest | {"programs": {"full": "full.so"}, "weights": ""}
    yield manifest | {
        "target": "executorch", "limits": {"batch": 8, "steps": 64}, "machine": {"runtime_version": "1.5"}
    }  # fmt: skip
    yield manifest | {"schema_version": 4, "verification": {"summary": "x"}}


def cut_tokenizer(tokens: int, pattern: str) -> str:
    """The demo's tokenizer with its first tokens alone: a small file is fuzzed faster."""
    whole = read_tokenizer(DEMO_FOLDER / "tokenizer")
    special = {name: tokens + i for i, name in enumerate(SPECIAL_TOKENS)}
    return TokenizerData(pattern, whole.tokens[:tokens], special, None).to_portable_json()


def safetensors(entries: dict[str, Any], data: bytes) -> bytes:
    header = json.dumps(entries).encode()
    header += b" " * (-(8 + len(header)) % 8)
    return struct.pack("<Q", len(header)) + header + data


def seeds() -> dict[str, list[bytes]]:
    """Check -> inputs."""
    tensor = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    return {
        "manifest": [json.dumps(manifest).encode() for manifest in manifests()],
        "tokenizer_file": [
            cut_tokenizer(256, PATTERNS[3]).encode(),
            cut_tokenizer(300, PATTERNS[0]).encode(),
            *(b"P" + pattern.encode() + b"\0on\0th\0the\0 \n" for pattern in PATTERNS),
        ],
        "session": [
            bytes([0, 1, 3, 0, 5, 8, 4, 0, 0, 0, 0, 4, 5, 1, 1, 2, 3, 4, 7, 1, 2, 1, 2, 9, 9, 1, 1, 1]),
            bytes([1, 0, 2, 1, 1, 5, 1, 1, 6, 7, 0, 0, 8, 2, 1, 0, 6, 3, 1, 7]),
            bytes([3, 6, 130, 7, 9, 1, 8, 0, 3, 7, 0, 20, 6, 100, 50, 2]),
            bytes([0, 6, 20, 4, 1, 11, 1, 2, 3, 9, 1, 2, 3, 10, 24, 0, 255, 0, 253, 8, 0]),
        ],
        "calculator": [
            b"1+2*3-4/5//6", b"-(1.5e)", b"(1,000.25)*.5", b"0/-5", b"9" * 50 + b"/7", b"()", b"...", b"--+-1",
            b"'banana'.count('an')", b"('a' 'b').count(\"b\")", b"r'''x'''.count('x')", b"f'a'.count('')", b"2**3",
            b"1" + b"0" * 308 + b".*10",
        ],
        "safetensors": [
            safetensors({}, b""),
            safetensors({"a": tensor, "b": {"dtype": "I64", "shape": [1], "data_offsets": [24, 32]}}, bytes(32)),
            safetensors({"__metadata__": {"format": "pt"}, "w": tensor | {"dtype": "BF16", "shape": [12]}}, bytes(24)),
        ],
        "splitter": [f"{pattern}\n{text}".encode() for pattern in PATTERNS for text in TEXTS],
        "utf8": [bytes([i * 37 % 256]) + text.encode() for i, text in enumerate(TEXTS)]
        + [bytes.fromhex("03 f0 9f 98 e2 82 c3 41 ed a0 80 f4 90 80 80 c0 af ff")],
    }  # fmt: skip


#: Check -> words that random changes would hardly find.
WORDS = {
    "manifest": [
        *next(manifests()), "limits", "batch", "steps", "generation", "n_layer", "n_head", "n_kv_head", "n_embd",
        "vocab_size", "sequence_len", "platform", "architecture", "march", "cpu_features", "torch_version",
        "runtime_version", "path", "size", "sha256", "prefill", "decode", "full", "aoti", "torchscript", "onnx",
        "executorch", "float32", "bfloat16", "..", "/", "\\\\", "2147483647", "9223372036854775808", "1e400", "null",
    ],
    "tokenizer_file": [
        "version", "pattern", "tokens", "special_tokens", "AA==", "\\\\p{L}", "\\\\p{N}", "\\\\s", "(?i:", "(?>", "(?!",
    ],
    "session": [],
    "calculator": [".count(", "'''", "//", "**", "()", "...", "rb'", "f'", "__", "eval", ",", "1e5", "0x", "_"],
    "safetensors": [
        "dtype", "shape", "data_offsets", "__metadata__", "F32", "BF16", "I64", "F8_E4M3", "4611686018427387904",
    ],
    "splitter": [
        "\\\\p{L}", "\\\\p{N}", "\\\\s", "\\\\S", "(?i:", "(?>", "(?=", "(?!", "(?:", "++", "*?", "{1,3}", "{2,}", "[^",
        "\\\\r\\\\n", "\\\\P{L}", "'s",
    ],
    "utf8": ["\\xf0\\x9f\\x98\\x80", "\\xed\\xa0\\x80", "\\xe2\\x82", "\\xc0", "\\xf4\\x90"],
}  # fmt: skip


def write_seeds(folder: Path) -> dict[str, int]:
    """FOLDER/CHECK/000 and on, FOLDER/CHECK.dict; returns how many seeds each check got."""
    counts = {}
    for check, inputs in seeds().items():
        (folder / check).mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs):
            (folder / check / f"{number:03}").write_bytes(data)
        lines = [f'"{word}"' for word in WORDS[check]]
        (folder / f"{check}.dict").write_text("\n".join(lines) + "\n", encoding="ascii")
        counts[check] = len(inputs)
    return counts


if __name__ == "__main__":
    print(write_seeds(Path(sys.argv[1])))
