"""Draws what the README shows from a result of bench.kernels.ops: each side's time over the floor, and its peak memory.

    python -m bench.harness.plot [RESULT] [--shape T8192-H3584-V152064] [--out FILE.svg]

The floor is the op's FLOP at the speed of the best torch.mm of the same rounds: 1x is what no implementation can beat. A bar that would be
longer than the axis is cut and says its value. Sides that could not run are named under the plot with the reason. Without RESULT the newest
one of this machine is read; the drawing goes beside it unless --out names another file (.svg or .png).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.harness.compare import newest
from bench.harness.table import chip

BLANK = {"facecolor": "white", "edgecolor": "none", "pad": 1}
OURS, OTHER, INK, DIM, EDGE = "#0b6fc2", "#b4bcc6", "#1b1f24", "#667079", "#dfe3e8"
LONGEST = 6.0  # times the floor, the end of the axis at most
TITLES = {
    ("linear_grpo_loss", "trainable"): "GRPO loss, forward + backward, trainable head: floor 3 GEMMs",
    ("linear_grpo_loss", "frozen"): "GRPO loss, forward + backward, frozen head: floor 2 GEMMs",
    ("linear_logprob", "no grad"): "log-probs and entropies, no gradient: floor 1 GEMM",
    ("linear_cross_entropy", "trainable"): "cross-entropy, forward + backward, trainable head: floor 3 GEMMs",
}


def main(argv: list[str] | None = None) -> int:
    """Draw one picture and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.harness.plot", description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[2]
    )
    parser.add_argument(
        "result", metavar="RESULT", type=Path, nargs="?", help="a JSON file of bench.kernels.ops (default: the newest here)"
    )
    parser.add_argument("--shape", help="which size (default: that of the result's first case)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the drawing, .svg or .png (default: beside the result, .svg)")
    args = parser.parse_args(argv)
    path = args.result or newest()
    if path is None:
        parser.error("no result of this machine in bench/results; run python -m bench.kernels.ops first")
    result = json.loads(path.read_text())
    shape = args.shape or result["cases"][0]["case"].rsplit("/", 1)[1]
    out = args.out or path.with_suffix(".svg")
    try:
        draw(result, shape, out)
    except ValueError as error:
        parser.error(str(error))
    print(f"drawn: {out}")
    return 0


def draw(result: dict[str, Any], shape: str, out: Path) -> None:
    """One row of panels for every op of TITLES that the result measured at `shape`; time left, memory right.

    Raises ValueError where there is none.
    """
    cases = [case for case in result["cases"] if case["case"].endswith(f"/{shape}") and (case["op"], case["variant"]) in TITLES]
    cases = [case for case in cases if "ceiling" in case]
    if not cases:
        raise ValueError(f"shape: no op was measured at {shape}; the result has {', '.join(sorted({_shape(c) for c in result['cases']}))}")
    shown = [[side for side in case["sides"] if _drawn(side)] for case in cases]
    heights = [len(sides) + 1.1 for sides in shown]
    notes = _notes(cases)
    inches = 0.235 * sum(heights) + 0.95 + 0.16 * len(notes)
    figure, axes = plt.subplots(
        len(cases), 2, figsize=(8.6, inches), squeeze=False, gridspec_kw={"height_ratios": heights, "width_ratios": (1.45, 1)}
    )
    bottom = (0.45 + 0.16 * len(notes)) / inches
    figure.subplots_adjust(left=0.215, right=0.985, top=1 - 0.62 / inches, bottom=bottom, hspace=0.3, wspace=0.1)
    longest = min(LONGEST, 1.06 * max(1 / side["share"] for sides in shown for side in sides if "share" in side))
    most = max(side["peak_mib"] for sides in shown for side in sides if "peak_mib" in side)
    for row, (case, sides) in enumerate(zip(cases, shown, strict=True)):
        _time(axes[row][0], case, sides, max(longest, 1.5))
        _memory(axes[row][1], sides, most)
        last = row == len(cases) - 1
        for axis in axes[row]:
            axis.tick_params(labelbottom=last)
    axes[-1][0].set_xlabel("time, as a multiple of the floor", color=DIM, fontsize=8)
    axes[-1][1].set_xlabel("peak memory above inputs and outputs", color=DIM, fontsize=8)
    case, machine = cases[0], result["machine"]
    title = f"T = {case['T']:,} rows, H = {case['H']:,}, V = {case['V']:,}, {case['dtype']}, {chip(machine)}"
    figure.text(0.015, 1 - 0.2 / inches, title, fontsize=9.5, weight="bold", color=INK, va="center")
    for i, note in enumerate(notes):
        figure.text(0.015, (0.06 + 0.16 * (len(notes) - 1 - i)) / inches, note, fontsize=7, color=DIM, va="bottom")
    figure.savefig(out, dpi=150, facecolor="white")
    plt.close(figure)


def _time(axis: Axes, case: dict[str, Any], sides: list[dict[str, Any]], longest: float) -> None:
    axis.set_title(TITLES[case["op"], case["variant"]], loc="left", fontsize=8.5, color=INK, x=-0.43, pad=5)
    axis.axvline(1, color=INK, linewidth=0.9, zorder=3)
    for y, side in enumerate(sides):
        if side["status"] != "measured":
            axis.text(0.06, y, side["status"].split(":")[0], va="center", fontsize=7.5, color=DIM, style="italic", bbox=BLANK, zorder=4)
            continue
        over = 1 / side["share"]
        axis.barh(y, min(over, longest), height=0.68, color=_colour(side), zorder=2)
        told = f"{over:.2f}x   {_milliseconds(side['ms']['median'])}"
        inside = over > 0.55 * longest
        colour = "white" if inside and _ours(side) else INK
        where = min(over, longest) - 0.012 * longest if inside else max(over, 1) + 0.015 * longest
        axis.text(
            where, y, told + (" »" if over > longest else ""), va="center", ha="right" if inside else "left", fontsize=7.5, color=colour
        )
    axis.set_xlim(0, longest)
    axis.set_yticks(range(len(sides)), [side["side"] for side in sides])
    _plain(axis, len(sides))
    for label, side in zip(axis.get_yticklabels(), sides, strict=True):
        label.set(color=OURS if _ours(side) else INK, weight="bold" if _ours(side) else "normal", fontsize=8)
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(7, integer=longest >= 4))
    axis.xaxis.set_major_formatter("{x:g}x")


def _memory(axis: Axes, sides: list[dict[str, Any]], most: float) -> None:
    gib = most >= 2048
    for y, side in enumerate(sides):
        if side["status"] != "measured":
            continue
        size = side["peak_mib"]
        axis.barh(y, size, height=0.68, color=_colour(side), zorder=2)
        inside = size > 0.6 * most
        told = f"{size / 1024:.1f} GiB" if gib else f"{size:,.0f} MiB"
        where = size - 0.015 * most if inside else size + 0.02 * most
        colour = "white" if inside and _ours(side) else INK
        axis.text(where, y, told, va="center", ha="right" if inside else "left", fontsize=7.5, color=colour)
    axis.set_xlim(0, 1.04 * max(most, 1e-3))
    axis.set_yticks([])
    _plain(axis, len(sides))
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:.0f} GiB" if gib else f"{x:,.0f} MiB")


def _plain(axis: Axes, rows: int) -> None:
    axis.set_ylim(rows - 0.45, -0.55)
    axis.tick_params(length=0, labelsize=7.5, colors=DIM, pad=3)
    axis.grid(axis="x", color=EDGE, linewidth=0.6, zorder=0)
    for name, spine in axis.spines.items():
        spine.set_visible(name == "left")
        spine.set_color(EDGE)


def _notes(cases: list[dict[str, Any]]) -> list[str]:
    """The sides that are not drawn, by reason, in lines that fit."""
    reasons: dict[str, list[str]] = {}
    for case in cases:
        for side in case["sides"]:
            if not _drawn(side) and side["side"] not in reasons.setdefault(side["status"], []):
                reasons[side["status"]].append(side["side"])
    lines = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return [line if len(line) <= 140 else f"{line[:139]}…" for line in lines]


def _drawn(side: dict[str, Any]) -> bool:
    """What ran, and what ran out of memory or was wrong, which is a result too."""
    return side["status"].startswith(("measured", "out of memory", "wrong"))


def _ours(side: dict[str, Any]) -> bool:
    return side["side"].startswith("ours")


def _colour(side: dict[str, Any]) -> str:
    return OURS if _ours(side) else OTHER


def _milliseconds(ms: float) -> str:
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def _shape(case: dict[str, Any]) -> str:
    return case["case"].rsplit("/", 1)[1]


if __name__ == "__main__":
    sys.exit(main())
