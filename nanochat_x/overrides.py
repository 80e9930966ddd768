"""`--override KEY=VALUE`: constants of the forward pass that a checkpoint cannot tell and its owner knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nanochat_x.errors import UsageError
from nanochat_x.generations import CLASSIC, VALUE_EMBEDS, Generation, layer_letters, layer_windows
from nanochat_x.model_config import ModelConfig, is_window_pattern
from nanochat_x.quoting import quoted
from nanochat_x.spec import ModelSpec

_TABLE_DTYPES = ("bfloat16", "float32", "compute")


def _number(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _base(text: str) -> bool:
    return _number(text) and float(text) > 1


def _tokens(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0


#: Key -> (whether a value is one, what is wanted, what the constant is).
KNOWN: dict[str, tuple[Callable[[str], bool], str, str]] = {
    "softcap": (_number, "a positive number", "logits = softcap * tanh(logits / softcap)"),
    "rotary_base": (_base, "a number above 1", "angle of rotary embeddings = position / base^(2j/D)"),
    "rope_table_dtype": (
        lambda text: text in _TABLE_DTYPES,
        f"one of {', '.join(_TABLE_DTYPES)}",
        "what the cos and sin tables are rounded to",
    ),
    "qk_scale": (_number, "a positive number", "q and k are multiplied by it after their norm"),
    "gate_scale": (_number, "a positive number", "factor of a value embedding's gate"),
    "window_pattern": (is_window_pattern, "letters S and L", "each layer's attention window, short or long"),
    "short_window": (_tokens, "a positive number of tokens", "how far back an S layer sees"),
}


def parse_overrides(pairs: Sequence[str]) -> dict[str, str]:
    """`["softcap=20"]` -> `{"softcap": "20"}`. Raises UsageError for an unknown or repeated key or a bad value."""
    overrides: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UsageError(f"override {pair!r} is not KEY=VALUE", remedy="for instance softcap=20")
        if key in overrides:
            raise UsageError(f"override {quoted(key)} is given twice", remedy="give it once")
        overrides[key] = value
    _check(overrides)
    return overrides


def apply_overrides(
    spec: ModelSpec, generation: Generation, config: ModelConfig, overrides: Mapping[str, str]
) -> tuple[ModelSpec, tuple[str, ...]]:
    """The spec with a user's constants, and a line for each constant that the file cannot tell or the user set.

    Raises UsageError for a constant that this model does not have: an override never goes unheeded.
    """
    _check(overrides)
    changes: dict[str, Any] = {}
    for key, value in overrides.items():
        if key in ("softcap", "rotary_base", "qk_scale"):
            changes[key] = float(value)
        elif key == "rope_table_dtype":
            changes[key] = value
        elif key == "gate_scale":
            if not generation.gate_channels:
                raise _unheeded(key, f"generation {generation.name} has no value embeddings")
            changes[key] = float(value)
    if "window_pattern" in overrides or "short_window" in overrides:
        changes["windows"] = _windows(generation, config, overrides)
    return replace(spec, **changes), _notes(generation, config, overrides)


def _check(overrides: Mapping[str, str]) -> None:
    for key, value in overrides.items():
        if key not in KNOWN:
            raise UsageError(f"unknown override {key!r}", remedy=f"the known ones are {', '.join(KNOWN)}")
        is_value, wanted, _ = KNOWN[key]
        if not is_value(value):
            raise UsageError(f"override {key}={value!r:.40} cannot be meant", remedy=f"it takes {wanted}")


def _windows(generation: Generation, config: ModelConfig, overrides: Mapping[str, str]) -> tuple[int, ...]:
    key = "window_pattern" if "window_pattern" in overrides else "short_window"
    if generation is CLASSIC:
        raise _unheeded(key, "generation classic has no attention windows")
    pattern = overrides.get("window_pattern", config.window_pattern or "L").upper()
    short = int(overrides.get("short_window", generation.short_window(config.sequence_len)))
    if "short_window" in overrides and "S" not in layer_letters(pattern, config.n_layer):
        raise _unheeded("short_window", f"no layer has an S window (pattern {pattern}, {config.n_layer} layers)")
    return layer_windows(pattern, short, config)


def _unheeded(key: str, reason: str) -> UsageError:
    return UsageError(f"override {key} would change nothing: {reason}", remedy="leave it out")


def _notes(generation: Generation, config: ModelConfig, overrides: Mapping[str, str]) -> tuple[str, ...]:
    notes = [f"{key} = {value}, as asked for by --override" for key, value in overrides.items()]
    if generation is VALUE_EMBEDS:
        if "softcap" not in overrides:
            notes.append(
                "softcap = 15: the file cannot tell; models trained from 2026-03-02 to 2026-03-08 need"
                " --override softcap=20"
            )
        if "rope_table_dtype" not in overrides:
            notes.append(
                "rope_table_dtype = bfloat16: the file cannot tell; models trained from 2026-03-04 on need"
                " --override rope_table_dtype=compute"
            )
    if generation is not CLASSIC and config.window_pattern is None and "window_pattern" not in overrides:
        notes.append(
            "window_pattern = L: model_config has none; nanochat reads such a file so (--override window_pattern=...)"
        )
    return tuple(notes)
