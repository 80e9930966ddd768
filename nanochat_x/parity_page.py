"""parity.html: the report of `verify` as a page that stands alone, with its plots inside."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

Bins = Sequence[Mapping[str, Any]]


def render_page(report: Mapping[str, Any]) -> str:
    """The page of a report as `verify_bundle` returns it."""
    bundle = report["bundle"]
    verdict = "passed" if report["passed"] else "FAILED"
    title = f"{bundle['target']}, {bundle['dtype']}, {bundle['generation']}: {verdict}"
    plots = [
        ("by_position", "Error against position", "position in the text"),
        ("by_call_length", "Error against T, the tokens of one call", "T"),
        ("by_distance_to_window_edge", "Error around window edges", "position - first position that a window cuts"),
    ]
    parts = [
        _plot(report[key], heading, axis, log=key == "by_call_length") for key, heading, axis in plots if report[key]
    ]
    facts = _facts(report)
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>\n" for key, value in facts.items()
    )
    files = "".join(f"<li>{html.escape(path)} <code>{sha}</code></li>\n" for path, sha in bundle["files"].items())
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{html.escape(title)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
th {{ text-align: left; vertical-align: top; padding-right: 1.5rem; font-weight: 600; white-space: nowrap; }}
td {{ overflow-wrap: anywhere; }}
svg {{ max-width: 100%; height: auto; }}
code {{ font-size: 0.8em; }}
</style>
<h1>{html.escape(title)}</h1>
<table>
{rows}</table>
{"".join(parts)}
<h2>Files that were verified</h2>
<ul>
{files}</ul>
</html>
"""


def _facts(report: Mapping[str, Any]) -> dict[str, str]:
    error, divergence, checkpoint = report["error"], report["kl_divergence_nats"], report["checkpoint"]
    other = "" if checkpoint["is_the_bundles_own"] else " (not the one that the bundle was lowered from)"
    return {
        "rule": report["rule"],
        "result": report["summary"],
        "examples": f"{report['examples']} of {report['examples_asked_for']}, seed {report['seed']},"
        f" {report['seconds']} s",
        "computed": f"{report['calls']} calls, {report['tokens']} tokens, {report['logits']:,} logits",
        "largest error against float64": f"runner {_number(error['max'])}, eager {_number(error['eager_max'])}",
        "RMS error against float64": f"runner {_number(error['rms'])}, eager {_number(error['eager_rms'])}",
        "largest difference to eager": _number(report["largest_difference_to_eager"]),
        "KL divergence from float64": f"mean {_number(divergence['mean'])} nats,"
        f" largest {_number(divergence['max'])} nats",
        "most likely token as in float64": f"runner {report['top1_agreement']:.4%},"
        f" eager {report['eager_top1_agreement']:.4%}",
        "worst example": _worst(report["worst"]),
        "checkpoint": f"{checkpoint['model']}, SHA-256 {checkpoint['model_sha256']}{other}",
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "machine": report["machine"],
        "date": report["date"],
    }


def _worst(worst: Mapping[str, Any] | None) -> str:
    if worst is None:
        return "none"
    return (
        f"{_number(worst['ratio'])} times what eager loses, in row {worst['row']} at position {worst['position']},"
        f" token id {worst['token_id']}, of {worst['example']}"
    )


def _plot(bins: Bins, heading: str, axis: str, *, log: bool) -> str:
    """The largest errors of runner and eager, as an inline SVG."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanochat_x", "font.family": "sans-serif"}):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        axes = figure.subplots()
        at = [entry["at"] for entry in bins]
        style = "." if len(bins) > 40 else "o-"
        for key, label, color in (("eager_error", "eager", "#999999"), ("runner_error", "runner", "#0b66c3")):
            errors = [entry[key] for entry in bins]
            axes.plot(at, [error if error else float("nan") for error in errors], style, label=label, color=color)
        axes.set_yscale("log")
        if log:
            axes.set_xscale("log", base=2)
        axes.set_xlabel(axis)
        axes.set_ylabel("largest error against float64")
        axes.grid(alpha=0.3)
        axes.legend()
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = stream.getvalue()
    return f"<h2>{html.escape(heading)}</h2>\n{svg[svg.index('<svg') :]}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"
