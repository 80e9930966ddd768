"""Looks at the C++ programs without building any: which are there, which could be built."""

from __future__ import annotations

import tempfile
from pathlib import Path

from nanochat_x.build import (
    RunnerBuild,
    configure_command,
    default_build_dir,
    find_tool,
    installed_sources,
    is_fresh,
    left_out,
    make_recipe,
    program_of,
    run_step,
)


def find_built(target: str) -> RunnerBuild | None:
    """The runner of a target if it is there and up to date, so that `ensure_built` would build nothing.

    Raises RunnerError where nothing can be built at all: without torch, or without the sources.
    """
    source_dir = installed_sources().resolve()
    build_dir = default_build_dir(source_dir)
    if not is_fresh(build_dir, target, make_recipe(source_dir)):
        return None
    return RunnerBuild(program_of(target, build_dir), build_dir)


def why_not_buildable() -> dict[str, str]:
    """target -> why its runner would be left out, and how to get what it lacks. What is not in it can be built.

    Asks CMake, in a folder of its own: some seconds. Raises RunnerError with what every runner lacks.
    """
    source_dir = installed_sources().resolve()
    with tempfile.TemporaryDirectory(prefix="nanochat_x-doctor-") as folder:
        build_dir = Path(folder)
        command = configure_command(source_dir, build_dir, find_tool("ninja"), None, make_recipe(source_dir))
        run_step(command, build_dir, "configuring")
        return left_out(build_dir)
