"""A worker of peers.py: llama.cpp on a GGUF file, through llama-cpp-python's low-level bindings.

    python peer_llama_cpp.py MODEL.gguf PROMPT_TOKENS DECODE_TOKENS THREADS

The protocol is peer_worker.py's. All options are llama.cpp's defaults (flash attention where it chooses it, weights
mapped and repacked as it likes), but for the number of threads and the context's length.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import llama_cpp as llama
import numpy as np
from peer_worker import serve

#: llama.cpp's log goes nowhere. Kept here: it is called for as long as the program runs.
_QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


class Model:
    """A model with an empty cache."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        llama.llama_log_set(_QUIET, ctypes.c_void_p(0))
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = llama.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = max(params.n_batch, context)
        params.n_threads = params.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, params)
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    def clear(self) -> None:
        """Forgets what was fed."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)

    def feed(self, ids: np.ndarray) -> None:
        """Feeds tokens, int32 [T]; the logits behind the last are computed."""
        pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        if llama.llama_decode(self._context, llama.llama_batch_get_one(pointer, len(ids))) != 0:
            raise SystemExit("llama.cpp could not compute")
        llama.llama_get_logits_ith(self._context, -1)  # waits until they are there


def main() -> None:
    """Serves until standard input ends."""
    path, prompt, decode, threads = sys.argv[1], *map(int, sys.argv[2:5])
    model = Model(path, prompt + decode, threads)
    ids = np.random.default_rng(1).integers(0, model.vocab, prompt + decode, dtype=np.int32)

    def begin() -> Callable[[np.ndarray], None]:
        model.clear()
        return model.feed

    serve(begin, ids, prompt)


if __name__ == "__main__":
    main()
