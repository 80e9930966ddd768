"""Functions in forked processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from nanochat_x.errors import LoweringError
from nanochat_x.forked import LostProcessError, can_fork, side_by_side

pytestmark = pytest.mark.skipif(not can_fork(), reason="no processes are forked on this system")

SOON = 10  # seconds in which a process of these tests has started, or ended


def wait_for(path: Path) -> None:
    """Until another process has written the file."""
    deadline = time.monotonic() + SOON
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} was not written"
        time.sleep(0.01)


def meet(own: Path, others: Path) -> int:
    """Comes back only if both of two processes run at once; its process."""
    own.touch()
    wait_for(others)
    return os.getpid()


def test_all_run_at_once_each_in_a_process_of_its_own(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    pids = side_by_side([partial(meet, a, b), partial(meet, b, a)])
    assert len({os.getpid(), *pids}) == 3


def test_results_stand_in_the_order_of_the_functions_however_many() -> None:
    held = torch.arange(40)  # what this process holds is there
    numbers = side_by_side([partial(lambda i: int(held[i]) ** 2, i) for i in range(40)])
    assert numbers == [i**2 for i in range(40)]


def test_one_function_runs_in_this_process() -> None:
    assert side_by_side([os.getpid]) == [os.getpid()]
    assert side_by_side([]) == []


def test_torch_has_one_thread() -> None:
    threads = torch.get_num_threads()
    assert side_by_side([torch.get_num_threads] * 2) == [1, 1]
    assert torch.get_num_threads() == threads


def refuse(started: Path) -> None:
    wait_for(started)
    raise LoweringError("no such instruction", remedy="choose another --march")


def call_a_program(started: Path) -> None:
    """As a compiler does; the program's process is written to the file."""
    process = subprocess.Popen(["sleep", "600"])
    part = started.with_suffix(".part")
    part.write_text(str(process.pid))
    part.rename(started)
    process.wait()


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie that nobody asks for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_an_error_of_one_comes_out_and_ends_the_others_and_what_they_started(tmp_path: Path) -> None:
    started = tmp_path / "started"
    with pytest.raises(LoweringError) as caught:
        side_by_side([partial(call_a_program, started), partial(refuse, started)])
    assert str(caught.value) == "no such instruction; choose another --march"
    assert caught.value.remedy == "choose another --march"
    deadline = time.monotonic() + SOON
    while not has_ended(int(started.read_text())):
        assert time.monotonic() < deadline, "the program still runs"
        time.sleep(0.01)


def test_an_error_that_does_not_pickle_is_told_by_its_name() -> None:
    class Odd(Exception):
        pass

    def fail() -> int:
        raise Odd("because")

    functions: list[Callable[[], int]] = [fail, os.getpid]
    with pytest.raises(RuntimeError, match="Odd: because"):
        side_by_side(functions)


def test_a_process_that_is_killed_is_not_waited_for() -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    functions: list[Callable[[], None]] = [die, partial(time.sleep, 600)]
    with pytest.raises(LostProcessError, match="ended without an answer \\(killed by SIGKILL\\)"):
        side_by_side(functions)
