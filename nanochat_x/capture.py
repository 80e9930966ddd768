"""Capture: the wrappers become ExportedPrograms, once, with dynamic batch, sequence and cache dimensions."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.experimental._config
from torch.export import Dim, ExportedProgram

from nanochat_x import operators
from nanochat_x.errors import CaptureError
from nanochat_x.model import GPT
from nanochat_x.spec import ModelSpec
from nanochat_x.wrappers import ExportableGPT, ExportableGPTWithCache, empty_cache

FULL_INPUTS = ("input_ids",)
FULL_OUTPUTS = ("logits",)
CACHED_INPUTS = ("input_ids", "prev_ids", "cache_k", "cache_v", "position", "logits_to_keep")
CACHED_OUTPUTS = ("logits", "new_k", "new_v")


_EXAMPLES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)


@dataclass(frozen=True)
class Captured:
    """What a target lowers: the two programs of one model, and the limits that they were captured with."""

    spec: ModelSpec
    dtype: torch.dtype
    max_seq_len: int
    full: ExportedProgram  # input_ids [B, T] -> logits [B, T, vocab]
    cached: ExportedProgram | None  # the contract with a cache
    decode: ExportedProgram | None  # `cached` at T = R = 1, derived from it

    def programs(self) -> dict[str, ExportedProgram]:
        """By their role in a bundle: `prefill`, `decode` and `full`, or `full` alone."""
        found = {"prefill": self.cached, "decode": self.decode, "full": self.full}
        return {role: program for role, program in found.items() if program is not None}

    def operators(self) -> set[str]:
        """Names of the own operators (operators.py) that the programs call, without the namespace."""
        nodes = [node for program in self.programs().values() for node in program.graph.nodes]
        return {operators.NAMES[node.target] for node in nodes if node.target in operators.NAMES}


def capture(model: GPT, max_seq_len: int, *, cached: bool = True) -> Captured:
    """Captures a model; `cached=False`: without the programs that take a KV cache.

    Raises CaptureError if torch.export cannot, or makes a dimension of the contract static.
    """
    wrapper = ExportableGPTWithCache(model, max_seq_len) if cached else None
    return _capture(model.spec, model.dtype, max_seq_len, ExportableGPT(model, max_seq_len), wrapper)


def without_operators(captured: Captured, keep: Collection[str] = ()) -> Captured:
    """The same programs, of ATen operators alone but for the own ones that `keep` names: those that a target has.

    Derived, not a new capture. Raises CaptureError as `capture` does.
    """
    if captured.operators() <= set(keep):
        return captured
    cached = None if captured.cached is None else _composed(captured.cached, keep)
    return _capture(captured.spec, captured.dtype, captured.max_seq_len, _composed(captured.full, keep), cached)


def _composed(program: ExportedProgram, keep: Collection[str]) -> torch.nn.Module:
    """A captured program as a module whose own operators, but those of `keep`, are calls of what they are made of."""
    module = program.module(check_guards=False)
    for node in module.graph.nodes:
        if node.target in operators.NAMES and operators.NAMES[node.target] not in keep:
            node.target = operators.COMPOSED[node.target]
    module.recompile()
    return module


def _capture(
    spec: ModelSpec,
    dtype: torch.dtype,
    max_seq_len: int,
    full_module: torch.nn.Module,
    cached_module: torch.nn.Module | None,
) -> Captured:
    sizes = sizes_for_examples(spec, max_seq_len)
    batch, steps, slots, kept = next(sizes), next(sizes), next(sizes), next(sizes)
    ids = torch.zeros(batch, steps, dtype=torch.long)
    full = export_program(full_module, (ids,), (dict(enumerate(_dims(max_seq_len)[:2])),))
    _check_dynamic(full, "full", {"input_ids": (0, 1)})
    if cached_module is None:
        return Captured(spec, dtype, max_seq_len, full, None, None)

    example = cached_example(spec, dtype, batch, steps, slots, kept)
    whole = export_program(cached_module, example, _cached_dims(max_seq_len))
    cache = {"cache_k": (1, 3), "cache_v": (1, 3), "position": (0,)}
    _check_dynamic(whole, "cached", {"input_ids": (0, 1), **cache, "logits_to_keep": (0,)})

    # The step of one token is by far the most frequent one, and a compiler does better when it knows T = 1.
    one = cached_example(spec, dtype, batch, 1, slots, 1)
    decode = export_program(whole.module(check_guards=False), one, _cached_dims(max_seq_len, decode=True))
    _check_dynamic(decode, "decode", {"input_ids": (0,), **cache})
    return Captured(spec, dtype, max_seq_len, full, whole, decode)


def describe_contract(captured: Captured, *, cache_by_layer: bool = False) -> dict[str, Any]:
    """Names, dtypes and symbolic shapes of each program's inputs and outputs, for a manifest.

    `cache_by_layer`: `cache_k_0`, `cache_v_0`, `cache_k_1`, ... [B, H_kv, S, D], after all others, in the place of
    `cache_k` and `cache_v`.
    """
    spec, dtype = captured.spec, str(captured.dtype).removeprefix("torch.")
    cache = [spec.n_layer, "B", spec.n_kv_head, "S", spec.head_dim]
    logits = {"logits": {"dtype": "float32", "shape": ["B", "R", spec.vocab_size]}}
    ids = {"input_ids": {"dtype": "int64", "shape": ["B", "T"]}}
    new = {"dtype": dtype, "shape": [*cache[:3], "T", spec.head_dim]}
    kinds = ("cache_k", "cache_v")
    stacked = {name: {"dtype": dtype, "shape": cache} for name in kinds}
    layer = {"dtype": dtype, "shape": cache[1:]}
    layers = {f"{name}_{i}": layer for i in range(spec.n_layer) for name in kinds}
    cached = {
        "inputs": ids
        | {"prev_ids": {"dtype": "int64", "shape": ["B", 1]}}
        | ({} if cache_by_layer else stacked)
        | {"position": {"dtype": "int64", "shape": ["B"]}, "logits_to_keep": {"dtype": "int64", "shape": ["R"]}}
        | (layers if cache_by_layer else {}),
        "outputs": logits | {"new_k": new, "new_v": new},
    }
    description: dict[str, Any] = {
        "limits": f"B >= 1, 1 <= T <= {captured.max_seq_len} (decode: T = R = 1), R >= 1, "
        f"0 <= S <= {captured.max_seq_len}, max(position) <= S, position + T <= {captured.max_seq_len}",
        "prefill": cached,
        "decode": _with_one_step(cached),
        "full": {"inputs": ids, "outputs": {"logits": {"dtype": "float32", "shape": ["B", "T", spec.vocab_size]}}},
    }
    if captured.cached is None:
        return {"limits": f"B >= 1, 1 <= T <= {captured.max_seq_len}", "full": description["full"]}
    return description


def _with_one_step(part: Any) -> Any:
    """The same description with T = R = 1."""
    if isinstance(part, dict):
        return {key: _with_one_step(value) for key, value in part.items()}
    return [1 if size in ("T", "R") else size for size in part] if isinstance(part, list) else part


def cached_example(
    spec: ModelSpec, dtype: torch.dtype, batch: int, steps: int, slots: int, kept: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of a cached program: zeros of the contract's shapes, rows at position 0."""
    cache_k, cache_v = empty_cache(spec, dtype, batch, slots)
    ids = torch.zeros(batch, steps, dtype=torch.long)
    position, logits_to_keep = torch.zeros(batch, dtype=torch.long), torch.zeros(kept, dtype=torch.long)
    return ids, torch.zeros(batch, 1, dtype=torch.long), cache_k, cache_v, position, logits_to_keep


def _cached_dims(max_seq_len: int, *, decode: bool = False) -> tuple[dict[int, Any], ...]:
    batch, steps, slots = _dims(max_seq_len)
    cache = {1: batch, 3: slots}
    kept = {} if decode else {0: Dim("kept", min=1)}
    return ({0: batch} if decode else {0: batch, 1: steps}), {0: batch}, cache, cache, {0: batch}, kept


def _dims(max_seq_len: int) -> tuple[Dim, Dim, Dim]:
    # Export wants its examples within the range; a caller must keep to max_seq_len all the same.
    most = max(max_seq_len, _EXAMPLES[-1])
    return Dim("batch", min=1), Dim("steps", min=1, max=most), Dim("slots", min=0, max=most)


def export_program(module: torch.nn.Module, args: tuple[Any, ...], dims: tuple[Any, ...]) -> ExportedProgram:
    """One torch.export in which every dimension named in `dims` stays open, down to sizes of 0 and 1.

    `module` may be a captured program's, for a target that needs it with other bounds. Raises CaptureError.
    """
    # Without this, export takes it for granted that no size is 0 or 1, and guards against them.
    config: Any = torch.fx.experimental._config
    try:
        with torch.no_grad(), config.patch(backed_size_oblivious=True):
            return torch.export.export(module, args, dynamic_shapes=dims, strict=False)
    except Exception as error:  # torch.export raises a dozen types, none with a common base
        raise CaptureError(f"torch.export failed on {type(module).__name__}: {str(error).splitlines()[0]}") from error


def sizes_for_examples(spec: ModelSpec, max_seq_len: int) -> Iterator[int]:
    """Small primes that equal no size of the model.

    torch.export may take two dimensions of equal example size for one (pytorch#153896).
    """
    taken = {
        spec.n_layer, spec.n_head, spec.n_kv_head, spec.n_embd, spec.head_dim, spec.vocab_size, max_seq_len,
        spec.n_head // spec.n_kv_head, spec.head_dim // 2, spec.mlp_width, spec.gate_channels, spec.smear_channels,
        spec.n_kv_head * spec.head_dim,
    }  # fmt: skip
    return (size for size in _EXAMPLES if size not in taken)


def _check_dynamic(program: ExportedProgram, name: str, dims: dict[str, tuple[int, ...]]) -> None:
    """Raises CaptureError if export specialised a dimension that the contract leaves open."""
    placeholders = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    for tensor, open_dims in dims.items():
        for dim in open_dims:
            size = placeholders[tensor].shape[dim]
            if not isinstance(size, torch.SymInt):
                raise CaptureError(f"program {name}: dimension {dim} of {tensor} became the constant {size}")
