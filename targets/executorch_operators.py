"""The project's own operators as ExecuTorch calls them: with their result as an argument, `nanochat_x::NAME.out`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanochat_x.operators import NAMESPACE, SCHEMAS

#: Those that the runner has kernels for (runners/backends/executorch_operators.cpp has the same list).
OWN = frozenset({"linear", "attention"})

_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def _define_out(name: str) -> None:
    """Defines `NAME.out`, which `to_executorch` finds by its schema and a program calls in the place of NAME."""
    arguments, _ = SCHEMAS[name].removeprefix("(").split(") -> ")

    def compute(*args: Any, out: Tensor) -> Tensor:
        return out.copy_(getattr(torch.ops.nanochat_x, name).default(*args))

    _library.define(f"{name}.out({arguments}, *, Tensor(a!) out) -> Tensor(a!)")
    _library.impl(f"{name}.out", compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}.out", lambda *args, out: out, lib=_library)


for _name in sorted(OWN):
    _define_out(_name)
