"""report.html: what a run did, on one page that needs nothing but itself (inline SVG, images and script, no fetch; light and dark).

Without a script, and printed, all of it is there; the script tells values, zooms, smooths and searches.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from actial_fast.report.cards import rollout_cards
from actial_fast.report.chart import number
from actial_fast.report.curves import grid, grpo, learning, optimisation
from actial_fast.report.evaluations import evaluation, headline
from actial_fast.report.html import bullets, document, folded, section
from actial_fast.report.run import Run, read_run
from actial_fast.report.speed import speed_charts
from actial_fast.report.troubles import signs, warned


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html (whole or not at all) and return its path.

    Raises ValueError when the folder has neither metrics nor events, or when one of its files cannot be read.
    """
    run = read_run(Path(run_dir))
    told = f'<p class="muted">actial_fast run &middot; {time.strftime("%Y-%m-%d %H:%M")} &middot; {escape(run.state)}</p>'
    body = [
        f"<header>{told}<h1>{escape(run.name)}</h1>{headline(run)}</header>",
        section("What went wrong", bullets(warned(run.events))),
        section("Signs of trouble", bullets(signs(run.metrics, run.evals))),
        section("Evaluation", evaluation(run)),
        section("Learning", grid(learning(run))),
        section("GRPO", grid(grpo(run))),
        *(section(f"Sampled replies: {stage}", rollout_cards(run.folder, stage, run.events)) for stage in run.steps),
        section("Where the time goes", grid(speed_charts(run.metrics, run.events, run.steps))),
        section("Speed and optimisation", grid(optimisation(run))),
        section("Stages", _stage_table(run)),
        section("Summary", _pairs(run.summary)),
        section("Versions and machine", _pairs(run.versions)),
        *(folded(name, f"<pre>{escape(text)}</pre>") for name, text in run.recipes.items()),
    ]
    path, temporary = run.folder / "report.html", run.folder / "report.html.tmp"
    temporary.write_text(document(run.name, "".join(body)), encoding="utf-8")
    os.replace(temporary, path)
    return path


def _stage_table(run: Run) -> str:
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
        rows.append(f"<tr><th>{escape(stage)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    names = ("stage", "steps", "seconds in steps", "tokens/s, median", "MFU, median", "of measured TFLOP/s", "peak GiB")
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    return f'<table class="figures"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, f"{name} / {key}" if name else str(key))
    elif isinstance(value, float):
        yield name, f"{value:.5g}"
    elif isinstance(value, list):
        yield name, ", ".join(f"{item:.5g}" if isinstance(item, float) else str(item) for item in value)
    else:
        yield name, str(value)


def _pairs(value: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _flatten(value))
    return f"<dl>{rows}</dl>" if rows else ""
