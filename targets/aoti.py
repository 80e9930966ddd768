"""AOTInductor: shared objects for libtorch, compiled without weights so that all of them share one file."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor.cpu_vec_isa
from safetensors.torch import load_file
from torch.export import ExportedProgram

from nanochat_x import row_operators
from nanochat_x.bundle import WEIGHTS
from nanochat_x.capture import Captured
from nanochat_x.compiler import find_compiler
from nanochat_x.console import Progress, format_size
from nanochat_x.errors import LoweringError
from nanochat_x.forked import LostProcessError, side_by_side
from nanochat_x.target import Lowered, Machine
from nanochat_x.targets.quiet import quiet

DTYPES = frozenset({"float32", "bfloat16", "float16"})
OPTIONS = frozenset({"march", "kernels"})
QUANTIZATION = frozenset({"int8", "int4"})

#: gcc and clang define a macro for each instruction set that they may use. The names are those that a runner knows.
_FEATURE_MACROS = {
    "__SSE4_2__": "sse4.2", "__POPCNT__": "popcnt", "__AVX__": "avx", "__AVX2__": "avx2", "__FMA__": "fma",
    "__F16C__": "f16c", "__BMI__": "bmi", "__BMI2__": "bmi2", "__LZCNT__": "lzcnt",
    "__AVX512F__": "avx512f", "__AVX512BW__": "avx512bw", "__AVX512CD__": "avx512cd", "__AVX512DQ__": "avx512dq",
    "__AVX512VL__": "avx512vl", "__AVX512IFMA__": "avx512ifma", "__AVX512VBMI__": "avx512vbmi",
    "__AVX512VBMI2__": "avx512vbmi2", "__AVX512VNNI__": "avx512vnni", "__AVX512BITALG__": "avx512bitalg",
    "__AVX512VPOPCNTDQ__": "avx512vpopcntdq", "__AVX512BF16__": "avx512bf16", "__AVX512FP16__": "avx512fp16",
    "__AVXVNNI__": "avxvnni", "__AVXIFMA__": "avxifma", "__AVXVNNIINT8__": "avxvnniint8", "__GFNI__": "gfni",
    "__MOVBE__": "movbe", "__AMX_TILE__": "amxtile", "__AMX_INT8__": "amxint8", "__AMX_BF16__": "amxbf16",
    "__AMX_FP16__": "amxfp16", "__VAES__": "vaes", "__VPCLMULQDQ__": "vpclmulqdq",
}  # fmt: skip


#: How a schema's types are passed to a C function.
_C_TYPES = {
    "Tensor": "AtenTensorHandle",
    "Tensor?": "AtenTensorHandle*",
    "float": "double",
    "int": "int64_t",
    "SymInt": "int64_t",
    "bool": "int32_t",
}


def _c_function(name: str, schema: str) -> str:
    """Declaration of the function that programs call: Inductor makes its name from the operator's."""
    arguments = [argument.split() for argument in schema[1 : schema.index(")")].split(", ")]
    parameters = [f"{_C_TYPES[kind]} {argument}" for kind, argument in arguments]
    return f"AOTITorchError aoti_torch_cpu_{name}({', '.join(parameters)}, AtenTensorHandle* result)"


class Aoti:
    """Lowers to a shared object a program: `prefill.so`, `decode.so` and `full.so`."""

    name = "aoti"

    def __init__(self, march: str = "native", kernels: str = "own") -> None:
        """`march` is a name that the C++ compiler knows, or `native`. Raises LoweringError if it does not.

        `kernels`: `own` takes operators of this project, `stock` what Inductor and ATen have.
        """
        self.march = march
        self.operators = frozenset(row_operators.ALL) if kernels == "own" else frozenset()
        self.machine = Machine(
            platform=platform.system().lower(),
            architecture=platform.machine(),
            march=march,
            cpu_features=_cpu_features(march),
            torch_version=torch.__version__.split("+")[0],
        )

    def lower(self, captured: Captured, folder: Path, progress: Progress) -> Lowered:
        """Compiles the programs into `folder`. Raises LoweringError if the compiler fails."""
        programs = captured.programs()
        files = {role: f"{role}.so" for role in programs}
        # The compiler works in a folder of ours, never in the user's cache: an interrupted one cannot reach us. Only
        # headers that are compiled once lie elsewhere (docs/robustness.md).
        with (
            tempfile.TemporaryDirectory(prefix="nanochat_x-aoti-") as scratch,
            quiet(),
            _cache_dir(Path(scratch)),
            progress.stage(f"compile {', '.join(programs)}") as stage,
        ):
            simdlen = _simdlen(self.march)  # once for all of them: it compiles some programs
            compilations = [
                partial(self._compile, program, Path(scratch) / files[role], self._options(role, simdlen))
                for role, program in programs.items()
            ]
            for path in _side_by_side(compilations):
                shutil.move(path, folder / path.name)
            stage.detail(format_size(sum((folder / name).stat().st_size for name in files.values())))
        constants: dict[str, torch.Tensor] = {}
        for program in programs.values():
            constants |= _constants(program)
        return Lowered(programs=files, weights=constants, machine=self.machine)

    def _compile(self, program: ExportedProgram, path: Path, options: dict[str, Any]) -> Path:
        module = program.module(check_guards=False)
        args, kwargs = program.example_inputs
        try:
            with torch.no_grad():
                torch._inductor.aot_compile(
                    module, args, kwargs, options={"aot_inductor.output_path": str(path), **options}
                )
        except OSError:
            raise
        except Exception as error:  # the compiler raises many types, none with a common base
            raise LoweringError(_reason(error)) from error
        if not path.is_file():
            raise LoweringError(f"AOTInductor wrote no {path.name}")
        return path

    def _options(self, role: str, simdlen: int | None) -> dict[str, Any]:
        # One token is little work but for the products, whose kernels have threads of their own: to wake threads for
        # each small loop between them costs more than the loop.
        one_token = role == "decode"
        serial_loops = one_token and bool(self.operators)
        options: dict[str, Any] = {
            # Several programs use one set of weights: the runner maps one file and lends it to all of them.
            "aot_inductor.package_constants_in_so": False,
            "always_keep_tensor_constants": True,
            # Otherwise the number of threads of this machine is baked in.
            **({"cpp.threads": 1} if serial_loops else {"cpp.dynamic_threads": True}),
            "cpp.march": self.march,
            "cpp.cxx": (None, find_compiler()),
            # What calls the kernels takes the compiler long, and is little work but for one token.
            **({} if one_token else {"aot_inductor.compile_wrapper_opt_level": "O0"}),
            "compile_threads": 1,  # a pool of processes for kernels that are compiled one by one, as here none are
            # Own operators are calls of C functions that the runner has (runners/backends/operators_c.cpp).
            "aot_inductor.custom_ops_to_c_shims": {
                getattr(torch.ops.nanochat_x, name).default: [_c_function(name, schema)]
                for name, schema in row_operators.ALL.items()
            },
        }
        if simdlen is not None:
            options["cpp.simdlen"] = simdlen
        return options


def make_target(*, will_run: bool = False, march: str = "native", kernels: str = "own") -> Aoti:
    """The target; `will_run`: its programs are to be run on this machine. Raises LoweringError if they cannot."""
    target = Aoti(march, kernels)
    missing = [name for name in target.machine.cpu_features if name not in _cpu_features("native")]
    if will_run and missing:
        raise LoweringError(
            f"programs for {march} do not run on this machine (it lacks {' '.join(missing)})",
            remedy="add --no-verify to lower for another machine",
        )
    return target


def quantized_tensors(bundle: Path) -> dict[str, torch.Tensor]:
    """The tensors of a bundle's quantised matrices, as `quantize` names them. Raises OSError."""
    return {name.removeprefix("model."): tensor for name, tensor in load_file(bundle / WEIGHTS).items()}


def _side_by_side(compilations: Sequence[Callable[[], Path]]) -> list[Path]:
    """`side_by_side`, where a lost process is the compiler's failure."""
    try:
        return side_by_side(compilations)
    except LostProcessError as error:
        raise LoweringError(f"AOTInductor failed: {error}", remedy="it may have run out of memory") from error


def _constants(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and lifted constant, by the name that the compiled program knows it by.

    Raises LoweringError for one that is not row-major: the program reads it by the strides that it was captured with,
    and a file has none.
    """
    found = {**program.state_dict, **{n: t for n, t in program.constants.items() if isinstance(t, torch.Tensor)}}
    for name, tensor in found.items():
        if not tensor.is_contiguous():
            raise LoweringError(f"tensor {name} is not row-major in memory", remedy="please report it")
    return found


def _cpu_features(march: str, *flags: str) -> tuple[str, ...]:
    """What the C++ compiler may use under `-march` and `flags`, asked from it. Raises LoweringError if it refuses."""
    if not re.fullmatch(r"[A-Za-z0-9_.+-]+", march):
        raise LoweringError(f"--march {march!r} is no instruction set", remedy="try native, x86-64-v3 or x86-64-v4")
    compiler = find_compiler()
    command = [compiler, f"-march={march}", *flags, "-dM", "-E", "-x", "c++", os.devnull]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise LoweringError(
            f"{compiler} knows no -march={march}", remedy="try native, x86-64-v3 or x86-64-v4, or see its manual"
        )
    defined = {line.split()[1] for line in result.stdout.splitlines() if line.startswith("#define")}
    return tuple(name for macro, name in _FEATURE_MACROS.items() if macro in defined)


def _simdlen(march: str) -> int | None:
    """Width in bits of the vectors that Inductor may write code for; `None` leaves the choice to it.

    Inductor vectorises for the machine it runs on, and adds the compiler flags for that, whatever -march says: its own
    choice is good only if it asks for nothing beyond `march`.
    """
    features = set(_cpu_features(march))
    # A fresh look at what it would choose, before any option of ours.
    chosen = torch._inductor.cpu_vec_isa.pick_vec_isa()
    if set(_cpu_features(march, *chosen.build_arch_flags().split())) <= features:
        return None
    return 256 if {"avx2", "fma", "f16c"} <= features else 1  # 1: no vectors beyond the compiler's own


@contextmanager
def _cache_dir(scratch: Path) -> Iterator[None]:
    """Points Inductor's cache at `scratch`."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = str(scratch / "cache")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _reason(error: Exception) -> str:
    if "No space left on device" in str(error):
        return "AOTInductor failed: no space left on device; it works in the folder for temporary files (TMPDIR)"
    lines = [line for line in str(error).splitlines() if line.strip()]
    wanted = [line for line in lines if "error:" in line.lower()]
    return f"AOTInductor failed: {(wanted or lines or [type(error).__name__])[0].strip()}"
