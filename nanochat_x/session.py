"""A client of the runner's verb `session` (docs/session.md): a bundle stays open, tokens go in, logits come out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat_x.console import Progress
from nanochat_x.errors import RunnerError
from nanochat_x.runner import Runner, failure

Rows = Sequence[Sequence[int]]  # token ids, one list a row, all of one length


class RefusedRequest(RunnerError):
    """The runner answered a request with an error; the session is as it was before."""


class RunnerSession:
    """The C++ program of a bundle, started once; a context manager.

    with RunnerSession(bundle) as session:
        session.new(rows=1)
        logits = session.append([[1, 2, 3]])
    """

    def __init__(self, bundle: Path, *, threads: int | None = None, log: Progress | None = None) -> None:
        """Raises BundleError and RunnerError."""
        command = Runner(bundle, log=log).command("session", *([] if threads is None else [f"--threads={threads}"]))
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise RunnerError(f"cannot start {command[0]}: {error.strerror}") from None
        try:
            greeting = self._answer()
        except BaseException:
            self.close()
            raise
        self.vocab_size: int = greeting["vocab_size"]
        self.max_seq_len: int = greeting["max_seq_len"]
        self.cached: bool = greeting["cached"]  # False: the bundle has the program `full` alone
        self.positions: list[int] = []  # tokens in each row

    def new(self, rows: int) -> None:
        """A session of empty rows, in the place of the one before. Raises RefusedRequest, RunnerError, as all below."""
        self._ask({"op": "new", "rows": rows})

    def append(
        self, ids: Rows, counts: Sequence[int] | None = None, logits_to_keep: Sequence[int] | None = None
    ) -> Tensor:
        """Feeds tokens [B, T]; returns float32 logits [B, T, vocab].

        `counts`: of row b the first counts[b] alone. `logits_to_keep`: only logits after these columns, [B, R, vocab].
        """
        chosen = {"counts": counts, "logits_to_keep": logits_to_keep}
        given = {key: value for key, value in chosen.items() if value is not None}
        return self._logits({"op": "append", "ids": ids, **given})

    def forward(self, ids: Rows) -> Tensor:
        """float32 logits [B, T, vocab] of whole sequences [B, T], by the program without a cache."""
        return self._logits({"op": "forward", "ids": ids})

    def rollback(self, row: int, position: int) -> None:
        """Leaves the row its first `position` tokens."""
        self._ask({"op": "rollback", "row": row, "position": position})

    def select(self, source: Sequence[int]) -> None:
        """Row r continues row source[r]."""
        self._ask({"op": "select", "source": source})

    def reset(self) -> None:
        """Empties every row."""
        self._ask({"op": "reset"})

    def close(self) -> None:
        """Ends the program."""
        process = self._process
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with suppress(BrokenPipeError):  # it had ended by itself
                    stream.close()
        process.wait()

    def __enter__(self) -> RunnerSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _logits(self, request: Mapping[str, Any]) -> Tensor:
        shape = self._ask(request)["logits"]
        return torch.from_numpy(np.frombuffer(self._data, dtype="<f4").reshape(shape))

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: what it said is read below
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise RefusedRequest(str(answer["error"]))
        self.positions = answer.get("positions", self.positions)
        return answer

    def _answer(self) -> dict[str, Any]:
        """The next line; the logits behind it are in `_data` then."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise self._ended() from None
        self._data = bytearray()
        if "logits" in answer:
            batch, length, vocab = answer["logits"]
            self._data = bytearray(4 * batch * length * vocab)
            if self._process.stdout.readinto(self._data) != len(self._data):  # type: ignore[attr-defined]
                raise self._ended()
        return answer

    def _ended(self) -> RunnerError:
        _, stderr = self._process.communicate()
        return RunnerError(failure(self._process.returncode, stderr.decode("utf-8", "replace")))
