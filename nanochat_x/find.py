"""Find a checkpoint's files as nanochat does: base folder, source, model tag, step.

    <base>/{base,mid,chatsft,chatrl}_checkpoints/<tag>/model_<step:06d>.pt and meta_<step:06d>.json
    <base>/tokenizer/tokenizer.pkl

Nothing is opened here; `checkpoint` reads what was found.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nanochat_x.errors import CheckpointError, UsageError

#: nanochat's name of a source -> its folder, in the order in which a model is trained.
SOURCE_FOLDERS = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}

#: The source of a folder that transformers wrote; `hf` finds and reads those.
HF_SOURCE = "hf"

#: The small model inside this package, laid out like a base folder of its own.
DEMO_FOLDER = Path(__file__).parent / "demo"

_CHECKPOINT_FILE = re.compile(r"model_(?P<model>[0-9]{6,})\.pt|meta_(?P<meta>[0-9]{6,})\.json")
_LISTED = 8  # an error lists no more of what exists than this


@dataclass(frozen=True)
class CheckpointFiles:
    """Where one checkpoint's files are; `source` is base, mid, sft, rl, demo or hf."""

    source: str
    tag: str
    step: int | None  # None: a folder of transformers', which knows no steps
    model: Path
    meta: Path
    tokenizer_dir: Path
    is_demo: bool
    shards: tuple[Path, ...] = ()  # the files of the weights where `model` is but their index

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return self.shards or (self.model,)

    @property
    def model_bytes(self) -> int:
        """Size of the weights' files together."""
        return sum(file.stat().st_size for file in self.weight_files)


def find_checkpoint(
    source: str | None = None,
    model_tag: str | None = None,
    step: int | None = None,
    base_dir: Path | None = None,
    tokenizer_dir: Path | None = None,
) -> CheckpointFiles:
    """Choose a checkpoint; what is None is chosen as nanochat does it.

    source: base, mid, sft, rl or demo. None: the most finished source (rl, sft, mid, base) that has a checkpoint (of
        `model_tag`, if that is given); where there is no base folder and nothing else was asked for, the demo model.
    model_tag: a folder of the source. None: the largest depth `d<N>`, else the newest.
    step: None: the last.
    base_dir: None: NANOCHAT_BASE_DIR, else ~/.cache/nanochat.
    tokenizer_dir: None: `tokenizer` in the base folder.

    Raises UsageError for an argument that cannot be meant, CheckpointError for what is not there (with what is).
    """
    _check_arguments(source, model_tag, step, base_dir)
    try:
        if source == "demo":
            return _demo(model_tag, step, tokenizer_dir)
        base, named = _base_folder(base_dir)
        if not base.is_dir():
            nothing_asked = not named and source is None and model_tag is None and step is None
            if nothing_asked and not base.exists():
                return _demo(None, None, tokenizer_dir)
            raise CheckpointError(
                f"{base} is not a folder" if base.exists() else f"no nanochat base folder {base}",
                remedy="name yours with --base-dir or NANOCHAT_BASE_DIR, or use the model shipped with -i demo",
            )
        chosen = source if source is not None else _most_finished_source(base, model_tag)
        return _in_source(base, chosen, SOURCE_FOLDERS[chosen], model_tag, step, tokenizer_dir)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename}: {error.strerror}", remedy="make the folder readable or name another with --base-dir"
        ) from error


def _check_arguments(source: str | None, model_tag: str | None, step: int | None, base_dir: Path | None) -> None:
    known = [*SOURCE_FOLDERS, "demo"]
    if source is not None and source not in known:
        raise UsageError(f"unknown source {source!r}", remedy=f"the sources are {', '.join(known)}")
    if source == "demo" and base_dir is not None:
        raise UsageError("the demo model is inside nanochat_x", remedy="leave out --base-dir or -i demo")
    # A tag is one folder's name: anything else would read outside of the source's folder.
    if model_tag is not None and (model_tag in ("", ".", "..") or re.search(r"[/\\\0]", model_tag)):
        raise UsageError(f"model tag {model_tag!r} is not a folder's name", remedy="a tag is like d12")
    if step is not None and step < 0:
        raise UsageError(f"step {step} is negative", remedy="steps count from 0")


def _base_folder(base_dir: Path | None) -> tuple[Path, bool]:
    """The base folder, and whether the user named it."""
    if base_dir is not None:
        return base_dir, True
    from_environment = os.environ.get("NANOCHAT_BASE_DIR")
    if from_environment:
        return Path(from_environment), True
    return Path(os.path.expanduser("~/.cache/nanochat")), False


def _demo(model_tag: str | None, step: int | None, tokenizer_dir: Path | None) -> CheckpointFiles:
    return _in_source(DEMO_FOLDER, "demo", SOURCE_FOLDERS["sft"], model_tag, step, tokenizer_dir)


def _most_finished_source(base: Path, model_tag: str | None) -> str:
    tags_of = {source: _tags(base / folder) for source, folder in SOURCE_FOLDERS.items()}
    for source in reversed(SOURCE_FOLDERS):
        if model_tag in tags_of[source] or (model_tag is None and tags_of[source]):
            return source
    if model_tag is not None and any(tags_of.values()):
        exist = [f"{tag} ({source})" for source, tags in tags_of.items() for tag in tags]
        raise CheckpointError(f"no model tag {model_tag} in {base}", remedy=f"there are {_listing(exist)}")
    raise CheckpointError(
        f"no checkpoints in {base}",
        remedy="train one with nanochat, name another folder with --base-dir, or use the model shipped with -i demo",
    )


def _in_source(
    base: Path, source: str, folder: str, model_tag: str | None, step: int | None, tokenizer_dir: Path | None
) -> CheckpointFiles:
    tags = _tags(base / folder)
    if not tags:
        others = [name for name, other in SOURCE_FOLDERS.items() if _tags(base / other)]
        exist = f"there are checkpoints of {_listing(others)}" if others else "there are none of any source"
        raise CheckpointError(f"no checkpoints of source {source} in {base}", remedy=exist)
    if model_tag is None:
        model_tag = _largest_or_newest(base / folder, tags)
    elif model_tag not in tags:
        raise CheckpointError(f"no model tag {model_tag} in {base / folder}", remedy=f"there are {_listing(tags)}")
    tag_folder = base / folder / model_tag
    step = _choose_step(tag_folder, step)
    return CheckpointFiles(
        source=source,
        tag=model_tag,
        step=step,
        model=tag_folder / f"model_{step:06d}.pt",
        meta=tag_folder / f"meta_{step:06d}.json",
        tokenizer_dir=tokenizer_dir if tokenizer_dir is not None else base / "tokenizer",
        is_demo=source == "demo",
    )


def _tags(folder: Path) -> list[str]:
    """Names of the folders in `folder` that hold a model or a meta file, sorted by depth and name."""
    if not folder.is_dir():
        return []
    tags = [entry.name for entry in folder.iterdir() if entry.is_dir() and any(_steps(entry).values())]
    return sorted(tags, key=lambda tag: (_depth(tag), tag))


def _depth(tag: str) -> int:
    """N of d<N>; nanochat takes d20-test for depth 20 too. -1: not a tag of that kind."""
    match = re.match(r"d([0-9]+)", tag)
    return int(match.group(1)) if match else -1


def _largest_or_newest(folder: Path, tags: Iterable[str]) -> str:
    # Of two tags of one depth (d20 and d20-test) nanochat takes either; here it is the plain one, then the newest.
    def rank(tag: str) -> tuple[int, bool, float]:
        depth = _depth(tag)
        return depth, tag == f"d{depth}", (folder / tag).stat().st_mtime

    return max(tags, key=rank)


def _steps(tag_folder: Path) -> dict[str, set[int]]:
    """The steps of which there is a model, and those of which there is a meta file."""
    steps: dict[str, set[int]] = {"model": set(), "meta": set()}
    for name in os.listdir(tag_folder):
        match = _CHECKPOINT_FILE.fullmatch(name)
        if match:
            kind = "model" if match.group("model") else "meta"
            number = int(match.group(kind))
            if f"{number:06d}" == match.group(kind):  # not model_0000010.pt, which no step's name is
                steps[kind].add(number)
    return steps


def _choose_step(tag_folder: Path, step: int | None) -> int:
    steps = _steps(tag_folder)
    complete = sorted(steps["model"] & steps["meta"])
    exist = f"complete steps: {_listing(complete[::-1])}" if complete else "no step there is complete"
    chosen = max(steps["model"] | steps["meta"]) if step is None else step
    if chosen in complete:
        return chosen
    if chosen not in steps["model"] | steps["meta"]:
        raise CheckpointError(f"no step {chosen} in {tag_folder}", remedy=exist)
    # nanochat writes the model first and the meta file after it, so a run that was cut short leaves this behind.
    there, lacking = ("model", "meta") if chosen in steps["model"] else ("meta", "model")
    remedy = f"take another step with -s STEP ({exist})" if complete else f"copy the {lacking} file there ({exist})"
    raise CheckpointError(f"step {chosen} in {tag_folder} has a {there} file but no {lacking} file", remedy=remedy)


def _listing(names: Iterable[object]) -> str:
    shown = [str(name) for name in names]
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return ", ".join(shown[:_LISTED]) + more
