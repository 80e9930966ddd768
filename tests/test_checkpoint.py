"""Loading a checkpoint: what real files give, and one clear line for each kind of file that cannot be trusted."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_x.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from nanochat_x.errors import CheckpointError, TokenizerError, UsageError
from nanochat_x.inspection import describe_checkpoint

GENERATIONS = Path(__file__).parent / "data" / "generations"
SMEAR = GENERATIONS / "2026-07-smear"
SMEAR_MODEL = SMEAR / "chatrl_checkpoints/d5/model_000050.pt"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the smallest checkpoint of generation smear, to be spoiled."""
    return Path(shutil.copytree(SMEAR, tmp_path / "base"))


def load(base: Path, **overrides: str) -> Checkpoint:
    return load_checkpoint(find_checkpoint(base_dir=base), overrides)


def model_of(base: Path) -> Path:
    return base / SMEAR_MODEL.relative_to(SMEAR)


def change_state(base: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Saves the model again after `change` did its work on the state dict."""
    state = torch.load(model_of(base), weights_only=True)
    change(state)
    torch.save(state, model_of(base))


def refused(base: Path, match: str, error: type[CheckpointError] = CheckpointError) -> None:
    with pytest.raises(error, match=match) as caught:
        load(base)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "source", "tag", "step", "generation", "tensors"),
    [
        ("2025-12-classic", "base", "d3", 10, "classic", 20),  # 2 + 3 x 6
        ("2026-01-lambdas", "base", "d4", 20, "lambdas", 28),  # 2 + 4 x 6 + 2 lambdas
        ("2026-01-value-embeds", "sft", "d4", 30, "value-embeds", 32),  # + 2 value embeddings with their gates
        ("2026-03-wide-rope", "sft", "d4", 40, "wide-rope", 32),
        ("2026-07-smear", "rl", "d5", 50, "smear", 43),  # 2 + 5 x 6 + 2 + 3 x 2 + 3
    ],
)
def test_each_generation_loads(name: str, source: str, tag: str, step: int, generation: str, tensors: int) -> None:
    checkpoint = load(GENERATIONS / name)
    files = checkpoint.files
    assert (files.source, files.tag, files.step) == (source, tag, step)
    assert checkpoint.spec.generation == generation
    assert len(checkpoint.weights) == tensors
    assert checkpoint.model_sha256 == hashlib.sha256(files.model.read_bytes()).hexdigest()
    assert checkpoint.tokenizer.vocab_size == 272
    stored = torch.load(files.model, weights_only=True)
    for key, tensor in stored.items():
        ours = checkpoint.weights[key.removeprefix("_orig_mod.")]
        assert ours.dtype == tensor.dtype
        assert torch.equal(ours, tensor)


def test_the_demo_loads() -> None:
    checkpoint = load_checkpoint(find_checkpoint("demo"))
    spec = checkpoint.spec
    assert (spec.generation, spec.n_layer, spec.n_embd, spec.vocab_size) == ("smear", 4, 256, 2048)
    assert spec.windows == (128, 512, 128, 512)  # SL over 512 tokens: S is 512 / 4
    assert spec.value_embed_layers == (1, 3)
    # wte, lm_head; 2 value embeddings; 4 layers of c_q, c_proj, c_k, c_v and the MLP; 2 gates; lambdas, smear, backout
    layer = 2 * 256 * 256 + 2 * 128 * 256 + 8 * 256 * 256
    numbers = 2 * 2048 * 256 + 2 * 2048 * 128 + 4 * layer + 2 * 2 * 12 + 2 * 4 + 24 + 1 + 1
    assert sum(tensor.numel() for tensor in checkpoint.weights.values()) == numbers
    assert {tensor.dtype for tensor in checkpoint.weights.values()} == {torch.bfloat16}
    assert checkpoint.notes == ()


def test_overrides_and_notes_are_recorded() -> None:
    checkpoint = load(GENERATIONS / "2026-01-value-embeds", softcap="20")
    assert checkpoint.spec.softcap == 20.0
    assert checkpoint.overrides == {"softcap": "20"}
    assert [note.split(" = ")[0] for note in checkpoint.notes] == ["softcap", "rope_table_dtype"]
    with pytest.raises(UsageError, match="unknown override 'cap'"):
        load(SMEAR, cap="20")


def test_a_step_that_the_meta_file_contradicts_is_noted(base: Path) -> None:
    folder = model_of(base).parent
    for name in ("model_000050.pt", "meta_000050.json"):
        (folder / name).rename(folder / name.replace("50", "60"))
    assert load(base).notes == ("step = 60, by the file's name: the meta file inside says 50",)


def test_every_value_is_mapped_not_read(tmp_path: Path) -> None:
    """A model of 200 MB must load in a process whose own memory does not grow by a quarter of that."""
    shutil.copytree(SMEAR, tmp_path / "base")
    meta = tmp_path / "base/chatrl_checkpoints/d5/meta_000050.json"
    config = json.loads(meta.read_text())
    config["model_config"] |= {"n_layer": 1, "n_embd": 2048, "n_head": 16, "n_kv_head": 16}
    meta.write_text(json.dumps(config))
    width, rows = 2048, 320
    state = {name: torch.ones(width, width) for name in (f"transformer.h.0.attn.c_{x}.weight" for x in "qkv")}
    state |= {
        "transformer.h.0.attn.c_proj.weight": torch.ones(width, width),
        "transformer.h.0.mlp.c_fc.weight": torch.ones(4 * width, width),
        "transformer.h.0.mlp.c_proj.weight": torch.ones(width, 4 * width),
        "transformer.h.0.attn.ve_gate.weight": torch.ones(16, 12),
        "value_embeds.0.weight": torch.ones(rows, width),
        "transformer.wte.weight": torch.ones(rows, width),
        "lm_head.weight": torch.ones(rows, width),
        "smear_gate.weight": torch.ones(1, 24),
    }
    state |= {name: torch.ones(1) for name in ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda")}
    torch.save(state, model_of(tmp_path / "base"))
    assert model_of(tmp_path / "base").stat().st_size > 200e6
    program = """if True:
        import sys
        from pathlib import Path
        from nanochat_x.checkpoint import find_checkpoint, load_checkpoint
        def anonymous():  # kB; file-backed pages are the page cache's
            return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])
        before = anonymous()
        checkpoint = load_checkpoint(find_checkpoint(base_dir=Path(sys.argv[1])))
        print(anonymous() - before, len(checkpoint.weights))
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", program, str(tmp_path / "base")]
    grown, tensors = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert int(tensors) == 15
    assert int(grown) < 50_000


# Files that are damaged


@settings(max_examples=60)
@given(data=st.data())
def test_a_model_file_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    base = Path(shutil.copytree(SMEAR, tmp_path_factory.mktemp("cut") / "base"))
    whole = SMEAR_MODEL.read_bytes()
    model_of(base).write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    refused(base, "not a file of torch.save|cut short or damaged")


@settings(max_examples=150)
@given(data=st.data())
def test_a_flipped_bit_is_refused_or_changes_no_weight(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    base = Path(shutil.copytree(SMEAR, tmp_path_factory.mktemp("flip") / "base"))
    spoiled = bytearray(SMEAR_MODEL.read_bytes())
    where = data.draw(st.integers(0, len(spoiled) - 1) | st.integers(len(spoiled) - 4000, len(spoiled) - 1))
    spoiled[where] ^= 1 << data.draw(st.integers(0, 7))
    model_of(base).write_bytes(spoiled)
    try:
        weights = load(base).weights
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert message.isprintable()
        return
    # A zip has bytes that mean nothing to a reader: padding, dates, who wrote it.
    whole = torch.load(SMEAR_MODEL, weights_only=True)
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_every_flipped_bit_of_the_weights_is_refused(base: Path) -> None:
    whole = SMEAR_MODEL.read_bytes()
    with zipfile.ZipFile(SMEAR_MODEL) as archive:
        member = archive.getinfo("model_000050/data/6")
        start = whole.index(archive.read(member))
    generator = random.Random(0)
    for _ in range(20):
        spoiled = bytearray(whole)
        spoiled[start + generator.randrange(member.file_size)] ^= 1 << generator.randrange(8)
        model_of(base).write_bytes(spoiled)
        # What this guards against: torch itself takes the file as it is.
        assert len(torch.load(model_of(base), weights_only=True)) == 43
        refused(
            base, r"model_000050.pt: cut short or damaged \(Bad CRC-32 for file 'model_000050/data/6'\); copy it again"
        )


def test_a_header_that_contradicts_the_directory_is_refused(base: Path) -> None:
    whole = bytearray(SMEAR_MODEL.read_bytes())
    descriptor = whole.index(b"PK\x07\x08")
    whole[descriptor + 4] ^= 1  # the CRC-32 behind the first member's data
    model_of(base).write_bytes(whole)
    refused(base, "the two descriptions of model_000050/data.pkl differ")


def test_a_compressed_archive_is_refused(base: Path) -> None:
    with zipfile.ZipFile(SMEAR_MODEL) as source, zipfile.ZipFile(model_of(base), "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    refused(base, "is compressed")


def test_a_member_that_is_there_twice_is_refused(base: Path) -> None:
    with zipfile.ZipFile(model_of(base), "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("model_000050/data/6", b"\0" * 4608)
    refused(base, "a member is there twice")


def test_an_archive_of_something_else_is_refused(base: Path) -> None:
    with zipfile.ZipFile(model_of(base), "w") as archive:
        archive.writestr("hello/world.txt", "hello")
    refused(base, "torch cannot read it")


def test_torchs_old_format_is_refused(base: Path) -> None:
    torch.save({"a": torch.ones(1)}, model_of(base), _use_new_zipfile_serialization=False)
    refused(base, r"not a file of torch.save \(no zip archive\)")


def test_meta_cut_short(base: Path) -> None:
    meta = model_of(base).with_name("meta_000050.json")
    meta.write_bytes(meta.read_bytes()[:90])
    refused(base, r"meta_000050.json: cut short or not JSON .*-s STEP")


# Files that hold something else


class Touch:
    """Unpickled by the plain pickle module, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return open, (str(self.path), "w")


def test_code_in_a_model_file_is_not_run(base: Path, tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    torch.save({"evil": Touch(sentinel)}, model_of(base))
    refused(base, "holds something other than tensors.*nothing of it was run")
    assert not sentinel.exists()
    with zipfile.ZipFile(model_of(base)) as archive:
        pickle.loads(archive.read("model_000050/data.pkl"))
    assert sentinel.exists()  # plain pickle does run it: this test can fail


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("lm_head.weight"), "missing lm_head.weight; "),
        (lambda state: state.update({"transformer.h.9.bias": torch.ones(1)}), "unknown transformer.h.9.bias; "),
        (lambda state: state.update(x0_lambdas=torch.ones(6)), r"misshapen x0_lambdas \[6\] instead of \[5\]; "),
        (lambda state: state["x0_lambdas"].__setitem__(3, float("nan")), "x0_lambdas holds NaN; .*-s STEP"),
        (lambda state: state["lm_head.weight"][319].__setitem__(47, -float("inf")), "lm_head.weight holds Inf"),
        (
            lambda state: state["value_embeds.2.weight"][7].__setitem__(0, float("nan")),
            "value_embeds.2.weight holds NaN",
        ),
        (lambda state: state.update(x0_lambdas=torch.ones(5, dtype=torch.float64)), "x0_lambdas' has dtype float64; "),
        (
            lambda state: state.update(x0_lambdas=torch.ones(5, dtype=torch.int32)),
            "has dtype int32; weights are float32",
        ),
        (lambda state: state.update(x0_lambdas=torch.ones(5).to_sparse()), "'x0_lambdas' is not a"),
        (
            lambda state: state.update(x0_lambdas=torch.ones(1).expand(5)),
            "'x0_lambdas' is not a dense contiguous tensor",
        ),
        (
            lambda state: state.update(x0_lambdas=torch.ones(5, device="meta")),
            "'x0_lambdas' is not a dense",
        ),
        (lambda state: state.update(x0_lambdas=[1.0] * 5), "'x0_lambdas' is a list, not a tensor"),
        (lambda state: state.update({7: torch.ones(5)}), "the key 7 is not a tensor's name"),
        (lambda state: state.update({"_orig_mod.x0_lambdas": torch.ones(5)}), "'x0_lambdas' is there twice"),
        (lambda state: state.clear(), "holds a dict of nothing, not a state dict"),
    ],
)
def test_a_state_dict_that_does_not_fit(base: Path, change: Callable[[Any], object], message: str) -> None:
    change_state(base, change)
    refused(base, message)


def test_a_file_that_is_no_dict(base: Path) -> None:
    torch.save(torch.ones(3), model_of(base))
    refused(base, "holds a Tensor, not a state dict")


def test_names_of_a_compiled_model_lose_their_prefix(base: Path) -> None:
    change_state(base, lambda state: state.update({f"_orig_mod.{name}": state.pop(name) for name in list(state)}))
    assert load(base).weights.keys() == torch.load(SMEAR_MODEL, weights_only=True).keys()


def test_model_config_of_another_model(base: Path) -> None:
    meta = model_of(base).with_name("meta_000050.json")
    data = json.loads(meta.read_text())
    data["model_config"]["n_embd"] = 96
    meta.write_text(json.dumps(data))
    refused(base, r"misshapen transformer.wte.weight \[320, 48\] instead of \[320, 96\], .* and \d+ more; ")


def test_a_vocabulary_that_differs_from_the_tokenizers(base: Path) -> None:
    shutil.rmtree(base / "tokenizer")
    shutil.copytree(find_checkpoint("demo").tokenizer_dir, base / "tokenizer")
    refused(base, "has 2048 tokens, the model has 272; .*--tokenizer DIR", TokenizerError)
    files = find_checkpoint(base_dir=base, tokenizer_dir=SMEAR / "tokenizer")
    assert load_checkpoint(files).tokenizer.vocab_size == 272


def test_no_tokenizer(base: Path) -> None:
    shutil.rmtree(base / "tokenizer")
    refused(base, "no tokenizer.pkl in .*tokenizer; .*--tokenizer DIR", TokenizerError)


def test_inspect_says_everything() -> None:
    text = describe_checkpoint(load(GENERATIONS / "2026-01-value-embeds", short_window="64"))
    lines = dict(line.split("  ", 1) for line in text.splitlines() if not line.startswith("note"))
    assert lines["checkpoint"].strip() == "source sft, tag d4, step 30"
    assert lines["generation"].strip() == "value-embeds (C of docs/generations.md)"
    assert lines["width"].strip() == "48: 4 heads of 12, 2 KV heads; MLPs of 192"
    assert lines["vocabulary"].strip() == "272 tokens, rows padded to 320"
    assert lines["windows"].strip() == "64 64 64 256 tokens back, by layer"
    assert (
        lines["constants"].strip()
        == "softcap 15, rotary_base 10000, rope_table_dtype bfloat16, qk_scale 1, norm_eps 1.19209e-07"
    )
    assert lines["value embeddings"].strip() == "layers 1, 3; gate_scale 2, 32 gate channels"
    assert sum(line.startswith("note") for line in text.splitlines()) == 3
    classic = describe_checkpoint(load(GENERATIONS / "2025-12-classic"))
    assert "none: each token sees all before it" in classic
