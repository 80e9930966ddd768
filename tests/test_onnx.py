"""ONNX bundles: through the C++ runner against what the real nanochat computed, and by plain onnxruntime."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from bundles import change_byte, edit_manifest, lower_bundle, refused, replace_file, run_cli
from golden import FACTOR, MODES, assert_golden_logits, assert_golden_tokens, assert_transcripts
from models import GENERATIONS, MAX_SEQ_LEN, NAMES, golden_of
from safetensors.torch import load_file

from nanochat_x.build import ensure_built
from nanochat_x.errors import LoweringError, UsageError
from nanochat_x.runner import Runner
from nanochat_x.safetensors_file import layout
from nanochat_x.targets import onnx as onnx_target
from nanochat_x.targets.onnx import DEFAULT_OPSET, RUNTIMES, make_target
from nanochat_x.targets.onnx_graph import _split_cache

SMALL = "2025-12-classic"
GRAPHS = ("cached.onnx", "full.onnx")


@pytest.fixture(scope="session")
def onnx_demo(lowered: Callable[..., Path]) -> Path:
    """The demo model. Never write to it."""
    return lowered("demo", "onnx")


@pytest.fixture(scope="session")
def onnx_bundle(lowered: Callable[..., Path]) -> Callable[..., Path]:
    """The bundle of one of tests/data/generations under these options."""
    return partial(lowered, target="onnx")


@pytest.fixture
def copied(onnx_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a small bundle that a test may spoil."""
    return Path(shutil.copytree(onnx_bundle(SMALL), tmp_path / "copy"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_golden_logits(name: str, mode: str, onnx_bundle: Callable[..., Path], tmp_path: Path) -> None:
    assert_golden_logits(onnx_bundle(name), name, mode, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_golden_greedy_tokens(name: str, onnx_bundle: Callable[..., Path]) -> None:
    assert_golden_tokens(onnx_bundle(name), name)


def test_transcripts(onnx_demo: Path, data_dir: Path, tmp_path: Path) -> None:
    assert_transcripts(onnx_demo, data_dir, tmp_path)


@pytest.mark.parametrize(
    "options", [{"opset": 18}, {"opset": 20}, {"optimize": True}, {"opset": 18, "optimize": True}], ids=str
)
@pytest.mark.parametrize("name", [NAMES[-1]])
def test_options(options: dict[str, Any], name: str, onnx_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = onnx_bundle(name, **options)
    opset = options.get("opset", DEFAULT_OPSET)
    optimize = options.get("optimize", False)
    for graph in GRAPHS:
        check_graph(bundle / graph, opset, optimize=optimize)
    manifest = json.loads((bundle / "manifest.json").read_text())
    version = ".".join(onnxruntime.__version__.split(".")[:2]) if optimize else RUNTIMES[opset]
    assert manifest["machine"] == {"runtime_version": version}
    assert_golden_logits(bundle, name, "by-3-1-16", tmp_path)
    if optimize:
        plain = onnx_bundle(name, **{key: value for key, value in options.items() if key != "optimize"})
        nodes = [len(onnx.load(b / "cached.onnx", load_external_data=False).graph.node) for b in (bundle, plain)]
        assert nodes[0] < nodes[1]


def check_graph(path: Path, opset: int, *, optimize: bool = False) -> onnx.ModelProto:
    """What onnx itself says about a file, and whose operators it has: the standard's alone unless optimized."""
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    versions = {"": opset} | ({"com.microsoft": 1} if optimize else {})
    assert {entry.domain: entry.version for entry in model.opset_import} == versions
    assert {node.domain for node in model.graph.node} == set(versions)
    return model


def shape_of(value: onnx.ValueInfoProto) -> list[Any]:
    """Sizes, and names of dynamic axes."""
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_names_and_axes(onnx_bundle: Callable[..., Path]) -> None:
    bundle = onnx_bundle(SMALL)
    model = json.loads((bundle / "manifest.json").read_text())["model"]
    layers, heads, vocab = model["n_layer"], model["n_kv_head"], model["vocab_size"]
    width = model["n_embd"] // model["n_head"]
    cached = check_graph(bundle / "cached.onnx", DEFAULT_OPSET).graph
    cache_shape, new_shape = ["batch", heads, "slots", width], [layers, "batch", heads, "steps", width]
    assert [(value.name, shape_of(value)) for value in cached.input] == [
        ("input_ids", ["batch", "steps"]),
        ("prev_ids", ["batch", 1]),
        ("position", ["batch"]),
        ("logits_to_keep", ["kept"]),
        *((f"cache_{kind}_{layer}", cache_shape) for layer in range(layers) for kind in "kv"),
    ]
    assert {v.name: shape_of(v) for v in cached.output} == {
        "logits": ["batch", "kept", vocab],
    } | {"new_k": new_shape, "new_v": new_shape}
    full = check_graph(bundle / "full.onnx", DEFAULT_OPSET).graph
    assert {value.name: shape_of(value) for value in full.input} == {"input_ids": ["batch", "steps"]}
    assert {value.name: shape_of(value) for value in full.output} == {"logits": ["batch", "steps", vocab]}


def test_the_manifest_tells_the_names(onnx_bundle: Callable[..., Path]) -> None:
    """The contract of a bundle has what its graphs take and give, in their order."""
    bundle = onnx_bundle(SMALL)
    contract = json.loads((bundle / "manifest.json").read_text())["contract"]
    axes = {"batch": "B", "steps": "T", "slots": "S", "kept": "R"}
    for role, file in (("prefill", "cached.onnx"), ("full", "full.onnx")):
        graph = onnx.load(bundle / file, load_external_data=False).graph
        used = {name for node in graph.node for name in node.input}
        assert {tensor.name for tensor in graph.initializer} <= used
        for end, values in (("inputs", graph.input), ("outputs", graph.output)):
            found = [(value.name, [axes.get(size, size) for size in shape_of(value)]) for value in values]
            assert found == [(name, tensor["shape"]) for name, tensor in contract[role][end].items()]


def readers_of_the_past(graph: onnx.GraphProto) -> list[str]:
    """The operators that take the cache or a view of it, but for those that read its shape or make a view."""
    past = {value.name for value in graph.input if value.name.startswith("cache_")}
    readers = []
    for node in graph.node:
        if past.isdisjoint(node.input) or node.op_type == "Shape":
            continue
        if node.op_type == "Reshape":
            past.update(node.output)
        else:
            readers.append(node.op_type)
    return sorted(readers)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_copies_nothing_of_the_past(name: str, onnx_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """Products read the cache where it lies: in the file but for a transposition, which onnxruntime makes their own."""
    path = onnx_bundle(name) / "cached.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    layers = sum(value.name.startswith("cache_k_") for value in graph.input)
    assert readers_of_the_past(graph) == ["MatMul"] * layers + ["Transpose"] * layers
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    assert readers_of_the_past(optimized) == ["FusedMatMul"] * layers + ["MatMul"] * layers


@pytest.mark.parametrize("op_type", ["Gather", "Slice", "Concat", "Transpose"])
@pytest.mark.parametrize("of_a_view", [False, True])
def test_a_copy_of_the_past_is_found(op_type: str, of_a_view: bool, onnx_bundle: Callable[..., Path]) -> None:
    graph = onnx.load(onnx_bundle(SMALL) / "cached.onnx", load_external_data=False).graph
    before = readers_of_the_past(graph)
    view = next(node.output[0] for node in graph.node if node.op_type == "Reshape" and "cache_v_0" in node.input)
    graph.node.append(onnx.helper.make_node(op_type, [view if of_a_view else "cache_v_0"], ["copy"]))
    assert readers_of_the_past(graph) == sorted([*before, op_type])


def test_a_cache_that_is_taken_otherwise_is_refused() -> None:
    """The pass that gives each layer its input does not guess."""
    index = ir.Value(name="i", const_value=ir.tensor(np.array(1)))
    for op_type, more, attributes, message in (
        ("Neg", [], {}, "a part of the cache by Neg, which is no layer"),
        ("Gather", [index], {"axis": 1}, "a part of the cache by Gather, which is no layer"),
        ("Gather", [index], {}, r"reads layers \[1\] of cache_k, which has 3"),
        ("Shape", [], {"start": 0, "end": 1}, "the shape of all of cache_k"),
    ):
        cache = ir.Value(name="cache_k", shape=ir.Shape([3, "b", 2, "s", 4]), type=ir.TensorType(ir.DataType.FLOAT))
        graph = ir.Graph([cache], [], nodes=[ir.node(op_type, [cache, *more], attributes)])
        with pytest.raises(LoweringError, match=message):
            _split_cache(graph)


def test_the_checker_finds_a_spoilt_graph(copied: Path) -> None:
    model = onnx.load(copied / "full.onnx", load_external_data=False)
    model.graph.node[0].op_type = "Shapes"
    (copied / "full.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(onnx.checker.ValidationError, match="Shapes"):
        check_graph(copied / "full.onnx", DEFAULT_OPSET)


def test_weights_are_in_one_file(onnx_demo: Path) -> None:
    """Every large initializer of both graphs is a place in weights.safetensors: that of the tensor of its name."""
    weights = load_file(onnx_demo / "weights.safetensors")
    places = layout(weights).places
    for graph in GRAPHS:
        seen = set()
        for tensor in onnx.load(onnx_demo / graph, load_external_data=False).graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                assert len(tensor.raw_data) <= 1 << 12
                continue
            entry = {item.key: item.value for item in tensor.external_data}
            assert entry["location"] == "weights.safetensors"
            assert (int(entry["offset"]), int(entry["length"])) == places[tensor.name]
            assert list(tensor.dims) == list(weights[tensor.name].shape)
            seen.add(tensor.name)
        assert seen == set(weights)
        assert (onnx_demo / graph).stat().st_size < 1 << 17
    # what nanochat stores in bfloat16 stays so
    assert weights["model.transformer.wte.weight"].dtype == torch.bfloat16


def test_nothing_of_this_machine_is_in_the_graphs(onnx_demo: Path, root: Path) -> None:
    for graph in GRAPHS:
        data = (onnx_demo / graph).read_bytes()
        for secret in (str(root), sys.prefix, "site-packages", ".py"):
            assert secret.encode() not in data


def test_float16(onnx_bundle: Callable[..., Path]) -> None:
    bundle = onnx_bundle(SMALL, dtype="float16")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["dtype"] == "float16"
    assert 0 < manifest["verification"]["largest_ratio"] <= FACTOR
    assert {tensor.dtype for tensor in load_file(bundle / "weights.safetensors").values()} <= {
        torch.float16, torch.bfloat16,
    }  # fmt: skip


def test_no_bfloat16(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the target onnx has no bfloat16.*--dtype float16 or float32"):
        lower_bundle(tmp_path / "out", "onnx", source="demo", dtype="bfloat16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("opset", [1, 17, 24, 99])
def test_opsets_that_there_are_none_of(opset: int) -> None:
    with pytest.raises(UsageError, match=rf"--opset {opset} cannot be written.*from 18 to 23"):
        make_target(opset=opset)


def test_options_of_other_targets(tmp_path: Path) -> None:
    for target, option in (("aoti", "--opset=20"), ("onnx", "--march=native")):
        done = run_cli("lower", "-i", "demo", f"--target={target}", option, "-o", tmp_path / "out")
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{option.split('=')[0]} is not for the target {target}" in done.stderr


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_target, "_PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(LoweringError, match=r"needs no_such_package; pip install 'nanochat_x\[onnx\]'"):
        make_target()


def test_a_good_copy_is_taken(copied: Path) -> None:
    """What the next tests spoil."""
    done = run_cli("generate", copied, "--prompt-ids=1", "--max-tokens=1", "--raw")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_corrupt_graph(graph: str, copied: Path) -> None:
    change_byte(copied / graph)
    assert "SHA-256" in refused(copied)


def test_what_is_no_graph(copied: Path) -> None:
    """With the right hash: onnxruntime's own refusal is one line too."""
    replace_file(copied, "cached.onnx", b"no graph")
    assert "cannot open the bundle's programs: " in refused(copied)


def test_a_runtime_that_is_too_old(copied: Path) -> None:
    edit_manifest(copied, lambda manifest: manifest["machine"].update(runtime_version="1.99"))
    assert "needs version 1.99 or newer of the onnx runtime" in refused(copied)


OLD_LIBRARY = """\
#include <onnxruntime_c_api.h>
static const OrtApi* ORT_API_CALL api(uint32_t) noexcept { return nullptr; }
static const char* ORT_API_CALL version() noexcept { return "1.2.3"; }
static OrtApiBase base{api, version};
extern "C" const OrtApiBase* ORT_API_CALL OrtGetApiBase() noexcept { return &base; }
"""
PROGRAM = """\
#include <cstdio>
#include "onnx_library.h"
int main() {
  try { nanochat_x::use_onnxruntime(); } catch (const nanochat_x::Error& error) { std::puts(error.what()); }
}
"""


def test_a_library_that_is_older_than_the_program(tmp_path: Path, root: Path) -> None:
    """One line instead of a crash, and instead of what onnxruntime itself would print."""
    cache_file = (ensure_built("onnx").build_dir / "CMakeCache.txt").read_text()
    (headers,) = re.findall(r"^ONNXRUNTIME_INCLUDE_DIR:PATH=(.*)$", cache_file, flags=re.MULTILINE)
    (compiler,) = re.findall(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cache_file, flags=re.MULTILINE)
    (tmp_path / "old.cpp").write_text(OLD_LIBRARY)
    (tmp_path / "program.cpp").write_text(PROGRAM)
    command = [compiler, "-std=c++20", "-isystem", headers, f"-I{root}/runners/include", f"-I{root}/runners/backends"]
    old = tmp_path / "libold.so"
    subprocess.run([*command, "-shared", "-fPIC", str(tmp_path / "old.cpp"), "-o", str(old)], check=True)
    source, program = str(tmp_path / "program.cpp"), str(tmp_path / "program")
    subprocess.run([*command, f'-DNANOCHAT_X_ONNXRUNTIME="{old}"', source, "-o", program, "-ldl"], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert line.startswith("onnxruntime 1.2.3 is older than 1.")
    assert "pip install --upgrade onnxruntime" in line


def test_no_cuda_here(copied: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    assert "pip install onnxruntime-gpu" in refused(copied, "--device=cuda")


def test_threads(onnx_bundle: Callable[..., Path]) -> None:
    options = ("--prompt-ids=1,2,3", "--max-tokens=8", "--raw", "--temperature=0", "--json")
    runner = Runner(onnx_bundle(SMALL))
    ids = [runner.json("generate", *options, *more)["samples"][0]["ids"] for more in ([], ["--threads=1"])]
    assert ids[0] == ids[1]


def test_no_cache(tmp_path: Path) -> None:
    bundle = lower_bundle(tmp_path / "out", "onnx", base_dir=GENERATIONS / SMALL, max_seq_len=MAX_SEQ_LEN, cached=False)
    assert {path.name for path in bundle.glob("*.onnx")} == {"full.onnx"}
    assert_golden_logits(bundle, SMALL, "by-3-1-16", tmp_path)


def test_the_runner_needs_no_python(onnx_bundle: Callable[..., Path]) -> None:
    program = ensure_built("onnx").program
    libraries = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0] for line in libraries.splitlines()}
    assert not [name for name in names if "python" in name or "torch" in name]


def example_answer(command: list[str], name: str, bundle: Path, env: dict[str, str] | None = None) -> list[int]:
    """What a documented example prints for a golden prompt."""
    golden = golden_of(name)
    arguments = [str(bundle), str(len(golden.greedy_tokens)), *map(str, golden.greedy_prompt)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize("name", NAMES)
def test_python_example(name: str, onnx_bundle: Callable[..., Path], root: Path) -> None:
    example = root / "docs" / "examples" / "onnx_continue.py"
    assert example_answer([sys.executable, str(example)], name, onnx_bundle(name)) == golden_of(name).greedy_tokens


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A folder with onnxruntime-node and the example; skips where either cannot be had."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    # The program for the CPU is in the package; nothing else is to be downloaded.
    env = os.environ | {"ONNXRUNTIME_NODE_INSTALL": "skip", "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
    command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), "onnxruntime-node"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.skip("npm install onnxruntime-node took more than 300 s")
    if done.returncode != 0:
        pytest.skip(f"npm install onnxruntime-node failed: {(done.stderr.splitlines() or ['?'])[-1]}")
    shutil.copy(root / "docs" / "examples" / "onnx_continue.mjs", folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_node_example(name: str, onnx_bundle: Callable[..., Path], node_folder: Path) -> None:
    command = ["node", str(node_folder / "onnx_continue.mjs")]
    assert example_answer(command, name, onnx_bundle(name)) == golden_of(name).greedy_tokens
