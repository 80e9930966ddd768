"""`compare`: a bundle's logits, computed by its C++ runner, beside those of another bundle or of a checkpoint."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanochat_x.checkpoint import Checkpoint
from nanochat_x.comparison import Buckets, measure
from nanochat_x.console import Progress
from nanochat_x.errors import BundleError, UsageError
from nanochat_x.manifest import read_manifest
from nanochat_x.model import GPT, prepare_weights
from nanochat_x.runner import Runner
from nanochat_x.wrappers import ExportableGPT

_GROUP = 1 << 28  # bytes of logits on disk at once, for each of the two; a single longer window may take more
_CHUNK = 128  # tokens that the runner computes at once


class Model(Protocol):
    """One of the two that are compared."""

    name: str
    vocab_size: int
    longest: int | None  # tokens that it takes; None: any number
    tokenizer: dict[str, Any]  # the content of a bundle's tokenizer.json

    def logits(self, inputs: Sequence[Tensor]) -> Generator[Tensor]:
        """Logits [T, vocab] of each of the token ids int64 [T]."""


class BundleModel:
    """A bundle, through its C++ runner."""

    def __init__(self, bundle: Path, progress: Progress) -> None:
        """Raises BundleError and RunnerError."""
        self.name = str(bundle)
        self.runner = Runner(bundle, log=progress)
        manifest = read_manifest(bundle)
        try:
            self.vocab_size = int(manifest["model"]["vocab_size"])
            self.longest: int | None = int(manifest["max_seq_len"])
            self.trained = int(manifest["model"]["sequence_len"])
            self._cached = "prefill" in manifest["programs"]
            self.tokenizer = json.loads((bundle / manifest["tokenizer"]).read_text(encoding="utf-8"))
            if not isinstance(self.tokenizer, dict):
                raise TypeError("no object")
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{bundle}: its manifest or tokenizer is malformed ({error})",
                              remedy="lower the model again") from error  # fmt: skip

    def windows(self, arguments: Sequence[str]) -> Any:
        """What the runner's `tokenize` answers: context, number of documents, windows."""
        return self.runner.json("tokenize", *arguments)

    def logits(self, inputs: Sequence[Tensor]) -> Generator[Tensor]:
        """One process for all of them; each is read when its turn comes."""
        with tempfile.TemporaryDirectory(prefix="nanochat_x-compare-") as scratch:
            source, result = Path(scratch, "input.safetensors"), Path(scratch, "output.safetensors")
            save_file({f"{i}.input_ids": ids.unsqueeze(0) for i, ids in enumerate(inputs)}, source)
            self.runner.forward(source, result, cache=self._cached, chunks=(_CHUNK,) if self._cached else ())
            with safe_open(result, framework="pt") as file:
                for i in range(len(inputs)):
                    yield file.get_tensor(f"{i}.logits")[0]


class CheckpointModel:
    """A checkpoint, computed by eager PyTorch over whole windows, without a cache."""

    def __init__(self, checkpoint: Checkpoint, dtype: str) -> None:
        files = checkpoint.files
        step = "" if files.step is None else f" step {files.step}"
        self.name = f"checkpoint {files.source} {files.tag}{step}, eager PyTorch in {dtype}"
        self.vocab_size = checkpoint.spec.vocab_size
        self.longest: int | None = None
        self.tokenizer: dict[str, Any] = json.loads(checkpoint.tokenizer.to_portable_json())
        wanted = {"float32": torch.float32, "float64": torch.float64}[dtype]
        self._model = GPT.from_weights(checkpoint.spec, prepare_weights(checkpoint.weights, wanted), wanted)

    def logits(self, inputs: Sequence[Tensor]) -> Generator[Tensor]:
        """One forward pass each."""
        model = ExportableGPT(self._model, max(ids.shape[0] for ids in inputs))
        for ids in inputs:
            with torch.inference_mode():
                yield model(ids.unsqueeze(0))[0]


def compare_models(
    a: BundleModel, b: Model, text: Sequence[str], context: int | None, progress: Progress
) -> dict[str, Any]:
    """The report on A against the reference B. `text` is the runner's option that names it, `context` the predicted
    tokens of a window at most (None: what A was trained on, or fewer if one of the two takes fewer).

    Raises UsageError if the two cannot be compared, ParityError for logits that cannot, RunnerError and BundleError.
    """
    check_same_tokenizer(a, b)
    counts = _byte_counts(a, b)
    answer = a.windows([*text, f"--context={_context(a, b, context)}"])
    windows = [torch.tensor(window["ids"]) for window in answer["windows"]]
    buckets = Buckets()
    for first, group in _groups(windows, a.vocab_size):
        with progress.stage(f"compute windows {first + 1} to {first + len(group)} of {len(windows)}"):
            _add_group(buckets, a, b, group, counts)
    return {
        "a": a.name,
        "b": b.name,
        "reference": "b",
        "documents": answer["documents"],
        "windows": len(windows),
        "context": answer["context"],
        **buckets.total.figures(),
        "positions": buckets.figures(),
    }


def check_same_tokenizer(a: Model, b: Model) -> None:
    """Raises UsageError if a token id does not mean the same to both."""
    if a.vocab_size != b.vocab_size:
        raise UsageError(
            f"{a.name} has a vocabulary of {a.vocab_size} tokens and {b.name} one of {b.vocab_size}",
            remedy="models of one tokenizer alone can be compared",
        )
    for part in ("pattern", "tokens", "special_tokens"):
        if a.tokenizer.get(part) != b.tokenizer.get(part):
            raise UsageError(
                f"{a.name} and {b.name} have different tokenizers ({part} differs)",
                remedy="models of one tokenizer alone can be compared",
            )


def _byte_counts(a: Model, b: Model) -> Tensor:
    """Bytes of each token id, int64 [vocab]."""
    counts = a.tokenizer.get("token_bytes") or b.tokenizer.get("token_bytes")
    if not isinstance(counts, list) or len(counts) != a.vocab_size:
        raise BundleError(
            f"{a.name}: its tokenizer.json has no token_bytes, an older nanochat_x wrote it",
            remedy="lower the checkpoint again",
        )
    return torch.tensor(counts)


def _context(a: BundleModel, b: Model, wanted: int | None) -> int:
    longest = min(model.longest for model in (a, b) if model.longest is not None)
    if wanted is None:
        return min(a.trained, longest)
    if wanted > longest:
        raise UsageError(
            f"--context {wanted} is more than the {longest} tokens that both take",
            remedy="choose less, or lower again with a larger --max-seq-len",
        )
    return wanted


def _groups(windows: Sequence[Tensor], vocab: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Index of its first window, and windows whose logits together are no larger than _GROUP (but one at least)."""
    first, size = 0, 0
    for i, ids in enumerate(windows):
        own = (ids.shape[0] - 1) * vocab * 4
        if i > first and size + own > _GROUP:
            yield first, list(windows[first:i])
            first, size = i, 0
        size += own
    yield first, list(windows[first:])


def _add_group(buckets: Buckets, a: BundleModel, b: Model, group: Sequence[Tensor], counts: Tensor) -> None:
    inputs = [ids[:-1] for ids in group]
    # Closed even when a comparison ends them early: they own temporary folders.
    with closing(a.logits(inputs)) as of_a, closing(b.logits(inputs)) as of_b:
        for ids, logits_a, logits_b in zip(group, of_a, of_b, strict=True):
            targets = ids[1:]
            buckets.add(measure(logits_a, logits_b, targets, (a.name, b.name)), counts[targets])
