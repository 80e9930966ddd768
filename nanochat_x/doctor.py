"""What is installed, and which targets can be lowered and run here. `doctor_bundle` looks at a bundle.

Nothing is built or changed. Torch is looked up before it is imported: that it is missing must be said, not raised.
"""

from __future__ import annotations

import importlib
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat_x.build import PROGRAMS, find_tool
from nanochat_x.buildable import find_built, why_not_buildable
from nanochat_x.compiler import find_compiler
from nanochat_x.errors import NanochatXError, RunnerError
from nanochat_x.interrupts import ending_at_once
from nanochat_x.pins import Pin, python_pin, read_pins, satisfies
from nanochat_x.quoting import quoted
from nanochat_x.runner import failure
from nanochat_x.runtimes import RUNTIMES, installed_version

#: "missing": not there, and nothing is wrong with that; "amiss": to be mended.
State = Literal["ok", "missing", "amiss"]

BUILD = "nanochat_x build-runners"
_TOOLS = ("cmake", "ninja")  # packages that are programs: those on PATH serve as well


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    section: str
    name: str
    state: State
    text: str  # one line
    mend: str = ""  # the command or the step that mends it, or brings what is missing


def examine() -> Iterator[Finding]:
    """Everything but a bundle, in the order in which it is to be shown."""
    pins = read_pins()
    yield from examine_packages(pins)
    yield from examine_tools(pins)
    yield from examine_lowering()
    yield from examine_running()


def examine_packages(pins: list[Pin] | None) -> Iterator[Finding]:
    """Python, and each package: the version found and the one wanted."""
    section = "packages"
    wanted = python_pin()
    version = platform.python_version()
    fits = satisfies(version, wanted)
    yield Finding(section, "python", "ok" if fits else "amiss", _found(version, wanted),
                  "" if fits else f"make an environment with a Python {wanted}")  # fmt: skip
    if pins is None:
        yield Finding(section, "nanochat_x", "amiss", "is not installed, so its versions are unknown",
                      "pip install -e . (in a clone), or install its wheel")  # fmt: skip
    for pin in pins or []:
        if pin.name not in _TOOLS:
            yield _examine_package(section, pin)


def _examine_package(section: str, pin: Pin) -> Finding:
    version = installed_version(pin.name)
    if version is None:
        purpose = f", for the target {pin.extra}" if pin.extra else ""
        text = f"not installed (wanted: {pin.versions}{purpose})"
        return Finding(section, pin.name, "missing" if pin.extra else "amiss", text, pin.install)
    fits = satisfies(version, pin.versions)
    return Finding(
        section, pin.name, "ok" if fits else "amiss", _found(version, pin.versions), "" if fits else pin.install
    )


def _found(version: str, wanted: str) -> str:
    return f"{version} (wanted: {wanted})" if wanted else version


def examine_tools(pins: list[Pin] | None) -> Iterator[Finding]:
    """The C++ compiler, CMake and Ninja: what would be started, and its version."""
    try:
        compiler = find_compiler()
        yield _examine_tool("C++ compiler", compiler, "", "install another, or set CXX to one")
    except NanochatXError as error:
        yield _of_error("tools", "C++ compiler", error)
    by_name = {pin.name: pin for pin in pins or []}
    for name in _TOOLS:
        pin = by_name.get(name, Pin(name, "", None))
        try:
            yield _examine_tool(name, find_tool(name), pin.versions, pin.install)
        except RunnerError as error:
            yield Finding("tools", name, "amiss", f"{error.what} (wanted: {pin.versions})", pin.install)


def _examine_tool(name: str, program: str, wanted: str, mend: str) -> Finding:
    """A tool of another version than the pinned one serves as well: what it can do, building shows."""
    try:
        said = _said([program, "--version"])
    except RunnerError as error:
        return Finding("tools", name, "amiss", f"{program} does not start: {error.what}", mend)
    version = re.search(r"\d+(?:\.\d+)+", said)
    fits = version is not None and satisfies(version[0], wanted)
    note = f" (wanted: {wanted}{'' if fits else '; another may serve'})" if wanted else ""
    return Finding("tools", name, "ok", f"{said}{note}: {program}")


def _said(command: list[str]) -> str:
    """The first line that a program prints. Raises RunnerError if it does not end well."""
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    except OSError as error:
        raise RunnerError(str(error.strerror)) from None
    if done.returncode != 0:
        raise RunnerError(quoted(failure(done.returncode, done.stderr.decode("utf-8", "replace")), 300))
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    return quoted(lines[0]) if lines else "says nothing"


def examine_lowering() -> Iterator[Finding]:
    """Which targets can be lowered here: each is asked itself."""
    for target in PROGRAMS:
        yield _examine_lowering(target)


def _examine_lowering(target: str) -> Finding:
    section = "lowering"
    if installed_version("torch") is None:
        return Finding(section, target, "missing", "needs torch")
    try:
        with ending_at_once():
            module = importlib.import_module(f"nanochat_x.targets.{target}")
        module.make_target(will_run=True)
    except NanochatXError as error:
        return Finding(section, target, "missing", error.what, error.remedy or "")
    except (ImportError, OSError) as error:  # a package that is there and broken
        # `name` is the module, which a library that cannot be opened does not have.
        of_torch = str(getattr(error, "name", None)).split(".")[0] == "torch" or "libtorch" in str(error)
        runtime = "torch" if of_torch else RUNTIMES[target]
        return Finding(section, target, "amiss", f"cannot be imported: {quoted(error, 300)}",
                       f"pip install --force-reinstall {runtime}")  # fmt: skip
    return Finding(section, target, "ok", "can be lowered here")


def examine_running() -> Iterator[Finding]:
    """The runner of each target: built, or what building it takes."""
    section = "running"
    try:
        built = {target: find_built(target) for target in PROGRAMS}
        reasons = {} if all(built.values()) else why_not_buildable()
    except RunnerError as error:
        # The remedy would name a log that is gone.
        yield Finding(section, "runners", "amiss", f"cannot be built: {error.what}", f"mend that, then: {BUILD}")
        return
    for target, runner in built.items():
        if runner is not None:
            yield examine_program(section, target, runner.program)
        elif target in reasons:
            # The runtime is there, and something else is not: that is no choice of the user's.
            state: State = "missing" if installed_version(RUNTIMES[target]) is None else "amiss"
            yield Finding(section, target, state, "its runner cannot be built", reasons[target])
        else:
            text = "its runner is not built, or from older sources; the first verb that needs it builds it"
            yield Finding(section, target, "missing", text, BUILD)


def examine_program(section: str, name: str, program: Path) -> Finding:
    """Whether a runner that is built starts."""
    try:
        return Finding(section, name, "ok", f"{_said([str(program), '--version'])}: {program}")
    except RunnerError as error:
        return Finding(section, name, "amiss", f"{program} does not start: {error.what}", BUILD)


def _of_error(section: str, name: str, error: NanochatXError) -> Finding:
    return Finding(section, name, "amiss", quoted(error.what, 400), error.remedy or "")


def lines_of(findings: Iterable[Finding]) -> Iterator[str]:
    """For people: a heading a section, then a line each, and below it what mends it."""
    section = None
    for finding in findings:
        if finding.section != section:
            section = finding.section
            yield section
        yield quoted(f"  {finding.state:<8}{finding.name:<14}{finding.text}", 1000, keep_spaces=True)
        if finding.mend:
            yield quoted(f"{'':24}-> {finding.mend}", 1000, keep_spaces=True)
