"""What is installed: one package, with the C++ sources and the demo model inside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import nanochat_x

#: Folder of the repository -> where a wheel has it.
INSTALLED_AS = {"nanochat_x": "nanochat_x", "targets": "nanochat_x/targets", "runners": "nanochat_x/runners"}
DIST_INFO = f"nanochat_x-{nanochat_x.__version__}.dist-info"


def copy_tree(root: Path, to: Path) -> None:
    """What a wheel is made of; built elsewhere, as setuptools leaves folders behind."""
    for name in INSTALLED_AS:
        shutil.copytree(root / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, to / name)


def build_wheel(tree: Path, into: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(into),
        str(tree),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = into.glob("*.whl")
    return wheel


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def expected_names(tree: Path) -> set[str]:
    """Every file of the three folders, where it belongs in the wheel."""
    return {
        str(PurePosixPath(inside, file.relative_to(tree / folder).as_posix()))
        for folder, inside in INSTALLED_AS.items()
        for file in (tree / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


@pytest.fixture(scope="module")
def tree(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    copy_tree(root, folder)
    return folder


@pytest.fixture(scope="module")
def expected(tree: Path) -> set[str]:
    return expected_names(tree)  # before setuptools works in it


@pytest.fixture(scope="module")
def wheel(tree: Path, expected: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


def test_the_top_level_is_one_package(wheel: Path) -> None:
    assert {name.split("/")[0] for name in names_in(wheel)} == {"nanochat_x", DIST_INFO}


def test_every_file_is_inside(wheel: Path, expected: set[str]) -> None:
    assert {name for name in names_in(wheel) if not name.startswith(DIST_INFO)} == expected
    assert {
        "nanochat_x/py.typed",
        "nanochat_x/targets/__init__.py",
        "nanochat_x/runners/CMakeLists.txt",
        "nanochat_x/runners/include/nanochat_x/nanochat.h",
        "nanochat_x/demo/tokenizer/tokenizer.pkl",
        "nanochat_x/demo/chatsft_checkpoints/d4/model_003000.pt",
    } <= expected


def test_a_file_that_is_left_out_would_be_seen(root: Path, tmp_path: Path) -> None:
    """`test_every_file_is_inside` rests on this: a new kind of source file is in the tree, but not in the wheel."""
    copy_tree(root, tmp_path)
    (tmp_path / "runners" / "src" / "new.kind").write_text("")
    wanted = expected_names(tmp_path)
    names = names_in(build_wheel(tmp_path, tmp_path / "wheels"))
    assert wanted - names == {"nanochat_x/runners/src/new.kind"}


def test_the_metadata(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{DIST_INFO}/METADATA").decode()
        scripts = archive.read(f"{DIST_INFO}/entry_points.txt").decode()
        assert archive.read(f"{DIST_INFO}/licenses/LICENSE") == (root / "LICENSE").read_bytes()
    assert "\nLicense-Expression: MIT\n" in metadata
    assert "\nRequires-Dist: torch==2.13.0\n" in metadata, "exact: a range takes another libtorch than was tried"
    assert {line.split(" = ")[0] for line in scripts.splitlines() if " = " in line} == {"nanochat_x", "nanochat-x"}


def test_every_dependency_is_pinned_and_explained(root: Path) -> None:
    text = (root / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    lines = {line.strip().split('"')[1]: line for line in text.splitlines() if line.strip().startswith('"')}
    extras = [dependency for extra in project["optional-dependencies"].values() for dependency in extra]
    for dependency in [*project["dependencies"], *extras]:
        if dependency.startswith("nanochat_x["):  # an extra of ours that names other extras
            continue
        assert any(mark in dependency for mark in ("==", "~=", ">=")), dependency
        assert ", # " in " ".join(lines[dependency].split()), f"{dependency}: no comment says what it is for"


def test_an_installed_wheel_is_whole(wheel: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere, it finds its targets, its C++ sources and its demo model inside itself."""
    site = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    assert subprocess.run(command, check=False).returncode == 0
    code = (
        "import nanochat_x, nanochat_x.targets, nanochat_x.build, nanochat_x.find\n"
        "print(nanochat_x.__file__)\nprint(nanochat_x.targets.__file__)\n"
        "print(nanochat_x.build.installed_sources())\nprint(nanochat_x.find.find_checkpoint('demo').model)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    places = [Path(line) for line in done.stdout.splitlines()]
    assert len(places) == 4
    for place in places:
        assert place.is_relative_to(site / "nanochat_x"), place
        assert place.exists()


@pytest.mark.parametrize("folder", [".", "tests"])
def test_the_editable_install(root: Path, folder: str) -> None:
    """In the repository too, where folders `targets` and `runners` lie in the way."""
    code = (
        "import nanochat_x.targets, nanochat_x.runners; print(nanochat_x.targets.__file__, nanochat_x.runners.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root / folder, capture_output=True, text=True)
    assert done.stdout.split() == [str(root / "targets" / "__init__.py"), str(root / "runners" / "__init__.py")]
