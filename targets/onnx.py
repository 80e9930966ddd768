"""ONNX: graphs of standard operators for onnxruntime and other readers, over one shared file of weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from nanochat_x.bundle import WEIGHTS
from nanochat_x.capture import Captured
from nanochat_x.console import Progress, format_size
from nanochat_x.errors import LoweringError, UsageError
from nanochat_x.quantized_model import QUANTIZED_PRODUCTS
from nanochat_x.safetensors_file import layout
from nanochat_x.target import Lowered, Machine

if TYPE_CHECKING:
    import onnx_ir as ir

OPTIONS = frozenset({"opset", "optimize"})
#: onnxruntime's CPU provider multiplies no bfloat16 matrices.
DTYPES = frozenset({"float32", "float16"})
QUANTIZATION = frozenset({"int8", "int4"})

#: opset -> the least onnxruntime that takes it. 22 and 23 were found by loading graphs with onnxruntime 1.19 to 1.27;
#: older ones are from its table (https://onnxruntime.ai/docs/reference/compatibility.html). torch 2.13's exporter
#: writes no newer opset than the last.
RUNTIMES = {18: "1.14", 19: "1.15", 20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23"}
DEFAULT_OPSET = max(RUNTIMES)

#: Role -> file. One graph serves prefill and decode: a graph at T = 1 is no faster (d12: 33 ms a token both), and would
#: be a second session with its own memory.
FILES = {"prefill": "cached.onnx", "decode": "cached.onnx", "full": "full.onnx"}

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Onnx:
    """Lowers to `cached.onnx` and `full.onnx`."""

    name = "onnx"
    operators = QUANTIZED_PRODUCTS  # which onnx_quantized translates

    def __init__(self, opset: int = DEFAULT_OPSET, *, optimize: bool = False) -> None:
        """`optimize`: onnxruntime rewrites the graphs; some operators are its own (com.microsoft) then.

        Raises UsageError for an opset that there is none of.
        """
        if opset not in RUNTIMES:
            raise UsageError(
                f"--opset {opset} cannot be written", remedy=f"choose one from {min(RUNTIMES)} to {max(RUNTIMES)}"
            )
        self.opset = opset
        self.optimize = optimize

    def lower(self, captured: Captured, folder: Path, progress: Progress) -> Lowered:
        """Writes the graphs into `folder`; they refer to the weights in the bundle's one file of them.

        Raises LoweringError if the exporter or the optimizer fails.
        """
        from nanochat_x.targets import onnx_graph, onnx_quantized

        programs = captured.programs()
        files = {role: FILES[role] for role in programs}
        models: dict[str, ir.Model] = {}
        tensors = dict(captured.full.state_dict)
        for role, file in files.items():
            if file in models:
                continue
            with progress.stage(f"export {role if role == 'full' else 'prefill and decode'}") as stage:
                program = programs[role]
                tensors |= onnx_graph.constants_of(program)
                try:
                    models[file] = onnx_graph.export_graph(program, self.opset, cached=role != "full")
                    quantized = onnx_quantized.expand(models[file], tensors)
                    tensors |= quantized
                    if self.optimize:
                        models[file] = onnx_graph.optimized(models[file])
                except LoweringError:
                    raise
                except Exception as error:  # the exporter raises many types, none with a common base
                    raise LoweringError(f"exporting {file} failed: {_first_line(error)}") from error
                stage.detail(f"{models[file].graph.num_nodes()} nodes")
        weights = onnx_graph.weights_of(models.values(), tensors)
        places = layout(weights).places
        for file, model in models.items():
            onnx_graph.write(model, folder / file, places, WEIGHTS)
            progress.note(f"  {file}: opset {self.opset}, {format_size((folder / file).stat().st_size)}")
        # Operators of com.microsoft carry no version: only this onnxruntime, and newer ones, are known to have them.
        own = self.optimize or quantized
        runtime = onnx_graph.runtime_version() if own else RUNTIMES[self.opset]
        machine = Machine(runtime_version=runtime)
        return Lowered(files, weights, machine, translated=self.operators, cache_by_layer=True)


def quantized_tensors(bundle: Path) -> dict[str, torch.Tensor]:
    """The tensors of a bundle's quantised matrices, as `quantize` names them. Raises OSError, KeyError."""
    from nanochat_x.targets import onnx_quantized

    return onnx_quantized.matrices_in(load_file(bundle / WEIGHTS))


def make_target(*, will_run: bool = False, opset: int = DEFAULT_OPSET, optimize: bool = False) -> Onnx:
    """The target. Raises UsageError for an opset that there is none of, LoweringError if a package is missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise LoweringError(f"the target onnx needs {' and '.join(missing)}", remedy="pip install 'nanochat_x[onnx]'")
    return Onnx(opset, optimize=optimize)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
