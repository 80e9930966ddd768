"""Spoilt bundles and wrong input, through the real command line: one line, exit code 2, nothing written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import change_byte, edit_manifest, run_cli
from safetensors.torch import load_file, save_file

CONTEXT, VOCAB = 512, 2048  # of the demo model

Manifest = dict[str, Any]


def forward(bundle: Path, folder: Path, *options: str, ids: torch.Tensor | None = None) -> tuple[int, str, bool]:
    """Runs `forward`: exit code, standard error, and whether it wrote its output or anything else."""
    source, output = folder / "in.safetensors", folder / "out.safetensors"
    save_file({"a.input_ids": torch.tensor([[1, 2, 3]]) if ids is None else ids}, source)
    before = set(folder.iterdir())
    done = run_cli("forward", bundle, "--input", source, "--output", output, *options)
    assert done.stdout == ""
    return done.returncode, done.stderr, set(folder.iterdir()) != before


def assert_refused(result: tuple[int, str, bool], message: str) -> None:
    """One line that says `message`, exit code 2, nothing written."""
    code, stderr, wrote = result
    assert code == 2, stderr
    assert_one_line(stderr, message)
    assert not wrote


def assert_one_line(stderr: str, message: str) -> None:
    """Nothing but a line that says `message`."""
    assert len(stderr.splitlines()) == 1, stderr
    assert re.search(message, stderr), stderr


def test_a_good_bundle_is_taken(copied_bundle: Path, tmp_path: Path) -> None:
    """What every other test here spoils."""
    assert forward(copied_bundle, tmp_path) == (0, "", True)
    assert load_file(tmp_path / "out.safetensors")["a.logits"].shape == (1, 3, VOCAB)


def test_an_edited_manifest_is_taken(copied_bundle: Path, tmp_path: Path) -> None:
    """`edit_manifest` itself spoils nothing."""
    edit_manifest(copied_bundle, lambda manifest: manifest.update(a_key_of_the_future=1))
    assert forward(copied_bundle, tmp_path) == (0, "", True)


@pytest.mark.parametrize("name", ["prefill.so", "decode.so", "full.so", "weights.safetensors", "tokenizer.json"])
def test_changed_byte(name: str, copied_bundle: Path, tmp_path: Path) -> None:
    change_byte(copied_bundle / name)
    assert_refused(forward(copied_bundle, tmp_path), rf"{name}.*SHA-256")


def test_changed_byte_in_the_manifest(copied_bundle: Path, tmp_path: Path) -> None:
    """Still good JSON, still a good value: only its hash tells."""
    text = (copied_bundle / "manifest.json").read_text()
    assert text.count('"step": 3000') == 1
    (copied_bundle / "manifest.json").write_text(text.replace('"step": 3000', '"step": 3001'))
    assert_refused(forward(copied_bundle, tmp_path), r"manifest\.json.*(SHA-256|sha256)")


@pytest.mark.parametrize("name", ["full.so", "weights.safetensors", "tokenizer.json"])
def test_missing_file(name: str, copied_bundle: Path, tmp_path: Path) -> None:
    (copied_bundle / name).unlink()
    assert_refused(forward(copied_bundle, tmp_path), rf"{name}.* is missing")


def test_truncated_file(copied_bundle: Path, tmp_path: Path) -> None:
    data = (copied_bundle / "weights.safetensors").read_bytes()
    (copied_bundle / "weights.safetensors").write_bytes(data[:-1])
    assert_refused(forward(copied_bundle, tmp_path), rf"weights\.safetensors.* has {len(data) - 1} bytes")


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_missing_manifest(name: str, copied_bundle: Path, tmp_path: Path) -> None:
    (copied_bundle / name).unlink()
    assert_refused(forward(copied_bundle, tmp_path), name.replace(".", r"\."))


def test_no_bundle(tmp_path: Path) -> None:
    assert_refused(forward(tmp_path / "nowhere", tmp_path), "no bundle at .*nowhere")


def points_elsewhere(path: str) -> Callable[[Manifest], None]:
    """The weights, hash and all, are said to lie at `path`."""

    def change(manifest: Manifest) -> None:
        (entry,) = (entry for entry in manifest["files"] if entry["path"] == manifest["weights"])
        entry["path"] = manifest["weights"] = path

    return change


@pytest.mark.parametrize(
    ("path", "message"), [("../w.safetensors", "leaves the bundle"), ("{outside}", "is an absolute path")]
)
def test_path_that_leaves_the_bundle(path: str, message: str, copied_bundle: Path, tmp_path: Path) -> None:
    """The file is there and right: only the place is wrong."""
    outside = shutil.move(copied_bundle / "weights.safetensors", tmp_path / "w.safetensors")
    edit_manifest(copied_bundle, points_elsewhere(path.format(outside=outside)))
    assert_refused(forward(copied_bundle, tmp_path), message)


def test_link_that_leaves_the_bundle(copied_bundle: Path, tmp_path: Path) -> None:
    outside = shutil.move(copied_bundle / "weights.safetensors", tmp_path / "w.safetensors")
    (copied_bundle / "weights.safetensors").symlink_to(outside)
    assert_refused(forward(copied_bundle, tmp_path), r"weights\.safetensors.*leaves the bundle")


def test_link_inside_the_bundle_is_taken(copied_bundle: Path, tmp_path: Path) -> None:
    (copied_bundle / "weights.safetensors").rename(copied_bundle / "w")
    (copied_bundle / "weights.safetensors").symlink_to("w")
    assert forward(copied_bundle, tmp_path) == (0, "", True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=99), "schema.* 99.*; update nanochat_x"),
        (lambda m: m["machine"].update(platform="plan9"), "was lowered for .plan9..*; lower it on this machine"),
        (lambda m: m["machine"].update(architecture="sparc"), "was lowered for .sparc..*; lower it on this machine"),
        (lambda m: m["machine"]["cpu_features"].append("avx9000"), "with avx9000, which this machine lacks; lower it"),
        (lambda m: m["machine"].update(torch_version="1.13.1"), "with torch 1.13.1, .*; lower it again with that"),
        (lambda m: m.update(target="onnx", machine={}), "nanochat-onnx: error: cannot open the bundle's programs: "),
        (lambda m: m["machine"].update(runtime_version="2.99"), "needs version 2.99 or newer of the aoti runtime"),
        (lambda m: m.update(target="abacus"), "target .abacus..*; "),
        (lambda m: m.update(dtype="float8"), "dtype.*.float8., not one of"),
        (lambda m: m["programs"].pop("decode"), "decode"),
        (lambda m: m["files"].pop(0), "is not listed in files"),
        (lambda m: m["model"].update(vocab_size=VOCAB + 1), f"{VOCAB} tokens and its model {VOCAB + 1}"),
    ],
    ids=[
        "schema", "platform", "architecture", "cpu", "torch", "other-target", "runtime", "no-target", "dtype",
        "program", "unlisted", "vocabulary",
    ],
)  # fmt: skip
def test_manifest_of_another_world(
    change: Callable[[Manifest], object], message: str, copied_bundle: Path, tmp_path: Path
) -> None:
    edit_manifest(copied_bundle, change)
    assert_refused(forward(copied_bundle, tmp_path), message)


def test_a_device_that_the_programs_are_not_for(lowered: Callable[..., Path], tmp_path: Path) -> None:
    """TorchScript's; AOTInductor's have kernels for a card (test_cuda.py)."""
    message = "programs of .* are lowered for the CPU, not for the device 'cuda'; leave out --device"
    assert_refused(forward(lowered("demo", "torchscript"), tmp_path, "--device=cuda"), message)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 2), "tensor 'a.input_ids' has dtype F32"),
        (torch.zeros(3, dtype=torch.long), r"tensor 'a.input_ids' has shape \[3\]"),
        (torch.zeros(1, 0, dtype=torch.long), r"tensor 'a.input_ids' has shape \[1, 0\]"),
        (torch.zeros(1, CONTEXT + 1, dtype=torch.long), f"{CONTEXT + 1} tokens, longer than .* context of {CONTEXT}"),
        (torch.tensor([[1, VOCAB]]), f"token id {VOCAB}, not in the vocabulary"),
        (torch.tensor([[-1]]), "token id -1, not in the vocabulary"),
    ],
    ids=["dtype", "shape", "empty", "long", "large-id", "negative-id"],
)
def test_forward_input(ids: torch.Tensor, message: str, demo_bundle: Path, tmp_path: Path) -> None:
    assert_refused(forward(demo_bundle, tmp_path, ids=ids), message)


@pytest.mark.parametrize("chunks", ["0", "-1", "1,,2", "two", ""])
def test_forward_chunks(chunks: str, demo_bundle: Path, tmp_path: Path) -> None:
    assert_refused(forward(demo_bundle, tmp_path, f"--chunks={chunks}"), "--chunks.*is not an integer of at least 1")


def test_forward_chunks_without_a_cache(demo_bundle: Path, tmp_path: Path) -> None:
    assert_refused(forward(demo_bundle, tmp_path, "--chunks=1", "--no-cache"), "chunks go through the cache")


def test_forward_input_that_is_no_safetensors(demo_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    done = run_cli("forward", demo_bundle, "--input", tmp_path / "text", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert_one_line(done.stderr, "text'?: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--prompt-ids=" + ",".join(["1"] * (CONTEXT + 1)),),
            f"prompt of {CONTEXT + 1} tokens.* context of {CONTEXT}",
        ),
        (("--prompt=" + "Zebra 7 " * CONTEXT,), f"prompt of .* context of {CONTEXT}"),
        ((f"--prompt-ids=1,{VOCAB}",), f"token id {VOCAB} .*not in the vocabulary"),
        (("--prompt-ids=-1",), "'-1' is not an integer of at least 0"),
        ((b"--prompt=caf\xe9",), "--prompt is not UTF-8"),
        ((), "takes one of --prompt and --prompt-ids"),
    ],
    ids=["long-ids", "long-text", "large-id", "negative-id", "latin-1", "nothing"],
)
def test_prompts(arguments: tuple[str | bytes, ...], message: str, demo_bundle: Path) -> None:
    done = run_cli("generate", demo_bundle, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, message)


def test_a_good_prompt_is_taken(demo_bundle: Path) -> None:
    done = run_cli("generate", demo_bundle, "--prompt-ids=2039", "--max-tokens=3", "--json", "--raw")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["samples"][0]["ids"]) == 3


def test_the_embedding_example(demo_bundle: Path, runner_build: Path) -> None:
    """A program of one's own, linked with the library: next token, continuation, reply by way of the calculator."""
    command = [str(runner_build / "embed-aoti"), str(demo_bundle), "What is 9325 + 33?"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("most likely next: '")
    # Drawn at a temperature, so the words may differ; what the calculator is given and answers hardly does.
    assert "9325+33<|python_end|><|output_start|>9358<|output_end|>" in done.stdout.partition("\n")[2]
    assert done.stderr == ""


def test_the_embedding_example_refuses(copied_bundle: Path, runner_build: Path) -> None:
    change_byte(copied_bundle / "full.so")
    done = subprocess.run([runner_build / "embed-aoti", copied_bundle, "Hello"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, r"embed: error: .*full\.so.*SHA-256")
