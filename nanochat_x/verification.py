"""After lowering: does the C++ runner compute what the model computes?

The rule: the runner's largest error against float64 is at most FACTOR times what eager PyTorch in the same dtype
loses against float64 on the same tokens. Two correct evaluations differ in the order of their sums alone; their
largest errors over thousands of logits then lie within a small factor of each other, while in float32 a wrong window,
a missing smear or a shifted position is wrong by thousands of times as much. In bfloat16 and float16 eager itself
loses so much that a small mistake of structure can hide below it; a float32 bundle of the same checkpoint tells.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat_x.errors import ParityError
from nanochat_x.heap import give_back
from nanochat_x.model import GPT
from nanochat_x.spec import ModelSpec
from nanochat_x.wrappers import ExportableGPT

FACTOR = 4.0

#: Modes of the runner's `forward`: the program without a cache, one prefill, and pieces that cross every boundary.
MODES: dict[str, dict[str, Any]] = {
    "no-cache": {"cache": False},
    "prefill": {},
    "chunks 5,1,3": {"chunks": (5, 1, 3)},
}


class RunForward(Protocol):
    """`Runner.forward`."""

    def __call__(self, inputs: Path, output: Path, *, cache: bool = True, chunks: Sequence[int] = ()) -> None: ...


@dataclass(frozen=True)
class Comparison:
    """One case in one mode. All differences are the largest absolute ones over all logits of the case."""

    case: str
    mode: str
    batch: int
    tokens: int
    difference: float  # runner and eager, same dtype
    runner_error: float  # runner against float64
    eager_error: float  # eager against float64

    @property
    def allowed(self) -> float:
        """The largest runner_error that passes."""
        return FACTOR * self.eager_error

    @property
    def ratio(self) -> float:
        """runner_error in units of eager_error; 0 where neither loses anything."""
        return self.runner_error / self.eager_error if self.eager_error else 0.0

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.runner_error <= self.allowed


def verify(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    max_seq_len: int,
    run_forward: RunForward,
) -> dict[str, Any]:
    """Compares the runner with eager PyTorch; returns what the manifest records.

    `weights` are those of the bundle. Raises ParityError naming the worst case if the rule is broken.
    """
    cases = make_cases(spec, max_seq_len)
    give_back()  # what lowering took
    eager = reference_logits(spec, weights, dtype, max_seq_len, cases)
    for name, logits in eager.items():
        if not logits.isfinite().all():
            raise ParityError(
                f"eager PyTorch's own logits are not finite in {str(dtype).removeprefix('torch.')} (case {name})",
                remedy="the model does not fit that type; lower it in float32 or bfloat16",
            )
    exact = reference_logits(spec, weights, torch.float64, max_seq_len, cases)
    comparisons = []
    with tempfile.TemporaryDirectory(prefix="nanochat_x-verify-") as scratch:
        source, result = Path(scratch) / "input.safetensors", Path(scratch) / "output.safetensors"
        save_file({f"{name}.input_ids": ids for name, ids in cases.items()}, source)
        for mode, options in MODES.items():
            run_forward(source, result, **options)
            comparisons += compare(mode, cases, load_file(result), eager, exact)
    return judge(comparisons, dtype)


def make_cases(spec: ModelSpec, max_seq_len: int) -> dict[str, Tensor]:
    """Token ids int64 [B, T], reproducible: one token, a small batch, and a text longer than the shortest window."""
    generator = torch.Generator().manual_seed(20251013)
    windows = [w for w in spec.windows if w is not None]
    long = min(windows, default=240) + 16
    shapes = {"one": (1, 1), "batch": (2, 19), "long": (1, long)}
    return {
        name: torch.randint(spec.vocab_size, (batch, min(steps, max_seq_len)), generator=generator)
        for name, (batch, steps) in shapes.items()
    }


def reference_logits(
    spec: ModelSpec, weights: Mapping[str, Tensor], dtype: torch.dtype, max_seq_len: int, cases: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Logits of each case from the forward pass without a cache, computed in `dtype`."""
    tables = torch.float32 if dtype == torch.float64 else dtype
    gpt = GPT.from_weights(spec, weights, dtype)
    gpt.rows = gpt.rows._replace(soft_cap=_soft_cap_in_place)
    model = ExportableGPT(gpt, max_seq_len)
    with torch.inference_mode():
        return {name: model(ids).to(torch.promote_types(tables, dtype)) for name, ids in cases.items()}


def compare(
    mode: str,
    cases: Mapping[str, Tensor],
    got: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
) -> list[Comparison]:
    """One Comparison a case. Raises ParityError if the runner left out a case or returned another shape."""
    comparisons = []
    for name, ids in cases.items():
        logits = got.get(f"{name}.logits")
        if logits is None or logits.shape != exact[name].shape:
            shape = None if logits is None else tuple(logits.shape)
            raise ParityError(f"runner returned {shape} for case {name} ({mode}), not {tuple(exact[name].shape)}")
        comparisons.append(
            Comparison(
                case=name,
                mode=mode,
                batch=ids.shape[0],
                tokens=ids.shape[1],
                difference=_largest_difference(logits, eager[name]),
                runner_error=_largest_difference(logits, exact[name]),
                eager_error=_largest_difference(eager[name], exact[name]),
            )
        )
    return comparisons


def judge(comparisons: list[Comparison], dtype: torch.dtype) -> dict[str, Any]:
    """The manifest's `verification`. Raises ParityError naming the worst case if one breaks the rule."""
    broken = [c for c in comparisons if not c.passed]
    if broken:
        worst = max(broken, key=lambda c: c.runner_error if c.runner_error == c.runner_error else float("inf"))
        raise ParityError(
            f"the runner's logits are wrong by {worst.runner_error:.3g} in case {worst.case} ({worst.mode}), more than "
            f"{FACTOR:g} times the {worst.eager_error:.3g} that eager loses; the bundle was not written",
            remedy="please report it with the checkpoint's generation and the command",
        )
    difference = max(c.difference for c in comparisons)
    ratio = max(c.ratio for c in comparisons)
    return {
        "rule": f"runner's largest error against float64 <= {FACTOR:g} x eager's",
        "summary": f"largest difference to eager {difference:.2g}; error against float64 at most {ratio:.2f} x eager's "
        f"in {str(dtype).removeprefix('torch.')} (allowed {FACTOR:g} x), {len(comparisons)} comparisons",
        "largest_difference": difference,
        "largest_ratio": ratio,
        "comparisons": [asdict(c) for c in comparisons],
    }


def _soft_cap_in_place(x: Tensor, cap: float) -> Tensor:
    """`row_operators.soft_cap`, bit by bit: logits of a long case are the most that is in memory at any time."""
    return x.div_(cap).tanh_().mul_(cap)


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference of [B, T, vocab]; NaN if there is one. The wider of both dtypes counts."""
    # Token by token: whole differences would take as much memory as the logits, twice.
    tokens = zip(a.flatten(0, 1), b.flatten(0, 1), strict=True)
    return float(torch.stack([(one - other).abs().max() for one, other in tokens]).max())
