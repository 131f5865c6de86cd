"""Losses of held-out rows in the report: a table, a chart beside the training loss, and whether they have begun to rise.

Of metrics.jsonl are read `eval/NAME/loss` and its fellows (MetricLog.losses).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from html import escape

from actial_fast.report.chart import Chart, Series, lines
from actial_fast.report.curves import Runs, series, steps_of
from actial_fast.report.metrics import LOSSES
from actial_fast.report.run import Record

RISEN = 1.02  # of the least loss, from which it counts as risen
Losses = dict[str, dict[str, dict[int, Mapping[str, float]]]]  # name -> stage -> step -> loss, perplexity, answer_tokens, rows


def losses_of(metrics: Iterable[Record]) -> Losses:
    """The losses of every source, stage and step."""
    out: Losses = {}
    for record in metrics:
        for key in filter(_is_loss, record):
            whole = key.removesuffix("loss")
            figures = {key.removeprefix(whole): value for key, value in record.items() if key.startswith(whole)}
            out.setdefault(whole[len(LOSSES) : -1], {}).setdefault(record["stage"], {})[record["step"]] = figures
    return out


def loss_line(losses: Losses) -> str:
    """A sentence for the head of the page, of the source that was measured last, or that there is none."""
    last = [(max(steps), name, stage) for name, stages in losses.items() for stage, steps in stages.items()][-1:]
    if not last:
        return '<p class="lead">No evaluation yet.</p>'
    end, name, stage = last[0]
    steps = losses[name][stage]
    shown = " &rarr; ".join(f"<b>{steps[n]['loss']:.4f}</b> at {escape(stage)} step {n:,}" for n in sorted({min(steps), end}))
    note = f'<span class="muted">(perplexity {steps[end]["perplexity"]:,.4g})</span>'
    return f'<p class="lead">Loss on <i>{escape(name)}</i>: {shown} {note}.</p>'


def loss_table(losses: Losses) -> str:
    """A line for each source and stage: the first, the least and the last loss, each with its perplexity; "" without any."""
    rows = []
    for name, stages in losses.items():
        for stage, steps in stages.items():
            moments = (min(steps), _least(steps), max(steps))
            cells = "".join(
                f"<td>{steps[step]['loss']:.4f}<small> step {step:,}, perplexity {steps[step]['perplexity']:,.4g}</small></td>"
                for step in moments
            )
            last = steps[moments[-1]]
            counts = f"<td>{last['rows']:,.0f}</td><td>{last['answer_tokens']:,.0f}</td>"
            rows.append(f"<tr><th>{escape(name)}</th><td>{escape(stage)}</td>{counts}{cells}</tr>")
    heads = ("held-out rows", "stage", "n", "answer tokens", "first loss", "least", "last")
    head = f"<tr>{''.join(f'<th>{each}</th>' for each in heads)}</tr>"
    note = "<p class='muted'>Losses are nats per answer token; the perplexity is their exponential.</p>"
    table = f'<div class="wide"><table class="figures"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>{note}'
    return table if rows else ""


def loss_charts(runs: Runs) -> Iterator[Chart]:
    """The losses of every source, beside those of the steps where these are supervised."""
    steps = steps_of(runs)
    names = list(dict.fromkeys(key for run in runs.values() for m in run.metrics for key in m if _is_loss(key)))
    measured = {m["stage"] for run in runs.values() for m in run.metrics if any(name in m for name in names)}
    supervised = [s for s in steps if s in measured and not any(s in run.rl for run in runs.values())]
    own = _of_one("training rows", 0, series(runs, ["loss"], supervised), runs)
    held = [
        each
        for place, name in enumerate(names)
        for each in _of_one(name.removeprefix(LOSSES).removesuffix("/loss"), place + 1, series(runs, [name], steps), runs)
    ]
    if held:
        yield lines(
            "Loss of held-out rows (nats per answer token)", [*own, *(replace(each, dots=True) for each in held)], steps, may_log=True
        )


def _of_one(title: str, colour: int, found: list[Series], runs: Runs) -> list[Series]:
    """The lines of one metric, in one colour, with the runs' dashes and, of several, their labels."""
    order = list(runs)
    if len(runs) == 1:
        return [replace(each, name=title, colour=colour) for each in found]
    return [replace(each, name=f"{title}, {each.name}", colour=colour, dash=order.index(each.name)) for each in found]


def _is_loss(key: str) -> bool:
    return key.startswith(LOSSES) and key.endswith("/loss")


def risen(losses: Losses) -> list[str]:
    """A line for each source whose last loss lies above its least one, by more than a fiftieth."""
    told = []
    for name, stages in losses.items():
        for stage, steps in stages.items():
            best, last = _least(steps), max(steps)
            top, end = steps[best]["loss"], steps[last]["loss"]
            if end > RISEN * top:
                rise = f"the loss of {name} has risen from {top:.4f} at step {best:,} to {end:.4f}"
                why = "the stage learns its rows by heart: train fewer epochs or take more rows"
                told.append(
                    f"{stage} step {last:,}: {rise}; {why}. The checkpoint of step {best:,} is the better model, if save.keep left it."
                )
    return told


def _least(steps: Mapping[int, Mapping[str, float]]) -> int:
    """The step of the least loss, the first of equal ones."""
    return min(steps, key=lambda step: (math.inf if math.isnan(steps[step]["loss"]) else steps[step]["loss"], step))
