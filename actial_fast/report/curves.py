"""Which charts a report has, of which metrics: how a run learnt, GRPO's figures, speed and optimisation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from actial_fast.report.chart import Chart, Guide, Series, lines, moving_average
from actial_fast.report.html import folded
from actial_fast.report.paired import Result
from actial_fast.report.run import Record, Run
from actial_fast.report.speed import TAKEN

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
MAY_LOG = ("loss", "grad_norm", "kl", "ratio")
FEW = 0.02  # a share of well-formed replies that no evaluation of a stage exceeds is not worth a chart
DESCENT = 5  # the first fifth of a stage does not set the axis of the close-up of its loss: its descent would flatten all that follows


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


def _series(run: Run, names: Sequence[str], stages: Iterable[str]) -> list[Series]:
    """One series a metric, over the stages that recorded it."""
    out = []
    for colour, name in enumerate(names):
        points = {stage: [(m["step"], m[name]) for m in run.metrics if m["stage"] == stage and name in m] for stage in stages}
        out.append(Series(name, {stage: p for stage, p in points.items() if p}, colour))
    return out


def _marks(figures: Record) -> float:
    """The mean score: the accuracy where no marks are partial, and in runs from before there were any."""
    return float(figures.get("score", figures["accuracy"]))


def eval_charts(run: Run, name: str, wanted: Iterable[str]) -> Iterator[Chart]:
    """Accuracy, or marks, by type and, if replies were well-formed, the format, over each wanted stage that evaluated more than once."""
    stages: Mapping[str, Mapping[int, Result]] = run.evals[name]
    for stage in (s for s in wanted if len(stages.get(s, ())) > 1):
        points, last = stages[stage].items(), {stage: run.steps[stage]}
        kinds = list(dict.fromkeys(kind for _, result in points for kind in result["kinds"]))
        of_kinds = [
            Series(kind, {stage: [(n, _marks(r["kinds"][kind])) for n, r in points if kind in r["kinds"]]}, i, True)
            for i, kind in enumerate(kinds)
        ]
        chance = {kind: round(r["kinds"][kind]["chance"], 3) for _, r in points for kind in r["kinds"]}
        guides = [Guide("chance", next(iter(chance.values())))] if len(set(chance.values())) == 1 else []
        guides = guides or [Guide(f"chance, {kind}", value, kinds.index(kind)) for kind, value in chance.items()]
        yield lines(f"Accuracy by type ({name})", of_kinds, last, guides=guides, percent=True)
        shares = (("well-formed", "format_rate"), ("well-formed and correct", "well_formed_and_correct"), ("correct", "accuracy"))
        formed = [Series(label, {stage: [(n, r["overall"][key]) for n, r in points]}, i, True) for i, (label, key) in enumerate(shares)]
        if any(result["overall"]["format_rate"] > FEW for _, result in points):
            yield lines(f"Format and correctness ({name})", formed, last, percent=True)


def learning(run: Run) -> Iterator[Chart]:
    """The last supervised stage from close by, its loss beside its accuracy; then the loss of all of them."""
    supervised = [s for s in run.steps if s not in run.rl and any(m["stage"] == s and "loss" in m for m in run.metrics)]
    if supervised:
        stage = supervised[-1]
        (series,) = _series(run, ["loss"], [stage])
        later = [v for n, v in moving_average(series.stages[stage]) if n > run.steps[stage] / DESCENT and math.isfinite(v)]
        top = 1.25 * max(later, default=math.inf)
        yield lines(f"Supervised loss, {stage} (nats per answer token)", [series], {stage: run.steps[stage]}, top=top)
    for name in run.evals:
        yield from eval_charts(run, name, supervised[-1:])
    title = "Supervised loss, all stages (nats per answer token)"
    yield lines(title, _series(run, ["loss"], supervised), run.steps, may_log=True)


def grpo(run: Run) -> Iterator[Chart]:
    """The reward, the evaluations, and the figures of the algorithm."""
    stages = [s for s in run.steps if s in run.rl]
    names = dict.fromkeys(key for m in run.metrics for key in m if key.startswith("reward"))
    yield lines("Reward and its parts", _series(run, list(names), stages), run.steps)
    for name in run.evals:
        yield from reversed(list(eval_charts(run, name, stages)))  # format first: it is what GRPO moves
    for title, keys, percent in GRPO_CHARTS:
        yield lines(title, _series(run, keys, stages), run.steps, percent=percent, may_log=keys[0] in MAY_LOG)


def optimisation(run: Run) -> Iterator[Chart]:
    """Speed and the optimizer's figures, then every metric that has no chart of its own."""
    for title, keys in ALL_CHARTS:
        yield lines(title, _series(run, keys, run.steps), run.steps, may_log=keys[0] in MAY_LOG)
    drawn = {"stage", "step", "time", "loss", *(key for _, keys, *_ in (*GRPO_CHARTS, *ALL_CHARTS) for key in keys)}
    for key in dict.fromkeys(key for m in run.metrics for key in m if key not in drawn and not key.startswith(("reward", *TAKEN))):
        yield lines(key, _series(run, [key], run.steps), run.steps)
