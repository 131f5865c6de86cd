"""Draws what the README shows first: one GRPO update by both sides, from results of bench.step.update.

    python -m bench.step.plot RESULT [RESULT ...] --out FILE.svg

A group of bars a result: seconds on the left, the median of a side's updates; peak memory on the right, their largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

OURS, OTHER, INK, DIM = "#0b6fc2", "#b4bcc6", "#1b1f24", "#667079"
MEASURES = (("seconds", "seconds", "{:.1f}", statistics.median), ("peak_mib", "peak memory, MiB", "{:,.0f}", max))


def main(argv: list[str] | None = None) -> int:
    """Draw one picture and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.plot", description=__doc__.split("\n\n")[0])
    parser.add_argument("results", metavar="RESULT", type=Path, nargs="+", help="JSON files of bench.step.update")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the drawing, .svg or .png")
    args = parser.parse_args(argv)
    draw([json.loads(path.read_text()) for path in args.results], args.out)
    print(f"drawn: {args.out}")
    return 0


def draw(results: list[dict[str, Any]], out: Path) -> None:
    """Bars of every result, ours above the other side's."""
    rows = [(result, side) for result in results for side in result["sides"]]
    places = [index + 0.6 * (index // 2) for index in range(len(rows))]
    with plt.rc_context({"svg.hashsalt": "actial_fast", "font.family": "DejaVu Sans", "font.size": 10}):
        figure, axes = plt.subplots(1, len(MEASURES), figsize=(10, 0.55 * len(rows) + 0.9), sharey=True)
        for axis, (measure, title, form, of) in zip(axes, MEASURES, strict=True):
            values = [of([update[measure] for update in side["updates"]]) for _, side in rows]
            colours = [OURS if side["side"] == "ours" else OTHER for _, side in rows]
            axis.barh(places, values, 0.82, color=colours)
            for place, value in zip(places, values, strict=True):
                axis.text(value + 0.015 * max(values), place, form.format(value), va="center", color=INK)
            axis.set_title(title, loc="left", color=DIM, fontsize=10)
            axis.set_xlim(0, 1.16 * max(values))
            axis.xaxis.set_visible(False)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
        axes[0].set_yticks(places, [_label(result, side) for result, side in rows])
        axes[0].invert_yaxis()
        figure.tight_layout()
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
        plt.close(figure)


def _label(result: dict[str, Any], side: dict[str, Any]) -> str:
    packages, settings = result["machine"]["packages"], result["settings"]
    name = {"ours": "actial_fast", "trl": f"TRL {packages['trl'].removesuffix('.0')}", "plain": "padded"}[side["side"]]
    return f"{name}, LoRA {settings['lora']}" if settings.get("lora") else f"{name}, all weights"


if __name__ == "__main__":
    sys.exit(main())
