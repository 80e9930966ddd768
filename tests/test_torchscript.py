"""TorchScript bundles: through the C++ runner against what the real nanochat computed, and by plain libtorch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import change_byte, edit_manifest, lower_bundle, refused, replace_file, run_cli
from golden import FACTOR, MODES, assert_golden_logits, assert_golden_tokens, assert_transcripts
from models import GENERATIONS, MAX_SEQ_LEN, NAMES, golden_of, largest, model_of
from torch import Tensor
from torch.export import Dim, ExportedProgram

from nanochat_x.build import ensure_built
from nanochat_x.errors import LoweringError
from nanochat_x.runner import Runner
from nanochat_x.targets import torchscript
from nanochat_x.targets.torchscript import script_module
from nanochat_x.targets.torchscript_source import MethodSource, method_source
from nanochat_x.wrappers import ExportableGPTWithCache

SMALL = "2025-12-classic"
SMEAR = "2026-07-smear"


@pytest.fixture(scope="session")
def script_demo(lowered: Callable[..., Path]) -> Path:
    """The demo model. Never write to it."""
    return lowered("demo", "torchscript")


@pytest.fixture(scope="session")
def script_bundle(lowered: Callable[..., Path]) -> Callable[..., Path]:
    """The bundle of one of tests/data/generations, in a dtype."""
    return lambda name, dtype="float32": lowered(name, "torchscript", dtype)


@pytest.fixture(scope="session")
def stock_bundle(lowered: Callable[..., Path]) -> Callable[..., Path]:
    """The bundle of one of tests/data/generations that any libtorch runs."""
    return lambda name: lowered(name, "torchscript", kernels="stock")


@pytest.fixture
def copied(script_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a small bundle that a test may spoil."""
    return Path(shutil.copytree(script_bundle(SMALL), tmp_path / "copy"))


def load(bundle: Path) -> Any:
    """The module as anyone with torch loads it, with own operators as nanochat_x.row_operators defines them."""
    return torch.jit.load(str(bundle / "model.pt"))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_golden_logits(name: str, mode: str, script_bundle: Callable[..., Path], tmp_path: Path) -> None:
    assert_golden_logits(script_bundle(name), name, mode, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_golden_greedy_tokens(name: str, script_bundle: Callable[..., Path]) -> None:
    assert_golden_tokens(script_bundle(name), name)


def test_transcripts(script_demo: Path, data_dir: Path, tmp_path: Path) -> None:
    assert_transcripts(script_demo, data_dir, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_plain_torch(name: str, stock_bundle: Callable[..., Path]) -> None:
    golden = golden_of(name)
    module = load(stock_bundle(name))
    for case, ids in golden.input_ids.items():
        for _ in range(3):  # torch rewrites the method for the types and sizes of its first calls
            assert largest(module(ids) - golden.logits[case]) <= 2e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [SMALL, SMEAR])
def test_any_shape(name: str, dtype: str, script_bundle: Callable[..., Path]) -> None:
    """Every corner of the contract, with rows at their own positions: what eager PyTorch computes."""
    model = model_of(name, getattr(torch, dtype))
    eager, module = ExportableGPTWithCache(model, MAX_SEQ_LEN), load(script_bundle(name, dtype))
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, 1, 0), (1, 1, 1), (4, 1, 40), (1, 9, 0), (3, 8, 31), (2, 2, 510), (1, MAX_SEQ_LEN, 0)]
    for batch, steps, slots in shapes:
        new = [torch.randint(model.spec.vocab_size, (batch, n), generator=generator) for n in (steps, 1)]
        caches = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in eager.empty_cache(batch, slots)]
        position = torch.randint(slots + 1, (batch,), generator=generator)
        kept = torch.randint(steps, (1 if steps == 1 else 5,), generator=generator)
        with torch.inference_mode():
            wanted = eager(*new, *caches, position, kept)
            for method in ["prefill", "decode"][: 2 if steps == 1 else 1]:
                got = getattr(module, method)(*new, *caches, position, kept)
                assert [t.dtype for t in got] == [torch.float32, getattr(torch, dtype), getattr(torch, dtype)]
                for ours, theirs in zip(got, wanted, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, script_bundle: Callable[..., Path]) -> None:
    bundle = script_bundle(SMALL, dtype)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["dtype"] == dtype
    assert 0 < manifest["verification"]["largest_ratio"] <= FACTOR
    tensors = load(bundle).state_dict()
    assert {tensors.pop(table).dtype for table in ("cos", "sin")} == {torch.bfloat16}  # of this generation
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}


def test_what_the_bundle_holds(script_demo: Path) -> None:
    manifest = json.loads((script_demo / "manifest.json").read_text())
    assert manifest["programs"] == dict.fromkeys(("prefill", "decode", "full"), "model.pt")
    assert manifest["weights"] == ""
    assert manifest["machine"] == {"runtime_version": torch.__version__.split("+")[0]}
    assert {file["path"] for file in manifest["files"]} == {"model.pt", "tokenizer.json"}
    tensors = load(script_demo).state_dict()
    assert {"model.lm_head.blocks", "model.transformer.h.0.attn.c_q.blocks", "cos", "sin"} <= set(tensors)
    assert tensors["model.transformer.wte.weight"].dtype == torch.bfloat16  # as nanochat stores it
    # each tensor once; the rest is code
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert held < (script_demo / "model.pt").stat().st_size < held + 400_000


def test_nothing_of_this_machine_is_in_the_file(script_demo: Path, root: Path) -> None:
    with zipfile.ZipFile(script_demo / "model.pt") as archive:
        texts = [archive.read(name) for name in archive.namelist() if "/data/" not in name]
    assert len(texts) > 3
    for secret in (str(root), sys.prefix, "site-packages"):
        assert not [text for text in texts if secret.encode() in text]


def test_rows_that_the_vocabulary_lacks_stay_outside(tmp_path: Path) -> None:
    """nanochat pads its tables; a view of the first rows must not drag the others into the file."""
    program = torch.export.export(Doubling(torch.arange(4096.0)[:8]), (torch.ones(8),))
    torchscript.save(script_module({"full": program}), tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size < 4096
    assert load(tmp_path)(torch.ones(8)).tolist() == [2.0 * i for i in range(8)]


def test_no_cache(tmp_path: Path) -> None:
    checkpoint = GENERATIONS / SMALL
    bundle = lower_bundle(tmp_path / "out", "torchscript", base_dir=checkpoint, max_seq_len=MAX_SEQ_LEN, cached=False)
    assert not hasattr(load(bundle), "prefill")
    assert_golden_logits(bundle, SMALL, "by-3-1-16", tmp_path)


# --- the source text


class Doubling(torch.nn.Module):
    """2 * table * x."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * self.table * x


class Function(torch.nn.Module):
    """Any function of one tensor."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def exported(function: Callable[[Tensor], Any]) -> ExportedProgram:
    """A function of one float32 tensor [rows, 4] with any number of rows."""
    return torch.export.export(Function(function), (torch.ones(6, 4),), dynamic_shapes=((Dim("rows", min=2), None),))


def source_of(function: Callable[[Tensor], Any]) -> MethodSource:
    return method_source("forward", exported(function), lambda name: f"self.{name}")


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda x: x.erfinv(), r"aten\.erfinv\.default"),
        (lambda x: x.clone().add_(1), r"aten\.add_\.Tensor"),
        (lambda x: x + x.new_zeros(x.shape[0], 4), r"aten\.new_zeros\.default"),
    ],
    ids=["unknown", "in-place", "unknown-with-sizes"],
)
def test_an_operator_without_torchscript_is_named(function: Callable[[Tensor], Any], what: str) -> None:
    with pytest.raises(LoweringError, match=rf"program forward: {what} \(node \w+\) has no TorchScript here"):
        source_of(function)


def test_the_text_is_dynamic_and_has_no_dead_or_doubled_lines() -> None:
    def function(x: Tensor) -> Tensor:
        torch.relu(x)  # for nothing
        flat = x.view(x.shape[0] * 2, 2).to(torch.float32)
        return torch.cat([flat.tanh(), flat.tanh() * float("-inf")], 1)

    source = source_of(function)
    assert source.operators == ("aten::view", "aten::tanh", "aten::mul.Scalar", "aten::cat")
    assert 'float("-inf")' in source.text
    module = script_module({"full": exported(function)})
    for rows in (2, 3, 17):
        x = torch.randn(rows, 4)
        assert torch.equal(module(x), function(x))


def test_two_models_of_one_shape_in_one_process() -> None:
    """TorchScript shares types between modules that hold the same tensors; these must not share their methods."""
    functions = (torch.tanh, torch.relu)
    modules = [script_module({"full": exported(function)}) for function in functions]
    x = torch.randn(3, 4)
    for module, function in zip(modules, functions, strict=True):
        assert torch.equal(module(x), function(x))


def test_another_overload_is_noticed() -> None:
    module = script_module({"full": exported(torch.tanh)})
    text = "def other(self, x: Tensor) -> Tensor:\n    return torch.ops.aten.add(x, 1)\n"
    with pytest.raises(LoweringError, match=r"compiled aten::add\.Scalar for aten::add\.Tensor in the method other"):
        torchscript._define(module, "other", MethodSource(text, ("aten::add.Tensor",)))


def test_text_that_does_not_compile_is_one_line() -> None:
    module = script_module({"full": exported(torch.tanh)})
    with pytest.raises(LoweringError, match=r"^TorchScript does not compile the method other: \S[^\n]*$"):
        torchscript._define(module, "other", MethodSource("def other(self):\n    return nothing\n", ()))


def test_programs_that_do_not_share_a_tensor() -> None:
    programs = {
        role: torch.export.export(Doubling(torch.full((8,), value)), (torch.ones(8),))
        for role, value in (("full", 1.0), ("prefill", 2.0))
    }
    with pytest.raises(LoweringError, match="program prefill has a tensor table of its own"):
        script_module(programs)


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands for it. libtorch left alone would end the process."""
    script = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]);"
        "from pathlib import Path; from test_torchscript import *;"
        "module = script_module({'full': exported(torch.tanh)});"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "torchscript.save(module, Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"OSError: \[Errno \d+\] .*: '.*model\.pt'", done.stderr.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


# --- spoilt bundles


def test_a_good_copy_is_taken(copied: Path) -> None:
    """What the next tests spoil; a rewritten file too."""
    replace_file(copied, "model.pt", (copied / "model.pt").read_bytes())
    done = run_cli("generate", copied, "--prompt-ids=1", "--max-tokens=1", "--raw")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_corrupt_file(copied: Path) -> None:
    """Refused by its hash: libtorch, whose own words would be others, never sees it."""
    change_byte(copied / "model.pt")
    assert re.search(r"model\.pt.*SHA-256", refused(copied))


def test_what_is_no_torchscript(copied: Path) -> None:
    replace_file(copied, "model.pt", b"no program")
    assert "cannot open the bundle's programs: " in refused(copied)


def test_a_missing_method(copied: Path, tmp_path: Path) -> None:
    torchscript.save(script_module({"full": exported(torch.tanh)}), tmp_path / "other.pt")
    replace_file(copied, "model.pt", (tmp_path / "other.pt").read_bytes())
    assert re.search(r"'model\.pt' has no method (prefill|decode); lower the model again", refused(copied))


def test_operators_are_listed_and_an_unknown_one_is_refused(copied: Path, stock_bundle: Callable[..., Path]) -> None:
    rows = {"heads_first", "norm", "relu_square", "rotary", "soft_cap"}  # no mix: it has no lambdas
    assert (
        set(json.loads((copied / "manifest.json").read_text())["operators"])
        == {"attention", "linear", "linear_compact"} | rows
    )
    assert "operators" not in json.loads((stock_bundle(SMALL) / "manifest.json").read_text())
    edit_manifest(copied, lambda manifest: manifest["operators"].append("magic"))
    assert "call the operator nanochat_x::magic, which this runner has not; build the runner anew" in refused(copied)
    edit_manifest(copied, lambda manifest: manifest.update(operators="linear"))
    assert "manifest.json: operators: " in refused(copied)


@pytest.mark.parametrize("mode", MODES)
def test_stock_kernels(mode: str, stock_bundle: Callable[..., Path], tmp_path: Path) -> None:
    assert_golden_logits(stock_bundle(SMEAR), SMEAR, mode, tmp_path)


def test_outputs_of_another_shape(copied: Path, tmp_path: Path) -> None:
    module = script_module({"full": exported(torch.tanh)})
    for name in ("prefill", "decode"):
        arguments = ", ".join(f"{name}: Tensor" for name in ("input_ids", "prev_ids", "k", "v", "position", "kept"))
        module.define(f"def {name}(self, {arguments}) -> Tensor:\n    return k\n")
    torchscript.save(module, tmp_path / "other.pt")
    replace_file(copied, "model.pt", (tmp_path / "other.pt").read_bytes())
    assert re.search(r"program decode returned 1 tensors instead of 3; lower the model again", refused(copied))


def test_a_torch_that_is_too_old(copied: Path) -> None:
    edit_manifest(copied, lambda manifest: manifest["machine"].update(runtime_version="99.1"))
    assert "needs version 99.1 or newer of the torchscript runtime" in refused(copied)


def test_another_targets_program(copied: Path) -> None:
    done = subprocess.run([ensure_built("aoti").program, "info", copied], capture_output=True, text=True, check=False)
    assert done.returncode == 0  # only looking is allowed
    command = [str(ensure_built("aoti").program), "generate", str(copied), "--prompt-ids=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(r"target 'torchscript'", done.stderr)
    edit_manifest(copied, lambda manifest: manifest.update(target="aoti"))
    assert "machine.platform: is missing; lower it again" in refused(copied)


def test_no_cuda_here(copied: Path) -> None:
    assert "not for the device 'cuda'; leave out --device" in refused(copied, "--device=cuda")


def test_threads(script_bundle: Callable[..., Path]) -> None:
    options = ("--prompt-ids=1,2,3", "--max-tokens=8", "--raw", "--temperature=0", "--json")
    runner = Runner(script_bundle(SMALL))
    ids = [runner.json("generate", *options, *more)["samples"][0]["ids"] for more in ([], ["--threads=1"])]
    assert ids[0] == ids[1]


def test_the_runner_needs_no_python(runner_build: Path) -> None:
    program = ensure_built("torchscript").program
    libraries = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0] for line in libraries.splitlines()}
    assert any("libtorch_cpu" in name for name in names)
    assert not [name for name in names if "python" in name]


# --- the documented examples


def example_answer(command: list[str], name: str, bundle: Path) -> list[int]:
    """What a documented example prints for a golden prompt."""
    golden = golden_of(name)
    arguments = [str(bundle), str(len(golden.greedy_tokens)), *map(str, golden.greedy_prompt)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize("name", NAMES)
def test_python_example(name: str, stock_bundle: Callable[..., Path], root: Path) -> None:
    example = root / "docs" / "examples" / "torchscript_continue.py"
    assert example_answer([sys.executable, str(example)], name, stock_bundle(name)) == golden_of(name).greedy_tokens


@pytest.fixture(scope="session")
def cpp_example(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """The C++ example, compiled as docs/torchscript.md says."""
    text = (root / "docs" / "torchscript.md").read_text()
    (command,) = re.findall(r"^    (T=\$\(python .*?\n)\n", text, flags=re.MULTILINE | re.DOTALL)
    folder = tmp_path_factory.mktemp("example")
    command = command.rstrip().replace("python ", f"{sys.executable} ", 1) + f" -o {folder}/program"
    subprocess.run(["sh", "-c", command], cwd=root, check=True)
    return folder / "program"


@pytest.mark.parametrize("name", [SMALL, SMEAR])
def test_cpp_example(name: str, stock_bundle: Callable[..., Path], cpp_example: Path) -> None:
    assert example_answer([str(cpp_example)], name, stock_bundle(name)) == golden_of(name).greedy_tokens
