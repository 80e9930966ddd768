"""The versions that this package wants of its dependencies, as its own metadata tells them."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
from dataclasses import dataclass

DISTRIBUTION = "nanochat_x"

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?P<pin>[^;\[]*)(?:;.*extra == [\"'](?P<extra>\w+)[\"'].*)?")
_CLAUSE = re.compile(r"(?P<operator>==|~=|>=)\s*(?P<version>\d+(?:\.\d+)*)")


@dataclass(frozen=True)
class Pin:
    """One dependency."""

    name: str
    versions: str  # "==2.13.0", "~=4.4": what pip takes behind the name
    extra: str | None  # of which extra of ours it is; None: always needed

    @property
    def install(self) -> str:
        """The command that brings it."""
        return f"pip install '{self.name}{self.versions}'"


def read_pins() -> list[Pin] | None:
    """Every dependency that a user may need, those of development left out. None: this package is not installed."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return parse_pins(lines)


def parse_pins(lines: list[str]) -> list[Pin]:
    """Pins of `Requires-Dist` lines; an extra that names our other extras adds nothing to them."""
    matches = [match for line in lines if (match := _REQUIREMENT.fullmatch(line.strip()))]
    pins = [Pin(match["name"], "".join(match["pin"].split()), match["extra"]) for match in matches]
    return [pin for pin in pins if pin.extra != "dev"]


def python_pin() -> str:
    """Which Python this package wants, as ">=3.11"; "" where it is not installed."""
    try:
        return importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return ""


def satisfies(version: str, pin: str) -> bool:
    """Whether a version is one that a pin takes: `==`, `~=` and `>=`, joined by commas.

    Numbers alone are compared: "2.13.0+cpu" is 2.13.0. Raises ValueError for a pin in any other form.
    """
    found = re.match(r"\d+(?:\.\d+)*", version)
    return found is not None and all(_satisfies(_numbers(found[0]), clause) for clause in pin.split(",") if clause)


def _satisfies(version: list[int], clause: str) -> bool:
    match = _CLAUSE.fullmatch(clause.strip())
    if match is None:
        raise ValueError(f"not a pin: {clause!r}")
    wanted = _numbers(match["version"])
    pairs = list(itertools.zip_longest(version, wanted, fillvalue=0))
    mine, its = [a for a, _ in pairs], [b for _, b in pairs]
    if match["operator"] == "==":
        return mine == its
    # ~= is >= with all numbers but the last one as they are
    return mine >= its and (match["operator"] == ">=" or mine[: len(wanted) - 1] == wanted[:-1])


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]
