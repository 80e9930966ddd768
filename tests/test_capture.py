"""What torch.export captured: every dimension of the contract open, and the same function as the module."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from models import MAX_SEQ_LEN, NAMES, largest, model_of, weights_of

from nanochat_x import row_operators
from nanochat_x.capture import (
    CACHED_INPUTS,
    Captured,
    _check_dynamic,
    cached_example,
    capture,
    describe_contract,
    sizes_for_examples,
    without_operators,
)
from nanochat_x.errors import CaptureError
from nanochat_x.model import GPT
from nanochat_x.wrappers import ExportableGPT, ExportableGPTWithCache

SMEAR = "2026-07-smear"
SHAPES = [(1, 1, 0), (1, 1, 1), (3, 1, 0), (1, 2, 0), (2, 290, 0), (1, 1, 511), (4, 1, 9), (2, 5, 130), (1, 512, 0)]


@cache
def captured_of(name: str) -> Captured:
    return capture(model_of(name), MAX_SEQ_LEN)


def example(name: str, batch: int, steps: int, slots: int) -> tuple[torch.Tensor, ...]:
    """Random arguments of the contract; rows stand at different positions."""
    spec, _ = weights_of(name)
    generator = torch.Generator().manual_seed(batch * 1000 + steps + slots)
    ids = torch.randint(spec.vocab_size, (batch, steps + 1), generator=generator)
    shape = (spec.n_layer, batch, spec.n_kv_head, slots, spec.head_dim)
    position = torch.randint(min(slots, MAX_SEQ_LEN - steps) + 1, (batch,), generator=generator)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    kept = torch.randint(steps, (1 if steps == 1 else batch + 2,), generator=generator)  # more than steps, or fewer
    return ids[:, 1:], ids[:, :1], keys, values, position, kept


@pytest.mark.parametrize(("batch", "steps", "slots"), SHAPES)
def test_programs_equal_the_module(batch: int, steps: int, slots: int) -> None:
    """With export's own guards on: none of them may refuse a shape of the contract."""
    captured = captured_of(SMEAR)
    args = example(SMEAR, batch, steps, slots)
    expected = ExportableGPTWithCache(model_of(SMEAR), MAX_SEQ_LEN)(*args)
    programs = [captured.programs()[role] for role in ("prefill", "decode") if role == "prefill" or steps == 1]
    for program in programs:
        for got, want in zip(program.module(check_guards=True)(*args), expected, strict=True):
            assert got.shape == want.shape
            assert got.numel() == 0 or largest(got - want) < 1e-6
    full = captured.full.module(check_guards=True)(args[0])
    assert largest(full - ExportableGPT(model_of(SMEAR), MAX_SEQ_LEN)(args[0])) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_dimensions_are_open_within_the_contract(name: str) -> None:
    captured = captured_of(name)
    ranges = sorted((int(r.lower), r.upper) for r in captured.programs()["prefill"].range_constraints.values())
    assert [low for low, _ in ranges] == [0, 1, 1, 1]  # slots; batch, steps and kept logits
    assert sorted(int(high) for low, high in ranges if high < 10**6) == [
        MAX_SEQ_LEN,
        MAX_SEQ_LEN,
    ]  # the others have no limit
    assert len(captured.programs()["decode"].range_constraints) == 2  # batch and slots
    assert len(captured.full.range_constraints) == 2
    nodes = captured.programs()["prefill"].graph.nodes
    placeholders = [n.name for n in nodes if n.op == "placeholder" and not n.name.startswith(("p_", "b_"))]
    assert placeholders == list(CACHED_INPUTS)


@pytest.mark.parametrize("max_seq_len", [1, 2, 6])
def test_short_contexts(max_seq_len: int) -> None:
    """Shorter than the example sizes that torch.export is given."""
    captured = capture(model_of(NAMES[0]), max_seq_len)
    ids = torch.randint(272, (1, max_seq_len), generator=torch.Generator().manual_seed(1))
    expected = ExportableGPT(model_of(NAMES[0]), max_seq_len)(ids)
    assert largest(captured.full.module(check_guards=True)(ids) - expected) < 1e-6


def test_programs_mutate_nothing() -> None:
    """A mutation would be lost by a target that drops them."""
    for program in captured_of(SMEAR).programs().values():
        signature = program.graph_signature
        assert not signature.buffers_to_mutate
        assert not signature.user_inputs_to_mutate


#: All that a captured program may call, but for products of quantised matrices.
OWN = frozenset({"linear", "attention"}) | row_operators.SCHEMAS.keys()


@cache
def with_operators(name: str) -> Captured:
    spec, weights = weights_of(name)
    return capture(GPT.from_weights(spec, weights, own_operators=OWN), MAX_SEQ_LEN)


@pytest.mark.parametrize(("batch", "steps", "slots"), SHAPES)
def test_own_operators_compute_the_same(batch: int, steps: int, slots: int) -> None:
    """By what they are made of, which is what Python computes for them; guards on."""
    captured = with_operators(SMEAR)
    assert captured.operators() == OWN
    args = example(SMEAR, batch, steps, slots)
    expected = ExportableGPTWithCache(model_of(SMEAR), MAX_SEQ_LEN)(*args)
    for role in ("prefill", "decode") if steps == 1 else ("prefill",):
        for got, want in zip(captured.programs()[role].module(check_guards=True)(*args), expected, strict=True):
            assert got.shape == want.shape
            assert got.numel() == 0 or largest(got - want) < 1e-6


@pytest.mark.parametrize("name", [NAMES[0], SMEAR])
def test_without_operators_is_what_is_captured_without_them(name: str) -> None:
    plain, derived = captured_of(name), without_operators(with_operators(name))
    assert without_operators(plain) is plain
    assert without_operators(with_operators(name), OWN) is with_operators(name)
    assert without_operators(with_operators(name), ["linear"]).operators() == {"linear"}
    assert derived.operators() == plain.operators() == set()
    for role, program in plain.programs().items():
        other = derived.programs()[role]
        assert [node.target for node in other.graph.nodes if node.op == "call_function"] == [
            node.target for node in program.graph.nodes if node.op == "call_function"
        ]
        assert list(other.state_dict) == list(program.state_dict)
        assert sorted(map(str, other.range_constraints.values())) == sorted(
            map(str, program.range_constraints.values())
        )


def test_a_specialised_dimension_is_caught() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids.view(3, 5) + 1

    program = torch.export.export(Fixed(), (torch.zeros(3, 5, dtype=torch.long),), strict=False)
    with pytest.raises(CaptureError, match="program full: dimension 1 of input_ids became the constant 5"):
        _check_dynamic(program, "full", {"input_ids": (1,)})


@pytest.mark.parametrize("name", NAMES)
def testsizes_for_examples_are_no_size_of_the_model(name: str) -> None:
    spec, _ = weights_of(name)
    sizes = [size for size, _ in zip(sizes_for_examples(spec, MAX_SEQ_LEN), range(3), strict=False)]
    assert len(set(sizes)) == 3
    assert not {spec.n_layer, spec.n_head, spec.n_kv_head, spec.head_dim, 1, 0} & set(sizes)


def test_contract_names_what_the_program_takes() -> None:
    captured = captured_of(SMEAR)
    contract = describe_contract(captured)
    args = cached_example(weights_of(SMEAR)[0], torch.float32, 3, 7, 11, 5)
    sizes = {"B": 3, "T": 7, "S": 11, "R": 5}
    assert list(contract["prefill"]["inputs"]) == list(CACHED_INPUTS)
    for tensor, described in zip(args, contract["prefill"]["inputs"].values(), strict=True):
        assert list(tensor.shape) == [sizes.get(size, size) for size in described["shape"]]
        assert str(tensor.dtype) == "torch." + described["dtype"]
    assert contract["decode"]["inputs"]["input_ids"]["shape"] == ["B", 1]
    outputs = captured.programs()["prefill"].module()(*args)
    for tensor, described in zip(outputs, contract["prefill"]["outputs"].values(), strict=True):
        assert list(tensor.shape) == [sizes.get(size, size) for size in described["shape"]]
