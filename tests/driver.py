"""Talks to one of the C++ test drivers (runners/tests/*_driver.cpp): a JSON line in, a JSON line out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Driver:
    """A running driver: one request, one answer."""

    def __init__(self, program: Path, *arguments: Path | str, env: Mapping[str, str] | None = None) -> None:
        self._name = program.name
        command = [program, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)

    def ask(self, **request: object) -> Any:
        """The answer to a request. Raises RuntimeError if the program ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended with code {self._process.wait()} on {str(request)[:1000]}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the program; it must end well."""
        self._process.communicate()
        assert self._process.returncode == 0
