"""The project's own operators as ExecuTorch calls them: with their result as an argument, `nanochat_x::NAME.out`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanochat_x import operators, row_operators

#: Name -> schema of those that the runner has kernels for (runners/backends/executorch_operators.cpp lists them too).
_SCHEMAS = {name: operators.SCHEMAS[name] for name in ("linear", "linear_compact", "attention")} | row_operators.SCHEMAS
OWN = frozenset(_SCHEMAS)

_library: Any = torch.library.Library(operators.NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def _define_out(name: str, schema: str) -> None:
    """Defines `NAME.out`, which `to_executorch` finds by its schema and a program calls in the place of NAME."""
    arguments, _ = schema.removeprefix("(").split(") -> ")

    def compute(*args: Any, out: Tensor) -> Tensor:
        return out.copy_(getattr(torch.ops.nanochat_x, name).default(*args))

    _library.define(f"{name}.out({arguments}, *, Tensor(a!) out) -> Tensor(a!)")
    _library.impl(f"{name}.out", compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{operators.NAMESPACE}::{name}.out", lambda *args, out: out, lib=_library)


for _name, _schema in _SCHEMAS.items():
    _define_out(_name, _schema)
