"""The comparison after lowering: that it passes what is right, and that it can fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from models import MAX_SEQ_LEN, model_of, weights_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat_x.errors import ParityError
from nanochat_x.verification import MODES, Comparison, judge, make_cases, verify
from nanochat_x.wrappers import ExportableGPT

NAME = "2026-07-smear"


def fake_runner(change: Callable[[dict[str, Tensor]], None]) -> Callable[..., None]:
    """A runner that computes with eager PyTorch, in another order of sums, and then spoils its answer."""
    model = ExportableGPT(model_of(NAME), MAX_SEQ_LEN)

    def run_forward(inputs: Path, output: Path, *, cache: bool = True, chunks: Sequence[int] = ()) -> None:
        answer = {}
        for key, ids in load_file(inputs).items():
            # one row at a time: other kernels, other roundings
            logits = torch.cat([model(row.unsqueeze(0)) for row in ids])
            answer[key.replace("input_ids", "logits")] = logits
        change(answer)
        save_file(answer, output)

    return run_forward


def perturb(answer: dict[str, Tensor]) -> None:
    answer["long.logits"][0, 70, 3] += 1e-3


def swap_rows(answer: dict[str, Tensor]) -> None:
    answer["batch.logits"] = answer["batch.logits"].flip(0).contiguous()


def insert_nan(answer: dict[str, Tensor]) -> None:
    answer["one.logits"][0, 0, 0] = float("nan")


def drop_case(answer: dict[str, Tensor]) -> None:
    del answer["batch.logits"]


def misshape(answer: dict[str, Tensor]) -> None:
    answer["batch.logits"] = answer["batch.logits"][:, :-1].contiguous()


def run_verify(change: Callable[[dict[str, Tensor]], None]) -> dict[str, object]:
    spec, weights = weights_of(NAME)
    return verify(spec, weights, torch.float32, MAX_SEQ_LEN, fake_runner(change))


def test_a_right_runner_passes() -> None:
    result = run_verify(lambda answer: None)
    assert len(result["comparisons"]) == 3 * len(MODES)  # type: ignore[arg-type]
    assert "in float32" in str(result["summary"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (perturb, r"wrong by 0.00\d+ in case long"),
        (swap_rows, "in case batch"),
        (insert_nan, "wrong by nan in case one"),
        (drop_case, "returned None for case batch"),
        (misshape, r"returned \(2, 18, 272\) for case batch \(no-cache\), not \(2, 19, 272\)"),
    ],
)
def test_a_wrong_runner_fails(change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    with pytest.raises(ParityError, match=message):
        run_verify(change)


def test_the_rule() -> None:
    """Four times what eager loses is the most that passes."""
    good = Comparison("c", "prefill", 1, 1, difference=1.0, runner_error=4.0, eager_error=1.0)
    assert judge([good], torch.float32)["largest_ratio"] == 4.0
    bad = Comparison("c", "prefill", 1, 1, difference=1.0, runner_error=4.1, eager_error=1.0)
    with pytest.raises(ParityError):
        judge([good, bad], torch.float32)


def test_cases_cross_the_shortest_window() -> None:
    spec, _ = weights_of(NAME)  # windows of 128 and 256
    cases = make_cases(spec, MAX_SEQ_LEN)
    assert cases["long"].shape[1] > 128 + 1
    assert {ids.shape for ids in make_cases(spec, 5).values()} == {(1, 1), (2, 5), (1, 5)}
