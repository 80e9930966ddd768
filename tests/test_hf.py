"""Folders of transformers' NanoChatForCausalLM: what transformers itself computed, and a line for each other folder.

`data/hf-nanochat` was written by transformers (scripts/make_hf_golden.py): no code of this project took part.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import lower_bundle, run_cli
from models import feed, largest
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat_x.checkpoint import Checkpoint, choose_checkpoint, load_checkpoint
from nanochat_x.cli import main
from nanochat_x.errors import CheckpointError, UsageError
from nanochat_x.hf import find_hf_checkpoint
from nanochat_x.inspection import describe_checkpoint
from nanochat_x.lowering import LowerRequest, output_of
from nanochat_x.model import GPT, prepare_weights
from nanochat_x.runner import Runner
from nanochat_x.spec import ModelSpec
from nanochat_x.wrappers import ExportableGPT, ExportableGPTWithCache

FOLDER = Path(__file__).parent / "data" / "hf-nanochat"
GOLDEN = load_file(FOLDER / "golden.safetensors")
TEXTS = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
CASES = ("case0", "case1", "case2")
TOKENS, ROWS, POSITIONS = 311, 320, 64
FACTOR = 4.0  # as in test_model.py

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy to be spoiled."""
    return Path(shutil.copytree(FOLDER, tmp_path / "model"))


@pytest.fixture(scope="session")
def hf_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder lowered, verification included."""
    return lower_bundle(tmp_path_factory.mktemp("hf") / "bundle", hf=FOLDER)


def load(folder: Path, **overrides: str) -> Checkpoint:
    return load_checkpoint(find_hf_checkpoint(folder), overrides)


def logits(
    checkpoint: Checkpoint, ids: Tensor, spec: ModelSpec | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    model = GPT.from_weights(spec or checkpoint.spec, prepare_weights(checkpoint.weights, dtype), dtype)
    with torch.inference_mode():
        out: Tensor = ExportableGPT(model, POSITIONS)(ids)
    return out


def golden(case: str) -> tuple[Tensor, Tensor]:
    """Ids, and transformers' float32 logits of the tokens that exist."""
    return GOLDEN[f"{case}.input_ids"].long(), GOLDEN[f"{case}.logits"][..., :TOKENS]


def edit_json(path: Path, change: Change) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def edit_weights(folder: Path, change: Change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


# --- the function


@pytest.mark.parametrize("case", CASES)
def test_golden_logits(case: str) -> None:
    checkpoint = load(FOLDER)
    ids, want = golden(case)
    exact = logits(checkpoint, ids, dtype=torch.float64)
    got = logits(checkpoint, ids)
    assert got.shape == want.shape
    assert largest(got - exact) <= FACTOR * largest(want - exact)
    assert largest(got - want) <= 2e-5  # measured: 7.6e-6


@pytest.mark.parametrize("chunks", [[1], [5, 1, 3], [64]])
def test_golden_logits_through_the_cache(chunks: list[int]) -> None:
    checkpoint = load(FOLDER)
    ids, want = golden("case2")
    weights = prepare_weights(checkpoint.weights, torch.float32)
    with torch.inference_mode():
        got = feed(ExportableGPTWithCache(GPT.from_weights(checkpoint.spec, weights), POSITIONS), ids, chunks)
    assert largest(got - want) <= 2e-5


@pytest.mark.parametrize(
    "constants",
    [
        {"norm_eps": 2.0**-23}, {"norm_eps": 1e-6}, {"softcap": 15.0}, {"softcap": None}, {"rotary_base": 10_000.0},
        {"rope_table_dtype": "bfloat16"}, {"qk_scale": 1.01}, {"windows": (15, 15, 15)},
    ],
    ids=str,
)  # fmt: skip
def test_the_golden_logits_know_each_constant(constants: dict[str, Any]) -> None:
    """A constant that the reader took from somewhere else would be seen."""
    checkpoint = load(FOLDER)
    ids, want = golden("case2")
    assert largest(logits(checkpoint, ids, replace(checkpoint.spec, **constants)) - want) > 2e-4


def test_tied_embeddings_without_a_softcap(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(tie_word_embeddings=True, final_logit_softcapping=None))
    refused(folder, "unknown lm_head.weight")  # another matrix than the one that the config says
    edit_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    ids, want = golden("tied")
    got = load(folder)
    assert got.spec.softcap is None
    assert largest(logits(got, ids) - want) <= 2e-5
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert largest(logits(load(folder), ids) - want) <= 2e-5
    assert "softcap none" in describe_checkpoint(got)


def test_what_is_read() -> None:
    checkpoint = load(FOLDER)
    files, spec = checkpoint.files, checkpoint.spec
    assert (files.source, files.tag, files.step) == ("hf", "hf-nanochat", None)
    assert (spec.generation, spec.n_layer, spec.n_head, spec.n_kv_head, spec.n_embd) == ("classic", 3, 4, 2, 64)
    assert (spec.mlp_width, spec.norm_eps, spec.softcap, spec.rotary_base) == (160, 1e-5, 11.0, 20_000.0)
    assert (spec.rope_table_dtype, spec.sequence_len, spec.windows) == ("compute", 64, (None, None, None))
    assert (spec.vocab_size, spec.padded_vocab_size) == (TOKENS, ROWS)
    assert checkpoint.model_sha256 == hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    stored = load_file(FOLDER / "model.safetensors")
    assert len(checkpoint.weights) == len(stored) == 20
    assert torch.equal(
        checkpoint.weights["transformer.h.1.attn.c_proj.weight"], stored["model.layers.1.self_attn.o_proj.weight"]
    )
    request = LowerRequest(
        targets=("aoti",), output=None, source=None, model_tag=None, step=None, base_dir=None, tokenizer_dir=None,
        dtype="float32", max_seq_len=None, cached=True, options={}, overrides={}, force=False, verify=True, hf=FOLDER,
    )  # fmt: skip
    assert output_of("aoti", files, request) == Path("nanochat-hf-nanochat-aoti")


def test_nanochats_own_constants_are_the_defaults() -> None:
    checkpoint = load_checkpoint(choose_checkpoint(None, "demo", None, None, None, None))
    assert checkpoint.spec.norm_eps == torch.finfo(torch.float32).eps
    assert checkpoint.spec.mlp_width == 4 * checkpoint.spec.n_embd


def test_overrides() -> None:
    checkpoint = load(FOLDER, rope_table_dtype="bfloat16")
    assert checkpoint.spec.rope_table_dtype == "bfloat16"
    assert checkpoint.notes == ("rope_table_dtype = bfloat16, as asked for by --override",)
    with pytest.raises(UsageError, match="gate_scale would change nothing"):
        load(FOLDER, gate_scale="2")


# --- shards


def shard(folder: Path) -> dict[str, str]:
    """The weights in two files with an index, as save_pretrained writes large models; the weight map."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def test_shards_are_one_model(folder: Path) -> None:
    shard(folder)
    whole, parts = load(FOLDER), load(folder)
    assert parts.weights.keys() == whole.weights.keys()
    assert all(torch.equal(parts.weights[name], whole.weights[name]) for name in whole.weights)
    lines = "".join(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(folder.glob("model-*"))
    )
    assert parts.model_sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert "in 2 shards" in describe_checkpoint(parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["weight_map"].pop("lm_head.weight"), "lm_head.weight is in a shard and not in the index"),
        (
            lambda index: index["weight_map"].update(x="model-00001-of-00002.safetensors"),
            "x is in the index and in no shard",
        ),
        (lambda index: index["weight_map"].update(x="model-00003-of-00002.safetensors"), "00003-of.*no such file"),
        (lambda index: index["weight_map"].update(x="../model.safetensors"), r"\.\./model.safetensors is no shard's"),
        (lambda index: index["weight_map"].update(x="/etc/passwd"), "/etc/passwd is no shard's name"),
        (lambda index: index["weight_map"].update(x=3), "3 is no shard's name"),
        (lambda index: index.update(weight_map=[]), "holds no weight_map"),
    ],
)
def test_an_index_that_does_not_fit(change: Change, message: str, folder: Path) -> None:
    shard(folder)
    edit_json(folder / "model.safetensors.index.json", change)
    refused(folder, message)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    shard(folder)
    first, second = sorted(folder.glob("model-*"))
    weights = load_file(second)
    save_file(weights | dict([load_file(first).popitem()]), second)
    refused(folder, "is in another shard too")


# --- folders that do not fit


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "no config.json in .*model; "),
        ("tokenizer.json", "no tokenizer.json in .*model; "),
        ("model.safetensors", "no model.safetensors in .*model; "),
    ],
)
def test_a_missing_file(name: str, message: str, folder: Path) -> None:
    (folder / name).unlink()
    refused(folder, message)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"no model.safetensors in .* \(pytorch_model.bin is not read\)")


def test_no_folder(folder: Path) -> None:
    refused(folder / "nowhere", "nowhere is not a folder")
    refused(folder / "config.json", "config.json is not a folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "is of model_type llama"),
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures \['LlamaForCausalLM'\], not of nanochat"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map names code of its own, which is not run"),
        ({"quantization_config": {"bits": 4}}, "unknown keys 'quantization_config'"),
        ({"sliding_window": 5}, "unknown keys 'sliding_window'"),
        ({"\x1b[31m": 5}, "unknown keys "),
        ({"hidden_act": "silu"}, 'hidden_act is "silu"; only "relu2" is known'),
        ({"attention_bias": True}, "attention_bias is true; only false is known"),
        ({"attention_bias": 0}, "attention_bias is 0; only false is known"),
        ({"qkv_bias": True}, "qkv_bias is true"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling is .*; only null is known"),
        ({"rope_parameters": {"rope_type": "yarn"}}, 'rope_parameters.rope_type is "yarn"; only "default"'),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; only 1"),
        ({"rope_parameters": {"factor": 2}}, "rope_parameters.factor is 2; that key is not known"),
        ({"rope_parameters": {"rope_theta": 1}}, "rope_theta is 1.0; it must be above 1"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; it must be an object"),
        ({"rope_theta": 5.0}, "rope_theta is 5.0; rope_parameters says 20000"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is NaN; it must be a positive number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be a positive number"),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0; it must be a positive"),
        ({"logits_soft_cap": 15.0}, "logits_soft_cap is 15.0; final_logit_softcapping is 11.0"),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes"; it must be true or false'),
        ({"head_dim": 32}, "head_dim is 32; only 16, width over heads, is known"),
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 64, "num_key_value_heads": 2}, "heads of odd width 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers is true; it must be a positive integer"),
        ({"num_hidden_layers": 10**9}, "20 tensors cannot be the 1000000000 layers of config.json"),
        ({"num_hidden_layers": 2}, "unknown model.layers.2.mlp.fc1.weight, .* and 3 more"),
        ({"num_hidden_layers": 4}, "missing model.layers.3.self_attn.q_proj.weight, "),
        ({"intermediate_size": 256}, r"misshapen model.layers.0.mlp.fc1.weight \[160, 64\] instead of \[256, 64\]"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
        ({"num_key_value_heads": None}, r"misshapen model.layers.0.self_attn.k_proj.weight \[32, 64\]"),
        ({"vocab_size": 384}, r"has 311 tokens, the model 384 \(or 320 with padding\)"),
        ({"vocab_size": 300}, "has 311 tokens, the model 300"),
        ({"vocab_size": 311}, r"misshapen model.embed_tokens.weight \[320, 64\] instead of \[311, 64\]"),
    ],
    ids=str,
)
def test_a_config_that_is_not_known(change: dict[str, Any], message: str, folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(change))
    refused(folder, message)


@pytest.mark.parametrize(
    "change",
    [
        {"head_dim": 16}, {"logits_soft_cap": 11.0, "qkv_bias": False}, {"eos_token_id": [1, 2]}, {"rope_theta": 20000},
        {"rope_parameters": None, "rope_scaling": None, "rope_theta": 20000.0}, {"torch_dtype": "bfloat16"},
        {"architectures": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_means_the_same(change: dict[str, Any], folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(change))
    assert load(folder).spec == load(FOLDER).spec


def test_what_a_config_leaves_out_is_transformers_default(folder: Path) -> None:
    def leave_out(config: dict[str, Any]) -> None:
        for key in ("rms_norm_eps", "final_logit_softcapping", "rope_parameters", "hidden_act", "tie_word_embeddings"):
            del config[key]

    edit_json(folder / "config.json", leave_out)
    spec = load(folder).spec
    assert (spec.norm_eps, spec.softcap, spec.rotary_base) == (1e-6, 15.0, 10_000.0)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "cut short or not JSON"),
        (b"\xff", "cut short or not JSON"),
        (b"[" * 100_000, "cut short or not JSON"),
        (b"[]", "holds no JSON object"),
        (b"{}", "is of model_type None|decoder is None"),
    ],
    ids=["cut", "bytes", "deep", "list", "empty"],
)
def test_files_that_are_not_json(name: str, text: bytes, message: str, folder: Path) -> None:
    (folder / name).write_bytes(text)
    refused(folder, rf"{name}: ({message})")


# --- weights that do not fit


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 2000, -1])
def test_weights_cut_short(keep: int, folder: Path) -> None:
    whole = (FOLDER / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    refused(folder, "model.safetensors: cut short or damaged")


def test_a_header_that_claims_more_than_there_is(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refused(folder, "model.safetensors: cut short or damaged")


def test_a_pickle_in_the_place_of_the_weights(folder: Path, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return open, (str(tmp_path / "ran"), "w")

    (folder / "model.safetensors").write_bytes(pickle.dumps(Touch()))
    refused(folder, "model.safetensors: cut short or damaged")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w["lm_head.weight"][300].__setitem__(5, math.nan), "lm_head.weight holds NaN"),
        (lambda w: w["model.layers.2.mlp.fc2.weight"][0].__setitem__(0, -math.inf), "h.2.mlp.c_proj.weight holds Inf"),
        (lambda w: w.pop("model.layers.1.mlp.fc1.weight"), "missing model.layers.1.mlp.fc1.weight;"),
        (lambda w: w.update({"model.norm.weight": torch.ones(64)}), "unknown model.norm.weight;"),
        (lambda w: w.update({"\x1b[31m": torch.ones(64)}), r"unknown \\x1b\[31m;"),
        (
            lambda w: w.update({"lm_head.weight": torch.ones(64, ROWS)}),
            r"misshapen lm_head.weight \[64, 320\] instead of \[320, 64\]",
        ),
        (
            lambda w: w.update({"lm_head.weight": torch.ones(ROWS, 64, dtype=torch.int8)}),
            "lm_head.weight has dtype I8; weights are F32, BF16, F16",
        ),
        (lambda w: w.update({"lm_head.weight": torch.ones(ROWS, 64).double()}), "has dtype F64"),
    ],
)
def test_weights_that_do_not_fit(change: Change, message: str, folder: Path) -> None:
    edit_weights(folder, change)
    refused(folder, message)


# --- the command line


@pytest.mark.parametrize(
    ("option", "value"), [("-i", "sft"), ("-g", "d4"), ("-s", "3"), ("--base-dir", "x"), ("--tokenizer", "x")]
)
@pytest.mark.parametrize("verb", ["lower", "inspect"])
def test_hf_is_alone(verb: str, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--hf", str(FOLDER), option, value]) == 2
    assert capsys.readouterr().err == (
        f"nanochat_x: error: --hf and {option} both choose a checkpoint; leave one of them out\n"
    )


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--hf", str(FOLDER)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "checkpoint         source hf, NanoChatForCausalLM" in lines
    assert any("tokenizer.json, split pattern '(?i:" in line for line in lines)
    assert any(line.endswith("qk_scale 1, norm_eps 1e-05") for line in lines)
    assert main(["inspect", "bundle", "--hf", str(FOLDER)]) == 2


def test_lower_refuses_in_one_line(folder: Path, tmp_path: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(hidden_act="gelu"))
    done = run_cli("lower", "--hf", folder, "-o", tmp_path / "out")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert 'hidden_act is "gelu"; only "relu2" is known' in done.stderr
    assert done.stdout.splitlines()[0] == f"checkpoint: NanoChatForCausalLM in {folder}"
    assert not (tmp_path / "out").exists()


# --- lowered


@pytest.mark.parametrize("options", [{}, {"cache": False}, {"chunks": (1,)}, {"chunks": (5, 1, 3)}], ids=str)
def test_the_lowered_model_is_transformers(options: dict[str, Any], hf_bundle: Path, tmp_path: Path) -> None:
    save_file({f"{case}.input_ids": golden(case)[0] for case in CASES}, tmp_path / "in.safetensors")
    Runner(hf_bundle).forward(tmp_path / "in.safetensors", tmp_path / "out.safetensors", **options)
    got = load_file(tmp_path / "out.safetensors")
    for case in CASES:
        ids, want = golden(case)
        exact = logits(load(FOLDER), ids, dtype=torch.float64)
        assert largest(got[f"{case}.logits"] - exact) <= FACTOR * largest(want - exact)


def test_the_lowered_model_goes_on_as_transformers(hf_bundle: Path, tmp_path: Path) -> None:
    """From the text on: the prompt's ids too are transformers'."""
    (tmp_path / "script.json").write_text(json.dumps([[TEXTS["message"]]]))
    tokens = GOLDEN["greedy.tokens"].tolist()
    options = (f"--script={tmp_path / 'script.json'}", "--json", "--temperature=0", f"--max-tokens={len(tokens)}")
    ((turn,),) = Runner(hf_bundle).json("chat", *options)
    assert turn["prompt_ids"] == GOLDEN["greedy.prompt"].tolist()
    assert turn["new_ids"] == tokens


def test_texts_become_transformers_ids(hf_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "script.json").write_text(json.dumps([[entry["text"]] for entry in TEXTS["texts"]]))
    options = (f"--script={tmp_path / 'script.json'}", "--json", "--temperature=0", "--max-tokens=1")
    conversations = Runner(hf_bundle).json("chat", *options)
    got = [turn["prompt_ids"][2:-2] for (turn,) in conversations]  # without bos, user_start and the two at the end
    assert got == [entry["ids"] for entry in TEXTS["texts"]]


def test_the_provenance(hf_bundle: Path) -> None:
    checkpoint = json.loads((hf_bundle / "manifest.json").read_text())["checkpoint"]
    sha256 = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert checkpoint == {
        "source": "hf", "tag": "hf-nanochat", "step": None, "model_sha256": sha256, "overrides": {}, "notes": [],
    }  # fmt: skip
    done = run_cli("inspect", hf_bundle)
    assert done.returncode == 0
    assert "checkpoint  hf hf-nanochat\n" in done.stdout
