"""`config.json` of a Hugging Face NanoChatForCausalLM, read strictly: what our model cannot be is refused by name.

The keys, defaults and meanings are those of transformers' NanoChatConfig (5.23.0; older files say `rope_theta` and
`rope_scaling`, and may carry `qkv_bias` and `logits_soft_cap`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nanochat_x.errors import CheckpointError
from nanochat_x.model_config import ModelConfig
from nanochat_x.quoting import quoted
from nanochat_x.regular_file import read_regular

ARCHITECTURE = "NanoChatForCausalLM"

_LARGEST_FILE = 16 << 20  # bytes; such a file has less than 1 kB
_LARGEST_SIZE = 2**31 - 1
_REMEDY = "nanochat_x reads folders of transformers' NanoChatForCausalLM; docs/hf.md says which"
_SIZES = {
    "max_position_embeddings": "sequence_len", "vocab_size": "vocab_size", "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head", "hidden_size": "n_embd",
}  # fmt: skip
# Keys without a say in the forward pass of inference: names, ids of special tokens, training, what is returned.
_NO_MATTER = {
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "finetuning_task", "id2label", "initializer_range", "keys_to_ignore_at_inference", "label2id",
    "model_type", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict",
    "task_specific_params", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
# Keys with one value that our forward pass has: the one that transformers takes where the key is missing.
_ONLY: dict[str, object] = {
    "hidden_act": "relu2",
    "attention_bias": False,
    "qkv_bias": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "torchscript": False,
    "rope_scaling": None,
}
_READ = {
    *_SIZES, "intermediate_size", "head_dim", "rms_norm_eps", "final_logit_softcapping", "logits_soft_cap",
    "rope_parameters", "rope_theta", "tie_word_embeddings",
}  # fmt: skip


@dataclass(frozen=True)
class HfConfig:
    """What config.json says of the forward pass."""

    sizes: ModelConfig  # vocab_size: rows of the embedding, which may be more than there are tokens
    mlp_width: int
    norm_eps: float
    softcap: float | None
    rotary_base: float
    tied: bool  # lm_head is the embedding


def read_hf_config(path: Path) -> HfConfig:
    """Raises CheckpointError, naming the key, for a config.json that is not of a NanoChatForCausalLM of this form."""
    config = read_json_object(path, CheckpointError, _LARGEST_FILE, _REMEDY)
    where = str(path)
    architectures = config.get("architectures")
    if config.get("model_type") != "nanochat" or architectures not in (None, [ARCHITECTURE]):
        raise CheckpointError(
            f"{where}: is of model_type {quoted(config.get('model_type'))},"
            f" architectures {quoted(architectures)}, not of nanochat and {ARCHITECTURE}",
            remedy=_REMEDY,
        )
    if "auto_map" in config:
        raise CheckpointError(f"{where}: auto_map names code of its own, which is not run", remedy=_REMEDY)
    unknown = sorted(set(config) - _NO_MATTER - set(_ONLY) - _READ)
    if unknown:
        names = ", ".join(quoted(repr(name)) for name in unknown[:8])
        raise CheckpointError(f"{where}: unknown keys {names}, which could mean another model", remedy=_REMEDY)
    for key, only in _ONLY.items():
        if key in config and (config[key] != only or type(config[key]) is not type(only)):
            raise _unlike(where, key, config[key], f"only {json.dumps(only)} is known")
    return _parse(config, where)


def read_json_object(
    path: Path, error_type: type[CheckpointError], largest_file: int, remedy: str
) -> dict[str, object]:
    """The object in a JSON file of at most `largest_file` bytes. Raises `error_type`."""
    try:
        if not path.exists():
            raise error_type(f"no {path.name} in {path.parent}", remedy=remedy)
        text = read_regular(path, largest_file)
        if len(text) > largest_file:
            raise error_type(f"{path}: larger than {largest_file >> 20} MiB", remedy=remedy)
        value = json.loads(text)
    except OSError as error:
        raise error_type(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise error_type(f"{path}: cut short or not JSON ({quoted(error)})", remedy="copy the file again") from error
    if not isinstance(value, dict):
        raise error_type(f"{path}: holds no JSON object", remedy=remedy)
    return value


def _parse(config: Mapping[str, object], where: str) -> HfConfig:
    sizes = _sizes(config, where)
    tied = config.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        raise _unlike(where, "tie_word_embeddings", tied, "it must be true or false")
    softcap = None
    if config.get("final_logit_softcapping", 15.0) is not None:
        softcap = _number(config, "final_logit_softcapping", 15.0, where)
    # Of an older version of the file; transformers heeds final_logit_softcapping alone.
    if config.get("logits_soft_cap", softcap) != softcap:
        raise _unlike(where, "logits_soft_cap", config["logits_soft_cap"], f"final_logit_softcapping is {softcap}")
    return HfConfig(
        sizes=sizes,
        mlp_width=_integer(config, "intermediate_size", where),
        norm_eps=_number(config, "rms_norm_eps", 1e-6, where),
        softcap=softcap,
        rotary_base=_rotary_base(config, where),
        tied=tied,
    )


def _sizes(config: Mapping[str, object], where: str) -> ModelConfig:
    config = dict(config)
    if config.get("num_key_value_heads") is None:  # as transformers reads it
        config["num_key_value_heads"] = config.get("num_attention_heads")
    sizes = {ours: _integer(config, key, where) for key, ours in _SIZES.items()}
    parsed = ModelConfig(window_pattern=None, **sizes)
    for whole, part in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
        if sizes[_SIZES[whole]] % sizes[_SIZES[part]]:
            raise CheckpointError(f"{where}: {whole} {config[whole]} is not a multiple of {part} {config[part]}")
    if parsed.head_dim % 2:
        raise CheckpointError(f"{where}: heads of odd width {parsed.head_dim}; rotary embeddings need an even one")
    if "head_dim" in config and config["head_dim"] != parsed.head_dim:
        raise _unlike(where, "head_dim", config["head_dim"], f"only {parsed.head_dim}, width over heads, is known")
    return parsed


def _rotary_base(config: Mapping[str, object], where: str) -> float:
    rope = config.get("rope_parameters")
    if rope is None:
        return _base(config, where)
    if not isinstance(rope, dict):
        raise _unlike(where, "rope_parameters", rope, "it must be an object")
    rope = dict(rope)
    kind, partial = rope.pop("rope_type", "default"), rope.pop("partial_rotary_factor", 1.0)
    if kind != "default":
        raise _unlike(where, "rope_parameters.rope_type", kind, 'only "default" is known')
    if partial != 1.0:
        raise _unlike(where, "rope_parameters.partial_rotary_factor", partial, "only 1 is known")
    if unknown := sorted(set(rope) - {"rope_theta"}):
        raise _unlike(where, f"rope_parameters.{unknown[0]}", rope[unknown[0]], "that key is not known")
    base = _base(rope, f"{where}: rope_parameters")
    if "rope_theta" in config and config["rope_theta"] != base:
        raise _unlike(where, "rope_theta", config["rope_theta"], f"rope_parameters says {base:g}")
    return base


def _base(config: Mapping[str, object], where: str) -> float:
    base = _number(config, "rope_theta", 10_000.0, where)
    if base <= 1:
        raise _unlike(where, "rope_theta", base, "it must be above 1")
    return base


def _integer(config: Mapping[str, object], key: str, where: str) -> int:
    value = config.get(key)
    if value is None:
        raise CheckpointError(f"{where} lacks {key}", remedy=_REMEDY)
    if type(value) is not int or not 1 <= value <= _LARGEST_SIZE:  # type(): True is an int to isinstance
        raise _unlike(where, key, value, "it must be a positive integer")
    return value


def _number(config: Mapping[str, object], key: str, default: float, where: str) -> float:
    value = config.get(key, default)
    if type(value) not in (int, float) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _unlike(where, key, value, "it must be a positive number")
    return float(value)


def _unlike(where: str, key: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"{where}: {quoted(key)} is {quoted(json.dumps(value), 60)}; {wanted}", remedy=_REMEDY)
