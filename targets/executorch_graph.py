"""Captured programs in the form that ExecuTorch runs well: every dimension bounded, nothing of the past copied.

ExecuTorch's tensors have no strides, so what costs nothing elsewhere is a copy there: taking one layer of the cache, or
transposing it. The captured graph is run again, node by node, under another torch.export:

- the cache comes as one tensor [B, H_kv, S, D] a layer for keys and one for values, instead of one for all layers;
- in the step of one token, q @ k.T becomes (k @ q.T).T: what is transposed there is a single row;
- one row in prefill and without a cache, where batches gain nothing: two dimensions stay open, not three.

The function is the same; verification and tests hold the result to it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from nanochat_x.capture import Captured, export_program, sizes_for_examples

aten = torch.ops.aten


#: What export records beside the computation.
_TRACING_ONLY = {aten._assert_tensor_metadata.default, aten.promote_types.default}


class Bounds(NamedTuple):
    """Upper bounds of what a caller chooses: memory is planned for them. Slots and `full` go up to max_seq_len."""

    batch: int  # rows of a step of one token; prefill and full take one row
    steps: int  # new tokens of a prefill


def bounded_programs(captured: Captured, bounds: Bounds) -> dict[str, ExportedProgram]:
    """Role -> program, exported again from what was captured.

    `prefill`: input_ids [1, T], prev_ids [1, 1], position [1], logits_to_keep [R], then cache_k_0, cache_v_0,
    cache_k_1, ... of the layers, each [1, H_kv, S, D], R <= T; `decode`: the same with B rows and T = R = 1; `full`:
    input_ids [1, T]. 1 <= S <= max_seq_len: an empty cache is one dead slot. Outputs are the contract's. Raises
    CaptureError.
    """
    length = captured.max_seq_len
    programs = {}
    if captured.cached is not None:
        module = captured.cached.module(check_guards=False)
        prefill = _WithLayers(module, captured.spec.n_layer, one_token=False)
        programs["prefill"] = _export(captured, prefill, None, min(bounds.steps, length))
        decode = _WithLayers(module, captured.spec.n_layer, one_token=True)
        programs["decode"] = _export(captured, decode, bounds.batch, None)
    example, most = next(sizes_for_examples(captured.spec, length)), _most(length)
    full = _Captured(captured.full.module(check_guards=False))
    ids = torch.zeros(1, example, dtype=torch.long)
    programs["full"] = export_program(full, (ids,), ({1: Dim("steps", min=1, max=most)},))
    return programs


def _export(captured: Captured, module: nn.Module, max_batch: int | None, max_steps: int | None) -> ExportedProgram:
    """A program with a cache; `None`: that dimension is 1."""
    spec, sizes = captured.spec, sizes_for_examples(captured.spec, captured.max_seq_len)
    batch, slots = (next(sizes) if max_batch else 1), next(sizes)
    steps, kept = (next(sizes), next(sizes)) if max_steps else (1, 1)
    layer = torch.zeros(batch, spec.n_kv_head, slots, spec.head_dim, dtype=captured.dtype)
    args = (
        torch.zeros(batch, steps, dtype=torch.long),
        torch.zeros(batch, 1, dtype=torch.long),
        torch.zeros(batch, dtype=torch.long),
        torch.zeros(kept, dtype=torch.long),
        *(layer.clone() for _ in range(2 * spec.n_layer)),
    )
    rows = {0: Dim("batch", min=1, max=max(max_batch, batch))} if max_batch else {}
    columns = {1: Dim("steps", min=1, max=max(max_steps, steps))} if max_steps else {}
    chosen = {0: Dim("kept", min=1, max=max(max_steps, kept))} if max_steps else {}
    cache = {**rows, 2: Dim("slots", min=1, max=_most(captured.max_seq_len))}
    return export_program(module, args, ((rows | columns, rows, rows, chosen, *[cache] * (2 * spec.n_layer)),))


def _most(max_seq_len: int) -> int:
    # Export wants its examples within the range; a caller must keep to max_seq_len all the same.
    return max(max_seq_len, 61)


class _Captured(nn.Module):
    """A captured program as a module whose graph is run anew."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor) -> Tensor:
        (logits,) = _Replay(self.module, one_token=False).run(input_ids, enable_io_processing=False)
        out: Tensor = logits
        return out


class _WithLayers(nn.Module):
    """The captured program with a cache, taking a tensor a layer."""

    def __init__(self, module: torch.fx.GraphModule, layers: int, *, one_token: bool) -> None:
        super().__init__()
        self.module = module
        self.layers = layers
        self.one_token = one_token

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        input_ids, prev_ids, position, logits_to_keep, *layers = args
        by_name = {
            "input_ids": input_ids,
            "prev_ids": prev_ids,
            "cache_k": _Layers(tuple(layers[0::2])),
            "cache_v": _Layers(tuple(layers[1::2])),
            "position": position,
            "logits_to_keep": logits_to_keep,
        }
        names = [node.target for node in self.module.graph.nodes if node.op == "placeholder"]
        replay = _Replay(self.module, one_token=self.one_token)
        return tuple(replay.run(*(by_name[str(name)] for name in names), enable_io_processing=False))


class _Layers(NamedTuple):
    """Keys or values of all layers, where the captured graph has one tensor [L, B, H_kv, S, D]."""

    layers: tuple[Tensor, ...]  # [B, H_kv, S, D] each


class _Transposed(NamedTuple):
    """`tensor` with its last two dimensions swapped, not computed yet."""

    tensor: Tensor


class _Replay(torch.fx.Interpreter):
    """Runs the captured graph with `_Layers` in place of a cache."""

    def __init__(self, module: torch.fx.GraphModule, *, one_token: bool) -> None:
        super().__init__(module)
        self.one_token = one_token

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first: Any = args[0] if args else None
        if isinstance(first, _Layers):
            return _of_cache(target, first.layers, args)
        if target in _TRACING_ONLY:
            return None
        if target == aten.to.dtype and first.dtype == args[1]:
            return first
        if self.one_token and target == aten.transpose.int and first.dim() == 3 and set(args[1:]) == {1, 2}:
            return _Transposed(first)
        if target == aten.bmm.default and isinstance(args[1], _Transposed):
            return _turned(torch.bmm(args[1].tensor, _turned(args[0])))
        return super().call_function(target, args, kwargs)


def _of_cache(target: Any, layers: tuple[Tensor, ...], args: tuple[Any, ...]) -> Any:
    """What the captured graph does to a whole cache: it takes a layer, or asks for a size."""
    if target == aten.select.int and args[1] == 0:
        return layers[args[2]]
    if target == aten.sym_size.int and args[1] > 0:
        return layers[0].shape[args[1] - 1]
    raise NotImplementedError(f"{target} of a KV cache")


def _turned(x: Tensor) -> Tensor:
    """x [N, A, B] as [N, B, A]: a view where A or B is 1, which ExecuTorch does without a copy."""
    if any(isinstance(size, int) and size == 1 for size in x.shape[1:]):
        return x.view(x.shape[0], x.shape[2], x.shape[1])
    return x.transpose(1, 2)
