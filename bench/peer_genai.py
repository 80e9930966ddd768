"""A worker of peers.py: onnxruntime-genai on a folder of llama_genai.py.

    python peer_genai.py FOLDER PROMPT_TOKENS DECODE_TOKENS THREADS

The protocol is peer_worker.py's. Options are the builder's own, but for the number of threads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
from peer_worker import serve


def set_threads(folder: Path, threads: int) -> int:
    """Writes the number of threads where genai reads it; returns the vocabulary's size."""
    file = folder / "genai_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    file.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return int(config["model"]["vocab_size"])


def main() -> None:
    """Serves until standard input ends."""
    folder, prompt, decode, threads = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    vocab = set_threads(folder, threads)
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=prompt + decode + 1, do_sample=False)
    ids = np.random.default_rng(1).integers(3, vocab, prompt + decode, dtype=np.int32)

    def begin() -> Callable[[np.ndarray], None]:
        append: Callable[[np.ndarray], None] = genai.Generator(model, params).append_tokens
        return append

    serve(begin, ids, prompt)


if __name__ == "__main__":
    main()
