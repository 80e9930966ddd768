"""Builds the C++ runner programs with CMake, when they are needed and only then.

The sources are those of `nanochat_x.runners` (in a checkout: `runners/`); the runtimes come from the installed wheels
of torch, onnxruntime and executorch, CMake and Ninja from their PyPI packages. One build folder serves every target; a
backend whose runtime is missing is left out, unless it is the one that is asked for.

The build folder is `var/nanochat_x/runners-KEY` in the virtual environment, else the user's cache folder;
`NANOCHAT_X_BUILD_DIR` names another. A stamp in it records what was built: sources, options, compiler.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nanochat_x import cuda
from nanochat_x.console import Progress, Silent
from nanochat_x.errors import RunnerError, UsageError
from nanochat_x.runtimes import cmake_prefixes, runtime_versions, torch_version

#: target -> its runner program. A target without a program here cannot be run.
PROGRAMS = {
    "aoti": "nanochat-aoti",
    "torchscript": "nanochat-torchscript",
    "onnx": "nanochat-onnx",
    "executorch": "nanochat-executorch",
}

#: All that can be built: the targets' programs, and the one with CUDA kernels, which runs bundles for `aoti` on a card.
ALL_PROGRAMS = PROGRAMS | {cuda.PROGRAM: "nanochat-cuda"}

STAMP = "nanochat_x-stamp.json"
LOG = "build.log"
SOURCES = "nanochat_x-sources.json"


@dataclass(frozen=True)
class RunnerBuild:
    """A finished build; further programs (`embed-aoti`, `core_tests`, `text_driver`) lie beside `program`."""

    program: Path
    build_dir: Path


@dataclass(frozen=True)
class Recipe:
    """Everything that the result of a build depends on; its JSON form is the stamp."""

    source_dir: str
    sources: str  # SHA-256 over names and contents
    runtimes: tuple[str, ...]  # packages that are linked, with their versions
    compiler: str  # the variables that choose it
    prefixes: tuple[str, ...]  # CMAKE_PREFIX_PATH
    tests: bool
    werror: bool

    def serves(self, wanted: Recipe) -> bool:
        """Whether a build by this recipe is good for `wanted`: one with more in it is."""
        same = replace(self, tests=wanted.tests, werror=wanted.werror) == wanted
        return same and self.tests >= wanted.tests and self.werror >= wanted.werror


def ensure_built(
    target: str,
    *,
    tests: bool = False,
    werror: bool = False,
    sources: Path | None = None,
    log: Progress | None = None,
) -> RunnerBuild:
    """The runner of a target, built if it is missing or older than its sources.

    `tests` adds the C++ tests, `werror` turns warnings into errors; both stay on in later builds of the folder, so
    that asking for less never compiles anything again. Raises UsageError for a target without a runner and
    RunnerError, with the place of the log, when the build fails or the target's runtime is missing.
    """
    if target not in ALL_PROGRAMS:
        raise UsageError(f"there is no runner for target {target!r}", remedy=f"choose one of: {', '.join(PROGRAMS)}")
    build_dir = _ensure(target, tests=tests, werror=werror, sources=sources, log=log or Silent())
    return RunnerBuild(program_of(target, build_dir), build_dir)


def build_all(*, tests: bool = False, werror: bool = False, log: Progress | None = None) -> tuple[Path, dict[str, str]]:
    """Builds every runner whose runtime is here. Returns the build folder, and why each other target was left out.

    Raises RunnerError, with the place of the log, when the build fails.
    """
    build_dir = _ensure(None, tests=tests, werror=werror, sources=None, log=log or Silent())
    reasons = left_out(build_dir)
    missing = [target for target in PROGRAMS if not program_of(target, build_dir).is_file()]
    return build_dir, {target: reasons.get(target, "see " + str(build_dir / LOG)) for target in missing}


def left_out(build_dir: Path) -> dict[str, str]:
    """target -> why configuring left its runner out, and how to get what it lacks, as the log tells."""
    text = (build_dir / LOG).read_text(encoding="utf-8", errors="replace")
    reasons = re.findall(r"^-- nanochat_x: no backend (\w+), (.*)$", text, flags=re.MULTILINE)
    return {switch.lower(): reason for switch, reason in reasons}


def program_of(target: str, build_dir: Path) -> Path:
    """Where the runner of a target is, or would be."""
    return build_dir / executable(ALL_PROGRAMS[target])


def _ensure(target: str | None, *, tests: bool, werror: bool, sources: Path | None, log: Progress) -> Path:
    """Builds by need and returns the build folder; without a target: what there are runtimes for."""
    source_dir = (sources or installed_sources()).resolve()
    build_dir = default_build_dir(source_dir)
    recipe = make_recipe(source_dir, tests=tests, werror=werror)
    if not is_fresh(build_dir, target, recipe):
        _build_locked(source_dir, build_dir, target, recipe, log)
    return build_dir


def make_recipe(source_dir: Path, *, tests: bool = False, werror: bool = False) -> Recipe:
    """What a build of these sources would be made of, here and now."""
    return Recipe(
        source_dir=str(source_dir),
        sources=hash_sources(source_dir),
        runtimes=runtime_versions(),
        compiler=" ".join(f"{name}={os.environ[name]}" for name in ("CXX", "CXXFLAGS") if name in os.environ),
        prefixes=tuple(str(prefix) for prefix in cmake_prefixes()),
        tests=tests,
        werror=werror,
    )


def executable(name: str) -> str:
    """File name of a program on this platform."""
    return name + ".exe" if sys.platform == "win32" else name


def installed_sources() -> Path:
    """The folder with the runners' CMakeLists.txt. Raises RunnerError if the installation lacks it."""
    spec = importlib.util.find_spec("nanochat_x.runners")
    folders = list(spec.submodule_search_locations or []) if spec else []
    # A checkout that was never installed has them beside the package.
    folders.append(str(Path(__file__).resolve().parent.parent / "runners"))
    for folder in folders:
        if Path(folder, "CMakeLists.txt").is_file():
            return Path(folder)
    raise RunnerError("this installation has no C++ sources (nanochat_x/runners)", remedy="install nanochat_x again")


def default_build_dir(source_dir: Path) -> Path:
    """`NANOCHAT_X_BUILD_DIR`; else, one for each torch and place, in the virtual environment or the user's cache."""
    if chosen := os.environ.get("NANOCHAT_X_BUILD_DIR"):
        return Path(chosen).expanduser().resolve()
    key = f"{torch_version()}-{hashlib.sha256(str(source_dir).encode()).hexdigest()[:8]}"
    in_environment = sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK)
    base = Path(sys.prefix, "var", "nanochat_x") if in_environment else _user_cache() / "nanochat_x"
    return base / f"runners-{key}"


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def source_files(source_dir: Path) -> Iterator[Path]:
    """All files that a build may read, sorted; Python's own and hidden ones left out."""
    for file in sorted(source_dir.rglob("*")):
        parts = file.relative_to(source_dir).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        if file.is_file() and not hidden and file.suffix != ".py":
            yield file


def hash_files(source_dir: Path) -> dict[str, str]:
    """Name -> SHA-256, hex, of every source file."""
    return {
        file.relative_to(source_dir).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in source_files(source_dir)
    }


def hash_sources(source_dir: Path) -> str:
    """SHA-256, hex, over the names and the contents of all source files."""
    return hashlib.sha256(json.dumps(hash_files(source_dir), sort_keys=True).encode()).hexdigest()


def _read_stamp(build_dir: Path) -> Recipe | None:
    """What was built last; None when nothing was, or when another version wrote the stamp."""
    try:
        data = json.loads((build_dir / STAMP).read_text(encoding="utf-8"))
        return Recipe(**{**data, **{name: tuple(data[name]) for name in ("runtimes", "prefixes")}})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def is_fresh(build_dir: Path, target: str | None, recipe: Recipe) -> bool:
    """Whether the folder holds the runner of the target (None: whatever was built) by this recipe, or one with more."""
    built = _read_stamp(build_dir)
    there = target is None or program_of(target, build_dir).is_file()
    return built is not None and built.serves(recipe) and there


def _build_locked(source_dir: Path, build_dir: Path, target: str | None, recipe: Recipe, log: Progress) -> None:
    """Builds while holding the folder's lock; who waited for it finds the work done."""
    from filelock import FileLock, Timeout

    try:
        build_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(build_dir / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.note(f"waiting for another build in {build_dir}")
            lock.acquire()
    except OSError as error:
        raise RunnerError(f"cannot write the build folder {build_dir}: {error.strerror}") from None
    try:
        if not is_fresh(build_dir, target, recipe):
            _build(source_dir, build_dir, target, recipe, log)
    finally:
        lock.release()


def _build(source_dir: Path, build_dir: Path, target: str | None, recipe: Recipe, log: Progress) -> None:
    built = _read_stamp(build_dir)
    if built is not None:
        recipe = replace(recipe, tests=recipe.tests or built.tests, werror=recipe.werror or built.werror)
    (build_dir / STAMP).unlink(missing_ok=True)
    (build_dir / LOG).unlink(missing_ok=True)
    if built is None or replace(built, sources="", tests=False, werror=False) != replace(
        recipe, sources="", tests=False, werror=False
    ):
        # In a folder that it knows, CMake keeps what it once found and refuses other sources and another compiler.
        (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
    ninja = find_tool("ninja")
    with log.stage("configure the C++ runner"):
        run_step(configure_command(source_dir, build_dir, ninja, target, recipe), build_dir, "configuring")
    with log.stage("compile the C++ runner") as stage:
        if _has_hidden_changes(source_dir, build_dir):
            run_step([ninja, "-C", str(build_dir), "-t", "clean"], build_dir, "cleaning")
        run_step([ninja, "-C", str(build_dir), "-j", str(os.cpu_count() or 1)], build_dir, "compiling")
        stage.detail(str(build_dir))
    if target is not None and not program_of(target, build_dir).is_file():
        raise RunnerError(f"the build left no {ALL_PROGRAMS[target]} in {build_dir}", remedy=f"see {build_dir / LOG}")
    temporary = build_dir / (STAMP + ".part")
    temporary.write_text(json.dumps(asdict(recipe), indent=1) + "\n", encoding="utf-8")
    temporary.replace(build_dir / STAMP)


def _has_hidden_changes(source_dir: Path, build_dir: Path) -> bool:
    """Whether a file changed since the last compilation without being newer, which Ninja would not notice.

    Copying and unpacking keep old times. Records the files for the next time.
    """
    record = build_dir / SOURCES
    now = hash_files(source_dir)
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
        when = record.stat().st_mtime_ns
        changed = [source_dir / name for name, digest in now.items() if before.get(name) != digest]
        hidden = any(file.stat().st_mtime_ns <= when for file in changed)
    except (OSError, ValueError, AttributeError):
        hidden = True
    record.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    return hidden


def configure_command(source_dir: Path, build_dir: Path, ninja: str, target: str | None, recipe: Recipe) -> list[str]:
    """CMake's command line; the target's backend must be found, others are taken where they are."""

    def switch(on: bool) -> str:
        return "ON" if on else "OFF"

    return [
        find_tool("cmake"),
        *("-S", str(source_dir), "-B", str(build_dir), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DCMAKE_BUILD_TYPE=Release",
        "-DCMAKE_PREFIX_PATH=" + ";".join(recipe.prefixes),
        *(f"-DNANOCHAT_X_{name.upper()}={'ON' if name == target else 'AUTO'}" for name in PROGRAMS),
        # Its kernels take minutes to compile: only for who asks for them, and then in later builds of the folder too.
        *(["-DNANOCHAT_X_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={cuda.find_nvcc()}"] if target == cuda.PROGRAM else []),
        f"-DNANOCHAT_X_TESTS={switch(recipe.tests)}",
        f"-DNANOCHAT_X_WERROR={switch(recipe.werror)}",
    ]


def find_tool(name: str) -> str:
    """Path of cmake or ninja: their PyPI package's program, else what is on PATH. Raises RunnerError."""
    spec = importlib.util.find_spec(name)
    folders = [Path(spec.origin).parent / "data" / "bin"] if spec and spec.origin else []
    folders.append(Path(sys.executable).parent)
    for folder in folders:
        if found := shutil.which(name, path=str(folder)):
            return found
    if found := shutil.which(name):
        return found
    raise RunnerError(f"{name} was not found", remedy=f"pip install {name}")


def run_step(command: Sequence[str], build_dir: Path, doing: str) -> None:
    """Runs one step with its output going to the log. Raises RunnerError with the line that tells most."""
    path = build_dir / LOG
    with path.open("ab") as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # Ninja ends its compilers when it is asked to end
            process.wait()
            raise
    if code != 0:
        text = path.read_text(encoding="utf-8", errors="replace")
        raise RunnerError(f"{doing} the C++ runner failed: {error_line(text)}", remedy=f"the whole output is in {path}")


def error_line(text: str) -> str:
    """The first line of a build's output that names an error: those after it mostly follow from it.

    CMake puts its message on the lines below `CMake Error at ...:`; they are joined. Without any such line, the last.
    """
    lines = [line.rstrip() for line in text.splitlines()]
    for number, line in enumerate(lines):
        if line.startswith("CMake Error"):
            body = itertools.takewhile(lambda below: not below or below.startswith("  "), lines[number + 1 :])
            return " ".join([line, *(below.strip() for below in body if below)])
        if re.search(r"\berror(?: [A-Z]+\d+)?: |undefined reference to |\bld: cannot find ", line):
            return line.strip()
    return next((line.strip() for line in reversed(lines) if line), "no output")
