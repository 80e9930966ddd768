"""Builds, checks and measures the CUDA kernels on the card of this machine, in one command:

    python bench/h100.py

Takes a card of compute capability 9.0, nvcc, CMake, ninja and this project's Python packages (torch with CUDA for the
eager figure). Nothing is fetched. The last line is JSON. docs/cuda.md has what it printed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from peer_eager import EagerEngine  # noqa: E402  (the paths above come first)

from nanochat_x.bundle import list_files, write_manifest  # noqa: E402
from nanochat_x.checkpoint import Checkpoint, choose_checkpoint, load_checkpoint  # noqa: E402
from nanochat_x.initialize import write_random_checkpoint  # noqa: E402
from nanochat_x.manifest import SCHEMA_VERSION  # noqa: E402
from nanochat_x.model import GPT, prepare_weights, rotary_tables  # noqa: E402
from nanochat_x.quantize import (  # noqa: E402
    BITS,
    GROUP_SIZE,
    Format,
    Method,
    dequantized,
    is_matrix,
    round_to_nearest,
    with_matrices,
)
from nanochat_x.quantized_model import in_dtype  # noqa: E402
from nanochat_x.runner import forward_arguments  # noqa: E402
from nanochat_x.safetensors_file import write_safetensors  # noqa: E402
from nanochat_x.verification import reference_logits, verify  # noqa: E402

CONTEXT, NEW = 512, 128


def main() -> int:
    """Returns the exit code: 0 if every check passed."""
    if not torch.cuda.is_available():
        print("there is no CUDA device here; bench/h100.py measures one", file=sys.stderr)
        return 2
    start = time.monotonic()

    def passed(what: str) -> None:
        print(f"{what}, {time.monotonic() - start:.0f} s from the start")

    name = torch.cuda.get_device_name(0)
    print(f"{name}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(prefix="nanochat_x-h100-") as folder:
        scratch = Path(folder)
        programs = build(scratch / "build")
        passed("built")
        kernel = run_kernel_bench(programs / "decode_bench")
        passed("decode_bench done")
        many = run_kernel_bench(programs / "pass_bench")
        passed("pass_bench done")
        parity = check_all_parity(programs / "nanochat-cuda", scratch)
        passed("parity checked")
        figures = measure(programs / "nanochat-cuda", scratch)
    figures["of_read_bandwidth"] = percent(kernel, r"d20 context  512, 64 steps.* ([0-9.]+) % of read")
    figures["of_matrix_rate"] = percent(many, r"d20 prompt of 2048.* ([0-9.]+) % of the matrix rate")
    passed("done")
    print(json.dumps({"card": name, "kernel": kernel, "many": many, "parity": parity, **figures}))
    return 0


def build(folder: Path) -> Path:
    """The folder with the programs. Raises CalledProcessError."""
    off = [f"-DNANOCHAT_X_{name}=OFF" for name in ("AOTI", "TORCHSCRIPT", "ONNX", "EXECUTORCH")]
    configure = ["cmake", "-S", str(ROOT / "runners"), "-B", str(folder), "-G", "Ninja", "-DNANOCHAT_X_CUDA=ON", *off]
    prefix = os.environ.get("NANOCHAT_X_PREFIX")
    run([*configure, *([f"-DCMAKE_PREFIX_PATH={prefix}"] if prefix else [])])
    run(["cmake", "--build", str(folder), "--target", "nanochat-cuda", "decode_bench", "pass_bench"])
    return folder


def run(command: list[str]) -> str:
    """Standard output. What a command that fails has printed is shown."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stdout[-6000:], done.stderr[-6000:], sep="\n", file=sys.stderr)
        done.check_returncode()
    return done.stdout


def run_kernel_bench(program: Path) -> list[str]:
    """Checks kernels against float64 and measures them beside the card's limits; its lines."""
    lines = run([str(program)]).splitlines()
    print("\n".join(lines))
    return lines


def percent(lines: list[str], pattern: str) -> float:
    """What the pattern's group finds in the line that it matches."""
    found = re.findall(f"^{pattern}", "\n".join(lines), flags=re.MULTILINE)
    return float(found[-1])


def check_all_parity(program: Path, scratch: Path) -> list[str]:
    """The summaries of all models. They share the card and the processor, as most of it is float64 on the latter."""
    models: list[tuple[int, Method | None]] = [(6, None), (4, None), (4, "int8"), (4, "int4"), (2, None)]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda model: check_parity(program, scratch, *model), models))


def check_parity(program: Path, scratch: Path, depth: int, method: Method | None = None) -> str:
    """Holds a random model of that depth to the rule of `lower`, in bfloat16; its summary. Raises ParityError.

    `method`: its matrices are in 8 or 4 bits, each weight the nearest, and held to what they stand for.
    """
    name = f"d{depth}" if method is None else f"d{depth}-{method}"
    base = scratch / name
    write_random_checkpoint(depth, base, sequence_len=1024, vocab_size=4096, window_pattern="SL")
    checkpoint = load_checkpoint(choose_checkpoint(None, "base", f"d{depth}", 0, base, None))
    stored = in_dtype(nearest(checkpoint.weights, method), torch.bfloat16)
    weights = dequantized(stored)
    bundle = write_bundle(scratch / f"bundle-{name}", checkpoint, stored, 1024, method)

    def forward(inputs: Path, output: Path, *, cache: bool = True, chunks: Sequence[int] = ()) -> None:
        run([str(program), "forward", str(bundle), *forward_arguments(inputs, output, cache=cache, chunks=chunks)])

    found = verify(checkpoint.spec, weights, torch.bfloat16, 1024, forward)
    error = max(case["runner_error"] for case in found["comparisons"])
    few = check_samples(program, bundle, checkpoint, weights, error, prompt=[1, 2, 3, 4, 5], count=3)
    # Of a long prompt the samples read what they have in common together.
    many = check_samples(program, bundle, checkpoint, weights, error, prompt=list(range(1, 601)), count=20)
    print(f"parity {name}: {found['summary']}\n  {few}\n  {many}")
    shutil.rmtree(base)
    return str(found["summary"])


def nearest(weights: Mapping[str, torch.Tensor], method: Method | None) -> dict[str, torch.Tensor]:
    """The state dict with its matrices in 8 or 4 bits, each weight the nearest: GPTQ takes minutes."""
    if method is None:
        return dict(weights)
    matrices = ((name, round_to_nearest(weight, Format(method))) for name, weight in weights.items() if is_matrix(name))
    return with_matrices(weights, matrices)


def check_samples(
    program: Path, bundle: Path, checkpoint: Checkpoint, weights: Any, error: float, *, prompt: list[int], count: int
) -> str:
    """Greedy samples of a prompt, whose rows are copies in the cache, must be alike, and be what one is; says how far.

    One row has a kernel of its own, so that logits, each at most `error` from float64's, are not the same to the bit:
    where the texts part, float64 may hold at most 2 * error between the two tokens. Raises RuntimeError.
    """
    command = [str(program), "generate", str(bundle), f"--prompt-ids={','.join(map(str, prompt))}", "--temperature=0",
               "--max-tokens=40", "--raw", "--json"]  # fmt: skip
    printed = (run([*command, f"--num-samples={samples}"]).splitlines()[-1] for samples in (1, count))
    (one,), many = ([sample["ids"] for sample in json.loads(line)["samples"]] for line in printed)
    if many != [many[0]] * count:
        raise RuntimeError(f"samples of one prompt differ: {many}")
    same = next((i for i, (a, b) in enumerate(zip(one, many[0], strict=True)) if a != b), len(one))
    text = f"{count} greedy samples of {len(prompt)} + 40 tokens are alike; one sample has the first {same} of 40"
    if same < len(one):
        ids = torch.tensor([[*prompt, *one[:same]]])
        exact = reference_logits(checkpoint.spec, weights, torch.float64, 1024, {"ids": ids})["ids"][0, -1]
        apart = float(abs(exact[one[same]] - exact[many[0][same]]))
        text += f", then float64 holds {apart:.2g} between the two (allowed {2 * error:.2g})"
        if not apart <= 2 * error:
            raise RuntimeError(f"one sample differs from {count}: {one} and {many[0]}")
    return text


def write_bundle(
    folder: Path, checkpoint: Checkpoint, weights: Any, positions: int, method: Method | None = None
) -> Path:
    """A bundle of weights alone: the kernels run no program of it, so all roles name the weights."""
    folder.mkdir()
    spec = checkpoint.spec
    cos, sin = rotary_tables(spec, positions, torch.bfloat16)
    cropped = {k: v[: spec.vocab_size] if v.ndim == 2 and v.shape[0] == spec.padded_vocab_size else v
               for k, v in weights.items()}  # fmt: skip
    write_safetensors(
        folder / "weights.safetensors",
        {"cos": cos, "sin": sin, **{f"model.{k}": v for k, v in cropped.items()}},
    )
    (folder / "tokenizer.json").write_text(checkpoint.tokenizer.to_portable_json(), encoding="utf-8")
    manifest = {
        "schema_version": SCHEMA_VERSION, "nanochat_x_version": "0.1.0", "target": "aoti", "dtype": "bfloat16",
        "model": spec.to_json(), "max_seq_len": positions,
        "checkpoint": {"source": "base", "tag": "random", "step": 0, "model_sha256": checkpoint.model_sha256,
                       "overrides": {}, "notes": []},
        "contract": {},
        "machine": {"platform": "linux", "architecture": "x86_64", "march": "native", "torch_version": "2.13.0"},
        "programs": dict.fromkeys(("prefill", "decode", "full"), "weights.safetensors"),
        "weights": "weights.safetensors", "tokenizer": "tokenizer.json",
        "special_tokens": dict(checkpoint.tokenizer.special_tokens), "verification": None,
        "files": list_files(folder),
    }  # fmt: skip
    if method is not None:
        manifest["quantization"] = {"method": method, "bits": BITS[method], "group_size": GROUP_SIZE}
    write_manifest(folder, manifest)
    return folder


def measure(program: Path, scratch: Path) -> dict[str, Any]:
    """d20 through the runner, and eager PyTorch on the same card."""
    base = scratch / "d20"
    write_random_checkpoint(20, base)
    checkpoint = load_checkpoint(choose_checkpoint(None, "base", "d20", 0, base, None))
    weights = prepare_weights(checkpoint.weights, torch.bfloat16)
    bundle = write_bundle(scratch / "bundle-d20", checkpoint, weights, 2048)
    output = run([str(program), "bench", str(bundle), "--batch=1,4,64", "--samples=64", f"--prompt-tokens={CONTEXT}",
                  f"--decode-tokens={NEW}", "--repeats=3", "--json"])  # fmt: skip
    print(output)
    packed = {method: packed_rate(program, scratch, checkpoint, method) for method in ("int8", "int4")}
    eager = eager_rate(checkpoint, weights)
    lines = json.loads(output.splitlines()[-1])["lines"]
    decode, few, batch = (line["tokens_per_s"]["median"] for line in lines if line["what"] == "decode")
    (samples,) = (line["tokens_per_s"]["median"] for line in lines if line["what"] == "samples")
    print(f"one small operator of eager PyTorch: {launch_seconds() * 1e6:.1f} us; it starts some 1,500 a token")
    print(f"d20, batch 1, context {CONTEXT}: runner {decode:.0f} tokens/s, eager PyTorch {eager:.1f} tokens/s "
          f"({decode / eager:.1f} x)")  # fmt: skip
    for method, rate in packed.items():
        print(f"{method}: runner {rate:.0f} tokens/s, {rate / decode:.2f} times bfloat16's")
    print(f"4 rows: {few:.0f} tokens/s, {few / decode:.1f} times one row's")
    print(f"64 rows: {batch:.0f} tokens/s, {batch / decode:.1f} times one row's")
    print(f"64 samples of one prompt: {samples:.0f} tokens/s, {samples / decode:.1f} times one row's")
    return {
        "runner_tokens_per_s": decode,
        **{f"{method}_tokens_per_s": rate for method, rate in packed.items()},
        "batch_tokens_per_s": batch,
        "samples_tokens_per_s": samples,
        "eager_tokens_per_s": eager,
        "bench": json.loads(output.splitlines()[-1]),
    }


def packed_rate(program: Path, scratch: Path, checkpoint: Checkpoint, method: Method) -> float:
    """Tokens a second of one row in 8 or 4 bits, behind CONTEXT tokens."""
    weights = in_dtype(nearest(checkpoint.weights, method), torch.bfloat16)
    bundle = write_bundle(scratch / f"bundle-d20-{method}", checkpoint, weights, 2048, method)
    output = run([str(program), "bench", str(bundle), "--batch=1", f"--prompt-tokens={CONTEXT}",
                  f"--decode-tokens={NEW}", "--repeats=3", "--json"])  # fmt: skip
    print(output)
    lines = json.loads(output.splitlines()[-1])["lines"]
    return float(next(line["tokens_per_s"]["median"] for line in lines if line["what"] == "decode"))


def eager_rate(checkpoint: Checkpoint, weights: Any) -> float:
    """Tokens a second of nanochat's way behind CONTEXT tokens: eager PyTorch, a cache in place, one row."""
    # cuDNN's attention makes a plan for each length anew, 1.8 ms a layer as measured: no figure to be beside.
    torch.backends.cuda.enable_cudnn_sdp(False)
    with torch.inference_mode():
        on_card = {name: tensor.cuda() for name, tensor in weights.items()}
        engine = EagerEngine(GPT.from_weights(checkpoint.spec, on_card, torch.bfloat16), CONTEXT + 2 * NEW, "cuda")
        ids = torch.randint(0, checkpoint.spec.vocab_size, (1, CONTEXT + 2 * NEW), device="cuda")
        engine.feed(ids[:, :CONTEXT])
        for i in range(NEW):  # warm up
            engine.feed(ids[:, CONTEXT + i : CONTEXT + i + 1])
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for i in range(NEW, 2 * NEW):
            engine.feed(ids[:, CONTEXT + i : CONTEXT + i + 1])
        torch.cuda.synchronize()
        return NEW / (time.perf_counter() - begin)


def launch_seconds() -> float:
    """What one operator of eager PyTorch takes here, which limits eager's rate."""
    x = torch.zeros(16, device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(2000):
            x.add_(1)
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / 2000


if __name__ == "__main__":
    sys.exit(main())
