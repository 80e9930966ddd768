"""ExportedPrograms as ONNX graphs of standard operators, whose weights lie in a file that several graphs share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnxscript.onnx_opset import opset18
from onnxscript.optimizer import optimize_ir
from torch.export import ExportedProgram

from nanochat_x.capture import CACHED_INPUTS, CACHED_OUTPUTS, FULL_INPUTS, FULL_OUTPUTS
from nanochat_x.errors import LoweringError
from nanochat_x.targets import onnx_quantized
from nanochat_x.targets.quiet import quiet

#: onnxscript types its operators' arguments by tensors of their element type, not by what a graph is made of.
_op: Any = opset18
#: Names of dynamic axes, by input and dimension.
_AXES = {("input_ids", 0): "batch", ("input_ids", 1): "steps", ("cache_k", 3): "slots", ("logits_to_keep", 0): "kept"}
#: Constants of more bytes than this lie in the shared file, and quantised matrices of any size, which `verify` reads;
#: smaller ones (scalars, axes) in the graph.
_EMBEDDED = 1 << 12


def export_graph(program: ExportedProgram, opset: int, *, cached: bool) -> ir.Model:
    """The program as an ONNX model with the contract's names and dynamic axes; weights keep their names.

    Raises whatever torch's exporter raises.
    """
    with quiet(), torch.no_grad():
        exported = torch.onnx.export(
            program,
            (),
            None,
            dynamo=True,
            opset_version=opset,
            input_names=CACHED_INPUTS if cached else FULL_INPUTS,
            output_names=CACHED_OUTPUTS if cached else FULL_OUTPUTS,
            custom_translation_table={
                torch.ops.aten.linear.default: _linear,
                torch.ops.aten.index.Tensor: _rows,
                **onnx_quantized.TRANSLATIONS,
            },
            verbose=False,
            optimize=False,  # it would fold transposed copies of the weights; below it is kept from that
        )
        assert exported is not None
        model: ir.Model = exported.model
        optimize_ir(model, should_fold=lambda node: False if node.op_type == "Transpose" else None)
    _compute_shape_once(model.graph)
    if opset >= 23:
        _fuse_norms(model.graph)
    _name_axes(model.graph)
    if cached:
        _split_cache(model.graph)
    RemoveUnusedNodesPass()(model)
    ClearMetadataAndDocStringPass()(model)  # stack traces, with the folders of this machine
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    model.producer_name = "nanochat_x"
    model.graph.name = "nanochat"
    return model


def _linear(x: Any, weight: Any) -> Any:
    """`x @ weight.T` by Gemm, which takes the weight as it lies: MatMul would want a transposed copy of it."""
    flat = _op.Reshape(x, _op.Constant(value_ints=[-1, weight.shape[1]]))
    leading = _op.Shape(x, start=0, end=-1)
    shape = _op.Concat(leading, _op.Constant(value_ints=[-1]), axis=0)
    return _op.Reshape(_op.Gemm(flat, weight, transB=1), shape)


def _rows(table: Any, indices: Sequence[Any]) -> Any:
    """`table[ids]` by Gather; the exporter's own way goes over a transposed table."""
    (ids,) = indices
    return _op.Gather(table, ids)


def _compute_shape_once(graph: ir.Graph) -> None:
    """Leading sizes of `_linear`'s inputs are asked for once: [batch, steps], and [batch, kept] before the logits."""
    first: dict[tuple[str, ...], ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Concat" or len(node.inputs) != 2:
            continue
        leading = node.inputs[0]
        shape = leading.producer() if leading is not None else None
        if shape is None or shape.op_type != "Shape" or "end" not in shape.attributes:
            continue
        measured = shape.inputs[0]
        if shape.attributes["end"].as_int() != -1 or measured is None or measured.shape is None:
            continue
        if len(measured.shape) != 3:
            continue
        sizes = tuple(str(size) for size in measured.shape[:2])
        if sizes in first:
            node.outputs[0].replace_all_uses_with(first[sizes])
        else:
            first[sizes] = node.outputs[0]


def _fuse_norms(graph: ir.Graph) -> None:
    """x * 1 / sqrt(mean(x^2) + eps) becomes RMSNormalization (opset 23) with a scale of ones."""
    scales: dict[tuple[int, ir.DataType], ir.Value] = {}
    for node in list(graph):
        match = _norm_of(node)
        if match is None:
            continue
        x, epsilon = match
        width = x.shape[-1] if x.shape is not None else None
        assert isinstance(width, int)
        assert x.dtype is not None
        key = width, x.dtype
        if key not in scales:
            ones = ir.tensor(np.ones(width, dtype=x.dtype.numpy()), name=f"ones_{width}")
            scales[key] = ir.Value(
                name=ones.name, shape=ir.Shape([width]), type=ir.TensorType(ones.dtype), const_value=ones
            )
            graph.register_initializer(scales[key])
        fused = ir.node(
            "RMSNormalization", [x, scales[key]], attributes={"axis": -1, "epsilon": epsilon, "stash_type": 1}
        )
        _replace(graph, node, fused)


def _replace(graph: ir.Graph, node: ir.Node, other: ir.Node) -> None:
    """Puts another node in the place of one; each has one output."""
    out, new = node.outputs[0], other.outputs[0]
    new.name, new.shape, new.type = out.name, out.shape, out.type
    graph.insert_after(node, other)
    out.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _norm_of(node: ir.Node) -> tuple[ir.Value, float] | None:
    """x and epsilon if the node is the last one of a norm."""
    if node.op_type != "Mul":
        return None
    x, factor = node.inputs
    chain = []
    for op_type in ("Reciprocal", "Sqrt", "Add", "ReduceMean", "Pow"):
        producer = factor.producer() if factor is not None else None
        if producer is None or producer.op_type != op_type:
            return None
        chain.append(producer)
        factor = producer.inputs[0]
    add, power = chain[2], chain[4]
    epsilon, exponent = add.inputs[1], power.inputs[1]
    if x is None or factor is not x or epsilon is None or exponent is None:
        return None
    if epsilon.const_value is None or exponent.const_value is None or exponent.const_value.numpy().item() != 2:
        return None
    return x, float(epsilon.const_value.numpy().item())


def _name_axes(graph: ir.Graph) -> None:
    """The exporter's symbols (s6) get the contract's names; shapes in between are left to the reader."""
    inputs = {value.name: value for value in graph.inputs}
    names: dict[str, str] = {}
    for (name, dim), axis in _AXES.items():
        if name in inputs:
            shape = inputs[name].shape
            assert shape is not None
            symbol = shape[dim]
            if isinstance(symbol, ir.SymbolicDim) and symbol.value is not None:
                names[str(symbol.value)] = axis
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([dim if isinstance(dim, int) else names[str(dim.value)] for dim in value.shape])
    outputs = set(graph.outputs)
    for node in graph:
        for value in node.outputs:
            if value not in outputs:
                value.shape, value.type = None, None


def _split_cache(graph: ir.Graph) -> None:
    """`cache_k` and `cache_v` become an input a layer, `cache_k_0`, `cache_v_0`, `cache_k_1`, ...: layer i of each.

    ONNX has no views: taking a layer of the stacked cache (Gather) would copy the past at each step. Raises
    LoweringError if the graph takes anything else of them.
    """
    for cache in [value for value in graph.inputs if value.name in ("cache_k", "cache_v")]:
        layers = _layers_of(cache)
        for node in list(cache.consumers()):
            if node.op_type == "Shape":  # of one dimension, which is one of a layer's
                begin, end = node.attributes["start"].as_int(), node.attributes["end"].as_int()
                _replace(graph, node, ir.node("Shape", [layers[0]], {"start": begin - 1, "end": end - 1}))
            else:
                node.outputs[0].replace_all_uses_with(layers[_layer_taken(node)])
                graph.remove(node, safe=True)
        graph.inputs.remove(cache)
        graph.inputs.extend(layers)
    kinds = {kind: place for place, kind in enumerate(CACHED_INPUTS)}
    # layer by layer, keys before values
    ordered = sorted(graph.inputs, key=lambda value: _input_order(str(value.name), kinds))
    graph.inputs.clear()
    graph.inputs.extend(ordered)


def _layers_of(cache: ir.Value) -> list[ir.Value]:
    """New inputs `NAME_0`, `NAME_1`, ... [B, H_kv, S, D]. Raises LoweringError if a use of it is no layer's."""
    assert cache.shape is not None
    count = cache.shape[0]
    assert isinstance(count, int)
    taken = set()
    for node in cache.consumers():
        if node.op_type == "Shape":
            begin, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 0)
            if begin < 1 or end <= begin:
                raise LoweringError(f"the graph takes the shape of all of {cache.name}")
        else:
            taken.add(_layer_taken(node))
    if taken != set(range(count)):
        raise LoweringError(f"the graph reads layers {sorted(taken)} of {cache.name}, which has {count}")
    shape = cache.shape[1:]
    return [ir.Value(name=f"{cache.name}_{layer}", shape=ir.Shape(shape), type=cache.type) for layer in range(count)]


def _layer_taken(node: ir.Node) -> int:
    """Which layer a node takes of the stacked cache. Raises LoweringError if it takes something else."""
    index = node.inputs[1].const_value if node.op_type == "Gather" and node.inputs[1] is not None else None
    if index is None or index.shape.rank() != 0 or node.attributes.get_int("axis", 0) != 0:
        raise LoweringError(f"the graph takes a part of the cache by {node.op_type}, which is no layer")
    return int(index.numpy())


def _input_order(name: str, kinds: Mapping[str, int]) -> tuple[int, int, int]:
    """Inputs that are no cache in the contract's order, then the caches by layer."""
    kind, _, layer = name.rpartition("_")
    return (1, int(layer), kinds[kind]) if kind in ("cache_k", "cache_v") else (0, 0, kinds[name])


def weights_of(models: Iterable[ir.Model], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the programs' tensors that a graph takes, and that do not lie in it."""
    found: dict[str, torch.Tensor] = {}
    for model in models:
        for name, value in model.graph.initializers.items():
            if _is_large(value):
                found[name] = tensors[name]
    return found


def runtime_version() -> str:
    """Major and minor number of the installed onnxruntime."""
    return ".".join(str(onnxruntime.__version__).split(".")[:2])


def _is_large(value: ir.Value) -> bool:
    if value.const_value is None:
        return False
    return value.const_value.nbytes > _EMBEDDED or onnx_quantized.is_quantized(str(value.name))


def constants_of(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and lifted constant by its name."""
    return {**program.state_dict, **{n: t for n, t in program.constants.items() if isinstance(t, torch.Tensor)}}


def write(model: ir.Model, path: Path, places: Mapping[str, tuple[int, int]], weights: str) -> None:
    """Writes a model whose initializers of these names lie at `places` (offset and length) in the file `weights`."""
    for name, (offset, length) in places.items():
        value = model.graph.initializers.get(name)
        if value is not None:
            assert value.dtype is not None
            assert value.shape is not None
            value.const_value = ir.ExternalTensor(
                weights, offset, length, value.dtype, shape=value.shape, name=name, base_dir=path.parent
            )
    ir.save(model, path)


def optimized(model: ir.Model) -> ir.Model:
    """The model after onnxruntime's extended optimizations, which fuse operators to some of the domain com.microsoft.

    (Its basic ones, which keep to standard operators, find nothing to do in these graphs.) Large initializers are
    inputs meanwhile: nothing is made of them that the shared file would not hold.
    """
    graph = model.graph
    large = {name: value for name, value in graph.initializers.items() if _is_large(value)}
    inputs = len(graph.inputs)
    for name, value in large.items():
        graph.initializers.pop(name)
        graph.inputs.append(value)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory(prefix="nanochat_x-onnx-") as scratch:
        source, result = Path(scratch) / "source.onnx", Path(scratch) / "result.onnx"
        ir.save(model, source)
        options.optimized_model_filepath = str(result)
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        found = ir.from_proto(onnx.load(result))
    used = {node.domain for node in found.graph}
    for domain in [domain for domain in found.opset_imports if domain not in used]:
        del found.opset_imports[domain]
    for value in list(found.graph.inputs)[inputs:]:
        assert value.name is not None
        value.const_value = large[value.name].const_value
        found.graph.inputs.remove(value)
        found.graph.register_initializer(value)
    return found
