"""AOTInductor bundles through the C++ runner, against what the real nanochat computed."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bundles import lower_bundle
from golden import FACTOR, MODES, assert_golden_logits, assert_golden_tokens, assert_transcripts
from models import GENERATIONS, MAX_SEQ_LEN, NAMES, exact_logits, golden_of, largest, model_of
from safetensors.torch import load_file, save_file

from nanochat_x.errors import LoweringError
from nanochat_x.runner import Runner
from nanochat_x.targets.aoti import Aoti, _constants, _cpu_features, make_target
from nanochat_x.wrappers import ExportableGPT


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_golden_logits(name: str, mode: str, generation_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    assert_golden_logits(generation_bundle(name), name, mode, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_golden_greedy_tokens(name: str, generation_bundle: Callable[[str], Path]) -> None:
    assert_golden_tokens(generation_bundle(name), name)


def test_transcripts(demo_bundle: Path, data_dir: Path, tmp_path: Path) -> None:
    assert_transcripts(demo_bundle, data_dir, tmp_path)


def test_the_calculator_is_asked(demo_bundle: Path) -> None:
    text = Runner(demo_bundle).run("chat", "--prompt=What is 9325 + 33?", "--temperature=0")
    assert text.strip().endswith("The answer is 9358.")


def test_samples_do_not_depend_on_each_other(demo_bundle: Path) -> None:
    options = ("--prompt=Tom has", "--max-tokens=24", "--seed=7", "--json")
    runner = Runner(demo_bundle)
    several = runner.json("generate", *options, "--num-samples=3")["samples"]
    assert runner.json("generate", *options)["samples"] == several[:1]
    assert len({tuple(sample["ids"]) for sample in several}) == 3


def test_the_runner_needs_no_python(runner_build: Path) -> None:
    libraries = subprocess.run(["ldd", runner_build / "nanochat-aoti"], capture_output=True, text=True, check=True)
    assert "libtorch_cpu" in libraries.stdout
    assert "python" not in re.sub(r"=> \S+", "", libraries.stdout)  # a folder may be named so


def test_portable_code_has_no_avx512(demo_bundle: Path, tmp_path: Path) -> None:
    """Looks at the machine code; finds AVX-512 where the compiler was allowed to use it (if this machine has it)."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump (Debian: binutils) is not installed")
    portable = lower_bundle(tmp_path / "portable", source="demo", options={"march": "x86-64-v3"})
    for program in sorted(portable.glob("*.so")):
        assert not avx512_code(program)
    if "avx512f" in _cpu_features("native"):
        assert any(avx512_code(program) for program in demo_bundle.glob("*.so"))
    manifest = json.loads((portable / "manifest.json").read_text())
    assert manifest["machine"]["march"] == "x86-64-v3"
    assert not [name for name in manifest["machine"]["cpu_features"] if name.startswith("avx512")]


# Registers that only AVX-512 has, masks among them, and instructions that are encoded by EVEX alone on any register.
AVX512_ONLY = re.compile(
    r"%(?:zmm\d+|[xy]mm(?:1[6-9]|2\d|3[01])|k[0-7])\b"
    r"|\bv(?:pternlog|permt2|permi2|pcompress|pexpand|rndscale|scalef|getexp|getmant|dpbf16)\w*"
)


def avx512_code(program: Path) -> set[str]:
    """What of a shared object's code only AVX-512 has."""
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", program], capture_output=True, text=True, check=True)
    # Tab-separated: address, instruction. Names of functions are on lines of their own.
    instructions = [line.split("\t", 1)[1] for line in code.stdout.splitlines() if "\t" in line]
    assert len(instructions) > 1000
    return {found for line in instructions for found in AVX512_ONLY.findall(line.split(" <")[0])}


@pytest.mark.parametrize(
    ("instruction", "only"),
    [
        ("vmovups %zmm0,(%rax)", True),
        ("vaddps %ymm17,%ymm1,%ymm2", True),
        ("vmovdqu8 (%rax),%ymm1{%k1}", True),
        ("vpternlogd $0x55,%ymm0,%ymm0,%ymm0", True),
        ("vrndscaleps $0x8,%xmm0,%xmm0", True),
        ("vfmadd231ps %ymm15,%ymm1,%ymm2", False),
        ("vpermilps $0x1,%ymm1,%ymm2", False),
        ("vroundps $0x8,%ymm0,%ymm0", False),
    ],
)
def test_avx512_is_known_by_its_code(instruction: str, only: bool) -> None:
    assert bool(AVX512_ONLY.search(instruction)) == only


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86-64's instruction sets")
def test_features_of_a_march() -> None:
    v2, v4 = (set(Aoti(march).machine.cpu_features) for march in ("x86-64-v2", "x86-64-v4"))
    assert "sse4.2" in v2
    assert not {name for name in v2 if name.startswith("avx")}
    assert {"avx2", "fma", "avx512f"} <= v4


def eager_greedy(name: str, dtype: torch.dtype, prompt: list[int], count: int) -> list[tuple[int, float]]:
    """Greedy tokens by eager PyTorch without a cache, each with its lead over the second choice."""
    model = ExportableGPT(model_of(name, dtype), MAX_SEQ_LEN)
    ids, answer = list(prompt), []
    with torch.inference_mode():
        for _ in range(count):
            best = model(torch.tensor([ids]))[0, -1].topk(2)
            answer.append((int(best.indices[0]), float(best.values[0] - best.values[1])))
            ids.append(answer[-1][0])
    return answer


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, tmp_path: Path) -> None:
    """The whole way in 16 bits: verified, recorded, and as good as eager in the same type."""
    name = "2025-12-classic"
    bundle = lower_bundle(tmp_path / "bundle", base_dir=GENERATIONS / name, max_seq_len=MAX_SEQ_LEN, dtype=dtype)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["dtype"] == dtype
    assert f"in {dtype}" in manifest["verification"]["summary"]
    assert 0 < manifest["verification"]["largest_ratio"] <= FACTOR
    weights = load_file(bundle / manifest["weights"])
    # this generation keeps its rotary tables in bfloat16, whatever the computation
    assert {weights.pop(table).dtype for table in ("cos", "sin")} == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, dtype)}

    golden = golden_of(name)
    save_file({f"{case}.input_ids": ids for case, ids in golden.input_ids.items()}, tmp_path / "in.safetensors")
    Runner(bundle).forward(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")
    eager_model = ExportableGPT(model_of(name, getattr(torch, dtype)), MAX_SEQ_LEN)
    loss = 0.0
    for case, ids in golden.input_ids.items():
        exact = exact_logits(name, ids)
        with torch.inference_mode():
            eager = eager_model(ids)
        loss = max(loss, largest(eager - exact))
        assert largest(got[f"{case}.logits"] - exact) <= FACTOR * largest(eager - exact)

    prompt = ",".join(map(str, golden.greedy_prompt))
    answer = Runner(bundle).json(
        "generate", "--raw", "--temperature=0", f"--prompt-ids={prompt}", "--max-tokens=8", "--json"
    )
    ids = answer["samples"][0]["ids"]
    assert len(ids) == 8
    for token, (wanted, lead) in zip(
        ids, eager_greedy(name, getattr(torch, dtype), golden.greedy_prompt, 8), strict=True
    ):
        if token != wanted:  # only where the two best are closer than what both may lose
            assert lead <= 2 * (1 + FACTOR) * loss
            break


@pytest.mark.parametrize("march", ["pentium9000", "x86-64-v3 -O0", ""])
def test_unknown_march(march: str) -> None:
    with pytest.raises(LoweringError, match=r"march.*; try native"):
        Aoti(march)


def test_programs_that_cannot_run_here_are_not_verified_here() -> None:
    if "amx_tile" in Path("/proc/cpuinfo").read_text() or "avx512fp16" in _cpu_features("native"):
        pytest.skip("this machine has every feature that the test asks for")
    with pytest.raises(LoweringError, match=r"do not run on this machine \(it lacks .*avx512fp16.*--no-verify"):
        make_target(march="sapphirerapids", will_run=True)
    assert make_target(march="sapphirerapids", will_run=False).machine.march == "sapphirerapids"


def test_a_tensor_that_is_not_row_major_is_refused() -> None:
    """A file has no strides: the program would read it by those that it was captured with."""

    class Product(torch.nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(weight, requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    def program(weight: torch.Tensor) -> torch.export.ExportedProgram:
        return torch.export.export(Product(weight), (torch.ones(2, 3),), strict=False)

    assert list(_constants(program(torch.ones(3, 4)))) == ["weight"]
    with pytest.raises(LoweringError, match="tensor weight is not row-major in memory"):
        _constants(program(torch.ones(4, 3).t()))
