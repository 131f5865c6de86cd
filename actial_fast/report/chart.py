"""Charts over the steps of a run's stages, as inline SVG: a few kilobytes each, coloured by the page's CSS, readable without a script.

The x axis gives every stage its own steps and its own stretch, at least half the mean width, so that 60 steps of GRPO beside 2,000 of SFT
stay visible; a rule and a name mark where a stage begins. Many points of a line are drawn as their per-bucket extremes: no spike gets
lost. Stacked bars are of one stage, and many steps share a bar, which has their mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

WIDTH, WIDE, HEIGHT = 470.0, 965.0, 240.0  # viewBox units, about CSS pixels; WIDE fills a row of two charts and the gap between them
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 20.0, 26.0
MIN_SHARE = 0.5
BUCKETS = 300
BARS = 120
SMOOTHED = 15  # fewer points than this are not averaged
TALL = 4.0  # medians of the bars, that a bar may be high
LOG_RATIO = 10.0  # positive values spanning more than this go on a log axis
COLOURS = 7  # --c0 ... --c6 in the page's CSS

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line. stages: per stage (step, value) in order of step, NaN where there is no finite value. dots: mark each point and do not
    smooth (evaluations); else the raw line is faint and a centred moving average lies over it."""

    name: str
    stages: Mapping[str, Points]
    colour: int = 0
    dots: bool = False


@dataclass(frozen=True)
class Guide:
    """A dashed horizontal line at `value`, in the colour of a series or, when None, in the text's."""

    name: str
    value: float
    colour: int | None = None


def line_chart(
    title: str,
    series: Sequence[Series],
    steps: Mapping[str, int],
    *,
    guides: Sequence[Guide] = (),
    percent: bool = False,
    may_log: bool = False,
    top: float = math.inf,
    wide: bool = False,
) -> str:
    """An HTML `<figure>` with legend and SVG; "" when no series has a point.

    steps: last step per stage in the run's order; fixes the x axis, so that charts of one stage align. percent: values are shares, the y
    axis runs from 0 to 100%. may_log: positive values that span more than a factor LOG_RATIO get a log axis, and the title says so.
    top: lines end where they rise above it; how many values do, and how far, is said. wide: the figure takes a whole row of the page.
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
    spans = _spans({stage: last for stage, last in steps.items() if any(s.stages.get(stage) for s in shown)}, width)
    log = may_log and not percent and min(finite) > 0 and max(finite) / min(finite) > LOG_RATIO
    low, high = (0.0, 1.0) if percent else _range([*(min(v, top) for v in finite), *(g.value for g in guides)], log)
    label: Callable[[float], str] = (lambda v: f"{100 * v:.3g}%") if percent else number
    y = _y_scale(low, high, log)

    out = _frame(spans, width, _log_ticks(low, high) if log else _ticks(low, high, 5), y, label if percent else None)
    for guide in guides:
        style = f' style="stroke:var(--c{guide.colour % COLOURS})"' if guide.colour is not None else ""
        out.append(f'<line class="guide"{style} x1="{LEFT}" x2="{width - RIGHT}" y1="{y(guide.value):.1f}" y2="{y(guide.value):.1f}"/>')

    legend = []
    for s in shown:
        stroke, last_value = f"stroke:var(--c{s.colour % COLOURS})", math.nan
        for stage, points in s.stages.items():
            x0, x1, last = spans[stage]
            placed = [(x0 + (x1 - x0) * step / max(1, last), value) for step, value in points]
            smooth = placed if s.dots else moving_average(placed)
            if smooth is not placed:
                out.append(f'<path class="raw" style="{stroke}" d="{_path(_thin(_under(top, placed)), y)}"/>')
            out.append(f'<path class="line" style="{stroke}" d="{_path(_thin(_under(top, smooth)), y)}"/>')
            if s.dots or len(placed) == 1:
                dots = ((x, v) for x, v in _under(top, placed) if math.isfinite(v))
                out += [f'<circle r="2.6" style="fill:var(--c{s.colour % COLOURS})" cx="{x:.1f}" cy="{y(v):.1f}"/>' for x, v in dots]
            last_value = next((v for _, v in reversed(smooth) if math.isfinite(v)), last_value)
        legend.append(f'<span><i style="background:var(--c{s.colour % COLOURS})"></i>{escape(s.name)} <b>{label(last_value)}</b></span>')
    for guide in guides:
        style = f' style="border-color:var(--c{guide.colour % COLOURS})"' if guide.colour is not None else ""
        legend.append(f'<span><i class="dash"{style}></i>{escape(guide.name)} <b>{label(guide.value)}</b></span>')
    return _figure(title, legend, caption, out, width, ' <span class="muted">(log scale)</span>' if log else "")


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
    heights = {
        name: {bar: math.fsum(v for s in of if math.isfinite(v := values.get(s, 0.0))) / len(of) for bar, of in members.items()}
        for name, values in parts.items()
    }
    totals = {bar: math.fsum(heights[name][bar] for name in parts) for bar in members}
    highest = max(totals.values())
    top = min(highest, TALL * median(totals.values())) or highest or 1.0
    (x0, x1, _), y = _spans({stage: last}, width)[stage], _y_scale(0.0, 1.04 * top, False)
    out = _frame({stage: (x0, x1, last)}, width, _ticks(0.0, 1.04 * top, 5), y)
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
        legend.append(f'<span><i style="background:{colours[name]}"></i>{escape(name)} <b>{number(mean)}</b></span>')
    above = [total for total in totals.values() if total > top]
    caption = f'<p class="muted">{len(above):,} of {len(totals):,} bars above the axis, up to {number(max(above))}</p>' if above else ""
    note = f' <span class="muted">(a bar is the mean of {together:,} steps)</span>' if together > 1 else ""
    return _figure(title, legend, caption, out, width, note)


def histogram(title: str, edges: Sequence[float], counts: Sequence[int], marks: Mapping[str, float]) -> str:
    """An HTML `<figure>` of how often values lie between each edge and the next. edges: n + 1, ascending, for n counts; marks: values that
    a dashed line and the legend show, by name."""
    low, high, top = edges[0], edges[-1], max(counts) or 1
    y = _y_scale(0.0, 1.04 * top, False)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    out = []
    for tick in (tick for tick in _ticks(0.0, 1.04 * top, 5) if tick == int(tick)):
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        out.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}">{number(tick)}</text>')
    for tick in _ticks(low, high, 6):
        out.append(f'<text class="tick" text-anchor="middle" x="{x(tick):.1f}" y="{HEIGHT - 8}">{number(tick, 4)}</text>')
    bars = []
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            bars.append(f"M{x(left):.1f},{y(count):.1f}H{max(x(right) - 1, x(left) + 0.5):.1f}V{y(0):.1f}H{x(left):.1f}z")
    out.append(f'<path class="bars" style="fill:var(--c0)" d="{"".join(bars)}"/>')
    for value in marks.values():
        out.append(f'<line class="guide" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP - 8}" y2="{HEIGHT - BOTTOM}"/>')
    legend = [f"<span>{escape(name)} <b>{number(value, 4)}</b></span>" for name, value in marks.items()]
    return _figure(title, legend, "", out, WIDTH, "")


def _frame(
    spans: Mapping[str, tuple[float, float, int]],
    width: float,
    ticks: Sequence[float],
    y: Callable[[float], float],
    label: Callable[[float], str] | None = None,
) -> list[str]:
    """Grid, ticks and the stages' names. label: of a tick, a number with as many digits as tell them apart when None."""
    out = []
    digits = next((d for d in range(3, 9) if len({number(tick, d) for tick in ticks}) == len(ticks)), 9)  # 0.9996 and 0.9998 differ
    for tick in ticks:
        text = label(tick) if label else number(tick, digits)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        out.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}">{text}</text>')
    for index, (stage, (x0, x1, last)) in enumerate(spans.items()):
        first, final = ("start", x0 + 3) if index else ("middle", x0), ("end", x1 - 3 if index < len(spans) - 1 else x1)
        labels: list[tuple[float, str, float]] = [(0, *first), (last, *final)] if last else [(0, *first)]
        between = ((tick, "middle", x0 + (x1 - x0) * tick / max(1, last)) for tick in _ticks(0, last, int((x1 - x0) / 70)))
        labels += [(tick, anchor, x) for tick, anchor, x in between if x0 + 34 < x < x1 - 44 and tick == int(tick)]
        out += [f'<text class="tick" text-anchor="{how}" x="{x:.1f}" y="{HEIGHT - 8}">{tick:,.0f}</text>' for tick, how, x in labels]
        if index:
            out.append(f'<line class="rule" x1="{x0:.1f}" x2="{x0:.1f}" y1="{TOP - 12}" y2="{HEIGHT - BOTTOM}"/>')
        out.append(f'<text class="stage" x="{x0 + 4:.1f}" y="{TOP - 5}">{escape(stage)}</text>')
    return out


def _figure(title: str, legend: Sequence[str], caption: str, shapes: Sequence[str], width: float, note: str) -> str:
    css = ' class="whole"' if width == WIDE else ""
    return (
        f'<figure{css}><figcaption>{escape(title)}{note}</figcaption><div class="legend">{"".join(legend)}</div>{caption}'
        f'<svg viewBox="0 0 {width:g} {HEIGHT:g}" role="img" aria-label="{escape(title)}">{"".join(shapes)}</svg></figure>'
    )


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


def _thin(points: Points) -> Points:
    """At most 2 points a bucket, its lowest and its highest in order of x; a bucket that holds a NaN keeps it as a gap."""
    if len(points) <= 2 * BUCKETS:
        return points
    out: list[tuple[float, float]] = []
    size = math.ceil(len(points) / BUCKETS)
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


def _spans(steps: Mapping[str, int], width: float) -> dict[str, tuple[float, float, int]]:
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


def _y_scale(low: float, high: float, log: bool) -> Callable[[float], float]:
    bottom, span = HEIGHT - BOTTOM, HEIGHT - BOTTOM - TOP
    if log:
        low, high = math.log10(low), math.log10(high)
        return lambda v: bottom - span * (math.log10(v) - low) / (high - low)
    return lambda v: bottom - span * (v - low) / (high - low)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten apart) in [low, high], about `most` of them."""
    if not high > low or most < 1:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / gap - 1e-9)
    return [round(i * gap, 12) for i in range(first, math.floor(high / gap + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**d for d in decades if low <= 10.0**d <= high]
    if len(tens) >= 3:
        return tens[:: math.ceil(len(tens) / 6)]
    return [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
