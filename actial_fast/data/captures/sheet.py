"""Contact sheet: rows drawn as a picture, to look at what is asked and answered before training on it.

Each row gets its images, its question with the true option marked, the answer that is trained where it says more than the truth (a chain of
thought) and, when it carries poses (viewpoint.py), a sketch of the move seen from above: camera 1 always at the bottom looking up, so that
the page's left and right are camera 1's left and right.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Arc, Circle, FancyArrowPatch, Polygon

from actial_fast.data.captures.geometry import horizontal, rotation, unit
from actial_fast.data.captures.questions import OPPOSITE
from actial_fast.data.sources.files import writing
from actial_fast.data.sources.picture import decode
from actial_fast.data.sources.row import IMAGE_TAG, Row

INK, SOFT, FIRST, SECOND, TRUE = "#1f2430", "#8a92a3", "#2f6fde", "#e0662b", "#1a8a4c"
MAX_IMAGES = 4  # shown per row
ROW_INCHES = 2.5  # of a row at least
LINE_INCHES, HEAD_INCHES, FOOT_INCHES = 0.2125, 0.42, 0.3  # of a row's text: a line, what stands above the first and below the last
WIDE, MOST_LINES = 68, 40  # characters of a line, and lines of a row


def contact_sheet(rows: Sequence[Row], out: Path, title: str = "", dpi: int = 110) -> Path:
    """Draw `rows` below one another into the PNG `out`, which is returned; its folder is made if need be.

    title: a line at the top. dpi: pixels per inch; a row is 2.5 inches high, or as high as its text. ValueError when there are no rows;
    BadRow when an image cannot be read."""
    if not rows:
        raise ValueError("no rows to draw; the source is empty or the filter leaves none")
    shown = min(MAX_IMAGES, max(1, max(len(row.images) for row in rows)))
    texts = [_lines(row) for row in rows]
    heights = [max(ROW_INCHES, HEAD_INCHES + LINE_INCHES * len(lines) + FOOT_INCHES) for lines in texts]
    height = sum(heights) + (0.55 if title else 0.1)
    figure = Figure(figsize=(2.45 * shown + 5.4 + 2.7, height), facecolor="white", dpi=dpi)
    grid = figure.add_gridspec(
        len(rows),
        shown + 2,
        width_ratios=[2.45] * shown + [5.4, 2.7],
        height_ratios=heights,
        left=0.012,
        right=0.99,
        bottom=0.07 / height,
        top=1 - (0.5 if title else 0.07) / height,
        wspace=0.05,
        hspace=0.09,
    )
    if title:
        figure.text(0.012, 1 - 0.28 / height, title, fontsize=14, fontweight="bold", color=INK, va="center")
    for r, row in enumerate(rows):
        for i in range(shown):
            axes = figure.add_subplot(grid[r, i])
            axes.set_axis_off()
            if i < len(row.images):
                _draw_image(axes, decode(row.images[i], row.where or row.id), i)
        _draw_text(figure.add_subplot(grid[r, shown]), row, texts[r], heights[r])
        sketch = figure.add_subplot(grid[r, shown + 1])
        sketch.set_axis_off()
        if row.meta.get("poses"):
            _draw_sketch(sketch, row)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with writing(out):
        figure.savefig(out, format="png")
    return out


def _draw_image(axes: Axes, pixels: np.ndarray, i: int) -> None:
    axes.imshow(pixels, interpolation="nearest" if max(pixels.shape) < 200 else "antialiased")
    color = (FIRST, SECOND)[i] if i < 2 else SOFT
    label = {"boxstyle": "round,pad=0.25", "facecolor": color, "edgecolor": "none"}
    axes.text(0.04, 0.95, str(i + 1), transform=axes.transAxes, fontsize=9, fontweight="bold", color="white", va="top", bbox=label)


Styled = tuple[str, str, str]  # text, colour, weight


def _lines(row: Row) -> list[Styled]:
    """The last user message, wrapped, the option whose letter is the truth in bold green; then the trained answer."""
    asked = next((turn.content for turn in reversed(row.prompt) if turn.role == "user"), "")
    lines: list[Styled] = []
    for line in asked.replace(IMAGE_TAG, "").strip().split("\n"):
        true = bool(row.truth) and line.startswith(f"{row.truth}.")
        text = f"{line}  \u2713" if true else line
        lines += [(part, TRUE if true else INK, "bold" if true else "normal") for part in _wrapped(text)]
    if row.truth and not any(color == TRUE for _, color, _ in lines):
        lines += [(part, TRUE, "bold") for part in _wrapped(f"answer: {row.truth}")]
    said = row.turns[-1].content.strip() if row.turns and row.turns[-1].role == "assistant" else ""
    if said and said != row.truth:
        lines += [(part, FIRST, "normal") for line in f"trained: {said}".split("\n") for part in _wrapped(line)]
    left = len(lines) - MOST_LINES
    return lines if left <= 0 else [*lines[: MOST_LINES - 1], (f"[{left + 1:,} more lines]", SOFT, "normal")]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDE) or [""]


def _draw_text(axes: Axes, row: Row, lines: Sequence[Styled], height: float) -> None:
    """Whatever stands in a row is text: a dollar sign begins no formula."""
    axes.set_axis_off()
    axes.set_xlim(0, 1)

    def put(place: float, text: str, size: float, color: str, **look: Any) -> None:
        axes.text(0.03, place, text, fontsize=size, color=color, transform=axes.transAxes, parse_math=False, **look)

    put(1 - 0.03 * ROW_INCHES / height, row.kind.replace("_", " "), 10, FIRST, fontweight="bold", va="top")
    for n, (text, color, weight) in enumerate(lines):
        put(1 - (HEAD_INCHES + LINE_INCHES * n) / height, text, 9.5, color, fontweight=weight, va="top")
    put(0.0, textwrap.shorten(row.id, 80), 7.5, SOFT, va="bottom")


def _draw_sketch(axes: Axes, row: Row) -> None:
    meta = row.meta
    up, center = np.array(meta["up"]), np.array(meta["center"])
    rotations = [rotation(pose["qvec"]) for pose in meta["poses"]]
    offsets = [horizontal(-r.T @ np.array(pose["tvec"]) - center, up) for r, pose in zip(rotations, meta["poses"], strict=True)]
    ahead = unit(-offsets[0])  # the page's up: from camera 1 to the object
    plane = np.stack([np.cross(ahead, up), ahead])  # (2, 3): the world's horizontal directions on the page
    scale = 1 / max(np.linalg.norm(offset) for offset in offsets)
    places = [scale * plane @ offset for offset in offsets]
    views = [unit(plane @ r[2]) for r in rotations]

    axes.set_aspect("equal")
    axes.add_patch(Circle((0, 0), 1, fill=False, edgecolor="#dfe3ea", linestyle=(0, (4, 3)), linewidth=1))
    axes.add_patch(Circle((0, 0), 0.13, facecolor="#c9cfda", edgecolor=INK, linewidth=0.8))
    change = meta["azimuth_change_deg"]
    turns = sorted((-90, -90 + change))
    axes.add_patch(Arc((0, 0), 0.6, 0.6, theta1=turns[0], theta2=turns[1], color=SOFT, linewidth=1.2))
    stayed = meta["ego_translation"] not in OPPOSITE
    for place, view, color, name in zip(places, views, (FIRST, SECOND), ("", "1 2") if stayed else "12", strict=True):
        axes.plot([place[0], 0], [place[1], 0], color="#dfe3ea", linewidth=0.9, zorder=0)
        side = np.array([-view[1], view[0]])
        tips = [place + 0.34 * view + 0.16 * side, place + 0.34 * view - 0.16 * side]
        axes.add_patch(Polygon([place, *tips], facecolor=color, alpha=0.3, edgecolor="none"))
        axes.add_patch(Circle(place, 0.085, facecolor=color, edgecolor="white", linewidth=0.8, zorder=3))
        size = 5.5 if stayed else 7.5
        axes.text(place[0], place[1], name, color="white", fontsize=size, fontweight="bold", ha="center", va="center_baseline", zorder=4)
    arrow = FancyArrowPatch(
        tuple(places[0]),
        tuple(places[1]),
        arrowstyle="-|>",
        connectionstyle=f"arc3,rad={0.25 if change > 0 else -0.25}",
        shrinkA=9,
        shrinkB=9,
        mutation_scale=11,
        color=INK,
        linewidth=1.3,
    )
    if not stayed:
        axes.add_patch(arrow)
    axes.text(
        0,
        1.2,
        f"moved {change:+.1f}\u00b0 round it, turned {meta['yaw_deg']:+.1f}\u00b0",
        fontsize=8.5,
        color=INK,
        ha="center",
        va="bottom",
    )
    axes.set_xlim(-1.45, 1.45)
    axes.set_ylim(-1.2, 1.45)
