"""`bench`: keys and units, bytes a token from the checkpoint's own tensors, the picture. No speed is ever asserted."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from bundles import run_cli
from models import GENERATIONS, MAX_SEQ_LEN

from nanochat_x import cli_bench
from nanochat_x.bench_plot import write_plot
from nanochat_x.checkpoint import find_checkpoint, load_checkpoint
from nanochat_x.cli import main
from nanochat_x.errors import RunnerError
from nanochat_x.matmul_speed import matmul_flops
from nanochat_x.runner import run_printing

NAME = "2026-07-smear"
PROMPT, DECODE, CONTEXT = 24, 5, 300  # the context lies beyond the short windows


def report_of(bundle: Path, *options: str) -> dict[str, Any]:
    """The JSON line of a short run."""
    done = run_cli("bench", bundle, "--json", f"--prompt-tokens={PROMPT}", f"--decode-tokens={DECODE}", "--repeats=2",
                   "--threads=1", *options)  # fmt: skip
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.fixture(scope="module")
def report(lowered: Callable[..., Path]) -> dict[str, Any]:
    return report_of(lowered(NAME), "--batch=1,2", "--samples=3", f"--contexts={CONTEXT}", "--matmul-gflops=50")


def check_spread(spread: dict[str, float]) -> None:
    assert list(spread) == ["median", "min", "max"]
    assert 0 < spread["min"] <= spread["median"] <= spread["max"]


# --- the report


def test_keys_and_units(report: dict[str, Any]) -> None:
    assert list(report) == ["bundle", "target", "runtime", "dtype", "threads", "prompt_tokens", "decode_tokens",
                            "repeats", "start", "memory", "limits", "lines"]  # fmt: skip
    assert (report["target"], report["dtype"], report["threads"]) == ("aoti", "float32", 1)
    assert (report["prompt_tokens"], report["decode_tokens"], report["repeats"]) == (PROMPT, DECODE, 2)
    assert list(report["start"]) == ["load_s", "first_token_s", "first_token_of_1_s"]
    for spread in [*report["start"].values(), report["limits"]["read_bytes_per_s"]]:
        check_spread(spread)
    assert report["start"]["load_s"]["min"] < report["start"]["first_token_s"]["max"], "loading is a part of it"
    assert report["limits"]["matmul_flops_per_s"] == 50e9
    # Bytes, not kilobytes: libtorch alone takes tens of MB, and no runner of a tiny model takes 4 GB
    assert 10e6 < report["memory"]["peak_bytes"] < 4e9
    held = report["memory"]["weights_bytes"] + report["memory"]["cache_bytes"]
    assert report["memory"]["ratio"] == pytest.approx(report["memory"]["peak_bytes"] / held)


def test_rates_are_tokens_over_seconds(report: dict[str, Any]) -> None:
    what = [(line["what"], line["rows"], line["context"], line["tokens"]) for line in report["lines"]]
    assert what == [("prefill", 1, 0, PROMPT), ("decode", 1, PROMPT, DECODE), ("prefill", 2, 0, PROMPT),
                    ("decode", 2, PROMPT, DECODE), ("samples", 3, PROMPT, DECODE),
                    ("decode", 1, CONTEXT, DECODE)]  # fmt: skip
    for line in report["lines"]:
        rates = sorted(line["rows"] * line["tokens"] / seconds for seconds in line["seconds"])
        check_spread(line["tokens_per_s"])
        assert len(rates) == 2
        assert [line["tokens_per_s"][key] for key in ("min", "max")] == pytest.approx(rates)
        assert line["tokens_per_s"]["median"] == pytest.approx(sum(rates) / 2)
        work, limits = line.get("operations"), report["limits"]
        allowed = (
            limits["matmul_flops_per_s"] * line["rows"] * line["tokens"] / work
            if line["what"] == "prefill"
            else limits["read_bytes_per_s"]["max"] * line["rows"] / line["bytes_per_step"]
        )
        assert line["limit"]["tokens_per_s"] == pytest.approx(allowed)
        assert line["limit"]["share"] == pytest.approx(line["tokens_per_s"]["median"] / allowed)
        assert line["limit"]["above"] is (line["limit"]["share"] > 1.2)


# --- bytes of a token, and the operations of a prompt, from the checkpoint's own tensors


def counted(context: int, *, compact: bool = False) -> tuple[int, float]:
    """Bytes of a float32 step: of the matrices, and of one row (tables and live cache, the mean of DECODE steps).

    Compact matrices have 28 bits a value, and for each row a byte and an int32, of which there is one more; what their
    exceptions take is not counted.
    """
    checkpoint = load_checkpoint(find_checkpoint(base_dir=GENERATIONS / NAME))
    spec = checkpoint.spec
    matrices, row = 0, 2.0 * spec.head_dim // 2 * 4  # cos and sin
    for name, tensor in checkpoint.weights.items():
        if name.startswith(("transformer.wte.", "value_embeds.")):
            row += tensor.shape[1] * tensor.element_size()
            continue
        rows, width = tensor.shape if tensor.dim() == 2 else (1, tensor.numel())
        rows = spec.vocab_size if name == "lm_head.weight" else rows
        # Gates are no products of the operator's.
        is_compact = compact and tensor.dim() == 2 and width % 32 == 0 and "gate" not in name
        matrices += rows * width * 7 // 2 + 5 * rows + 4 if is_compact else 4 * rows * width
    for window in spec.windows:
        for position in range(context, context + DECODE):
            keys = min(position, position if window is None else window)
            row += keys * 2 * spec.n_kv_head * spec.head_dim * 4 / DECODE
    return matrices, row


def bytes_of(report: dict[str, Any], rows: int, context: int) -> float:
    (line,) = (line for line in report["lines"]
               if (line["what"], line["rows"], line["context"]) == ("decode", rows, context))  # fmt: skip
    return float(line["bytes_per_step"])


def test_bytes_of_a_step_are_those_of_the_checkpoint(report: dict[str, Any]) -> None:
    for context in (PROMPT, CONTEXT):
        matrices, row = counted(context, compact=True)
        # At most one value in 256 is an exception, of 8 bytes: 4 of column, 4 of value.
        exceptions = bytes_of(report, 1, context) - matrices - row
        assert -0.01 < exceptions <= 8 * counted(context)[0] / 4 / 256
        if context == PROMPT:
            assert bytes_of(report, 2, context) == pytest.approx(matrices + exceptions + 2 * row, rel=1e-9)
    assert counted(CONTEXT)[1] > counted(PROMPT)[1], "more is live there"


@pytest.mark.parametrize(
    ("target", "options"),
    [("onnx", ()), ("torchscript", ("--matmul-gflops=1",)), ("executorch", ("--matmul-gflops=1",))],
)
def test_targets_count_alike(
    lowered: Callable[..., Path], report: dict[str, Any], target: str, options: tuple[str, ...]
) -> None:
    """Weights in another file, or inside the program, where gates, lambdas and what compact rows have beside their
    values (5 bytes of 112 or more) may be left out."""
    other = report_of(lowered(NAME, target), "--batch=1,2", *options)
    matrices, row = counted(PROMPT, compact=target != "onnx")
    for rows in (1, 2):
        assert bytes_of(other, rows, PROMPT) == pytest.approx(
            matrices + rows * row, rel=0.02 if target == "onnx" else 0.05
        )
    assert other["lines"][0]["operations"] == report["lines"][0]["operations"]
    if not options:  # measured, by PyTorch
        assert other["limits"]["matmul_flops_per_s"] > 0


def test_operations_of_a_prompt(report: dict[str, Any]) -> None:
    spec = load_checkpoint(find_checkpoint(base_dir=GENERATIONS / NAME)).spec
    kv = spec.n_kv_head * spec.head_dim
    block = spec.n_layer * spec.n_embd * (2 * spec.n_embd + 2 * kv + 2 * spec.mlp_width)
    pairs = sum(min(t, t if window is None else window) + 1 for window in spec.windows for t in range(PROMPT))
    expected = 2 * block * PROMPT + 2 * spec.vocab_size * spec.n_embd + 4 * spec.n_head * spec.head_dim * pairs
    assert report["lines"][0]["operations"] == expected
    assert report["lines"][2]["operations"] == 2 * expected


# --- the command line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bench", "Missing argument 'BUNDLE'"),
        ("bench /nowhere", "no bundle at /nowhere"),
        ("bench b --batch 1,0", "'0' is not an integer of at least 1"),
        ("bench b --batch x", "'x' is not an integer of at least 1"),
        ("bench b --samples 0", "'0' is not an integer of at least 1"),
        ("bench b --samples 8,,64", "'' is not an integer of at least 1"),
        ("bench b --contexts 1,,2", "'' is not an integer of at least 1"),
        ("bench b --repeats 0", "'0' is not an integer of at least 1"),
        ("bench b --repeats 1001", "at most 1000"),
        ("bench b --prompt-tokens 0", "'0' is not an integer of at least 1"),
        ("bench b --matmul-gflops 0", "not a number above 0"),
        ("bench b --matmul-gflops nan", "not a number above 0"),
        ("bench b --plot picture.svg", "--plot writes a PNG"),
        ("bench b --plot nowhere/x.png", "is no folder"),
        ("bench b --plot folder.png", "is a folder"),
        ("bench b --threads 0", "'0' is not an integer of at least 1"),
    ],
)
def test_a_mistake_is_one_line(
    line: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    assert main(shlex.split(line)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (said,) = captured.err.splitlines()
    assert message in said


def test_lengths_that_the_bundle_does_not_take(lowered: Callable[..., Path]) -> None:
    for option in (f"--prompt-tokens={MAX_SEQ_LEN}", f"--contexts={MAX_SEQ_LEN}"):
        done = run_cli("bench", lowered(NAME), option, "--matmul-gflops=1")
        assert (done.returncode, done.stdout) == (2, "")
        (said,) = done.stderr.splitlines()
        assert f"more than the {MAX_SEQ_LEN} tokens" in said


def test_what_is_handed_over(monkeypatch: pytest.MonkeyPatch, handed_over: list[list[str]]) -> None:
    monkeypatch.setattr(cli_bench, "_measured_matmul", lambda threads: 1e9 * threads)
    monkeypatch.setattr(cli_bench, "usable_cores", lambda: 7)
    assert main(["bench", "b"]) == 5, "the program's exit code is ours"
    main(["bench", "b", "--batch", "1, 3", "--contexts", "9", "--prompt-tokens", "4", "--decode-tokens", "2", "--json",
          "--samples", "8,2", "--repeats", "1", "--threads", "3", "--device", "cpu",
          "--matmul-gflops", "12.5"])  # fmt: skip
    assert handed_over == [
        ["bench", "b", "--batch=1,8", "--repeats=5", "--threads=7", "--matmul-gflops=7.0"],
        ["bench", "b", "--batch=1,3", "--repeats=1", "--threads=3", "--prompt-tokens=4", "--decode-tokens=2",
         "--samples=8,2", "--contexts=9", "--device=cpu", "--matmul-gflops=12.5", "--json"],
    ]  # fmt: skip


def program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_run_printing(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('one'); print('two'); print('said', file=sys.stderr); sys.exit(3)"
    assert run_printing(program(code), keep_last=True) == (3, ["one", "two"])
    assert capfd.readouterr() == ("one\n", "said\n")
    assert run_printing(program(code), keep_last=False) == (3, ["one", "two"])
    assert capfd.readouterr().out == "one\ntwo\n"
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    assert run_printing(program(killed), keep_last=True) == (128 + signal.SIGTERM, [])
    with pytest.raises(RunnerError, match="cannot start /nowhere/program"):
        run_printing(["/nowhere/program"], keep_last=True)


# --- the matrix product


def test_matmul_is_operations_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes 5 s, then 2 s, then 4 s: the best counts."""
    ticks = iter([0.0, 5.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert matmul_flops(1, size=50, times=3) == 2 * 50**3 / 2.0


@pytest.mark.parametrize("arguments", [(0, 8, 1), (1, 0, 1), (1, 8, 0)])
def test_matmul_of_nothing(arguments: tuple[int, int, int]) -> None:
    threads, size, times = arguments
    with pytest.raises(ValueError, match="at least 1"):
        matmul_flops(threads, size=size, times=times)


# --- the picture


def test_the_plot_is_a_picture(lowered: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "bench.png"
    done = run_cli("bench", lowered(NAME), f"--prompt-tokens={PROMPT}", f"--decode-tokens={DECODE}", "--repeats=1",
                   "--batch=1", "--matmul-gflops=50", "--plot", file)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stdout.splitlines()[-1].startswith("{"), "no JSON unless it was asked for"
    assert "prefill" in done.stdout
    pixels = matplotlib.image.imread(file)
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 600
    assert [path.name for path in tmp_path.iterdir()] == ["bench.png"]


def test_what_the_plot_shows(report: dict[str, Any], tmp_path: Path) -> None:
    """Limits are red, and only where there are any; a bar that is twice as high fills more."""

    def pixels(change: Callable[[dict[str, Any]], None]) -> Any:
        changed = json.loads(json.dumps(report))
        for line in changed["lines"]:
            line["tokens_per_s"] = {"median": 10.0, "min": 9.0, "max": 11.0}
            line["limit"] = {"tokens_per_s": 40.0, "share": 0.25, "above": False}
        change(changed)
        write_plot(changed, tmp_path / "x.png")
        return (matplotlib.image.imread(tmp_path / "x.png")[..., :3] * 255).astype(int)

    def share(image: Any, color: tuple[int, int, int]) -> float:
        return float(np.mean(np.abs(image - color).sum(-1) < 30))

    def without(report: dict[str, Any]) -> None:
        for line in report["lines"]:
            line["limit"] = {"tokens_per_s": None, "share": None, "above": False}

    def higher(report: dict[str, Any]) -> None:
        for line in report["lines"]:
            line["tokens_per_s"] = {"median": 20.0, "min": 18.0, "max": 22.0}

    red, blue = (214, 39, 40), (31, 119, 180)  # matplotlib's tab:red and tab:blue
    plain = pixels(lambda _: None)
    assert share(plain, red) > 0
    assert share(pixels(without), red) == 0
    assert share(pixels(higher), blue) > 1.5 * share(plain, blue)


def test_a_plot_that_cannot_be_written_leaves_nothing(report: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        write_plot(report, tmp_path / "nowhere" / "x.png")
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OSError, match=r"taken\.png"):
        write_plot(report, tmp_path / "taken.png")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


# --- Ctrl-C


def test_interrupting_ends_it_in_one_line(lowered: Callable[..., Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nanochat_x", "bench", str(lowered(NAME)), "--matmul-gflops=1", "--repeats=1000",
               "--plot", str(tmp_path / "x.png")]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    time.sleep(5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "interrupted" in err
    assert list(tmp_path.iterdir()) == []
