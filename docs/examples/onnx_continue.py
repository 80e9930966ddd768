"""Continues a prompt greedily with cached.onnx of a bundle: python onnx_continue.py BUNDLE COUNT ID ID ..."""

import sys

import numpy as np
import onnxruntime

bundle, count, *prompt = sys.argv[1], *map(int, sys.argv[2:])
session = onnxruntime.InferenceSession(f"{bundle}/cached.onnx", providers=["CPUExecutionProvider"])
cache = next(value for value in session.get_inputs() if value.name == "cache_k")
layers, _, heads, _, width = cache.shape
dtype = np.float16 if "float16" in cache.type else np.float32
cache_k, cache_v = (np.zeros((layers, 1, heads, len(prompt) + count, width), dtype) for _ in range(2))
ids, previous, position = prompt, 0, 0
answer: list[int] = []
while len(answer) < count:
    feeds = {"input_ids": np.array([ids]), "prev_ids": np.array([[previous]]), "position": np.array([position])}
    logits, new_k, new_v = session.run(None, {**feeds, "cache_k": cache_k, "cache_v": cache_v})
    cache_k[:, :, :, position : position + len(ids)] = new_k
    cache_v[:, :, :, position : position + len(ids)] = new_v
    previous, position = ids[-1], position + len(ids)
    ids = [int(logits[0, -1].argmax())]
    answer += ids
print(*answer)
