"""Continues a prompt greedily with cached.onnx of a bundle: python onnx_continue.py BUNDLE COUNT ID ID ..."""

import sys

import numpy as np
import onnxruntime

bundle, count, *prompt = sys.argv[1], *map(int, sys.argv[2:])
session = onnxruntime.InferenceSession(f"{bundle}/cached.onnx", providers=["CPUExecutionProvider"])
inputs = [value for value in session.get_inputs() if value.name.startswith("cache_")]
_, heads, _, width = inputs[0].shape
dtype = np.float16 if "float16" in inputs[0].type else np.float32
cache = {value.name: np.zeros((1, heads, len(prompt) + count, width), dtype) for value in inputs}
ids, previous, position = prompt, 0, 0
answer: list[int] = []
while len(answer) < count:
    feeds = {"input_ids": np.array([ids]), "prev_ids": np.array([[previous]]), "position": np.array([position])}
    feeds["logits_to_keep"] = np.array([len(ids) - 1])
    logits, new_k, new_v = session.run(None, {**feeds, **cache})
    for layer, (k, v) in enumerate(zip(new_k, new_v, strict=True)):
        cache[f"cache_k_{layer}"][:, :, position : position + len(ids)] = k
        cache[f"cache_v_{layer}"][:, :, position : position + len(ids)] = v
    previous, position = ids[-1], position + len(ids)
    ids = [int(logits[0, -1].argmax())]
    answer += ids
print(*answer)
