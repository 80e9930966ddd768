"""Telling the generation from the tensors, and every number of the spec. Expected numbers are worked out by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_x.errors import CheckpointError, UsageError
from nanochat_x.generations import Shape, check_tensors, make_spec, tell_generation
from nanochat_x.model_config import ModelConfig, parse_model_config, read_meta
from nanochat_x.overrides import apply_overrides, parse_overrides
from nanochat_x.spec import ModelSpec

CONFIG = {"sequence_len": 1000, "vocab_size": 100, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32}


def tensors(letter: str, rows: int = 128) -> dict[str, Shape]:
    """Names and shapes of a model of CONFIG, written out: width 32, heads of 8, KV width 16, layers 0 to 2."""
    shapes: dict[str, Shape] = {"transformer.wte.weight": (rows, 32), "lm_head.weight": (rows, 32)}
    for i in (0, 1, 2):
        shapes[f"transformer.h.{i}.attn.c_q.weight"] = (32, 32)
        shapes[f"transformer.h.{i}.attn.c_k.weight"] = (16, 32)
        shapes[f"transformer.h.{i}.attn.c_v.weight"] = (16, 32)
        shapes[f"transformer.h.{i}.attn.c_proj.weight"] = (32, 32)
        shapes[f"transformer.h.{i}.mlp.c_fc.weight"] = (128, 32)
        shapes[f"transformer.h.{i}.mlp.c_proj.weight"] = (32, 128)
    if letter in "BCDE":
        shapes["resid_lambdas"] = (3,)
        shapes["x0_lambdas"] = (3,)
    if letter in "CDE":
        for i in (0, 2):  # i % 2 == (3 - 1) % 2
            shapes[f"value_embeds.{i}.weight"] = (rows, 16)
            shapes[f"transformer.h.{i}.attn.ve_gate.weight"] = (2, 32 if letter == "C" else 12)
    if letter == "E":
        shapes["smear_gate.weight"] = (1, 24)
        shapes["smear_lambda"] = (1,)
        shapes["backout_lambda"] = (1,)
    return shapes


def config_of(letter: str, **changes: Any) -> ModelConfig:
    window = {} if letter == "A" else {"window_pattern": "SSL"}
    return parse_model_config(CONFIG | window | changes, "meta.json: model_config")


def spec_of(letter: str, shapes: dict[str, Shape] | None = None, overrides: list[str] | None = None) -> ModelSpec:
    return spec_and_notes(letter, config_of(letter), shapes or tensors(letter), overrides or [])[0]


def spec_and_notes(
    letter: str, config: ModelConfig, shapes: dict[str, Shape], overrides: list[str]
) -> tuple[ModelSpec, tuple[str, ...]]:
    generation = tell_generation(shapes, "model.pt")
    assert generation.letter == letter
    rows = check_tensors(generation, config, shapes, "model.pt")
    return apply_overrides(make_spec(generation, config, rows), generation, config, parse_overrides(overrides))


COMMON = {
    "sequence_len": 1000,
    "vocab_size": 100,
    "padded_vocab_size": 128,
    "n_layer": 3,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 32,
    "mlp_width": 128,
    "softcap": 15.0,
    "norm_eps": 2.0**-23,
}
NO_VALUE_EMBEDS = {"value_embed_layers": (), "gate_scale": 0.0, "gate_channels": 0}
NO_SMEAR = {"smear_channels": 0, "backout_layer": None}

EXPECTED: dict[str, dict[str, Any]] = {
    "A": {
        "generation": "classic",
        "windows": (None, None, None),
        "rotary_base": 10_000.0,
        "rope_table_dtype": "bfloat16",
        "qk_scale": 1.0,
        "lambdas": False,
        **NO_VALUE_EMBEDS,
        **NO_SMEAR,
    },
    "B": {
        "generation": "lambdas",
        "windows": (500, 500, 1000),  # 1000 // 2
        "rotary_base": 10_000.0,
        "rope_table_dtype": "bfloat16",
        "qk_scale": 1.0,
        "lambdas": True,
        **NO_VALUE_EMBEDS,
        **NO_SMEAR,
    },
    "C": {
        "generation": "value-embeds",
        "windows": (500, 500, 1000),
        "rotary_base": 10_000.0,
        "rope_table_dtype": "bfloat16",
        "qk_scale": 1.0,
        "lambdas": True,
        "value_embed_layers": (0, 2),
        "gate_scale": 2.0,
        "gate_channels": 32,
        **NO_SMEAR,
    },
    "D": {
        "generation": "wide-rope",
        "windows": (384, 384, 1000),  # 1000 / 3 = 333.3, / 128 = 2.6, up to 3 x 128
        "rotary_base": 100_000.0,
        "rope_table_dtype": "compute",
        "qk_scale": 1.15,
        "lambdas": True,
        "value_embed_layers": (0, 2),
        "gate_scale": 3.0,
        "gate_channels": 12,
        **NO_SMEAR,
    },
    "E": {
        "generation": "smear",
        "windows": (256, 256, 1000),  # 1000 / 4 = 250, / 128 = 1.95, up to 2 x 128
        "rotary_base": 100_000.0,
        "rope_table_dtype": "compute",
        "qk_scale": 1.2,
        "lambdas": True,
        "value_embed_layers": (0, 2),
        "gate_scale": 3.0,
        "gate_channels": 12,
        "smear_channels": 24,
        "backout_layer": 1,
    },
}


@pytest.mark.parametrize("letter", "ABCDE")
def test_every_field_of_every_generation(letter: str) -> None:
    assert asdict(spec_of(letter)) == COMMON | EXPECTED[letter]


@pytest.mark.parametrize(
    ("letter", "sequence_len", "short"),
    [
        ("B", 2048, 1024),
        ("B", 255, 127),  # rounded down
        ("D", 2048, 768),  # 682.7 -> 6 x 128
        ("D", 384, 128),  # exactly one tile
        ("D", 385, 256),  # one token more
        ("E", 2048, 512),
        ("E", 512, 128),
        ("E", 513, 256),
        ("E", 64, 128),  # never less than a tile
    ],
)
def test_short_windows(letter: str, sequence_len: int, short: int) -> None:
    spec, _ = spec_and_notes(letter, config_of(letter, sequence_len=sequence_len), tensors(letter), [])
    assert spec.windows == (short, short, sequence_len)


@pytest.mark.parametrize(
    ("n_layer", "backout_layer", "value_embed_layers"),
    [(1, 0, (0,)), (2, 1, (1,)), (5, 2, (0, 2, 4)), (6, 3, (1, 3, 5)), (7, 3, (0, 2, 4, 6))],
)
def test_layers_of_backout_and_value_embeddings(
    n_layer: int, backout_layer: int, value_embed_layers: tuple[int, ...]
) -> None:
    spec = make_spec(tell_generation(tensors("E"), "model.pt"), config_of("E", n_layer=n_layer), 128)
    assert spec.backout_layer == backout_layer
    assert spec.value_embed_layers == value_embed_layers


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        ("L", (1000, 1000, 1000)),
        ("S", (500, 500, 1000)),  # the last layer is always L
        ("SL", (500, 1000, 1000)),
        ("LS", (1000, 500, 1000)),
        ("sSsL", (500, 500, 1000)),  # longer than the layers; nanochat takes lower case too
    ],
)
def test_the_pattern_is_tiled_and_the_last_layer_is_long(pattern: str, windows: tuple[int, ...]) -> None:
    spec, _ = spec_and_notes("B", config_of("B", window_pattern=pattern), tensors("B"), [])
    assert spec.windows == windows


def test_vocabulary_rows_may_be_padded_or_not_but_not_otherwise() -> None:
    assert spec_of("A", tensors("A", rows=100)).padded_vocab_size == 100
    assert spec_of("A", tensors("A", rows=128)).padded_vocab_size == 128
    with pytest.raises(CheckpointError, match=r"misshapen transformer.wte.weight \[192, 32\] instead of \[128, 32\]"):
        spec_of("A", tensors("A", rows=192))
    mixed = tensors("E") | {"value_embeds.2.weight": (100, 16)}
    with pytest.raises(CheckpointError, match=r"misshapen value_embeds.2.weight \[100, 16\] instead of \[128, 16\]; "):
        spec_of("E", mixed)


@pytest.mark.parametrize("letter", "ABCDE")
def test_every_tensor_is_missed_by_name(letter: str) -> None:
    whole = tensors(letter)
    marks = {"A": set(), "B": {"resid_lambdas"}, "C": set(), "D": set(), "E": {"smear_gate.weight"}}[letter]
    for name in whole.keys() - marks:
        shapes = {other: shape for other, shape in whole.items() if other != name}
        with pytest.raises(CheckpointError, match=rf"generation \w+(-\w+)? \({letter}\).*: missing {name}; "):
            spec_of(letter, shapes)


@pytest.mark.parametrize("letter", "ABCDE")
def test_every_tensor_is_misshapen_by_name(letter: str) -> None:
    for name, shape in tensors(letter).items():
        shapes = tensors(letter) | {name: (*shape, 1)}
        if name.endswith("ve_gate.weight"):
            message = "ve_gate has 1 and .* columns" if letter in "CD" else "misshapen"
        else:
            message = f"misshapen {name} "
        with pytest.raises(CheckpointError, match=message):
            spec_of(letter, shapes)


@pytest.mark.parametrize("letter", "ABCDE")
@pytest.mark.parametrize(
    "extra",
    [
        "transformer.h.3.attn.c_q.weight",
        "skip_weights",
        "transformer.h.1.attn.c_q.bias",
        "value_embeds",
        "cos",
        "\n\x1b[",
    ],
)
def test_an_unknown_tensor_is_refused_by_name(letter: str, extra: str) -> None:
    shown = "" if extra.startswith("\n") else extra
    with pytest.raises(CheckpointError, match=f"unknown {shown}") as caught:
        spec_of(letter, tensors(letter) | {extra: (1,)})
    assert str(caught.value).isprintable()


def test_a_lost_mark_does_not_make_another_generation() -> None:
    without = {name: shape for name, shape in tensors("E").items() if name != "smear_gate.weight"}
    generation = tell_generation(without, "model.pt")
    with pytest.raises(CheckpointError, match="unknown backout_lambda, smear_lambda; "):
        check_tensors(generation, config_of("E"), without, "model.pt")
    without = {name: shape for name, shape in tensors("B").items() if name != "resid_lambdas"}
    with pytest.raises(CheckpointError, match="model_config has a window_pattern, but without resid_lambdas"):
        check_tensors(tell_generation(without, "model.pt"), config_of("B"), without, "model.pt")


def test_mixtures_of_generations_are_refused_by_name() -> None:
    smear_of_c = tensors("E") | {
        f"transformer.h.{i}.attn.ve_gate.weight": (2, 32) for i in (0, 2)
    }  # E's smear with C's gates
    with pytest.raises(CheckpointError, match=r"generation smear \(E\).*ve_gate.weight \[2, 32\] instead of \[2, 12\]"):
        check_tensors(tell_generation(smear_of_c, "model.pt"), config_of("E"), smear_of_c, "model.pt")
    gates_differ = tensors("D") | {"transformer.h.2.attn.ve_gate.weight": (2, 32)}
    with pytest.raises(CheckpointError, match="ve_gate has 12 and 32 columns, known generations have 32 or 12"):
        tell_generation(gates_differ, "model.pt")
    no_gates = {name: shape for name, shape in tensors("C").items() if "ve_gate" not in name}
    with pytest.raises(CheckpointError, match="value_embeds without ve_gate, a design of no known generation"):
        tell_generation(no_gates, "model.pt")
    no_lambdas = {name: shape for name, shape in tensors("C").items() if "lambdas" not in name}
    with pytest.raises(CheckpointError, match=r"\(C\) with this model_config: missing resid_lambdas, x0_lambdas; "):
        check_tensors(tell_generation(no_lambdas, "model.pt"), config_of("C"), no_lambdas, "model.pt")
    with pytest.raises(CheckpointError, match=r"window_pattern, but without resid_lambdas this is generation classic"):
        check_tensors(tell_generation(tensors("A"), "model.pt"), config_of("B"), tensors("A"), "model.pt")


def test_all_problems_are_in_one_line_and_a_few_of_each_are_named() -> None:
    shapes = tensors("A")
    for name in list(shapes)[2:9]:
        shapes["renamed." + name] = shapes.pop(name)
    shapes["lm_head.weight"] = (1, 1)
    with pytest.raises(CheckpointError) as caught:
        spec_of("A", shapes)
    message = str(caught.value)
    assert "\n" not in message
    assert message.count("and 4 more") == 2  # 7 missing and 7 unknown, 3 named of each
    assert "misshapen lm_head.weight [1, 1] instead of [128, 32]" in message


def test_a_billion_layers_are_refused_before_they_are_listed() -> None:
    with pytest.raises(CheckpointError, match="20 tensors cannot be the 1000000000 layers of model_config"):
        spec_and_notes("A", config_of("A", n_layer=10**9), tensors("A"), [])


def test_a_model_too_narrow_for_its_gates() -> None:
    with pytest.raises(CheckpointError, match="n_embd is 16, generation smear needs 24 or more"):
        spec_and_notes("E", config_of("E", n_embd=16), tensors("E"), [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_embd": 33}, "n_embd 33 is not a multiple of n_head 4"),
        ({"n_kv_head": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
        ({"n_embd": 36}, "heads of odd width 9"),
        ({"n_layer": 0}, "n_layer is 0; it must be a positive integer"),
        ({"n_layer": -1}, "n_layer is -1"),
        ({"n_layer": True}, "n_layer is True"),
        ({"n_layer": 3.0}, "n_layer is 3.0"),
        ({"vocab_size": "100"}, "vocab_size is '100'"),
        ({"sequence_len": None}, "sequence_len is None"),
        ({"sequence_len": 10**400}, "sequence_len is 1000"),
        ({"window_pattern": ""}, "window_pattern is ''; it must be letters S and L"),
        ({"window_pattern": "SXL"}, "window_pattern is 'SXL'"),
        ({"window_pattern": ["S"]}, "window_pattern is "),
        ({"rope_base": 1, "dropout": 0}, "unknown keys 'dropout', 'rope_base'; "),
    ],
)
def test_model_config_is_read_strictly(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_model_config(CONFIG | change, "meta.json: model_config")
    assert str(caught.value).startswith("meta.json: model_config")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("key", CONFIG)
def test_model_config_lacks_nothing(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"lacks {key}; "):
        parse_model_config({name: value for name, value in CONFIG.items() if name != key}, "meta.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1, "model_config": {"sequence_len"', "cut short or not JSON"),
        ("", "cut short or not JSON"),
        ("\ud800", "cut short or not JSON"),
        ("[" * 100_000, "cut short or not JSON"),
        ("[1]", "holds no model_config"),
        ('{"step": 1}', "holds no model_config"),
        ('{"model_config": 3}', "holds no model_config"),
    ],
)
def test_meta_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "meta_000001.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_meta(path)
    assert str(path) in str(caught.value)


def test_meta_file(tmp_path: Path) -> None:
    path = tmp_path / "meta_000001.json"
    path.write_text(json.dumps({"step": 7, "val_bpb": None, "model_config": CONFIG, "user_config": {"depth": 3}}))
    step, config = read_meta(path)
    assert step == 7
    assert vars(config) == CONFIG | {"window_pattern": None}
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_meta(tmp_path)


@pytest.mark.parametrize(
    ("letter", "override", "field", "value"),
    [
        ("C", "softcap=20", "softcap", 20.0),
        ("A", "rotary_base=5e4", "rotary_base", 50_000.0),
        ("C", "rope_table_dtype=compute", "rope_table_dtype", "compute"),
        ("C", "rope_table_dtype=float32", "rope_table_dtype", "float32"),
        ("E", "qk_scale=1.15", "qk_scale", 1.15),
        ("D", "gate_scale=2", "gate_scale", 2.0),
        ("B", "window_pattern=LSS", "windows", (1000, 500, 1000)),
        ("B", "window_pattern=l", "windows", (1000, 1000, 1000)),
        ("E", "short_window=77", "windows", (77, 77, 1000)),
        ("E", " short_window = 77 ", "windows", (77, 77, 1000)),
    ],
)
def test_an_override_changes_its_field_alone_and_is_noted(
    letter: str, override: str, field: str, value: object
) -> None:
    spec, notes = spec_and_notes(letter, config_of(letter), tensors(letter), [override])
    expected = COMMON | EXPECTED[letter] | {field: value}
    assert asdict(spec) == expected
    key, wanted = (part.strip() for part in override.split("="))
    assert f"{key} = {wanted}, as asked for by --override" in notes


def test_pattern_and_short_window_together() -> None:
    assert spec_of("C", overrides=["short_window=9", "window_pattern=LS"]).windows == (1000, 9, 1000)


def test_what_the_file_cannot_tell_is_noted_until_it_is_told() -> None:
    def keys(letter: str, *overrides: str, **config: Any) -> list[str]:
        _, notes = spec_and_notes(letter, config_of(letter, **config), tensors(letter), list(overrides))
        assert all("\n" not in note for note in notes)
        return [note.split(" = ")[0] for note in notes if "as asked for" not in note]

    assert keys("A") == keys("B") == keys("D") == keys("E") == []
    assert keys("C") == ["softcap", "rope_table_dtype"]
    assert keys("C", "softcap=15") == ["rope_table_dtype"]
    assert keys("C", "softcap=20", "rope_table_dtype=compute") == []


def test_a_config_without_a_pattern_is_long_everywhere_as_in_nanochat() -> None:
    config = parse_model_config(CONFIG, "meta.json")
    spec, notes = spec_and_notes("B", config, tensors("B"), [])
    assert spec.windows == (1000, 1000, 1000)
    assert any(note.startswith("window_pattern = L") for note in notes)
    spec, notes = spec_and_notes("B", config, tensors("B"), ["window_pattern=SL"])
    assert spec.windows == (500, 1000, 1000)
    assert notes == ("window_pattern = SL, as asked for by --override",)


@pytest.mark.parametrize(
    ("letter", "override", "message"),
    [
        ("A", "gate_scale=2", "gate_scale would change nothing: generation classic has no value embeddings"),
        ("B", "gate_scale=2", "gate_scale would change nothing: generation lambdas has no value embeddings"),
        ("A", "window_pattern=SL", "window_pattern would change nothing: generation classic has no attention windows"),
        ("A", "short_window=5", "short_window would change nothing: generation classic has no attention windows"),
    ],
)
def test_an_override_that_the_model_does_not_heed(letter: str, override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        spec_of(letter, overrides=[override])


def test_a_short_window_needs_a_short_layer() -> None:
    with pytest.raises(UsageError, match=r"no layer has an S window \(pattern LLS, 3 layers\)"):
        spec_of("B", overrides=["window_pattern=LLS", "short_window=5"])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["softcap"], "override 'softcap' is not KEY=VALUE; for instance softcap=20"),
        (
            ["temperature=1"],
            "unknown override 'temperature'; the known ones are softcap, rotary_base, rope_table_dtype",
        ),
        (["softcap=20", "softcap=15"], "override softcap is given twice"),
        (["softcap=0"], "softcap='0' cannot be meant; it takes a positive number"),
        (["softcap=nan"], "it takes a positive number"),
        (["softcap=inf"], "it takes a positive number"),
        (["softcap=-15"], "it takes a positive number"),
        (["softcap=fifteen"], "it takes a positive number"),
        (["rotary_base=1"], "it takes a number above 1"),
        (["rope_table_dtype=float16"], "it takes one of bfloat16, float32, compute"),
        (["window_pattern=SSX"], "it takes letters S and L"),
        (["window_pattern="], "it takes letters S and L"),
        (["short_window=0"], "it takes a positive number of tokens"),
        (["short_window=1.5"], "it takes a positive number of tokens"),
        (["short_window=9999999999"], "it takes a positive number of tokens"),
        (["short_window=²"], "it takes a positive number of tokens"),
    ],
)
def test_overrides_that_cannot_be_meant(pairs: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_overrides(pairs)


@given(pairs=st.lists(st.text(max_size=30) | st.from_regex(r"\A[a-z_]{1,16}=[0-9a-zA-Z.]{0,10}\Z"), max_size=4))
def test_any_overrides_are_parsed_or_refused_in_one_line(pairs: list[str]) -> None:
    try:
        parsed = parse_overrides(pairs)
    except UsageError as error:
        message = str(error)
    else:
        assert len(parsed) == len(pairs)
        message = "parsed"
    assert message.isprintable()
