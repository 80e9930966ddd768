"""Captured programs whose products take compact matrices: derived from what was captured, not captured anew."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Graph, Node

from nanochat_x.capture import Captured
from nanochat_x.compact import CompactMatrix, compact

_LINEAR: Any = torch.ops.nanochat_x.linear.default
_COMPACT: Any = torch.ops.nanochat_x.linear_compact.default
#: What export records between a float32 weight and its product: it is what it was.
_WITHOUT_EFFECT: set[Any] = {torch.ops.aten.to.dtype, torch.ops.aten._assert_tensor_metadata.default}


def with_compact_matrices(captured: Captured) -> Captured:
    """The same programs with `linear_compact` for `linear`, where the weight can be written compactly.

    The programs share the compact tensors, and keep the others of `captured`, which stays as it is.
    """
    matrices = _compact_matrices(captured.programs())
    if not matrices:
        return captured
    programs = {role: _rewritten(program, matrices) for role, program in captured.programs().items()}
    return replace(captured, full=programs["full"], cached=programs.get("prefill"), decode=programs.get("decode"))


def _compact_matrices(programs: Mapping[str, ExportedProgram]) -> dict[str, CompactMatrix]:
    """The matrices of the programs that can be compact, by the names that their tensors have."""
    used: dict[str, bool] = {}  # -> whether as a weight alone
    for program in programs.values():
        for node, target in _parameters(program, program.graph):
            used[target] = used.get(target, True) and _is_weight_alone(node)
    tensors = {name: tensor for program in programs.values() for name, tensor in program.state_dict.items()}
    found = {name: compact(tensors[name].detach()) for name, alone in used.items() if alone}
    return {name: matrix for name, matrix in found.items() if matrix is not None}


def _parameters(program: ExportedProgram, graph: Graph) -> list[tuple[Node, str]]:
    """The inputs of a program's graph, or of a copy of it, that are tensors of its state, and the tensors' names."""
    specs = program.graph_signature.input_specs
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    pairs = zip(placeholders, specs, strict=True)
    return [(node, spec.target) for node, spec in pairs if spec.kind == InputKind.PARAMETER and spec.target is not None]


def _uses(node: Node) -> list[tuple[Node, Node]]:
    """What takes a weight, and as which node: this one, or one that it becomes without being changed."""
    return [use for user in node.users for use in (_uses(user) if user.target in _WITHOUT_EFFECT else [(user, node)])]


def _is_weight_alone(node: Node) -> bool:
    """Whether a program takes this tensor for the weight of `linear` and for nothing else."""
    uses = _uses(node)
    return bool(uses) and all(user.target == _LINEAR and user.args[1] is taken for user, taken in uses)


def _erase(node: Node) -> None:
    """Erases a node that nothing takes any more, with what became of it."""
    for user in list(node.users):
        _erase(user)
    node.graph.erase_node(node)


def _rewritten(program: ExportedProgram, matrices: Mapping[str, CompactMatrix]) -> ExportedProgram:
    graph = copy.deepcopy(program.graph)
    signature = copy.copy(program.graph_signature)
    specs = {spec.arg.name: [spec] for spec in signature.input_specs}
    state = dict(program.state_dict)
    for node, name in _parameters(program, graph):
        if (matrix := matrices.get(name)) is None:
            continue
        mode = node.meta["val"].fake_mode
        parts, specs[node.name] = [], []
        for part, tensor in matrix._asdict().items():
            target = f"{name.removesuffix('weight')}{part}"
            state[target] = torch.nn.Parameter(tensor, requires_grad=False)
            with graph.inserting_before(node):
                placeholder = graph.placeholder(f"{node.name}_{part}")
            placeholder.meta = dict(node.meta, val=mode.from_tensor(tensor))
            parts.append(placeholder)
            specs[node.name].append(InputSpec(InputKind.PARAMETER, TensorArgument(placeholder.name), target))
        for product, _ in _uses(node):
            product.target, product.args = _COMPACT, (product.args[0], *parts)
        _erase(node)
        del state[name]
    signature.input_specs = [spec for some in specs.values() for spec in some]
    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=signature,
        state_dict=state,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
