"""An ExportedProgram as the text of a TorchScript method: one line a node, every call an operator by its schema.

The text is written from the captured graph and not by tracing or scripting the model's code: what TorchScript computes
is what was captured. Sizes stay expressions of the inputs' sizes, so the method is as dynamic as the capture.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isinf, isnan
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from nanochat_x import operators
from nanochat_x.errors import LoweringError

aten = torch.ops.aten

#: What the capture asserted about dtypes, sizes and symbols: nothing that computes.
_ASSERTIONS = frozenset({
    aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg,
    aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default,
})  # fmt: skip

#: Arithmetic on sizes, which TorchScript has as Python has it.
_INTEGER_OPERATORS: Mapping[Any, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//", operator.mod: "%",
}  # fmt: skip

#: The operators that nanochat's forward pass is made of. TorchScript has many more, but only these were compared.
OPERATORS = frozenset({
    aten.__and__.Scalar, aten.__and__.Tensor, aten.__rshift__.Scalar, aten.add.Tensor, aten.arange.default,
    aten.bmm.default, aten.cat.default, aten.chunk.default,
    aten.clone.default, aten.div.Tensor, aten.embedding.default, aten.ge.Scalar, aten.gt.Scalar, aten.gt.Tensor,
    aten.index.Tensor, aten.index_select.default, aten.le.Scalar, aten.linear.default, aten.mean.dim, aten.mul.Tensor,
    aten.narrow.default, aten.relu.default, aten.rsqrt.default, aten.select.int, aten.sigmoid.default,
    aten.slice.Tensor, aten.softmax.int, aten.square.default, aten.stack.default, aten.sub.Tensor, aten.sum.dim_IntList,
    aten.tanh.default, aten.to.dtype, aten.transpose.int, aten.unsqueeze.default, aten.view.default,
    aten.view_as.default, aten.where.ScalarOther,
})  # fmt: skip

_END = torch.iinfo(torch.int64).max  # of a slice that goes to the end
_OPTIONAL_TENSORS = "List[Optional[Tensor]]"
_DEVICE = "device"  # a local name of every method: new tensors are made where the first input is


@dataclass(frozen=True)
class MethodSource:
    """One method: its text, and the operators in the order in which the text calls them, as `aten::add.Tensor`."""

    text: str
    operators: tuple[str, ...]


def method_source(name: str, program: ExportedProgram, attribute: Callable[[str], str]) -> MethodSource:
    """The method `name`, from the program's tensors in their order to its outputs (one tensor, or a tuple).

    `attribute` gives the expression for a parameter, buffer or constant by the program's name for it. Raises
    LoweringError naming what has no TorchScript here.
    """
    writer = _Writer(name, program, attribute)
    for node in _needed(program):
        writer.write(node)
    return writer.finished()


def _needed(program: ExportedProgram) -> list[Node]:
    """The nodes that the outputs depend on, in order. What is computed for nothing is never emitted."""
    needed: set[Node] = set()
    nodes = list(program.graph.nodes)
    for node in reversed(nodes):
        if node.op == "output" or node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in nodes if node in needed]


class _Writer:
    """Writes one method, line by line."""

    def __init__(self, name: str, program: ExportedProgram, attribute: Callable[[str], str]) -> None:
        self.name = name
        self.attributes: dict[str, str] = {}  # placeholder -> expression
        self.inputs: list[str] = []
        for spec in program.graph_signature.input_specs:
            argument = spec.arg.name
            if spec.kind == InputKind.USER_INPUT:
                self.inputs.append(argument)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and spec.target:
                self.attributes[argument] = attribute(spec.target)
            else:
                raise LoweringError(f"program {name}: input {argument} is a {spec.kind.name}, which has no TorchScript")
        self.outputs: list[str] = []
        for output in program.graph_signature.output_specs:
            if output.kind != OutputKind.USER_OUTPUT or output.arg.name is None:
                raise LoweringError(f"program {name}: an output is a {output.kind.name}, which has no TorchScript")
            self.outputs.append(output.arg.name)
        self.lines: list[str] = []
        self.operators: list[str] = []
        self.names: dict[Node, str] = {}  # node -> the local name of its value
        self.known: dict[str, str] = {}  # expression -> the local name that has its value

    def write(self, node: Node) -> None:
        """Adds the line of a node; none for a value that an earlier line has."""
        if node.op == "placeholder":
            self.names[node] = self.attributes.get(node.name, node.name)
            return
        if node.op != "call_function":
            raise self._no_torchscript(node, node.op)
        same = _same_value(node)
        if same is not None:
            self.names[node] = self.names[same]
            return
        text, used = self._expression(node)
        # Nothing here writes to a tensor, so equal calls on equal values are one value: masks are made once, not once a
        # layer.
        if text not in self.known:
            self.known[text] = node.name
            self.lines.append(f"{node.name} = {text}")
            self.operators += used
        self.names[node] = self.known[text]

    def finished(self) -> MethodSource:
        """The whole method."""
        values = {node.name: name for node, name in self.names.items()}
        results = [values[output] for output in self.outputs]
        kind = "Tensor" if len(results) == 1 else f"Tuple[{', '.join(['Tensor'] * len(results))}]"
        parameters = ", ".join(["self", *(f"{name}: Tensor" for name in self.inputs)])
        body = [f"{_DEVICE} = {self.inputs[0]}.device", *self.lines, f"return {', '.join(results)}"]
        text = f"def {self.name}({parameters}) -> {kind}:\n" + "".join(f"    {line}\n" for line in body)
        return MethodSource(text, tuple(self.operators))

    def _expression(self, node: Node) -> tuple[str, list[str]]:
        """The call of a node, and the operators that it takes."""
        target, args = node.target, node.args
        if target is operator.getitem:
            return f"{self._value(node, args[0])}[{self._value(node, args[1])}]", []
        if target is aten.sym_size.int:
            return f"{self._value(node, args[0])}.size({self._value(node, args[1])})", []
        if target in _INTEGER_OPERATORS:
            left, right = (self._value(node, arg) for arg in args)
            return f"{left} {_INTEGER_OPERATORS[target]} {right}", []
        if target not in OPERATORS | operators.NAMES.keys() or not isinstance(target, torch._ops.OpOverload):
            raise self._no_torchscript(node, str(target))
        schema = target._schema
        values = [self._value(node, arg) for arg in args]
        for i, argument in enumerate(schema.arguments[: len(values)]):
            if str(argument.type) == _OPTIONAL_TENSORS:  # a plain list would choose another overload
                values[i] = f"torch.jit.annotate({_OPTIONAL_TENSORS}, {values[i]})"
        values += [f"{key}={self._value(node, value)}" for key, value in node.kwargs.items()]
        overload = schema.overload_name
        pairs = zip(args, schema.arguments, strict=False)
        if any(isinstance(arg, (int, float)) and str(argument.type) == "Tensor" for arg, argument in pairs):
            overload = "Scalar"  # what Python hands over as a tensor of one number, TorchScript has an overload for
        full = f"{schema.name}.{overload}" if overload else schema.name
        return f"torch.ops.{schema.name.replace('::', '.')}({', '.join(values)})", [full]

    def _value(self, node: Node, value: Any) -> str:
        """An argument as TorchScript writes it."""
        if isinstance(value, Node):
            return self.names[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._value(node, item) for item in value)}]"
        if isinstance(value, torch.device):
            if value.type != "cpu":
                raise self._no_torchscript(node, f"a tensor made on {value}")
            return _DEVICE
        if isinstance(value, float) and (isinf(value) or isnan(value)):
            return f'float("{value}")'
        if value is None or isinstance(value, (bool, int, float)):
            return repr(value)
        if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
            return str(value)
        raise self._no_torchscript(node, f"an argument of type {type(value).__name__}")

    def _no_torchscript(self, node: Node, what: str) -> LoweringError:
        return LoweringError(f"program {self.name}: {what} (node {node.name}) has no TorchScript here")


def _same_value(node: Node) -> Node | None:
    """The argument that a node hands on unchanged: a conversion to the dtype it has, a slice of everything."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or node.kwargs:
        return None
    if node.target is aten.to.dtype and len(node.args) == 2 and source.meta["val"].dtype == node.args[1]:
        return source
    if node.target is aten.slice.Tensor and len(node.args) == 4 and node.args[2:] == (0, _END):
        return source
    return None
