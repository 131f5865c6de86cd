"""Where a run's time went: a bar of phases per step, tokens per second and MFU of the phases, memory, and the sampler against the trainer.

Of metrics.jsonl are read `seconds/NAME`, `tokens_per_s/NAME`, `mfu`, `mfu/NAME`, `peak_gib` and `mismatch/...` (train.phases has their
meaning), and from events.jsonl those of kind "phases", which have a step's checkpoint and evaluation. A run without any has no charts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from actial_fast.report.bars import stacked_bars
from actial_fast.report.chart import Chart, Series, lines

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


def speed_charts(metrics: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], steps: Mapping[str, int]) -> Iterator[Chart]:
    """Those of nothing are empty. steps: last step per stage."""
    for stage, last in steps.items():
        parts = _seconds(metrics, events, stage)
        colours = {name: _css(COLOUR[name]) if name in COLOUR else "var(--dim)" for name in parts}
        yield Chart(partial(stacked_bars, f"Seconds of a step, {stage}", parts, stage, last, colours))
    yield lines("Tokens per second and device, by phase", _lines(metrics, "tokens_per_s/", steps), steps, may_log=True)
    whole = [Series("whole step", _stages(metrics, "mfu", steps), 6)]
    yield lines("MFU: share of the measured matmul rate", [*whole, *_lines(metrics, "mfu/", steps)], steps)
    yield lines("Peak memory (GiB)", [Series("peak_gib", _stages(metrics, "peak_gib", steps))], steps)
    for title, name in (
        ("Sampler against trainer: mean |d log p|", "mismatch/mean_abs"),
        ("Sampler against trainer: KL per token", "mismatch/kl"),
        ("Sampler against trainer: largest ratio", "mismatch/max_ratio"),
        ("Sampler against trainer: importance weights outside the bounds", "mismatch/outside"),
    ):
        yield lines(title, [Series(name, _stages(metrics, name, steps))], steps, may_log=True)


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


def _lines(metrics: Sequence[Mapping[str, Any]], prefix: str, steps: Mapping[str, int]) -> list[Series]:
    names = dict.fromkeys(key for m in metrics for key in m if key.startswith(prefix))
    found = {key.removeprefix(prefix): _stages(metrics, key, steps) for key in names}
    return [Series(name, found[name], COLOUR.get(name, 6)) for name in sorted(found, key=lambda n: [*COLOUR, n].index(n))]


def _stages(metrics: Sequence[Mapping[str, Any]], name: str, steps: Mapping[str, int]) -> dict[str, list[tuple[float, float]]]:
    points = {stage: [(float(m["step"]), m[name]) for m in metrics if m["stage"] == stage and name in m] for stage in steps}
    return {stage: found for stage, found in points.items() if found}


def _css(colour: int) -> str:
    plain = f"var(--c{colour % FAINT})"
    return plain if colour < FAINT else f"color-mix(in srgb,{plain} 50%,var(--bg))"
