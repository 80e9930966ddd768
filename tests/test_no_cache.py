"""Bundles with one program, ids to logits: everything else works on them too, by computing each text anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from bundles import edit_manifest, lower_bundle, run_cli
from models import GENERATIONS, MAX_SEQ_LEN, golden_of
from safetensors.torch import load_file, save_file
from test_eval import CONTEXT, DOCS, check
from test_eval import expected as sums_of

NAME = "2026-07-smear"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generation with smear and windows, lowered without a cache."""
    folder = tmp_path_factory.mktemp("no-cache")
    return lower_bundle(folder / "bundle", base_dir=GENERATIONS / NAME, max_seq_len=MAX_SEQ_LEN, cached=False)


def test_what_it_holds(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert list(manifest["programs"]) == ["full"]
    assert "prefill" not in manifest["contract"]
    assert manifest["verification"]["largest_ratio"] <= 4
    assert len(list(bundle.glob("*.so"))) == 1


@pytest.mark.parametrize("way", [(), ("--no-cache",), ("--chunks=37,1",)])
def test_logits(way: tuple[str, ...], bundle: Path, tmp_path: Path) -> None:
    golden = golden_of(NAME)
    save_file({f"{case}.input_ids": ids for case, ids in golden.input_ids.items()}, tmp_path / "in")
    done = run_cli("forward", bundle, "--input", tmp_path / "in", "--output", tmp_path / "out", *way)
    assert (done.returncode, done.stderr) == (0, "")
    logits = load_file(tmp_path / "out")
    for case, expected in golden.logits.items():
        assert torch.allclose(logits[f"{case}.logits"], expected, rtol=0, atol=2e-4), case


def test_greedy_tokens_and_samples(bundle: Path) -> None:
    golden = golden_of(NAME)
    prompt = "--prompt-ids=" + ",".join(map(str, golden.greedy_prompt))
    command = ["generate", str(bundle), prompt, "--raw", "--json", "--max-tokens=48", "--temperature=0"]
    done = run_cli(*command, "--num-samples=3")
    samples = json.loads(done.stdout.splitlines()[-1])["samples"]
    assert [sample["ids"] for sample in samples] == [golden.greedy_tokens] * 3


def test_eval(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "docs.json").write_text(json.dumps(DOCS), encoding="utf-8")
    done = run_cli("eval", bundle, "--docs", tmp_path / "docs.json", "--json")
    check(json.loads(done.stdout.splitlines()[-1]), sums_of(DOCS, CONTEXT, whole=False), len(DOCS))


def test_a_bundle_with_half_of_the_cached_programs_is_refused(bundle: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))
    edit_manifest(broken, lambda m: m["programs"].update(prefill=m["programs"]["full"]))
    done = run_cli("generate", broken, "--prompt=x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "programs.decode: is missing" in done.stderr
