"""Continues a prompt greedily with a bundle's model.pt: python torchscript_continue.py BUNDLE COUNT ID ID ..."""

import sys
import warnings

import torch

warnings.simplefilter("ignore")  # torch says at every load that TorchScript is deprecated
bundle, count, *prompt = sys.argv[1], *map(int, sys.argv[2:])
model = torch.jit.load(f"{bundle}/model.pt")
cache_k, cache_v = model.empty_cache(1, len(prompt) + count)
ids, previous, position = prompt, 0, 0
answer: list[int] = []
with torch.inference_mode(), torch.jit.optimized_execution(False):
    while len(answer) < count:
        new = torch.tensor([ids]), torch.tensor([[previous]])
        logits, new_k, new_v = model.prefill(
            *new, cache_k, cache_v, torch.tensor([position]), torch.tensor([len(ids) - 1])
        )
        cache_k[:, :, :, position : position + len(ids)] = new_k
        cache_v[:, :, :, position : position + len(ids)] = new_v
        previous, position = ids[-1], position + len(ids)
        ids = [int(logits[0, -1].argmax())]
        answer += ids
print(*answer)
