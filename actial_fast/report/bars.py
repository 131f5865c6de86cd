"""Bars as inline SVG like chart.py's lines: stacked ones over the steps of one stage, of which many share a bar with their mean, and
histograms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from actial_fast.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDE, WIDTH, figure, frame, number, short, spans, ticks, y_scale

BARS = 120
FINE = 8 * BARS  # bars that go along as numbers, for a part of the steps from close by
TALL = 4.0  # medians of the bars, that a bar may be high
HEADROOM = 1.04


def stacked_bars(
    title: str, parts: Mapping[str, Mapping[int, float]], stage: str, last: int, colours: Mapping[str, str], *, wide: bool = False
) -> str:
    """An HTML `<figure>` of a bar per step of one stage, its parts on top of one another in their order; "" when there are none.

    parts: per part (step -> value), from 1, none negative; a step without a part has 0 of it, and one that no part has, no bar. last: step
    at the right end; more than BARS steps are put together in bars of equally many, each with the mean of those that there are. colours:
    of each part, a CSS colour. Bars end where they rise above several times the median; how many do, and how far, is said.
    """
    steps = sorted({step for values in parts.values() for step in values})
    if not steps:
        return ""
    width = WIDE if wide else WIDTH
    together = math.ceil(last / BARS)
    members: dict[int, list[int]] = {}
    for step in steps:
        members.setdefault((step - 1) // together, []).append(step)
    heights = {name: {bar: _mean(values, of) for bar, of in members.items()} for name, values in parts.items()}
    totals = {bar: math.fsum(heights[name][bar] for name in parts) for bar in members}
    highest = max(totals.values())
    top = min(highest, TALL * median(totals.values())) or highest or 1.0
    (x0, x1, _), y = spans({stage: last}, width)[stage], y_scale(0.0, HEADROOM * top, False)
    out = frame({stage: (x0, x1, last)}, width, ticks(0.0, HEADROOM * top, 5), y)
    step_wide = (x1 - x0) / max(1, last)
    gap = min(1.0, 0.15 * step_wide * together)
    base, legend = dict.fromkeys(members, 0.0), []
    for name in parts:
        shapes = []
        for bar, value in heights[name].items():
            low, base[bar] = base[bar], base[bar] + value
            tall = y(min(low, top)) - y(min(base[bar], top))
            if tall >= 0.05:
                left, right = x0 + step_wide * bar * together, x0 + step_wide * min(last, (bar + 1) * together)
                shapes.append(
                    f"M{left:.1f},{y(min(base[bar], top)):.1f}h{max(right - left - gap, (right - left) / 2):.1f}v{tall:.1f}H{left:.1f}z"
                )
        if shapes:
            out.append(f'<path class="bars" style="fill:{colours[name]}" d="{"".join(shapes)}"/>')
        mean = math.fsum(v for v in parts[name].values() if math.isfinite(v)) / len(steps)
        legend.append(f'<span data-line><i style="background:{colours[name]}"></i>{escape(name)} <b>{number(mean)}</b></span>')
    above = [total for total in totals.values() if total > top]
    caption = f'<p class="muted">{len(above):,} of {len(totals):,} bars above the axis, up to {number(max(above))}</p>' if above else ""
    note = f' <span class="muted">(a bar is the mean of {together:,} steps)</span>' if together > 1 else ""
    return figure(title, legend, caption, out, width, note, _values(parts, steps, (stage, x0, x1, last), colours))


def _values(
    parts: Mapping[str, Mapping[int, float]], steps: Sequence[int], span: tuple[str, float, float, int], colours: Mapping[str, str]
) -> dict[str, Any]:
    """The bars for bars.js, finer than they are drawn: the place of each, how many steps it has, and the mean of each part over these."""
    together = math.ceil(span[3] / FINE)
    members: dict[int, list[int]] = {}
    for step in steps:
        members.setdefault((step - 1) // together, []).append(step)
    means = {
        name: [math.fsum(v for s in of if math.isfinite(v := values.get(s, 0.0))) / len(of) for of in members.values()]
        for name, values in parts.items()
    }
    return {
        "spans": [span],
        "together": together,
        "most": BARS,
        "tall": TALL,
        "bars": list(members),
        "steps": [len(of) for of in members.values()],
        "parts": [{"name": name, "colour": colours[name], "means": [short(mean) for mean in of]} for name, of in means.items()],
    }


def _mean(values: Mapping[int, float], steps: Sequence[int]) -> float:
    """Over these steps; what is missing or not finite is 0."""
    return math.fsum(v for step in steps if math.isfinite(v := values.get(step, 0.0))) / len(steps)


def histogram(title: str, edges: Sequence[float], counts: Sequence[int], marks: Mapping[str, float]) -> str:
    """An HTML `<figure>` of how often values lie between each edge and the next. edges: n + 1, ascending, for n counts; marks: values that
    a dashed line and the legend show, by name. It needs no script."""
    low, high, top = edges[0], edges[-1], max(counts) or 1
    y = y_scale(0.0, 1.04 * top, False)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    out = []
    for tick in (tick for tick in ticks(0.0, 1.04 * top, 5) if tick == int(tick)):
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        out.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}">{number(tick)}</text>')
    for tick in ticks(low, high, 6):
        out.append(f'<text class="tick" text-anchor="middle" x="{x(tick):.1f}" y="{HEIGHT - 8}">{number(tick, 4)}</text>')
    bars = []
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            bars.append(f"M{x(left):.1f},{y(count):.1f}H{max(x(right) - 1, x(left) + 0.5):.1f}V{y(0):.1f}H{x(left):.1f}z")
    out.append(f'<path class="bars" style="fill:var(--c0)" d="{"".join(bars)}"/>')
    for value in marks.values():
        out.append(f'<line class="guide" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP - 8}" y2="{HEIGHT - BOTTOM}"/>')
    legend = [f"<span>{escape(name)} <b>{number(value, 4)}</b></span>" for name, value in marks.items()]
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><div class="legend">{"".join(legend)}</div>'
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(title)}">{"".join(out)}</svg></figure>'
    )
