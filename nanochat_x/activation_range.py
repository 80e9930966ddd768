"""Does a model fit float16? Its largest number is 65504, and what is larger becomes infinite without a word.

The model is run in float32 over a calibration text; the largest number at each matrix, at its input (after relu^2, say)
and its output, and of the residual stream is held to that, with a margin.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanochat_x import row_operators
from nanochat_x.calibration import calibrate
from nanochat_x.checkpoint import Checkpoint
from nanochat_x.console import Progress
from nanochat_x.errors import LoweringError
from nanochat_x.model import GPT, Gate, Linear, prepare_weights
from nanochat_x.spec import ModelSpec
from nanochat_x.wrappers import ExportableGPT

#: Another text than the calibration's may drive the model further.
MARGIN = 2.0
TOKENS = 2048
_LARGEST = torch.finfo(torch.float16).max


class _Listening(GPT):
    """A model that tells `largest` how large numbers become, by the place where."""

    def listen(self) -> None:
        self.largest: dict[str, float] = {}
        self._place = "the embedding"
        self.rows = self.rows._replace(norm=self._heard_norm, rotary=self._heard_rotary)

    def note(self, place: str, x: Tensor) -> None:
        self._place = place
        self.largest[place] = max(self.largest.get(place, 0.0), float(x.abs().max()))

    def _heard_norm(self, x: Tensor, eps: float) -> Tensor:
        self.largest_norm(x)
        return row_operators.norm(x, eps)

    def _heard_rotary(self, x: Tensor, cos: Tensor, sin: Tensor, eps: float, scale: float, heads_first: bool) -> Tensor:
        self.largest_norm(row_operators.rotate(x, cos, sin))
        return row_operators.rotary(x, cos, sin, eps, scale, heads_first)

    def largest_norm(self, x: Tensor) -> None:
        """What goes into a norm is a sum, or a product of the matrix before."""
        place = f"the sum after {self._place.removesuffix(' (output)')}"
        self.largest[place] = max(self.largest.get(place, 0.0), float(x.abs().max()))


def activation_range(spec: ModelSpec, weights: Mapping[str, Tensor], ids: Tensor) -> dict[str, float]:
    """Place -> largest magnitude, in the order of the forward pass; weights for float32, ids int64 [R, T]."""
    model = _Listening.from_weights(spec, weights, torch.float32)
    assert isinstance(model, _Listening)
    model.listen()

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            model.note(f"{name} (input)", args[0])
            model.note(f"{name} (output)", out)

        return note

    with ExitStack() as hooks, torch.inference_mode():
        for name, module in model.named_modules():
            if isinstance(module, Linear) and not isinstance(module, Gate):
                hooks.callback(module.register_forward_hook(hook(name)).remove)
        ExportableGPT(model, ids.shape[1])(ids)
    return model.largest


def check_range(checkpoint: Checkpoint, calibration: Path | None, progress: Progress) -> None:
    """Raises LoweringError naming the first place of the model that would overflow in float16."""
    weights = prepare_weights(checkpoint.weights, torch.float32)
    with progress.stage("measure the range of activations") as stage:
        ids = calibrate(checkpoint.spec, weights, checkpoint.tokenizer, calibration, TOKENS).ids
        largest = activation_range(checkpoint.spec, weights, ids)
        place, most = max(largest.items(), key=lambda entry: entry[1])
        stage.detail(f"at most {most:.3g}, at {place}; float16 ends at {_LARGEST:g}")
    for place, value in largest.items():
        if not value * MARGIN <= _LARGEST:
            raise LoweringError(
                f"float16 is too narrow for this model: {place} reaches {value:.3g}, and {_LARGEST / MARGIN:g} is "
                "what a margin of 2 leaves of its range",
                remedy="choose --dtype bfloat16 or float32",
            )
