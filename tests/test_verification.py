"""The comparison after lowering: that it passes what is right, and that it can fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from models import GENERATIONS, MAX_SEQ_LEN, model_of, weights_of
from safetensors.torch import load_file, save_file
from test_lowering import StubTarget, quick_capture
from torch import Tensor

from nanochat_x import lowering
from nanochat_x.console import Silent
from nanochat_x.errors import ParityError
from nanochat_x.lowering import LowerRequest, lower
from nanochat_x.model import GPT
from nanochat_x.verification import MODES, Comparison, judge, make_cases, verify
from nanochat_x.wrappers import ExportableGPT

NAME = "2026-07-smear"


Change = Callable[[dict[str, Tensor]], None]
Options = tuple[bool, tuple[int, ...]]  # cache, chunks


class FakeRunner:
    """A runner that computes with eager PyTorch, in another order of sums, and then spoils its answer.

    It has no cache, so it answers alike in every mode; `asked` keeps the modes, `only` is the one that it spoils.
    """

    def __init__(self, change: Change, *, model: GPT | None = None, only: Options | None = None) -> None:
        self.change, self.only = change, only
        self.model = ExportableGPT(model or model_of(NAME), MAX_SEQ_LEN)
        self.asked: list[Options] = []

    def __call__(self, inputs: Path, output: Path, *, cache: bool = True, chunks: Sequence[int] = ()) -> None:
        options = (cache, tuple(chunks))
        self.asked.append(options)
        answer = {}
        for key, ids in load_file(inputs).items():
            # one row at a time: other kernels, other roundings
            logits = torch.cat([self.model(row.unsqueeze(0)) for row in ids])
            answer[key.replace("input_ids", "logits")] = logits
        if self.only in (None, options):
            self.change(answer)
        save_file(answer, output)


def keep(answer: dict[str, Tensor]) -> None:
    """Spoils nothing."""


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


def run_verify(change: Change, only: Options | None = None) -> dict[str, Any]:
    spec, weights = weights_of(NAME)
    return verify(spec, weights, torch.float32, MAX_SEQ_LEN, FakeRunner(change, only=only))


def test_a_right_runner_passes() -> None:
    result = run_verify(keep)
    assert len(result["comparisons"]) == 3 * len(MODES)
    assert "in float32" in result["summary"]


def test_every_mode_is_asked_for() -> None:
    spec, weights = weights_of(NAME)
    runner = FakeRunner(keep)
    result = verify(spec, weights, torch.float32, MAX_SEQ_LEN, runner)
    assert runner.asked == [(False, ()), (True, ()), (True, (5, 1, 3))]
    assert [c["mode"] for c in result["comparisons"][::3]] == ["no-cache", "prefill", "chunks 5,1,3"]


@pytest.mark.parametrize(
    ("only", "mode"), [((False, ()), "no-cache"), ((True, ()), "prefill"), ((True, (5, 1, 3)), "chunks 5,1,3")]
)
def test_one_wrong_mode_fails(only: Options, mode: str) -> None:
    with pytest.raises(ParityError, match=rf"wrong by 0.00\d+ in case long \({mode}\)"):
        run_verify(perturb, only)


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
def test_a_wrong_runner_fails(change: Change, message: str) -> None:
    with pytest.raises(ParityError, match=message):
        run_verify(change)


def test_the_rule() -> None:
    """Four times what eager loses is the most that passes."""
    good = Comparison("c", "prefill", 1, 1, difference=1.0, runner_error=4.0, eager_error=1.0)
    assert judge([good], torch.float32)["largest_ratio"] == 4.0
    bad = Comparison("c", "prefill", 1, 1, difference=1.0, runner_error=4.1, eager_error=1.0)
    with pytest.raises(ParityError):
        judge([good, bad], torch.float32)


@pytest.mark.parametrize("window", [128, 512, 768, 1024])
def test_cases_cross_the_shortest_window(window: int) -> None:
    """A query at p sees p - window .. p: only from window + 2 tokens on does a window hide anything."""
    spec, _ = weights_of(NAME)
    windows = tuple(window if layer % 2 == 0 else 2048 for layer in range(spec.n_layer))
    cases = make_cases(replace(spec, windows=windows), 2048)
    assert window + 1 < cases["long"].shape[1] <= 2048


def test_cases_of_a_model_without_windows() -> None:
    spec, _ = weights_of("2025-12-classic")
    assert set(spec.windows) == {None}
    assert make_cases(spec, 2048)["long"].shape[1] > 128


def test_cases_fit_a_short_context() -> None:
    spec, _ = weights_of(NAME)
    assert {ids.shape for ids in make_cases(spec, 5).values()} == {(1, 1), (2, 5), (1, 5)}


def with_weights(change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: change(name, tensor) for name, tensor in weights_of(NAME)[1].items()}


def test_a_model_of_zeros_passes() -> None:
    """Nothing is lost where every logit is 0; whatever is not 0 is wrong."""
    spec, _ = weights_of(NAME)
    weights = with_weights(lambda name, tensor: torch.zeros_like(tensor))
    model = GPT.from_weights(spec, weights, torch.float32)
    result = verify(spec, weights, torch.float32, MAX_SEQ_LEN, FakeRunner(keep, model=model))
    assert (result["largest_ratio"], result["largest_difference"]) == (0.0, 0.0)
    with pytest.raises(ParityError, match="in case long"):
        verify(spec, weights, torch.float32, MAX_SEQ_LEN, FakeRunner(perturb, model=model))


def test_a_model_that_its_type_cannot_hold() -> None:
    """Eager itself fails: the runner is not to blame, and is not even asked."""
    spec, _ = weights_of(NAME)
    weights = with_weights(lambda name, tensor: tensor * 1e7 if name == "lm_head.weight" else tensor)
    runner = FakeRunner(keep)
    with pytest.raises(ParityError, match="not finite in float16") as caught:
        verify(spec, weights, torch.float16, MAX_SEQ_LEN, runner)
    assert "runner" not in str(caught.value)
    assert runner.asked == []


class NoRunner:
    """Stands for the runner of a stub bundle."""

    def __init__(self, bundle: Path, **options: Any) -> None:
        assert (bundle / "manifest.json").is_file()

    def forward(self, inputs: Path, output: Path, *, cache: bool = True, chunks: Sequence[int] = ()) -> NoReturn:
        raise AssertionError("nobody asks it")


@pytest.fixture
def request_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LowerRequest:
    """Lower a small checkpoint to tmp_path/out with verification, by stubs of the compiler and the runner."""
    monkeypatch.setattr(lowering, "load_target", lambda name, request: StubTarget())
    monkeypatch.setattr(lowering, "capture", quick_capture)
    monkeypatch.setattr(lowering, "ensure_built", lambda target, **options: None)
    monkeypatch.setattr(lowering, "Runner", NoRunner)
    return LowerRequest(
        targets=("aoti",), output=tmp_path / "out", source=None, model_tag=None, step=None, base_dir=GENERATIONS / NAME,
        tokenizer_dir=None, dtype="float32", max_seq_len=64, cached=True, options={}, overrides={}, force=False,
        verify=True,
    )  # fmt: skip


def verify_by(answer: Mapping[str, Any] | ParityError) -> Callable[..., Mapping[str, Any]]:
    """In the place of `verify`."""

    def fake(*arguments: Any) -> Mapping[str, Any]:
        if isinstance(answer, ParityError):
            raise answer
        return answer

    return fake


def test_a_wrong_bundle_is_not_written(
    request_to: LowerRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lowering, "verify", verify_by(ParityError("wrong")))
    with pytest.raises(ParityError, match="wrong"):
        lower(request_to, Silent())
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_bundle_does_not_replace_a_right_one(
    request_to: LowerRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lowering, "verify", verify_by({"summary": "right"}))
    (result,) = lower(request_to, Silent())
    assert result.manifest["verification"] == {"summary": "right"}
    before = {path.name: path.read_bytes() for path in result.bundle.iterdir()}
    monkeypatch.setattr(lowering, "verify", verify_by(ParityError("wrong")))
    with pytest.raises(ParityError, match="wrong"):
        lower(replace(request_to, force=True), Silent())
    assert {path.name: path.read_bytes() for path in result.bundle.iterdir()} == before
    assert list(tmp_path.iterdir()) == [result.bundle]
