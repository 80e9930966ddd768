"""ExecuTorch: one .pte, its methods `prefill`, `decode` and `full` sharing one set of weights."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from nanochat_x.capture import Captured
from nanochat_x.console import Progress, format_size
from nanochat_x.errors import LoweringError, UsageError
from nanochat_x.target import Lowered, Machine
from nanochat_x.targets.executorch_graph import Bounds, bounded_programs
from nanochat_x.targets.executorch_operators import OWN
from nanochat_x.targets.quiet import quiet

#: Options of `lower` beyond those of every target.
OPTIONS = frozenset({"max_batch", "kernels"})
#: Its XNNPACK partitioner takes bfloat16 for single operators, on request and with new enough versions: not used here.
DTYPES = frozenset({"float32", "float16"})
QUANTIZATION: frozenset[str] = frozenset()
WHY_NOT_QUANTIZED = "XNNPACK multiplies matrices in 8 and 4 bits with activations rounded to 8 bits alone"

VERSION = "1.5.1"
REMEDY = f"pip install executorch=={VERSION}"
FILE = "model.pte"

#: Rows of one decode step. The weights are read once for all of them, and a chat asks for few samples at a time.
MAX_BATCH = 8
MOST_BATCH = 1024
#: New tokens of one prefill. Enough for the products to run at full speed; memory is planned for so many logits.
MAX_STEPS = 128

#: Bytes at multiples of which weights begin: a vector that lies across two lines takes two loads.
CACHE_LINE = 64

#: What XNNPACK computes of stock programs: the products, and what stands between them without changing a shape. Its
#: partitioner would take views, slices and the like too, but not with two dynamic dimensions, and fails on them instead
#: of leaving them.
DELEGATED = (
    "AddConfig", "BMMConfig", "DivConfig", "LinearConfig", "MulConfig", "PowConfig", "ReciprocalSquareRootConfig",
    "ReLUConfig", "SigmoidConfig", "SoftmaxConfig", "SubConfig", "TanhConfig",
)  # fmt: skip


class ExecuTorch:
    """Lowers to `model.pte`."""

    name = "executorch"

    def __init__(self, max_batch: int = MAX_BATCH, kernels: str = "own") -> None:
        """`max_batch`: rows of one decode step at most. Raises UsageError, LoweringError without the package.

        `kernels`: `own` takes operators of this project, `stock` XNNPACK and the portable kernels, for any runtime.
        """
        if not 1 <= max_batch <= MOST_BATCH:
            raise UsageError(f"--max-batch {max_batch} is not 1 to {MOST_BATCH}", remedy="choose a smaller one")
        if importlib.util.find_spec("executorch") is None:
            raise LoweringError("the target executorch needs the package executorch", remedy=REMEDY)
        self.bounds = Bounds(max_batch, MAX_STEPS)
        self.operators = OWN if kernels == "own" else frozenset()
        # A .pte runs on any machine for which there is a runtime. ExecuTorch promises that files run on the next minor
        # or major release too, and nothing for a runtime that is older than the file.
        self.machine = Machine(runtime_version=importlib.metadata.version("executorch").split("+")[0])

    def lower(self, captured: Captured, folder: Path, progress: Progress) -> Lowered:
        """Writes `model.pte` into `folder`. Raises LoweringError if ExecuTorch fails."""
        with progress.stage("bound dimensions"):
            programs = bounded_programs(captured, self.bounds)
        path = folder / FILE
        with progress.stage("lower to ExecuTorch") as stage, quiet():
            _write(programs, path, with_xnnpack=not self.operators)
            stage.detail(format_size(path.stat().st_size))
        return Lowered(
            programs=dict.fromkeys(programs, path.name),
            machine=self.machine,
            limits={"batch": self.bounds.batch, "steps": min(self.bounds.steps, captured.max_seq_len)},
        )


def make_target(max_batch: int = MAX_BATCH, kernels: str = "own", *, will_run: bool = False) -> ExecuTorch:
    """The target. Raises UsageError for a batch out of range, LoweringError without the package."""
    del will_run  # a .pte is no machine code: it runs here as anywhere
    return ExecuTorch(max_batch, kernels)


def _write(programs: dict[str, ExportedProgram], path: Path, *, with_xnnpack: bool) -> None:
    from executorch.backends.xnnpack.partition import config as xnnpack
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    delegated = [getattr(xnnpack, name) for name in DELEGATED] if with_xnnpack else []
    try:
        edge = to_edge_transform_and_lower(
            programs,
            partitioner=[XnnpackPartitioner(configs=delegated)] if delegated else [],
            # The check knows only core ATen operators and refuses others that have kernels.
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        # The caller's own memory serves as inputs and outputs: a cache is never copied, logits are written in place.
        planning: Any = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
        lowered = edge.to_executorch(
            ExecutorchBackendConfig(memory_planning_pass=planning, constant_tensor_alignment=CACHE_LINE)
        )
        with path.open("wb") as stream:
            lowered.write_to_file(stream)
    except OSError:
        raise
    except Exception as error:  # ExecuTorch raises many types, none with a common base
        lines = str(error).splitlines() or [type(error).__name__]
        raise LoweringError(f"ExecuTorch failed: {lines[0].strip()}") from error
