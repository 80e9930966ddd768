"""TorchScript: one file with the weights and a method for each program, for libtorch or `torch.jit.load`."""

from __future__ import annotations

import errno
import keyword
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from nanochat_x import row_operators
from nanochat_x.capture import Captured
from nanochat_x.console import Progress, format_size
from nanochat_x.errors import LoweringError
from nanochat_x.target import Lowered, Machine
from nanochat_x.targets.torchscript_source import MethodSource, method_source

DTYPES = frozenset({"float32", "bfloat16", "float16"})
OPTIONS = frozenset({"kernels"})
QUANTIZATION = frozenset({"int8", "int4"})

FILE = "model.pt"

#: role -> method of the file's module. `forward` is what calling the module calls.
METHODS = {"full": "forward", "prefill": "prefill", "decode": "decode"}


#: More than everything but the tensors takes in a file.
_MOST_CODE = 1 << 22


class TorchScript:
    """Lowers to `model.pt`."""

    name = "torchscript"

    def __init__(self, kernels: str = "own") -> None:
        """`kernels`: `own` takes operators of this project, `stock` ATen's alone, which every libtorch has."""
        self.operators = frozenset(row_operators.ALL) if kernels == "own" else frozenset()

    def lower(self, captured: Captured, folder: Path, progress: Progress) -> Lowered:
        """Writes the file into `folder`. Raises LoweringError for what cannot be said in TorchScript."""
        programs = captured.programs()
        with progress.stage("write TorchScript") as stage:
            module = script_module(programs)
            if captured.cached is not None:
                module.define(empty_cache_source(captured))
            save(module, folder / FILE)
            stage.detail(format_size((folder / FILE).stat().st_size))
        # A file is read by the torch that wrote it and by newer ones.
        version = torch.__version__.split("+")[0]
        return Lowered(programs=dict.fromkeys(programs, FILE), machine=Machine(runtime_version=version))


def make_target(*, will_run: bool = False, kernels: str = "own") -> TorchScript:
    """The target; its file runs wherever libtorch does, so `will_run` asks nothing of this machine."""
    del will_run
    return TorchScript(kernels)


def quantized_tensors(bundle: Path) -> dict[str, Tensor]:
    """The tensors of a bundle's quantised matrices, as `quantize` names them. Raises RuntimeError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: Any = torch.jit.load(str(bundle / FILE))  # type: ignore[no-untyped-call]
    return {name.removeprefix("model."): tensor for name, tensor in module.state_dict().items()}


def script_module(programs: Mapping[str, ExportedProgram]) -> torch.jit.ScriptModule:
    """A module with the programs' tensors, each once and not copied, and a method for each role of `programs`.

    A tensor keeps its name: `model.lm_head.weight`, `cos`. Raises LoweringError.
    """
    # A class of its own: modules of one class with the same tensors would share their methods, whatever the model.
    root = type("NanoChat", (nn.Module,), {})().eval()
    for name, tensor in _shared_tensors(programs).items():
        _register(root, name, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated: docs/torchscript.md says so, once
        module: torch.jit.ScriptModule = torch.jit.script(root)
    for role, program in programs.items():
        _define(module, METHODS[role], method_source(METHODS[role], program, _attribute))
    return module


def empty_cache_source(captured: Captured) -> str:
    """The method `empty_cache(batch, slots)`: zeroed cache_k and cache_v, whose sizes a lone file cannot tell."""
    spec = captured.spec
    shape = f"[{spec.n_layer}, batch, {spec.n_kv_head}, slots, {spec.head_dim}]"
    zeros = f"torch.zeros({shape}, dtype={captured.dtype}, device=self.cos.device)"
    return f"def empty_cache(self, batch: int, slots: int) -> Tuple[Tensor, Tensor]:\n    return {zeros}, {zeros}\n"


def save(module: torch.jit.ScriptModule, path: Path) -> None:
    """Writes the module. Raises OSError, as writing any file does."""
    tensors = module.state_dict().values()
    _check_room(path, sum(t.numel() * t.element_size() for t in tensors) + _MOST_CODE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.save(str(path))
    except RuntimeError as error:  # libtorch's own words
        reason = str(error).splitlines()[0]
        raise OSError(errno.EIO, f"libtorch cannot write it: {reason}", str(path)) from error


def _check_room(path: Path, size: int) -> None:
    """Raises OSError if the disk, a quota or a limit has no room for `size` bytes at `path`, where nothing is yet.

    libtorch's writer ends the process when it cannot go on, so that is asked before.
    """
    with path.open("xb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            elif shutil.disk_usage(path.parent).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        finally:
            path.unlink()


def _shared_tensors(programs: Mapping[str, ExportedProgram]) -> dict[str, Tensor]:
    """Parameters, buffers and constants of all programs. Raises LoweringError if two programs differ about one."""
    tensors: dict[str, Tensor] = {}
    for role, program in programs.items():
        constants = {name: t for name, t in program.constants.items() if isinstance(t, Tensor)}
        for name, tensor in {**program.state_dict, **constants}.items():
            if not _same(tensors.setdefault(name, tensor), tensor):
                raise LoweringError(f"program {role} has a tensor {name} of its own; all programs must share one")
    return tensors


def _same(a: Tensor, b: Tensor) -> bool:
    """One tensor, or two of the same type and content: each program has rotary tables of its own making."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def _register(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor at `a.b.c` of the tree, making modules on the way."""
    *path, leaf = name.split(".")
    module = root
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
        tensor = tensor.clone()  # a file takes the whole storage: rows that the vocabulary does not have, too
    module.register_buffer(leaf, tensor.detach())


def _attribute(name: str) -> str:
    """The expression for a tensor of the module: `self.model.lm_head.weight`; `getattr(self.h, "0")` for a number."""
    text = "self"
    for part in name.split("."):
        simple = part.isidentifier() and not keyword.iskeyword(part)
        text = f"{text}.{part}" if simple else f'getattr({text}, "{part}")'
    return text


def _define(module: torch.jit.ScriptModule, name: str, source: MethodSource) -> None:
    """Compiles a method. Raises LoweringError if TorchScript does not take it, or takes another overload for it."""
    try:
        module.define(source.text)
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise LoweringError(f"TorchScript does not compile the method {name}: {lines[0]}") from error
    wanted = set(source.operators)
    kinds = {operator.split(".")[0] for operator in wanted}
    nodes = [
        node
        for node in module._c._get_method(name).graph.nodes()
        if node.kind() in kinds and str(node.output().type()) != "int"  # arithmetic on sizes
    ]
    compiled = tuple(node.schema().split("(")[0] for node in nodes)
    if compiled != source.operators:
        different = next((pair for pair in zip(source.operators, compiled, strict=False) if pair[0] != pair[1]), None)
        what = (
            f"{different[1]} for {different[0]}" if different else f"{len(compiled)} calls for {len(source.operators)}"
        )
        raise LoweringError(f"TorchScript compiled {what} in the method {name}")
