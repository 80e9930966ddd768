"""A folder that transformers' `save_pretrained` wrote of a NanoChatForCausalLM: config.json, model.safetensors (or its
shards with their index), tokenizer.json. It is nanochat's generation A with constants of its own.

Nothing of a folder is run: safetensors and JSON hold no code, and code that a config names is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nanochat_x.errors import CheckpointError, TokenizerError
from nanochat_x.find import HF_SOURCE, CheckpointFiles
from nanochat_x.generations import CLASSIC, compare_shapes, expected_shapes, make_spec, padded_rows
from nanochat_x.hf_config import HfConfig, read_json_object
from nanochat_x.quoting import quoted
from nanochat_x.spec import ModelSpec
from nanochat_x.tokenizer import TokenizerData

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"

_DTYPES = ("F32", "BF16", "F16")
_LARGEST_INDEX = 64 << 20
_REMEDY = "nanochat_x reads folders that save_pretrained wrote of a NanoChatForCausalLM"
_LAYER_NAMES = {
    "attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_LM_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def find_hf_checkpoint(folder: Path) -> CheckpointFiles:
    """The files of a folder; its name is the tag. Of both forms of weights, transformers takes the single file.

    Raises CheckpointError, saying what is missing.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder", remedy="name the folder that save_pretrained wrote")
    for name in (CONFIG, TOKENIZER):
        if not (folder / name).exists():
            raise CheckpointError(f"no {name} in {folder}", remedy=_REMEDY)
    single = folder / WEIGHTS
    if not single.exists() and not (folder / INDEX).exists():
        pickled = " (pytorch_model.bin is not read)" if (folder / "pytorch_model.bin").exists() else ""
        raise CheckpointError(f"no {WEIGHTS} in {folder}{pickled}", remedy=_REMEDY)
    shards = () if single.exists() else tuple(folder / name for name in sorted(set(_weight_map(folder).values())))
    return CheckpointFiles(
        source=HF_SOURCE,
        tag=folder.resolve().name or "model",
        step=None,
        model=single if single.exists() else folder / INDEX,
        meta=folder / CONFIG,
        tokenizer_dir=folder,
        is_demo=False,
        shards=shards,
    )


def read_hf_weights(files: CheckpointFiles, config: HfConfig) -> dict[str, torch.Tensor]:
    """The tensors under nanochat's names, in their stored dtype, memory-mapped.

    Raises CheckpointError unless they are exactly those of the config.
    """
    weights: dict[str, torch.Tensor] = {}
    for path in files.weight_files:
        for name, tensor in _read_safetensors(path).items():
            if name in weights:
                raise CheckpointError(f"{path}: {quoted(name)} is in another shard too")
            weights[name] = tensor
    if files.shards:
        _check_index(files, weights)
    if config.tied and _same(weights.get(_LM_HEAD), weights.get(_EMBEDDING)):
        del weights[_LM_HEAD]  # the embedding once more
    if config.sizes.n_layer > len(weights):  # ahead of expected_shapes: it lists each layer
        raise CheckpointError(
            f"{files.model}: {len(weights)} tensors cannot be the {config.sizes.n_layer} layers of {CONFIG}",
            remedy=_REMEDY,
        )
    ours = expected_shapes(CLASSIC, config.sizes, config.sizes.vocab_size, config.mlp_width)
    names = {hf_name(name): name for name in ours if not (config.tied and name == _LM_HEAD)}
    expected = {theirs: ours[name] for theirs, name in names.items()}
    problems = compare_shapes(expected, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    if problems:
        raise CheckpointError(f"{files.model}: the tensors are not those of {CONFIG}: {problems}", remedy=_REMEDY)
    renamed = {names[theirs]: tensor for theirs, tensor in weights.items()}
    if config.tied:
        renamed[_LM_HEAD] = renamed[names[_EMBEDDING]]
    return renamed


def make_hf_spec(config: HfConfig, tokenizer: TokenizerData, where: Path) -> ModelSpec:
    """The forward pass of transformers' class: generation A with the config's constants.

    Raises TokenizerError if the tokenizer has not as many tokens as the model, padding apart.
    """
    rows, tokens = config.sizes.vocab_size, tokenizer.vocab_size
    if rows not in (tokens, padded_rows(tokens)):
        raise TokenizerError(
            f"the tokenizer in {where} has {tokens} tokens, the model {rows} (or {padded_rows(tokens)} with padding)",
            remedy="take the tokenizer that the model was trained with",
        )
    return replace(
        make_spec(CLASSIC, replace(config.sizes, vocab_size=tokens), rows),
        mlp_width=config.mlp_width,
        norm_eps=config.norm_eps,
        softcap=config.softcap,
        rotary_base=config.rotary_base,
        rope_table_dtype="compute",  # transformers brings cos and sin to the dtype of the activations
    )


def hf_name(name: str) -> str:
    """transformers' name of a tensor of generation A."""
    if name == "transformer.wte.weight":
        return _EMBEDDING
    if not name.startswith("transformer.h."):
        return name
    _, _, layer, part, matrix, _ = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[f'{part}.{matrix}']}.weight"


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file", remedy="copy it from where the others came from")
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, torch.Tensor] = {}
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _DTYPES:
                    raise CheckpointError(
                        f"{path}: {quoted(name, 80)} has dtype {dtype}", remedy=f"weights are {', '.join(_DTYPES)}"
                    )
                tensors[name] = file.get_tensor(name)
            return tensors
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: cut short or damaged ({quoted(error)})", remedy="copy it again from where it was made"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def _weight_map(folder: Path) -> dict[str, str]:
    """The index: tensor -> shard, each a name in the folder."""
    index = read_json_object(folder / INDEX, CheckpointError, _LARGEST_INDEX, _REMEDY)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: holds no weight_map", remedy=_REMEDY)
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX}: {quoted(name, 80)} is no shard's name", remedy=_REMEDY)
    return dict(weight_map)


def _check_index(files: CheckpointFiles, weights: Mapping[str, torch.Tensor]) -> None:
    indexed = set(_weight_map(files.meta.parent))
    if odd := sorted(indexed ^ set(weights)):
        place = "in the index and in no shard" if odd[0] in indexed else "in a shard and not in the index"
        raise CheckpointError(f"{files.model}: {quoted(odd[0])} is {place}", remedy="copy the whole folder again")
