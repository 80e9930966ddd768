"""Load a nanochat checkpoint: its spec, weights and tokenizer, each checked before it is believed.

    files = find_checkpoint("sft", model_tag="d20")
    checkpoint = load_checkpoint(files, parse_overrides(["softcap=20"]))

What is read may come from anywhere: nothing of it is run, and what does not fit is refused in one line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from nanochat_x.errors import CheckpointError, TokenizerError, UsageError
from nanochat_x.find import HF_SOURCE, CheckpointFiles, find_checkpoint
from nanochat_x.generations import CLASSIC, check_tensors, make_spec, tell_generation
from nanochat_x.hf import find_hf_checkpoint, make_hf_spec, read_hf_weights
from nanochat_x.hf_config import read_hf_config
from nanochat_x.hf_tokenizer import read_hf_tokenizer
from nanochat_x.model_config import read_meta
from nanochat_x.overrides import apply_overrides, parse_overrides
from nanochat_x.spec import ModelSpec
from nanochat_x.tokenizer import TokenizerData, read_tokenizer
from nanochat_x.torch_file import read_torch_file, sha256_of

__all__ = [
    "Checkpoint",
    "CheckpointFiles",
    "choose_checkpoint",
    "find_checkpoint",
    "load_checkpoint",
    "parse_overrides",
]

_COMPILED_PREFIX = "_orig_mod."  # of every name, in a state dict taken from a compiled model
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and checked whole."""

    files: CheckpointFiles
    spec: ModelSpec
    weights: dict[str, torch.Tensor]  # nanochat's names; stored dtype, contiguous, memory-mapped: never write to them
    tokenizer: TokenizerData
    overrides: dict[str, str]
    notes: tuple[str, ...]  # a line for each constant that the file cannot tell, with the choice made
    model_sha256: str  # of the model file; of shards: of the lines that `sha256sum` prints of them, by name


def choose_checkpoint(
    hf: Path | None,
    source: str | None,
    model_tag: str | None,
    step: int | None,
    base_dir: Path | None,
    tokenizer_dir: Path | None,
) -> CheckpointFiles:
    """The files of the folder `hf` of transformers', or those that `find_checkpoint` chooses by the other five.

    Raises UsageError if `hf` is not alone, CheckpointError for what is not there.
    """
    if hf is None:
        return find_checkpoint(source, model_tag, step, base_dir, tokenizer_dir)
    given = {"-i": source, "-g": model_tag, "-s": step, "--base-dir": base_dir, "--tokenizer": tokenizer_dir}
    if others := [option for option, value in given.items() if value is not None]:
        raise UsageError(f"--hf and {', '.join(others)} both choose a checkpoint", remedy="leave one of them out")
    return find_hf_checkpoint(hf)


def load_checkpoint(files: CheckpointFiles, overrides: Mapping[str, str] = MappingProxyType({})) -> Checkpoint:
    """Reads and checks the files that `find_checkpoint`, or `hf.find_hf_checkpoint`, found.

    The model file is read through (CRC-32, finiteness, SHA-256) but stays memory-mapped: the process itself holds next
    to nothing of it.

    Raises CheckpointError (TokenizerError) for files that cannot be read or trusted, or do not fit each other;
    UsageError for an override that this model does not heed.
    """
    spec, notes, weights, tokenizer = (_load_hf if files.source == HF_SOURCE else _load_nanochat)(files, overrides)
    return Checkpoint(
        files=files,
        spec=spec,
        weights=weights,
        tokenizer=tokenizer,
        overrides=dict(overrides),
        notes=notes,
        model_sha256=_sha256_of_all(files),
    )


_Loaded = tuple[ModelSpec, tuple[str, ...], dict[str, torch.Tensor], TokenizerData]


def _load_nanochat(files: CheckpointFiles, overrides: Mapping[str, str]) -> _Loaded:
    step, config = read_meta(files.meta)
    tokenizer = read_tokenizer(files.tokenizer_dir)
    if tokenizer.vocab_size != config.vocab_size:
        raise TokenizerError(
            f"the tokenizer in {files.tokenizer_dir} has {tokenizer.vocab_size} tokens,"
            f" the model has {config.vocab_size}",
            remedy="name the folder of the tokenizer that it was trained with: --tokenizer DIR",
        )
    weights = _read_weights(files.model)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    where = str(files.model)
    generation = tell_generation(shapes, where)
    padded_vocab_size = check_tensors(generation, config, shapes, where)
    spec, notes = apply_overrides(make_spec(generation, config, padded_vocab_size), generation, config, overrides)
    _check_finite(weights, files.model, "the training run diverged: take an earlier step with -s STEP")
    if step is not None and step != files.step:
        notes += (f"step = {files.step}, by the file's name: the meta file inside says {step}",)
    return spec, notes, weights, tokenizer


def _load_hf(files: CheckpointFiles, overrides: Mapping[str, str]) -> _Loaded:
    config = read_hf_config(files.meta)
    tokenizer = read_hf_tokenizer(files.tokenizer_dir)
    spec = make_hf_spec(config, tokenizer, files.tokenizer_dir)
    weights = read_hf_weights(files, config)
    spec, notes = apply_overrides(spec, CLASSIC, config.sizes, overrides)
    _check_finite(weights, files.model, "the training run diverged, or the file is damaged: get another copy")
    return spec, notes, weights, tokenizer


def _sha256_of_all(files: CheckpointFiles) -> str:
    if not files.shards:
        return sha256_of(files.model)
    lines = [f"{sha256_of(shard)}  {shard.name}\n" for shard in files.shards]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Name without `_orig_mod.` -> tensor; every value is a plain dense tensor of a dtype that nanochat saves."""
    state = read_torch_file(path)
    if not isinstance(state, dict) or not state:
        kind = type(state).__name__ + (" of nothing" if isinstance(state, dict) else "")
        raise CheckpointError(f"{path}: holds a {kind}, not a state dict", remedy="is it a model file?")
    weights: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: the key {key!r:.80} is not a tensor's name", remedy="is it a model file?")
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path}: {key!r:.80} is a {type(tensor).__name__}, not a tensor", remedy="is it a model file?"
            )
        name = key.removeprefix(_COMPILED_PREFIX)
        if name in weights:
            raise CheckpointError(f"{path}: {name!r:.80} is there twice, with and without {_COMPILED_PREFIX}")
        # Contiguous too: a tensor of stride 0 is small in the file and as large as it likes in memory.
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise CheckpointError(f"{path}: {name!r:.80} is not a dense contiguous tensor")
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{path}: {name!r:.80} has dtype {_dtype_name(tensor.dtype)}",
                remedy=f"weights are {', '.join(map(_dtype_name, _DTYPES))}",
            )
        weights[name] = tensor.detach()
    return weights


def _check_finite(weights: Mapping[str, torch.Tensor], path: Path, remedy: str) -> None:
    for name, tensor in weights.items():
        low, high = torch.aminmax(tensor)  # one pass without a copy; NaN wins over any number
        if not (torch.isfinite(low) and torch.isfinite(high)):
            kind = "NaN" if torch.isnan(low) else "Inf"
            raise CheckpointError(f"{path}: {name} holds {kind}", remedy=remedy)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
