"""Line charts over the steps, or the time, of a run's stages: inline SVG, coloured by the page's CSS, readable without a script.

The x axis gives every stage its own steps and its own stretch, at least half the mean width, so that 60 steps of GRPO beside 2,000 of SFT
stay visible; a rule and a name mark where a stage begins. Many points of a line are drawn as their per-bucket extremes: no spike gets
lost. Beside its SVG a chart has its values as JSON, from which page.js tells them and draws the chart anew, zoomed, smoothed, or on a log
axis.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

WIDTH, WIDE, HEIGHT = 470.0, 965.0, 240.0  # viewBox units, about CSS pixels; WIDE fills a row of two charts and the gap between them
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 20.0, 26.0
MIN_SHARE = 0.5
BUCKETS = 300
VALUES = 5000  # of a line in a stage, that go along as numbers; of more, the lowest and the highest of each bucket
SMOOTHED = 15  # fewer points than this are not averaged
LOG_RATIO = 10.0  # positive values spanning more than this go on a log axis
COLOURS = 7  # --c0 ... --c6 in the page's CSS
DASHES = ("", "6 4", "2 3", "9 3 2 3")  # of lines of the page's run, and of those that it is compared with

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line. stages: per stage (step, value) in order of step, NaN where there is no finite value. dots: mark each point and do not
    smooth (evaluations); else the raw line is faint and a centred moving average lies over it. dash: the place in
    DASHES, round and round."""

    name: str
    stages: Mapping[str, Points]
    colour: int = 0
    dots: bool = False
    dash: int = 0


@dataclass(frozen=True)
class Guide:
    """A dashed horizontal line at `value`, in the colour of a series or, when None, in the text's."""

    name: str
    value: float
    colour: int | None = None


@dataclass(frozen=True)
class Chart:
    """A chart to be drawn. draw: gives its `<figure>`, "" without a point; takes `wide`. constant: what it says if that is one number."""

    draw: Callable[..., str]
    constant: str = ""


def lines(title: str, series: Sequence[Series], steps: Mapping[str, int], **how: Any) -> Chart:
    """The Chart of line_chart with these arguments."""
    values = [v for s in series for points in s.stages.values() for _, v in points]
    same = len(values) > 1 and all(math.isfinite(v) and f"{v:.6g}" == f"{values[0]:.6g}" for v in values)
    told = f"{100 * values[0]:.3g}%" if same and how.get("percent") else number(values[0]) if same else ""
    return Chart(partial(line_chart, title, series, steps, **how), f"{title} {told}" if same else "")


def line_chart(
    title: str,
    series: Sequence[Series],
    steps: Mapping[str, int],
    *,
    guides: Sequence[Guide] = (),
    percent: bool = False,
    may_log: bool = False,
    top: float = math.inf,
    unit: str = "",
    wide: bool = False,
) -> str:
    """An HTML `<figure>` with legend and SVG; "" when no series has a point.

    steps: last step per stage in the run's order; fixes the x axis, so that charts of one stage align. percent: values are shares, the y
    axis runs from 0 to 100%. may_log: positive values that span more than a factor LOG_RATIO get a log axis, and the title says so.
    top: lines end where they rise above it; how many values do, and how far, is said. unit: of the x axis, where it is not steps. wide: the
    figure takes a whole row of the page.
    """
    shown = [s for s in series if any(s.stages.values())]
    values = [v for s in shown for points in s.stages.values() for _, v in points]
    finite = [v for v in values if math.isfinite(v)]
    if not values:
        return ""
    caption, width, css = "", WIDE if wide else WIDTH, ' class="whole"' if wide else ""
    if len(finite) < len(values):
        caption = f'<p class="bad">{len(values) - len(finite)} of {len(values)} values are NaN or infinite</p>'
    above = [v for v in finite if v > top]
    if above:
        caption += f'<p class="muted">{len(above):,} of {len(values):,} values above the axis, up to {number(max(above))}</p>'
    if not finite:
        return f"<figure{css}><figcaption>{escape(title)}</figcaption>{caption}</figure>"
    placed_at = spans({stage: last for stage, last in steps.items() if any(s.stages.get(stage) for s in shown)}, width)
    log = may_log and not percent and min(finite) > 0 and max(finite) / min(finite) > LOG_RATIO
    low, high = (0.0, 1.0) if percent else _range([*(min(v, top) for v in finite), *(g.value for g in guides)], log)
    label: Callable[[float], str] = (lambda v: f"{100 * v:.3g}%") if percent else number
    y = y_scale(low, high, log)

    out = frame(placed_at, width, _logticks(low, high) if log else ticks(low, high, 5), y, label if percent else None)
    for guide in guides:
        style = f' style="stroke:var(--c{guide.colour % COLOURS})"' if guide.colour is not None else ""
        out.append(f'<line class="guide"{style} x1="{LEFT}" x2="{width - RIGHT}" y1="{y(guide.value):.1f}" y2="{y(guide.value):.1f}"/>')

    legend = []
    for s in shown:
        colour, dash, last_value = f"var(--c{s.colour % COLOURS})", DASHES[s.dash % len(DASHES)], math.nan
        stroke = f"stroke:{colour};stroke-dasharray:{dash}" if dash else f"stroke:{colour}"
        for stage, points in s.stages.items():
            x0, x1, last = placed_at[stage]
            placed = [(x0 + (x1 - x0) * step / max(1, last), value) for step, value in points]
            smooth = placed if s.dots else moving_average(placed)
            if smooth is not placed:
                out.append(f'<path class="raw" style="{stroke}" d="{_path(_thin(_under(top, placed)), y)}"/>')
            out.append(f'<path class="line" style="{stroke}" d="{_path(_thin(_under(top, smooth)), y)}"/>')
            if s.dots or len(placed) == 1:
                dots = ((x, v) for x, v in _under(top, placed) if math.isfinite(v))
                out += [f'<circle r="2.6" style="fill:{colour}" cx="{x:.1f}" cy="{y(v):.1f}"/>' for x, v in dots]
            last_value = next((v for _, v in reversed(smooth) if math.isfinite(v)), last_value)
        mark = f'<i class="dash" style="border-color:{colour}"></i>' if dash else f'<i style="background:{colour}"></i>'
        legend.append(f"<span data-line>{mark}{escape(s.name)} <b>{label(last_value)}</b></span>")
    for guide in guides:
        style = f' style="border-color:var(--c{guide.colour % COLOURS})"' if guide.colour is not None else ""
        legend.append(f'<span><i class="dash"{style}></i>{escape(guide.name)} <b>{label(guide.value)}</b></span>')
    data = {
        "spans": [[stage, round(x0, 2), round(x1, 2), last] for stage, (x0, x1, last) in placed_at.items()],
        "percent": percent,
        "log": log,
        "top": top if math.isfinite(top) else None,
        "unit": unit,
        "lines": [_values(s, whole=not unit) for s in shown],
        "guides": [[g.name, g.value, None if g.colour is None else g.colour % COLOURS] for g in guides],
    }
    return figure(title, legend, caption, out, width, ' <span class="muted">(log scale)</span>' if log else "", data)


def _values(series: Series, whole: bool) -> dict[str, Any]:
    """A line for page.js: stage -> [steps, values]; steps that follow on one another are told by the first."""
    stages: dict[str, list[Any]] = {}
    finite = [v for points in series.stages.values() for _, v in points if math.isfinite(v)] or [0.0]
    spread, size = max(finite) - min(finite), max(map(abs, finite))
    digits = min(9, 4 + max(0, math.floor(math.log10(size / spread)))) if spread else 4  # 1.0002 and 1.0004 differ
    for stage, points in series.stages.items():
        kept = _thin(points, VALUES // 2)
        steps = [round(step) for step, _ in kept]
        follow = whole and bool(steps) and steps == list(range(steps[0], steps[0] + len(steps)))
        places = steps if whole else [round(at, 3) for at, _ in kept]
        stages[stage] = [steps[0] if follow else places, [short(value, digits) for _, value in kept]]
    return {
        "name": series.name,
        "colour": series.colour % COLOURS,
        "dash": DASHES[series.dash % len(DASHES)],
        "dots": series.dots,
        "stages": stages,
    }


def short(value: float, digits: int = 4) -> float | int | None:
    """A value for page.js, as JSON has it; null where it is not finite."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e6 else rounded


def frame(
    stages: Mapping[str, tuple[float, float, int]],
    width: float,
    rules: Sequence[float],
    y: Callable[[float], float],
    label: Callable[[float], str] | None = None,
) -> list[str]:
    """Grid, ticks and the stages' names. label: of a tick, a number with as many digits as tell them apart when None."""
    out = []
    digits = next((d for d in range(3, 9) if len({number(tick, d) for tick in rules}) == len(rules)), 9)  # 0.9996 and 0.9998 differ
    for tick in rules:
        text = label(tick) if label else number(tick, digits)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        out.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}">{text}</text>')
    for index, (stage, (x0, x1, last)) in enumerate(stages.items()):
        first, final = ("start", x0 + 3) if index else ("middle", x0), ("end", x1 - 3 if index < len(stages) - 1 else x1)
        labels: list[tuple[float, str, float]] = [(0, *first), (last, *final)] if last else [(0, *first)]
        between = ((tick, "middle", x0 + (x1 - x0) * tick / max(1, last)) for tick in ticks(0, last, int((x1 - x0) / 70)))
        labels += [(tick, anchor, x) for tick, anchor, x in between if x0 + 34 < x < x1 - 44 and tick == int(tick)]
        out += [f'<text class="tick" text-anchor="{how}" x="{x:.1f}" y="{HEIGHT - 8}">{tick:,.0f}</text>' for tick, how, x in labels]
        if index:
            out.append(f'<line class="rule" x1="{x0:.1f}" x2="{x0:.1f}" y1="{TOP - 12}" y2="{HEIGHT - BOTTOM}"/>')
        out.append(f'<text class="stage" x="{x0 + 4:.1f}" y="{TOP - 5}">{escape(stage)}</text>')
    return out


def figure(title: str, legend: Sequence[str], caption: str, shapes: Sequence[str], width: float, note: str, data: Mapping[str, Any]) -> str:
    """The `<figure>` around a chart's shapes. data: what page.js needs to draw them anew."""
    css = ' class="whole"' if width == WIDE else ""
    margins = {"margins": [LEFT, RIGHT, TOP, BOTTOM]}
    return (
        f'<figure{css}><figcaption>{escape(title)}{note}</figcaption><div class="legend">{"".join(legend)}</div>{caption}'
        f'<svg viewBox="0 0 {width:g} {HEIGHT:g}" role="img" aria-label="{escape(title)}">{"".join(shapes)}</svg>'
        f'<script type="application/json">{as_json({**data, **margins})}</script></figure>'
    )


def as_json(value: Any) -> str:
    """JSON that may stand in a <script> element, whatever its texts hold."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def number(value: float, digits: int = 3) -> str:
    """A short label: 0, 0.25, 1234, 15k, 2M, 3e-06; `digits` significant digits (but never fewer than a whole number below 10,000 has)."""
    if not math.isfinite(value):
        return "-"
    size = abs(value)
    if size >= 999_500:
        return f"{value / 1e6:.{digits}g}M"
    if size >= 9_995:
        return f"{value / 1e3:.{digits}g}k"
    if size >= 999.5:
        return f"{value:.{max(0, digits - 4)}f}"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"
    return f"{value:.{digits}g}"


def moving_average(points: Points) -> Points:
    """The centred mean over about a thirtieth of the points (at least 5), NaN left out; `points` itself when fewer than SMOOTHED."""
    n = len(points)
    if n < SMOOTHED:
        return points
    half = max(5, n // 30) // 2
    total, count = [0.0], [0]
    for _, value in points:
        ok = math.isfinite(value)
        total.append(total[-1] + (value if ok else 0.0))
        count.append(count[-1] + ok)
    out = []
    for i, (x, value) in enumerate(points):
        a, b = max(0, i - half), min(n, i + half + 1)
        out.append((x, (total[b] - total[a]) / (count[b] - count[a]) if math.isfinite(value) else math.nan))
    return out


def _under(top: float, points: Points) -> Points:
    return [(x, value if value <= top else math.nan) for x, value in points]


def _thin(points: Points, buckets: int = BUCKETS) -> Points:
    """At most 2 points a bucket, its lowest and its highest in order of x; a bucket that holds a NaN keeps it as a gap."""
    if len(points) <= 2 * buckets:
        return points
    out: list[tuple[float, float]] = []
    size = math.ceil(len(points) / buckets)
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        finite = [p for p in bucket if math.isfinite(p[1])]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        out += sorted(ends)
        if len(finite) < len(bucket):
            out.append((bucket[-1][0], math.nan))
    return out


def _path(points: Points, y: Callable[[float], float]) -> str:
    parts, pen = [], "M"
    for x, value in points:
        if math.isfinite(value):
            parts.append(f"{pen}{x:.1f},{y(value):.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def spans(steps: Mapping[str, int], width: float) -> dict[str, tuple[float, float, int]]:
    """Per stage (left x, right x, last step): widths by number of steps, none under MIN_SHARE of an equal share."""
    total, least = sum(steps.values()) or 1, MIN_SHARE / len(steps)
    shares = [max(last / total, least) for last in steps.values()]
    scale, x, out = (width - LEFT - RIGHT) / sum(shares), LEFT, {}
    for (stage, last), share in zip(steps.items(), shares, strict=True):
        out[stage] = (x, x + share * scale, last)
        x += share * scale
    return out


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.15, high * 1.15
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # a constant: half-way up, from zero
        return min(0.0, 2 * low), max(0.0, 2 * high) or float(not low)
    if 0 <= low < 0.5 * high:
        low = 0.0
    room = 0.05 * (high - low)
    return (low - room if low else 0.0), high + room


def y_scale(low: float, high: float, log: bool) -> Callable[[float], float]:
    """Value -> y in the picture."""
    bottom, span = HEIGHT - BOTTOM, HEIGHT - BOTTOM - TOP
    if log:
        low, high = math.log10(low), math.log10(high)
        return lambda v: bottom - span * (math.log10(v) - low) / (high - low)
    return lambda v: bottom - span * (v - low) / (high - low)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten apart) in [low, high], about `most` of them."""
    if not high > low or most < 1:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / gap - 1e-9)
    return [round(i * gap, 12) for i in range(first, math.floor(high / gap + 1e-9) + 1)]


def _logticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**d for d in decades if low <= 10.0**d <= high]
    if len(tens) >= 3:
        return tens[:: math.ceil(len(tens) / 6)]
    return [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
