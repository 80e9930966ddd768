"""Finding a checkpoint's files: nanochat's own choices, and one clear line for what is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_x.errors import CheckpointError, UsageError
from nanochat_x.find import find_checkpoint


def put(base: Path, folder: str, tag: str, *steps: int, kinds: tuple[str, ...] = ("model", "meta")) -> Path:
    """Empty files where nanochat would have written a checkpoint's: finding opens none."""
    tag_folder = base / folder / tag
    tag_folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        for kind in kinds:
            (tag_folder / f"{kind}_{step:06d}.{'pt' if kind == 'model' else 'json'}").touch()
    return tag_folder


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base folder with nothing in it; the home folder is empty too."""
    monkeypatch.delenv("NANOCHAT_BASE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "base"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("base", "base_checkpoints"),
        ("mid", "mid_checkpoints"),
        ("sft", "chatsft_checkpoints"),
        ("rl", "chatrl_checkpoints"),
    ],
)
def test_each_source_has_its_folder(base: Path, source: str, folder: str) -> None:
    tag_folder = put(base, folder, "d12", 650)
    found = find_checkpoint(source, base_dir=base)
    assert (found.source, found.tag, found.step, found.is_demo) == (source, "d12", 650, False)
    assert found.model == tag_folder / "model_000650.pt"
    assert found.meta == tag_folder / "meta_000650.json"
    assert found.tokenizer_dir == base / "tokenizer"


def test_the_largest_depth_is_compared_as_a_number(base: Path) -> None:
    for tag in ("d8", "d20", "d12", "zebra"):
        put(base, "base_checkpoints", tag, 1)
    assert find_checkpoint("base", base_dir=base).tag == "d20"


def test_a_tag_that_begins_with_its_depth_counts_as_nanochat_counts_it(base: Path) -> None:
    put(base, "base_checkpoints", "d12", 1)
    os.utime(put(base, "base_checkpoints", "d20-test", 1), (4e9, 4e9))  # newer than the plain one
    assert find_checkpoint("base", base_dir=base).tag == "d20-test"
    put(base, "base_checkpoints", "d20", 1)
    assert find_checkpoint("base", base_dir=base).tag == "d20"


def test_without_depths_the_newest_tag_is_taken(base: Path) -> None:
    for age, tag in enumerate(("beta", "alpha", "gamma")):
        os.utime(put(base, "base_checkpoints", tag, 1), (1e9 - age, 1e9 - age))
    assert find_checkpoint("base", base_dir=base).tag == "beta"


def test_the_last_step_is_taken_and_other_files_are_not_steps(base: Path) -> None:
    folder = put(base, "base_checkpoints", "d4", 9, 100, 1_234_567)
    for name in ("optim_9999999_rank0.pt", "model_9999999.pt.tmp", "model_99.pt", "model_09999999.pt"):
        (folder / name).touch()
    assert find_checkpoint("base", base_dir=base).step == 1_234_567
    assert find_checkpoint("base", step=9, base_dir=base).model.name == "model_000009.pt"


def test_an_empty_tag_folder_is_passed_over(base: Path) -> None:
    put(base, "base_checkpoints", "d4", 1)
    put(base, "base_checkpoints", "d99")
    assert find_checkpoint("base", base_dir=base).tag == "d4"


def test_without_a_source_the_most_finished_one_is_taken(base: Path) -> None:
    for folder, source in (
        ("base_checkpoints", "base"),
        ("mid_checkpoints", "mid"),
        ("chatsft_checkpoints", "sft"),
        ("chatrl_checkpoints", "rl"),
    ):
        put(base, folder, "d4", 1)
        assert find_checkpoint(base_dir=base).source == source


def test_without_a_source_a_tag_is_looked_for_in_all_of_them(base: Path) -> None:
    put(base, "base_checkpoints", "d12", 1)
    put(base, "chatrl_checkpoints", "d4", 1)
    found = find_checkpoint(model_tag="d12", base_dir=base)
    assert (found.source, found.tag) == ("base", "d12")
    with pytest.raises(CheckpointError, match=r"no model tag d5 in .*; there are d12 \(base\), d4 \(rl\)$"):
        find_checkpoint(model_tag="d5", base_dir=base)


def test_the_base_folder_comes_from_the_argument_then_the_environment_then_home(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "home/.cache/nanochat", "base_checkpoints", "home", 1)
    put(tmp_path / "env", "base_checkpoints", "env", 1)
    put(base, "base_checkpoints", "argument", 1)
    assert find_checkpoint().tag == "home"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "env"))
    assert find_checkpoint().tag == "env"
    assert find_checkpoint(base_dir=base).tag == "argument"


def test_the_demo_stands_in_only_where_nothing_was_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_checkpoint()
    assert (found.source, found.tag, found.step, found.is_demo) == ("demo", "d4", 3000, True)
    assert found.model.is_file()
    assert found.meta.is_file()
    assert (found.tokenizer_dir / "tokenizer.pkl").is_file()
    for arguments in ({"source": "sft"}, {"model_tag": "d4"}, {"step": 3000}, {"base_dir": base / "none"}):
        with pytest.raises(CheckpointError, match=r"no nanochat base folder .*-i demo"):
            find_checkpoint(**arguments)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base / "none"))
    with pytest.raises(CheckpointError, match=r"no nanochat base folder .*/none; "):
        find_checkpoint()


def test_a_base_folder_without_checkpoints_is_not_replaced_by_the_demo(base: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoints in .*base; .*-i demo"):
        find_checkpoint(base_dir=base)


def test_the_demo_by_name(base: Path, tmp_path: Path) -> None:
    put(tmp_path / "home/.cache/nanochat", "base_checkpoints", "d4", 1)
    assert find_checkpoint("demo").is_demo
    assert find_checkpoint("demo", tokenizer_dir=base).tokenizer_dir == base
    with pytest.raises(CheckpointError, match=r"no model tag d12 .*; there are d4$"):
        find_checkpoint("demo", model_tag="d12")
    with pytest.raises(UsageError, match="leave out --base-dir"):
        find_checkpoint("demo", base_dir=base)


def test_what_is_not_there_is_answered_with_what_is(base: Path) -> None:
    put(base, "base_checkpoints", "d4", *range(12))
    with pytest.raises(CheckpointError, match=r"no checkpoints of source rl in .*; there are checkpoints of base$"):
        find_checkpoint("rl", base_dir=base)
    with pytest.raises(CheckpointError, match=r"no model tag d5 in .*base_checkpoints; there are d4$"):
        find_checkpoint("base", "d5", base_dir=base)
    with pytest.raises(
        CheckpointError, match=r"no step 77 in .*d4; complete steps: 11, 10, 9, 8, 7, 6, 5, 4 and 4 more$"
    ):
        find_checkpoint("base", "d4", 77, base_dir=base)


def test_a_base_folder_that_is_a_file(base: Path) -> None:
    (base / "file").touch()
    with pytest.raises(CheckpointError, match="file is not a folder"):
        find_checkpoint(base_dir=base / "file")


@pytest.mark.parametrize(("there", "lacking"), [("model", "meta"), ("meta", "model")])
def test_half_a_checkpoint_is_refused_even_as_the_last_step(base: Path, there: str, lacking: str) -> None:
    put(base, "base_checkpoints", "d4", 10, 20)
    put(base, "base_checkpoints", "d4", 30, kinds=(there,))
    message = (
        rf"step 30 in .*d4 has a {there} file but no {lacking} file; take another step with -s STEP \(.*: 20, 10\)"
    )
    for step in (None, 30):
        with pytest.raises(CheckpointError, match=message):
            find_checkpoint("base", step=step, base_dir=base)
    assert find_checkpoint("base", step=20, base_dir=base).step == 20


def test_half_a_checkpoint_alone(base: Path) -> None:
    put(base, "base_checkpoints", "d4", 30, kinds=("model",))
    with pytest.raises(CheckpointError, match=r"no meta file; copy the meta file there \(no step there is complete\)"):
        find_checkpoint("base", base_dir=base)


@pytest.mark.parametrize("tag", ["", ".", "..", "../base_checkpoints/d4", "a/b", "a\\b", "/etc", "d4\0"])
def test_a_tag_that_is_no_folders_name(base: Path, tag: str) -> None:
    put(base, "base_checkpoints", "d4", 1)
    with pytest.raises(UsageError, match="is not a folder's name"):
        find_checkpoint("base", tag, base_dir=base)


def test_unknown_source_and_negative_step(base: Path) -> None:
    with pytest.raises(UsageError, match="unknown source 'chat'; the sources are base, mid, sft, rl, demo"):
        find_checkpoint("chat", base_dir=base)
    with pytest.raises(UsageError, match="step -1 is negative"):
        find_checkpoint("base", step=-1, base_dir=base)


@given(depths=st.sets(st.integers(0, 200), min_size=1, max_size=6), steps=st.sets(st.integers(0, 10**7), min_size=1))
def test_largest_depth_and_last_step_whatever_there_is(
    tmp_path_factory: pytest.TempPathFactory, depths: set[int], steps: set[int]
) -> None:
    base = tmp_path_factory.mktemp("base")
    for depth in depths:
        put(base, "base_checkpoints", f"d{depth}", *steps)
    found = find_checkpoint("base", base_dir=base)
    assert (found.tag, found.step) == (f"d{max(depths)}", max(steps))
