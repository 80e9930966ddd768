"""Whether a bundle is whole and runs on this machine, one thing after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nanochat_x.build import PROGRAMS
from nanochat_x.buildable import find_built
from nanochat_x.doctor import BUILD, Finding, examine_program
from nanochat_x.errors import BundleError, NanochatXError, RunnerError
from nanochat_x.manifest import MANIFEST, check_files, read_manifest
from nanochat_x.quoting import quoted
from nanochat_x.runner import Runner

_AGAIN = "copy the bundle again, or lower the model again"
#: Checks of the runner's `info --json` -> what a person calls them.
_NAMES = {"platform": "platform", "architecture": "architecture", "cpu_features": "CPU", "torch": "torch",
          "runtime": "runtime"}  # fmt: skip


def examine_bundle(folder: Path) -> Iterator[Finding]:
    """Manifest, files, runner, machine. Raises BundleError if `folder` is no bundle at all."""
    if not (folder / MANIFEST).is_file():
        read_manifest(folder)
    try:
        manifest = read_manifest(folder)
    except BundleError as error:
        yield Finding("bundle", "manifest", "amiss", quoted(error.what, 400), error.remedy or _AGAIN)
        return
    yield Finding("bundle", "manifest", "ok", f"schema {manifest['schema_version']}, written by nanochat_x "
                  f"{quoted(manifest.get('nanochat_x_version'), 40)} for {quoted(manifest['target'], 40)}, "
                  f"{quoted(manifest['dtype'], 40)}")  # fmt: skip
    yield from _examine_files(folder, manifest)
    if manifest["target"] not in PROGRAMS:
        yield Finding("bundle", "runner", "amiss", f"there is none for the target {quoted(manifest['target'], 40)!r}",
                      f"update nanochat_x, or lower the checkpoint for one of: {', '.join(PROGRAMS)}")  # fmt: skip
        return
    yield from _examine_machine(folder, manifest["target"])


def _examine_files(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    try:
        problems = check_files(folder, manifest["files"])
        size = sum(entry["size"] for entry in manifest["files"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        yield Finding("bundle", "files", "amiss", f"the manifest's list is malformed ({quoted(error)})", _AGAIN)
        return
    for problem in problems:
        yield Finding("bundle", "files", "amiss", quoted(problem, 400), _AGAIN)
    if not problems:
        yield Finding("bundle", "files", "ok",
                      f"{len(manifest['files'])} files, {size / 1e6:.1f} MB, every SHA-256 right")  # fmt: skip


def _examine_machine(folder: Path, target: str) -> Iterator[Finding]:
    """What the runner itself thinks of the bundle on this machine; it is asked, but never built."""
    try:
        built = find_built(target)
    except RunnerError as error:
        yield Finding("bundle", "runner", "amiss", f"cannot be built: {error.what}", error.remedy or "")
        return
    if built is None:
        text = f"the runner for {target} is not built, or from older sources; whether this machine fits, it tells"
        yield Finding("bundle", "runner", "amiss", text, BUILD)
        return
    starts = examine_program("bundle", "runner", built.program)
    yield starts
    if starts.state != "ok":
        return
    try:
        info = Runner(folder).json("info", "--json")
    except NanochatXError as error:
        yield Finding("bundle", "machine", "amiss", f"the runner refuses it: {quoted(error, 600)}", _AGAIN)
        return
    yield from findings_of_info(info)


def findings_of_info(info: Mapping[str, Any]) -> Iterator[Finding]:
    """One finding a check of `info --json`, and the verdict."""
    checks = info["checks"]
    for check in checks:
        name = _NAMES.get(check["name"], check["name"])
        if check["fits"]:
            yield Finding("bundle", name, "ok", f"fits: {quoted(check['needed'], 400)}")
        else:
            yield Finding("bundle", name, "amiss", check["problem"], check["remedy"])
    if info["runs_here"]:
        yield Finding("bundle", "machine", "ok", "this machine can run it")
    elif all(check["fits"] for check in checks):
        yield Finding("bundle", "machine", "amiss", f"cannot run it: {info['obstacle']}", _AGAIN)
