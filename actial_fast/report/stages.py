"""A run's stages as a table, and nested values as lists: the plain part of the page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from html import escape
from statistics import median
from typing import Any

from actial_fast.report.chart import number
from actial_fast.report.run import Run

COLUMNS = ("steps", "seconds in steps", "tokens/s, median", "MFU, median", "of measured TFLOP/s", "peak GiB")


def stage_table(run: Run) -> str:
    """A line a stage: its steps, seconds, speed and memory."""
    rows = []
    rates = {e["stage"]: e["rate"] for e in run.events if e["kind"] == "rate"}
    for stage, last in run.steps.items():
        own = [m for m in run.metrics if m["stage"] == stage]
        seconds = math.fsum(m["seconds"] for m in own if math.isfinite(m.get("seconds", math.nan)))
        speed = [m["tokens_per_s"] for m in own if "tokens_per_s" in m]
        share, peak = ([m[name] for m in own if name in m] for name in ("mfu", "peak_gib"))
        cells = (
            f"{last:,}",
            f"{seconds:,.1f}" if seconds else "&ndash;",
            number(median(speed)) if speed else "&ndash;",
            f"{100 * median(share):.1f}%" if share else "&ndash;",
            f"{number(rates[stage]['tflops'])}<small> {escape(rates[stage]['what'])}</small>" if stage in rates else "&ndash;",
            f"{max(peak):.2f}" if peak else "&ndash;",
        )
        told = "".join(f'<td data-label="{name}">{cell}</td>' for name, cell in zip(COLUMNS, cells, strict=True))
        rows.append(f"<tr><th>{escape(stage)}</th>{told}</tr>")
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in ('stage', *COLUMNS))}</tr>"
    return f'<div class="wide"><table class="figures narrow"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """What lies in nested mappings, as pairs of a path and a text."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, f"{name} / {key}" if name else str(key))
    elif isinstance(value, float):
        yield name, f"{value:.5g}"
    elif isinstance(value, list):
        yield name, ", ".join(f"{item:.5g}" if isinstance(item, float) else str(item) for item in value)
    else:
        yield name, str(value)


def pairs(value: Mapping[str, Any]) -> str:
    """Nested values as a list of names and texts; "" of none."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _flatten(value))
    return f"<dl>{rows}</dl>" if rows else ""
