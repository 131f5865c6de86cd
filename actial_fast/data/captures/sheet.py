"""Contact sheet: rows drawn as a picture, to look at what is asked and answered before training on it.

Each row gets its images, its question with the true option marked and, when it carries poses (viewpoint.py), a sketch of the move seen
from above: camera 1 always at the bottom looking up, so that the page's left and right are camera 1's left and right.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

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
ROW_INCHES = 2.5


def contact_sheet(rows: Sequence[Row], out: Path, title: str = "", dpi: int = 110) -> Path:
    """Draw `rows` below one another into the PNG `out`, which is returned; its folder is made if need be.

    title: a line at the top. dpi: pixels per inch; a row is 2.5 inches high. ValueError when there are no rows; BadRow when an image
    cannot be read."""
    if not rows:
        raise ValueError("no rows to draw; the source is empty or the filter leaves none")
    shown = min(MAX_IMAGES, max(1, max(len(row.images) for row in rows)))
    height = ROW_INCHES * len(rows) + (0.55 if title else 0.1)
    figure = Figure(figsize=(2.45 * shown + 5.4 + 2.7, height), facecolor="white", dpi=dpi)
    grid = figure.add_gridspec(
        len(rows),
        shown + 2,
        width_ratios=[2.45] * shown + [5.4, 2.7],
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
        _draw_question(figure.add_subplot(grid[r, shown]), row)
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


def _draw_question(axes: Axes, row: Row) -> None:
    """The last user message, wrapped; the option whose letter is the truth in bold green."""
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    asked = next((turn.content for turn in reversed(row.prompt) if turn.role == "user"), "")
    lines = asked.replace(IMAGE_TAG, "").strip().split("\n")
    styled = []  # (text, color, weight)
    for line in lines:
        true = bool(row.truth) and line.startswith(f"{row.truth}.")
        text = f"{line}  \u2713" if true else line
        styled += [(part, TRUE if true else INK, "bold" if true else "normal") for part in textwrap.wrap(text, 68) or [""]]
    if not any(color == TRUE for _, color, _ in styled) and row.truth:
        styled.append((f"answer: {row.truth}", TRUE, "bold"))
    styled = styled[:10]
    axes.text(0.03, 0.97, row.kind.replace("_", " "), fontsize=10, fontweight="bold", color=FIRST, va="top", transform=axes.transAxes)
    for n, (text, color, weight) in enumerate(styled):
        axes.text(0.03, 0.83 - 0.085 * n, text, fontsize=9.5, color=color, fontweight=weight, va="top", transform=axes.transAxes)
    axes.text(0.03, 0.0, textwrap.shorten(row.id, 80), fontsize=7.5, color=SOFT, va="bottom", transform=axes.transAxes)


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
    axes.text(0, 1.2, f"azimuth {change:+.1f}\u00b0   yaw {meta['yaw_deg']:+.1f}\u00b0", fontsize=8.5, color=INK, ha="center", va="bottom")
    axes.set_xlim(-1.45, 1.45)
    axes.set_ylim(-1.2, 1.45)
