"""What a target is: one small protocol, so that lowering knows none of them by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from nanochat_x.capture import Captured
from nanochat_x.console import Progress


@dataclass(frozen=True)
class Machine:
    """What a lowered program needs of the machine that runs it; empty fields do not matter to the target."""

    platform: str = ""  # "linux", "darwin", "windows"
    architecture: str = ""  # "x86_64", "aarch64"
    march: str = ""  # as given to the compiler
    cpu_features: tuple[str, ...] = ()  # all of them must be there
    torch_version: str = ""  # of the libtorch that the programs are linked against: no other runs them
    runtime_version: str = ""  # the least version of the target's runtime that runs them


@dataclass(frozen=True)
class Lowered:
    """What a target wrote into its folder, and what the bundle must add."""

    programs: dict[str, str]  # role ("prefill", "decode", "full") -> file name in the folder
    weights: dict[str, torch.Tensor] = field(default_factory=dict)  # to be written once, for all programs
    machine: Machine = field(default_factory=Machine)
    limits: dict[str, int] = field(default_factory=dict)  # of one call, below the contract's; the runner splits calls
    translated: frozenset[str] = frozenset()  # operators of operators.py that became some of the target's own
    cache_by_layer: bool = (
        False  # the cached programs take `cache_k_0`, `cache_v_0`, ... in the place of `cache_k`, `_v`
    )


class Target(Protocol):
    """A lowering: takes what was captured, writes program files; knows no checkpoint and no command line.

    Its module has `DTYPES` and `OPTIONS`, the dtypes that it can lower and the names of the options that
    `make_target(*, will_run, **options)` takes: only what the user gave is passed on. `will_run` says that the
    programs will be run here and now; make_target raises LoweringError if that, or the lowering, is impossible here.
    `operators` names those of operators.py that its programs may call: its runner has kernels for them.

    `QUANTIZATION` are the formats of quantised matrices (`quantize.Format.method`) that it can lower, without any of
    which WHY_NOT_QUANTIZED says the reason; `quantized_tensors(bundle)` reads the matrices of a bundle, by the names
    and in the formats of `quantize`.
    """

    name: str
    operators: frozenset[str]

    def lower(self, captured: Captured, folder: Path, progress: Progress) -> Lowered:
        """Writes one program a role of `captured.programs()` into `folder`. Raises LoweringError."""
