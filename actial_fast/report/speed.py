"""Where a run's time went: a bar of phases per step.

Of metrics.jsonl are read `seconds/NAME` (train.phases has their meaning), and from events.jsonl those of kind "phases", which have a step's
checkpoint and evaluation. A run without any has no chart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from actial_fast.report.bars import stacked_bars
from actial_fast.report.chart import Chart
from actial_fast.report.run import Run

OTHER = "other"
# Phases that there may be, from the bottom of a bar to its top, each with its place among the page's colours. There are more than colours:
# some share one with a phase far away in the bar, at half its strength.
COLOUR = {
    "data": 5,
    "sync": 6,
    "sample": 0,
    "score": 4,
    "plan": 12,
    "old": 9,
    "reference": 3,
    "update": 1,
    "log": 13,
    "save": 11,
    "eval": 2,
}
FAINT = 7  # from here on: the colours again, at half their strength
TAKEN = ("seconds/", "tokens_per_s/", "tflops", "mfu", "peak_gib", "mismatch/")  # beginnings of what is drawn here, or need not be


def phase_bars(run: Run) -> Iterator[Chart]:
    """A chart a stage, empty where no phase was recorded."""
    for stage, last in run.steps.items():
        parts = _seconds(run.metrics, run.events, stage)
        colours = {name: _css(COLOUR[name]) if name in COLOUR else "var(--dim)" for name in parts}
        yield Chart(partial(stacked_bars, f"Seconds of a step, {stage}", parts, stage, last, colours))


def _seconds(metrics: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], stage: str) -> dict[str, dict[int, float]]:
    """Phase -> step -> seconds, in the order of a bar; what an event has of a step is added to it."""
    found: dict[str, dict[int, float]] = {}
    records = [m for m in metrics if m["stage"] == stage]
    records += [{**e["phases"], "step": e["step"]} for e in events if e["kind"] == "phases" and e["stage"] == stage and e["step"]]
    for record in records:
        for key, value in record.items():
            if key.startswith("seconds/") and value is not None:
                of = found.setdefault(key.removeprefix("seconds/"), {})
                of[record["step"]] = of.get(record["step"], 0.0) + value
    order = [*COLOUR, *sorted(found.keys() - COLOUR.keys() - {OTHER}), OTHER]
    return {name: found[name] for name in order if name in found}


def _css(colour: int) -> str:
    plain = f"var(--c{colour % FAINT})"
    return plain if colour < FAINT else f"color-mix(in srgb,{plain} 50%,var(--bg))"
