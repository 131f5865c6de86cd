"""Which charts a report has, of which metrics: how a run learnt, by steps and by time, GRPO's figures, speed and optimisation."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from actial_fast.report.chart import Chart, Guide, Points, Series, lines, moving_average
from actial_fast.report.html import folded
from actial_fast.report.metrics import LOSSES
from actial_fast.report.paired import Result
from actial_fast.report.run import Record, Run
from actial_fast.report.speed import COLOUR, TAKEN, phase_bars

GRPO_CHARTS = (  # title, metrics drawn in one chart, whether they are shares on an axis from 0 to 100%
    ("Response length (tokens)", ("response_length",), False),
    ("KL to the reference, per token", ("kl",), False),
    ("Entropy (nats per token)", ("entropy",), False),
    ("Groups of equal rewards", ("zero_variance_groups",), True),
    ("Finished replies", ("finished",), True),
    ("Groups: drawn, with rewards that differ", ("sampling/drawn", "sampling/kept"), False),
    ("Clip fraction", ("clip_fraction",), False),
    ("Probability ratio", ("ratio", "ratio_max"), False),
    ("Importance weight", ("importance",), False),
    ("Policy loss", ("loss",), False),
)
ALL_CHARTS = (
    ("Tokens per second", ("tokens_per_s",)),
    ("Seconds per step", ("seconds", "sampling_seconds")),
    ("Gradient norm", ("grad_norm",)),
    ("Learning rate", ("lr",)),
    ("Answer tokens per step", ("answer_tokens",)),
)
SPEED_CHARTS = (  # title, metric of the whole step, beginning of those of its phases, whether an axis may be logarithmic
    ("Tokens per second and device, by phase", "", "tokens_per_s/", True),
    ("MFU: share of the measured matmul rate", "mfu", "mfu/", False),
    ("Peak memory (GiB)", "peak_gib", "", False),
    ("Sampler against trainer: mean |d log p|", "mismatch/mean_abs", "", True),
    ("Sampler against trainer: KL per token", "mismatch/kl", "", True),
    ("Sampler against trainer: largest ratio", "mismatch/max_ratio", "", True),
    ("Sampler against trainer: importance weights outside the bounds", "mismatch/outside", "", True),
)
MAY_LOG = ("loss", "grad_norm", "kl", "ratio")
FEW = 0.02  # a share of well-formed replies that no evaluation of a stage exceeds is not worth a chart
DESCENT = 5  # the first fifth of a stage does not set the axis of the close-up of its loss: its descent would flatten all that follows

Runs = Mapping[str, Run]  # what tells a run from the others in a chart -> the run; the first one is the page's


def grid(charts: Iterable[Chart]) -> str:
    """Two charts a row; of an odd number the last one takes a row, so that no cell stays empty. Those of one value are folded away under
    what they say. "" when none has a point."""
    drawn = [(chart, figure) for chart in charts if (figure := chart.draw())]
    open_, silent = ([pair for pair in drawn if bool(pair[0].constant) == still] for still in (False, True))
    told = ", ".join(chart.constant for chart, _ in silent)
    return _cells(open_) + (folded(f"Always the same: {told}", _cells(silent)) if silent else "")


def _cells(drawn: Sequence[tuple[Chart, str]]) -> str:
    figures = [figure for _, figure in drawn]
    if len(drawn) % 2:
        figures[-1] = drawn[-1][0].draw(wide=True)
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def steps_of(runs: Runs) -> dict[str, int]:
    """The last step of each stage of any run, stages in the order of the first run that has them."""
    steps: dict[str, int] = {}
    for run in runs.values():
        for stage, last in run.steps.items():
            steps[stage] = max(steps.get(stage, 0), last)
    return steps


def series(runs: Runs, names: Sequence[str], stages: Iterable[str], colours: Mapping[str, int] | None = None) -> list[Series]:
    """One line a metric and run, over the stages that recorded it. Metrics have colours, by their place unless told, and runs dashes; where
    there is one metric, the runs have the colours."""
    wanted = list(stages)
    found = {name: {label: _points(run, name, wanted) for label, run in runs.items()} for name in names}
    found = {name: {label: points for label, points in of.items() if points} for name, of in found.items()}
    alone = len(runs) > 1 and sum(map(bool, found.values())) == 1
    out = []
    for place, name in enumerate(names):
        for k, label in enumerate(runs):
            if label not in found[name]:
                continue
            colour = k if alone else (colours or {}).get(name, place)
            out.append(Series(label if alone else _told(name, label), found[name][label], colour, dash=0 if alone else k))
    return out


def _points(run: Run, name: str, stages: Iterable[str]) -> dict[str, list[tuple[float, float]]]:
    points = {stage: [(float(m["step"]), m[name]) for m in run.metrics if m["stage"] == stage and name in m] for stage in stages}
    return {stage: found for stage, found in points.items() if found}


def _told(name: str, label: str) -> str:
    return f"{name}, {label}" if label else name


def _marks(figures: Record) -> float:
    """The mean score: the accuracy where no marks are partial, and in runs from before there were any."""
    return float(figures.get("score", figures["accuracy"]))


def eval_charts(runs: Runs, name: str, wanted: Iterable[str]) -> Iterator[Chart]:
    """Accuracy, or marks, by type and, if replies were well-formed, the format, over each wanted stage that evaluated more than once."""
    for stage in wanted:
        of: dict[str, Mapping[int, Result]] = {label: run.evals.get(name, {}).get(stage, {}) for label, run in runs.items()}
        results = [result for steps in of.values() for result in steps.values()]
        if max(map(len, of.values())) < 2:
            continue
        kinds = list(dict.fromkeys(kind for result in results for kind in result["kinds"]))
        last = {stage: steps_of(runs)[stage]}
        by_kind = [
            Series(_told(kind, label), {stage: [(n, _marks(r["kinds"][kind])) for n, r in steps.items() if kind in r["kinds"]]}, i, True, k)
            for i, kind in enumerate(kinds)
            for k, (label, steps) in enumerate(of.items())
        ]
        chance = {kind: round(r["kinds"][kind]["chance"], 3) for r in results for kind in r["kinds"]}
        guides = [Guide("chance", next(iter(chance.values())))] if len(set(chance.values())) == 1 else []
        guides = guides or [Guide(f"chance, {kind}", value, kinds.index(kind)) for kind, value in chance.items()]
        yield lines(f"Accuracy by type ({name})", by_kind, last, guides=guides, percent=True)
        shares = (("well-formed", "format_rate"), ("well-formed and correct", "well_formed_and_correct"), ("correct", "accuracy"))
        formed = [
            Series(_told(title, label), {stage: [(n, r["overall"][key]) for n, r in steps.items()]}, i, True, k)
            for i, (title, key) in enumerate(shares)
            for k, (label, steps) in enumerate(of.items())
        ]
        if any(result["overall"]["format_rate"] > FEW for result in results):
            yield lines(f"Format and correctness ({name})", formed, last, percent=True)


def learning(runs: Runs) -> Iterator[Chart]:
    """The last supervised stage from close by, its loss beside its accuracy; then the loss of all of them."""
    steps, rl = steps_of(runs), _rl(runs)
    supervised = [s for s in steps if s not in rl and any(m["stage"] == s and "loss" in m for run in runs.values() for m in run.metrics)]
    if supervised:
        stage = supervised[-1]
        losses = series(runs, ["loss"], [stage])
        later = [v for each in losses for n, v in moving_average(each.stages[stage]) if n > steps[stage] / DESCENT and math.isfinite(v)]
        top = 1.25 * max(later, default=math.inf)
        yield lines(f"Supervised loss, {stage} (nats per answer token)", losses, {stage: steps[stage]}, top=top)
    for name in _evaluated(runs):
        yield from eval_charts(runs, name, supervised[-1:])
    yield lines("Supervised loss, all stages (nats per answer token)", series(runs, ["loss"], supervised), steps, may_log=True)


def grpo(runs: Runs) -> Iterator[Chart]:
    """The reward, the evaluations, and the figures of the algorithm."""
    steps, rl = steps_of(runs), _rl(runs)
    stages = [s for s in steps if s in rl]
    names = [key for key in _recorded(runs) if key.startswith("reward")]
    yield lines("Reward and its parts", series(runs, names, stages), steps)
    for name in _evaluated(runs):
        yield from reversed(list(eval_charts(runs, name, stages)))  # format first: it is what GRPO moves
    for title, keys, percent in GRPO_CHARTS:
        yield lines(title, series(runs, keys, stages), steps, percent=percent, may_log=keys[0] in MAY_LOG)


def optimisation(runs: Runs) -> Iterator[Chart]:
    """Speed and the optimizer's figures, then every metric that has no chart of its own."""
    steps = steps_of(runs)
    for title, keys in ALL_CHARTS:
        yield lines(title, series(runs, keys, steps), steps, may_log=keys[0] in MAY_LOG)
    drawn = {"stage", "step", "time", "loss", *(key for _, keys, *_ in (*GRPO_CHARTS, *ALL_CHARTS) for key in keys)}
    for key in _recorded(runs):
        if key not in drawn and not key.startswith(("reward", LOSSES, *TAKEN)):
            yield lines(key, series(runs, [key], steps), steps)


def speed(runs: Runs) -> Iterator[Chart]:
    """Where the time went: bars of one run only, as those of two do not stand side by side; then lines of all."""
    steps = steps_of(runs)
    if len(runs) == 1:
        yield from phase_bars(*runs.values())
    for title, whole, prefix, log in SPEED_CHARTS:
        names = [key for key in _recorded(runs) if key == whole or (prefix and key.startswith(prefix))]
        colours = {key: 6 if key == whole else COLOUR.get(key.removeprefix(prefix), 6) for key in names}
        ordered = sorted(names, key=lambda key: [whole, *(prefix + phase for phase in COLOUR), key].index(key))
        found = [replace(s, name=_phase(s.name, whole, prefix)) for s in series(runs, ordered, steps, colours)]
        yield lines(title, found, steps, may_log=log)


def by_time(runs: Runs) -> Iterator[Chart]:
    """Losses, rewards and accuracies over the time that a stage's steps took, evaluations and pauses between them left out."""
    clocks = {label: _clock(run) for label, run in runs.items()}
    longest = max((times[-1] for of in clocks.values() for _, times in of.values()), default=0.0)
    unit, size = next(((name, s) for name, s in (("seconds", 1), ("minutes", 60)) if longest < 600 * s), ("hours", 3600))

    def placed(label: str, stages: Mapping[str, Points]) -> dict[str, Points]:
        clock = clocks[label]
        return {s: [(_at(*clock[s], step) / size, value) for step, value in points] for s, points in stages.items() if s in clock}

    rl, stages = _rl(runs), [s for s in steps_of(runs) if any(s in of for of in clocks.values())]
    ends = {s: math.ceil(max(of[s][1][-1] for of in clocks.values() if s in of) / size) for s in stages}
    for title, name, reinforced in (("Supervised loss", "loss", False), ("Reward", "reward", True)):
        wanted = [s for s in stages if (s in rl) == reinforced]
        drawn = [Series(label or name, placed(label, _points(run, name, wanted)), k) for k, (label, run) in enumerate(runs.items())]
        yield lines(f"{title} over {unit}", drawn, ends, may_log=name in MAY_LOG, unit=unit)
    for name in _evaluated(runs):
        drawn = []
        for k, (label, run) in enumerate(runs.items()):
            marks = {s: [(n, _marks(r["overall"])) for n, r in of.items()] for s, of in run.evals.get(name, {}).items()}
            drawn.append(Series(label or "overall", placed(label, marks), k, True))
        if any(len(points) > 1 for each in drawn for points in each.stages.values()):
            yield lines(f"Accuracy over {unit} ({name})", drawn, ends, percent=True, unit=unit)


def _clock(run: Run) -> dict[str, tuple[list[int], list[float]]]:
    """Steps of each stage that timed them, and the seconds of all its steps up to each."""
    timed = {stage: [m for m in run.metrics if m["stage"] == stage and "seconds" in m] for stage in run.steps}
    return {stage: ([m["step"] for m in of], list(accumulate(m["seconds"] for m in of))) for stage, of in timed.items() if of}


def _at(steps: list[int], times: list[float], step: float) -> float:
    """The seconds up to a step."""
    done = bisect_right(steps, step)
    return times[done - 1] if done else 0.0


def _phase(name: str, whole: str, prefix: str) -> str:
    if not prefix or name.startswith(prefix):
        return name.removeprefix(prefix)
    return "whole step" + name.removeprefix(whole) if name.startswith(whole) else name


def _rl(runs: Runs) -> set[str]:
    return {stage for run in runs.values() for stage in run.rl}


def _evaluated(runs: Runs) -> list[str]:
    return list(dict.fromkeys(name for run in runs.values() for name in run.evals))


def _recorded(runs: Runs) -> list[str]:
    return list(dict.fromkeys(key for run in runs.values() for m in run.metrics for key in m))
