"""Matrices in 28 bits a value: bit by bit what they were, and programs over them compute the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import weights_of
from torch import Tensor

from nanochat_x import compact, operators
from nanochat_x.capture import capture
from nanochat_x.compact_program import with_compact_matrices
from nanochat_x.model import GPT
from nanochat_x.quantize import is_matrix


def bits(matrix: Tensor) -> Tensor:
    return matrix.view(torch.int32)


@given(
    rows=st.integers(1, 70),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    log2=st.integers(-120, 120),
    odd=st.lists(
        st.sampled_from([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3e38, -1e-38]), max_size=4
    ),
)
@settings(max_examples=60, deadline=None)
def test_any_matrix_comes_back_bit_by_bit(rows: int, blocks: int, seed: int, log2: int, odd: list[float]) -> None:
    torch.manual_seed(seed)
    matrix = torch.randn(rows, 32 * blocks) * 2.0**log2
    places = torch.randperm(matrix.numel())[: len(odd)]
    matrix.view(-1)[places] = torch.tensor(odd)
    written = compact._written(matrix, most=matrix.numel())
    assert written is not None
    assert written.blocks.shape == (rows, 32 * blocks * 7 // 2)
    assert torch.equal(bits(compact.expanded(*written)), bits(matrix))


def test_rows_beyond_those_that_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "_ROWS", 7)
    matrix = torch.randn(33, 64)
    matrix[5::9, 3] = 0
    found = compact.compact(matrix)
    assert found is not None
    assert found.columns.tolist() == [3] * 4
    assert found.starts.diff().nonzero().flatten().tolist() == [5, 14, 23, 32]
    assert torch.equal(bits(compact.expanded(*found)), bits(matrix))
    found.blocks[4, 100] ^= 16
    assert not torch.equal(bits(compact.expanded(*found)), bits(matrix))


def test_what_stays_as_it_is() -> None:
    assert compact.compact(torch.randn(4, 64)) is not None
    for matrix in (
        torch.exp(30 * torch.randn(8, 64)),  # most of it exceptions
        torch.randn(8, 48),  # no multiple of a block
        torch.randn(8, 64).bfloat16(),
        torch.randn(64),
        torch.randn(0, 64),
    ):
        assert compact.compact(matrix) is None


def test_the_operator_multiplies_with_what_the_matrix_was() -> None:
    matrix, x = torch.randn(10, 96), torch.randn(3, 2, 96)
    found = compact.compact(matrix)
    assert found is not None
    assert torch.equal(torch.ops.nanochat_x.linear_compact(x, *found), operators.linear(x, matrix))


def test_programs_compute_the_same_and_keep_no_second_copy() -> None:
    spec, weights = weights_of("2026-07-smear")
    captured = capture(GPT.from_weights(spec, weights, own_operators={"linear", "attention"}), 64)
    found = with_compact_matrices(captured)
    assert captured.operators() == {"attention", "linear"}  # what was captured stays
    wide = [name for name in weights if is_matrix(name) and weights[name].shape[1] % compact.BLOCK == 0]
    assert wide
    assert "linear_compact" in found.operators()
    ids = torch.randint(0, spec.vocab_size, (2, 9))
    assert torch.equal(found.full.module(check_guards=True)(ids), captured.full.module(check_guards=True)(ids))
    for role, program in found.programs().items():
        before = captured.programs()[role].state_dict
        compacted = [name for name in before if name not in program.state_dict]
        assert set(compacted) == {f"model.{name}" for name in wide}
        for name in compacted:
            parts = [
                program.state_dict[f"{name.removesuffix('weight')}{part}"] for part in compact.CompactMatrix._fields
            ]
            assert torch.equal(bits(compact.expanded(*parts)), bits(before[name].detach()))
        # All programs of a bundle share one set of weights.
        shared = {name: tensor for name, tensor in found.full.state_dict.items() if name.endswith("blocks")}
        assert all(program.state_dict[name].data_ptr() == tensor.data_ptr() for name, tensor in shared.items())


def test_a_weight_that_is_used_otherwise_too_stays() -> None:
    spec, weights = weights_of("2026-07-smear")
    captured = capture(GPT.from_weights(spec, weights, own_operators={"linear", "attention"}), 64, cached=False)
    graph = captured.full.graph
    head = next(node for node in graph.nodes if node.op == "placeholder" and "lm_head" in node.name)
    with graph.inserting_after(head):
        graph.call_function(torch.ops.aten.abs.default, (head,)).meta = dict(head.meta)
    found = with_compact_matrices(captured)
    assert found.operators() == {"attention", "linear", "linear_compact"}
    assert "model.lm_head.weight" in found.full.state_dict


def test_programs_without_such_products_are_what_they_were() -> None:
    spec, weights = weights_of("2026-07-smear")
    captured = capture(GPT.from_weights(spec, weights), 64, cached=False)
    assert with_compact_matrices(captured) is captured
