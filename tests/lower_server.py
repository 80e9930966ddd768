"""Lowers in forked copies of one process that has everything imported, so that a hundred runs cost seconds.

    LD_PRELOAD=libwrite_faults.so python lower_server.py TARGET      a JSON line in, a JSON line out

TARGET is a real target's name, or `stub`: files at once instead of a compiler. A request has a list, "runs", which
begin at the same moment; the answer is a list of what became of them.

    {"output": DIR, "max_seq_len": N, "force": BOOL}   lower the small checkpoint of the tests there
     "below": DIR, "at": N, "how": NAME                and strike its N-th change below that folder (write_faults.cpp)
     "hold": SECONDS                                   it takes at least so long
     "sabotage": NAME                                  with a part of nanochat_x made worse, so that tests see it fail
    -> {"code": exit code, or minus the signal that ended it, "stderr": TEXT, "changes": how many were counted}
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from models import GENERATIONS
from test_lowering import StubTarget, quick_capture

from nanochat_x import cli, lowering
from nanochat_x.capture import Captured, capture
from nanochat_x.console import Progress
from nanochat_x.target import Lowered

NAME = "2026-01-lambdas"
HOW = {"count": 0, "kill": 1, "kill-within": 2, "disk-full": 3, "disk-full-once": 4}


class SlowStub(StubTarget):
    """Some more to write, after a while."""

    def __init__(self, hold: float) -> None:
        self.hold = hold

    def lower(self, captured: Captured, folder: Path, progress: Progress) -> Lowered:
        time.sleep(self.hold)
        lowered = super().lower(captured, folder, progress)
        (folder / "sub").mkdir()
        (folder / "sub" / "data").write_bytes(bytes(20_000))
        return replace(lowered, weights={name: torch.full((5000,), float(ord(name))) for name in "abc"})


@contextmanager
def in_place(target: Path, **_: Any) -> Iterator[Path]:
    """What `staged_folder` must not be: writing where the bundle is to appear."""
    target.mkdir(exist_ok=True)
    yield target


SABOTAGE: dict[str, Callable[[], None]] = {
    "in-place": lambda: setattr(lowering, "staged_folder", in_place),
    "no-lock": lambda: setattr(lowering, "only_writer", lambda output: nullcontext()),
}


@dataclass
class Child:
    """A run in a process of its own, which waits for the start."""

    pid: int
    answer: int  # where it writes how many changes it made
    stderr: int  # a file in memory


def run(target: str, request: dict[str, Any], start: int, answer: int) -> NoReturn:
    """The whole life of a forked process."""
    code = 99
    try:
        if "sabotage" in request:
            SABOTAGE[request["sabotage"]]()
        if target == "stub":
            stub = SlowStub(request.get("hold", 0))
            setattr(lowering, "load_target", lambda *_: stub)  # noqa: B010 (mypy would want its names of arguments)
        arguments = ["lower", "--base-dir", str(GENERATIONS / NAME), "--no-verify", "-o", request["output"]]
        arguments += ["--max-seq-len", str(request["max_seq_len"]), "--target", "aoti" if target == "stub" else target]
        arguments += ["--force"] if request.get("force") else []
        preloaded = ctypes.CDLL(None)
        os.read(start, 1)
        if "below" in request:
            preloaded.nanochat_x_arm(os.fsencode(request["below"]), ctypes.c_long(request["at"]), HOW[request["how"]])
        code = cli.main(arguments)
        if "below" in request:
            preloaded.nanochat_x_changes.restype = ctypes.c_long
            os.write(answer, str(preloaded.nanochat_x_changes()).encode())
    except BaseException as error:  # what `main` lets through is a traceback
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 99
    finally:
        sys.stderr.flush()
        os._exit(code)


def begin(target: str, request: dict[str, Any], start: int) -> Child:
    """Forks."""
    stderr = os.memfd_create("stderr")
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(stderr, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        run(target, request, start, write_end)
    os.close(write_end)
    return Child(pid, read_end, stderr)


def finish(child: Child) -> dict[str, Any]:
    """Waits for a run."""
    _, status = os.waitpid(child.pid, 0)
    with os.fdopen(child.answer, "rb") as pipe:
        changes = pipe.read()
    os.lseek(child.stderr, 0, os.SEEK_SET)
    with os.fdopen(child.stderr, "rb") as file:
        stderr = file.read().decode()
    return {"code": os.waitstatus_to_exitcode(status), "stderr": stderr, "changes": int(changes or 0)}


def answer(target: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs that begin together."""
    read_end, write_end = os.pipe()
    children = [begin(target, request, read_end) for request in requests]
    os.write(write_end, b"." * len(children))
    os.close(read_end)
    os.close(write_end)
    return [finish(child) for child in children]


def remember(function: Callable[..., Captured]) -> Callable[..., Captured]:
    """`capture`, once for each context length: the same checkpoint comes each time."""
    made: dict[int, Captured] = {}

    def remembered(model: Any, max_seq_len: int, *, cached: bool = True) -> Captured:
        if max_seq_len not in made:
            made[max_seq_len] = function(model, max_seq_len, cached=cached)
        return made[max_seq_len]

    return remembered


def main() -> None:
    """Answers line by line."""
    target = sys.argv[1]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # for answers alone
    torch.set_num_threads(1)  # no pool of threads that a fork would leave behind
    setattr(lowering, "capture", quick_capture if target == "stub" else remember(capture))  # noqa: B010
    if target != "stub":  # captured, and everything imported, before the first fork
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["--base-dir", str(GENERATIONS / NAME), "--no-verify", "--max-seq-len", "64"]
            assert cli.main(["lower", "--target", target, "-o", f"{folder}/out", *arguments]) == 0
    for line in sys.stdin:
        out.write(json.dumps(answer(target, json.loads(line)["runs"])) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
