"""How nanochat_x's runner stands beside others, in one run: the same shape, the same width, the same number of threads.

    python bench/setup_peers.py                  once: installs llama.cpp and onnxruntime-genai apart from the project
    python bench/peers.py BUNDLE [BUNDLE ...]

Measured beside each other, in turns: the bundles; nanochat's own way (eager PyTorch with a KV cache, peer_eager.py);
llama.cpp and onnxruntime-genai on a random llama of the same layers, heads, width and vocabulary and as many weights in
its matrices, in the bundles' widths. What cannot be measured here is named. The last line is one JSON object.
docs/bench.md tells the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_x.console import Progress, progress_on
from nanochat_x.errors import NanochatXError, RunnerError, UsageError
from nanochat_x.machine import describe_machine, usable_cores
from nanochat_x.manifest import read_manifest
from nanochat_x.runner import Runner

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / "build" / "peers"
#: A bundle's width -> what llama.cpp calls it, and genai (None: its builder has none for the CPU).
WIDTHS: dict[str, tuple[str, str | None]] = {
    "float32": ("f32", "fp32"),
    "16 bit": ("f16", None),
    "int8": ("q8_0", "int8"),
    "int4": ("q4_0", "int4"),
}


@dataclass
class Entrant:
    """One that is measured: a program that answers lines (bench/peer_worker.py tells how), and what it took."""

    name: str
    width: str
    command: Sequence[str]
    environment: Mapping[str, str] | None = None
    rounds: list[dict[str, float]] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Waits until it is loaded and warm. Raises RunnerError."""
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=None if self.environment is None else dict(self.environment))  # fmt: skip
        if self._answer().get("ready") is not True:
            raise RunnerError(f"{self.name} does not say that it is ready")

    def run(self) -> None:
        """One round. Raises RunnerError."""
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise RunnerError(f"{self.name} has ended") from None
        answer = self._answer()
        self.rounds.append({key: float(answer[key]) for key in ("prefill_s", "decode_s")})

    def stop(self) -> None:
        """Ends the program."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            code = self.process.poll()
            raise RunnerError(f"{self.name} answered {line[:80]!r} (exit code {code})") from None
        return answer


def width_of(manifest: Mapping[str, Any]) -> str:
    """`float32`, `16 bit`, `int8` or `int4`: of the weights of a bundle."""
    quantization = manifest.get("quantization")
    if quantization:
        return f"int{quantization['bits']}"
    return "float32" if manifest["dtype"] == "float32" else "16 bit"


def llama_shape(model: Mapping[str, Any], positions: int) -> dict[str, int]:
    """The llama that has as many weights in its matrices as the model: three MLP matrices in the place of two.

    Widths are multiples of 32, as its quantised forms want it: where that does not come out even, the nearest.
    """
    n_embd = int(model["n_embd"])
    ffn = 2 * int(model.get("mlp_width", 4 * n_embd)) / 3
    return {
        "n_embd": n_embd,
        "n_layer": int(model["n_layer"]),
        "n_head": int(model["n_head"]),
        "n_kv_head": int(model["n_kv_head"]),
        "ffn_width": max(32, round(ffn / 32) * 32),
        "vocab_size": int(model["vocab_size"]),
        "context": max(2048, positions),
    }


def matrix_weights(model: Mapping[str, Any]) -> int:
    """Elements of the matrices of a nanochat model, lm_head's among them."""
    n_embd, kv = int(model["n_embd"]), int(model["n_kv_head"]) * int(model["n_embd"]) // int(model["n_head"])
    mlp = int(model.get("mlp_width", 4 * n_embd))
    return int(model["n_layer"]) * n_embd * (2 * n_embd + 2 * kv + 2 * mlp) + int(model["vocab_size"]) * n_embd


def llama_weights(shape: Mapping[str, int]) -> int:
    """The same of a llama, its output among them."""
    n_embd, kv = shape["n_embd"], shape["n_kv_head"] * shape["n_embd"] // shape["n_head"]
    layer = n_embd * (2 * n_embd + 2 * kv + 3 * shape["ffn_width"])
    return shape["n_layer"] * layer + shape["vocab_size"] * n_embd


def peer_python() -> Path:
    """The interpreter of the peers' environment."""
    return PEERS / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def has_package(name: str) -> bool:
    """Whether the peers' environment imports it."""
    python = peer_python()
    return python.exists() and subprocess.run([python, "-c", f"import {name}"], capture_output=True,
                                              check=False).returncode == 0  # fmt: skip


def made(maker: str, shape: Mapping[str, int], kind: str, suffix: str, progress: Progress) -> Path | None:
    """A peer's model, made once for a shape and kind; None if its maker failed."""
    text = json.dumps(shape, sort_keys=True)
    folder = PEERS / "models" / hashlib.sha256(text.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / (kind + suffix)
    if output.exists():
        return output
    (folder / "shape.json").write_text(text, encoding="utf-8")
    part = folder / ("part-" + kind + suffix)
    with progress.stage(f"make {maker.removesuffix('.py')} {kind}"):
        command = [str(peer_python()), str(HERE / maker), str(part), str(folder / "shape.json"), kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        progress.note(f"  {maker} {kind} failed: {lines[-1] if lines else done.returncode}")
        return None
    part.replace(output)
    return output


def entrants(arguments: argparse.Namespace, progress: Progress) -> tuple[list[Entrant], dict[str, str]]:
    """Who is measured, and name -> why not of those who are not."""
    numbers = [str(arguments.prompt_tokens), str(arguments.decode_tokens), str(arguments.threads)]
    found: list[Entrant] = []
    missing: dict[str, str] = {}
    manifests = {bundle: read_manifest(bundle) for bundle in arguments.bundles}
    for bundle, manifest in manifests.items():
        options = ["--serve", "--batch=1", f"--prompt-tokens={numbers[0]}", f"--decode-tokens={numbers[1]}",
                   f"--threads={numbers[2]}"]  # fmt: skip
        command = Runner(bundle, log=progress).command("bench", *options)
        found.append(Entrant(str(bundle), width_of(manifest), command))
    first, manifest = next(iter(manifests.items()))
    for bundle, other in manifests.items():
        if other["model"] != manifest["model"]:
            raise UsageError(f"{bundle} and {first} are of different models", remedy="compare bundles of one model")
    for width, dtype in {width_of(m): m["dtype"] for m in manifests.values()}.items():
        if "eager" in arguments.peers and width in ("float32", "16 bit"):
            sample = next(bundle for bundle, m in manifests.items() if width_of(m) == width)
            command = [sys.executable, str(HERE / "peer_eager.py"), str(sample), *numbers]
            found.append(Entrant(f"eager PyTorch {dtype}", width, command))
    shape = llama_shape(manifest["model"], arguments.prompt_tokens + arguments.decode_tokens)
    makers = {"llama.cpp": ("llama_cpp", "llama_gguf.py", ".gguf", "peer_llama_cpp.py"),
              "genai": ("onnxruntime_genai", "llama_genai.py", "", "peer_genai.py")}  # fmt: skip
    for number, (peer, (package, maker, suffix, worker)) in enumerate(makers.items()):
        if peer not in arguments.peers:
            continue
        if not has_package(package):
            missing[peer] = "is not installed: python bench/setup_peers.py"
            continue
        for width in dict.fromkeys(map(width_of, manifests.values())):
            kind = WIDTHS[width][number]
            model = made(maker, shape, kind, suffix, progress) if kind is not None else None
            if model is None:
                missing[f"{peer} {kind or width}"] = "its model could not be made" if kind else "has none for the CPU"
                continue
            found.append(
                Entrant(f"{peer} {kind}", width, [str(peer_python()), str(HERE / worker), str(model), *numbers])
            )
    return found, missing


def figures(entrant: Entrant, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians and ends, in tokens a second."""
    out: dict[str, Any] = {"name": entrant.name, "width": entrant.width}
    for key, tokens in (("prefill", arguments.prompt_tokens), ("decode", arguments.decode_tokens)):
        rates = [tokens / one[f"{key}_s"] for one in entrant.rounds]
        out[f"{key}_tokens_per_s"] = {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}
    return out


def ratios(rows: Sequence[dict[str, Any]], bundles: int) -> list[dict[str, Any]]:
    """Each bundle over each peer of the same width; a peer of another width is no measure for it."""
    found = []
    for ours in rows[:bundles]:
        for theirs in rows[bundles:]:
            if ours["width"] == theirs["width"]:
                over = {
                    key: ours[f"{key}_tokens_per_s"]["median"] / theirs[f"{key}_tokens_per_s"]["median"]
                    for key in ("prefill", "decode")
                }
                found.append({"bundle": ours["name"], "peer": theirs["name"], **over})
    return found


def show(report: Mapping[str, Any]) -> None:
    """The table."""
    width = max(len(row["name"]) for row in report["rows"])
    print(f"\n{report['machine']}; {report['threads']} threads, a prompt of {report['prompt_tokens']} tokens, "
          f"{report['decode_tokens']} new ones, medians of {report['rounds']} rounds\n")  # fmt: skip
    print(f"{'':{width}}  {'weights':8}  {'prefill, tokens/s':>24}  {'decode, tokens/s':>24}")
    for row in report["rows"]:
        cells = []
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            cells.append("{median:.1f} ({min:.1f} to {max:.1f})".format(**row[key]))
        print(f"{row['name']:{width}}  {row['width']:8}  {cells[0]:>24}  {cells[1]:>24}")
    print()
    for one in report["ratios"]:
        print(f"{one['bundle']} / {one['peer']}: prefill {one['prefill']:.2f}, decode {one['decode']:.2f}")
    for name, reason in report["missing"].items():
        print(f"{name}: {reason}")
    print(report["llama"])


def measure(arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """The report. Raises NanochatXError."""
    found, missing = entrants(arguments, progress)
    try:
        for entrant in found:
            with progress.stage(f"load {entrant.name}"):
                entrant.start()
        # In turns, so that what slows the machine down for a while slows all of them down.
        for number in range(arguments.rounds):
            with progress.stage(f"round {number + 1} of {arguments.rounds}"):
                for entrant in found:
                    entrant.run()
    finally:
        for entrant in found:
            entrant.stop()
    model = read_manifest(arguments.bundles[0])["model"]
    shape = llama_shape(model, arguments.prompt_tokens + arguments.decode_tokens)
    rows = [figures(entrant, arguments) for entrant in found]
    return {
        "machine": describe_machine(),
        "threads": arguments.threads,
        "prompt_tokens": arguments.prompt_tokens,
        "decode_tokens": arguments.decode_tokens,
        "rounds": arguments.rounds,
        "rows": rows,
        "ratios": ratios(rows, len(arguments.bundles)),
        "missing": missing,
        "llama": f"the llama has {llama_weights(shape) / 1e6:.1f} M weights in matrices, the model "
                 f"{matrix_weights(model) / 1e6:.1f} M",
    }  # fmt: skip


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--prompt-tokens", type=_positive, default=512)
    parser.add_argument("--decode-tokens", type=_positive, default=128)
    parser.add_argument("--rounds", type=_positive, default=5)
    parser.add_argument("--threads", type=_positive, default=usable_cores())
    parser.add_argument("--peers", default="eager,llama.cpp,genai", help="which of them (default: all)")
    arguments = parser.parse_args(argv)
    arguments.peers = arguments.peers.split(",")
    unknown = set(arguments.peers) - {"eager", "llama.cpp", "genai"}
    if unknown:
        parser.error(f"there is no peer {', '.join(sorted(unknown))}; there are eager, llama.cpp and genai")
    return arguments


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def main(argv: Sequence[str]) -> int:
    """Prints a table, and one JSON line last."""
    arguments = parse(argv)
    try:
        report = measure(arguments, progress_on(sys.stderr))
    except NanochatXError as error:
        print(f"peers.py: error: {error}", file=sys.stderr)
        return 2
    show(report)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
