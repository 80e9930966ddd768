"""The picture of `bench --plot`: each rate beside the limit of the machine that it was measured on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanochat_x.machine import describe_machine

Line = Mapping[str, Any]  # one of report["lines"] (docs/bench.md)


def write_plot(report: Mapping[str, Any], file: Path) -> None:
    """Writes a PNG with prefill and decode of each batch, and decode of samples and contexts where that was measured.

    `report` is the runner's JSON. The file appears whole or not at all. Raises OSError if it cannot be written.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    prefill, decode = figure.subplots(1, 2)
    lines = report["lines"]
    _draw(prefill, "prefill", [line for line in lines if line["what"] == "prefill"], "float32 matrix product")
    _draw(decode, "decode", [line for line in lines if line["what"] != "prefill"], "memory's speed")
    figure.suptitle(
        f"{report['bundle']}: {report['target']}, {report['dtype']}, {report['threads']} threads\n{describe_machine()}",
        fontsize="medium",
    )
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format="png", dpi=150)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _draw(axes: Axes, title: str, lines: Sequence[Line], limit: str) -> None:
    """Bars of the medians with their ends, and a mark where the limit lies."""
    places = range(len(lines))
    medians = [line["tokens_per_s"]["median"] for line in lines]
    ends = [
        [line["tokens_per_s"]["median"] - line["tokens_per_s"]["min"] for line in lines],
        [line["tokens_per_s"]["max"] - line["tokens_per_s"]["median"] for line in lines],
    ]
    axes.bar(places, medians, 0.6, yerr=ends, capsize=4, color="tab:blue", label="measured")
    known = [(place, line["limit"]["tokens_per_s"]) for place, line in zip(places, lines, strict=True)
             if line["limit"]["tokens_per_s"] is not None]  # fmt: skip
    if known:
        axes.hlines([height for _, height in known], [place - 0.4 for place, _ in known],
                    [place + 0.4 for place, _ in known], color="tab:red", label=f"limit: {limit}")  # fmt: skip
    for place, line in zip(places, lines, strict=True):
        if line["limit"]["share"] is not None:
            axes.annotate(f"{line['limit']['share']:.0%}", (place, 0), (0, 4), textcoords="offset points", ha="center",
                          color="white", fontsize="small")  # fmt: skip
    axes.set_xticks(list(places), [_name(line) for line in lines], fontsize="small")
    axes.set(title=title, ylabel="tokens/s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def _name(line: Line) -> str:
    kind = "sample" if line["what"] == "samples" else "row"
    rows = f"{line['rows']} {kind}{'s' if line['rows'] != 1 else ''}"
    return f"{rows}\n{line['context']}..{line['context'] + line['tokens']}"
