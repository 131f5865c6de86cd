"""What of a run deserves a look: what it warned of itself, and signs in its metrics, each by a rule that the page states.

A sign is a rule of thumb: it names steps, what was seen there, and what is usually done about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from actial_fast.report.held_out import losses_of, risen
from actial_fast.report.paired import paired

DEFINED = ("loss", "reward", "kl", "grad_norm")  # what is a number at every step
WINDOW = 20  # steps that a mean is over, and that a spike is compared with

Record = Mapping[str, Any]
Values = Sequence[tuple[int, float]]  # (step, value) of one metric in one stage, in order


@dataclass(frozen=True)
class Sign:
    """One rule. `found` gives the steps at which it holds, each with the figure that says so, of which `worst` is told; `says` and `advice`
    are for people, and `unit` is how they are told the figure."""

    metric: str
    found: Callable[[Values], list[tuple[int, float]]]
    says: str
    advice: str
    unit: str = "share"
    worst: Callable[[Iterable[float]], float] = max


def _mean_beyond(bound: float, above: bool = True) -> Callable[[Values], list[tuple[int, float]]]:
    """Where the mean over the last WINDOW steps lies above a bound, or below it."""

    def found(values: Values) -> list[tuple[int, float]]:
        means = [(step, mean(v for _, v in values[i + 1 - WINDOW : i + 1])) for i, (step, _) in enumerate(values) if i + 1 >= WINDOW]
        return [(step, value) for step, value in means if (value > bound if above else value < bound)]

    return found


def _spike(times: float, floor: float) -> Callable[[Values], list[tuple[int, float]]]:
    """Where a value is `times` the median of the WINDOW steps before it, and above `floor`."""

    def found(values: Values) -> list[tuple[int, float]]:
        before = [(step, value, [v for _, v in values[i - WINDOW : i]]) for i, (step, value) in enumerate(values) if i >= WINDOW]
        return [(step, value) for step, value, window in before if value > floor and value > times * median(window)]

    return found


def _grown(times: float, floor: float) -> Callable[[Values], list[tuple[int, float]]]:
    """Where the mean over the last WINDOW steps is `times` that of the stage's first WINDOW, and above `floor`."""

    def found(values: Values) -> list[tuple[int, float]]:
        first = mean(v for _, v in values[:WINDOW]) if values else 0.0
        return [pair for pair in _mean_beyond(floor)(values) if pair[1] > times * first]

    return found


def _some(values: Values) -> list[tuple[int, float]]:
    """The largest of a metric that should be 0, where it is not."""
    return [pair for pair in [max(values, key=lambda pair: pair[1], default=(0, 0.0))] if pair[1] > 0]


SIGNS = (
    Sign(
        "zero_variance_groups",
        _mean_beyond(0.5),
        f"more than half of the groups had equal rewards (mean over {WINDOW} steps), and no advantage",
        "take harder rows, a higher sampling.temperature, or sampling.oversample",
    ),
    Sign(
        "kl",
        _spike(5, 0.01),
        f"the KL to the reference was more than 5 times the median of the {WINDOW} steps before",
        "look at the replies of these steps; lower optim.lr or raise loss.beta if it comes again",
        "number",
    ),
    Sign(
        "grad_norm",
        _spike(10, 0.0),
        f"the gradient's norm was more than 10 times the median of the {WINDOW} steps before",
        "optim.clip_norm bounds what such a step does; look at its rows if it comes again",
        "number",
    ),
    Sign(
        "clip_fraction",
        _mean_beyond(0.2),
        f"more than a fifth of the tokens were clipped (mean over {WINDOW} steps)",
        "lower optim.lr, or take fewer updates of one batch",
    ),
    Sign(
        "finished",
        _mean_beyond(0.9, above=False),
        f"more than a tenth of the replies were cut off (mean over {WINDOW} steps)",
        "raise sampling.max_new_tokens, or see whether the replies repeat themselves",
        worst=min,
    ),
    Sign(
        "response_length",
        _grown(3, 100),
        f"replies were more than 3 times as long as in the first {WINDOW} steps (mean over {WINDOW} steps)",
        "read the replies of these steps: where length earns nothing, lower sampling.max_new_tokens or take an objective that does not "
        "reward it, such as dr_grpo",
        "count",
    ),
    Sign(
        "rejected_rows",
        _some,
        "rows could not be used and were left out",
        "rejects.jsonl in the stage's folder has each with its reason",
        "count",
    ),
)
WRITTEN = {"share": lambda v: f"{100 * v:.0f}%", "number": lambda v: f"{v:.3g}", "count": lambda v: f"{v:,.0f}"}


def warned(events: Iterable[Record]) -> list[str]:
    """Evaluations that failed, steps that were skipped and whatever else a run warned of, a line each."""
    lines = []
    for event in events:
        where = f"{event['stage']} step {event['step']:,}"
        if event["kind"] == "eval_failed":
            told = event["eval_failed"]
            lines.append(f"{where}: {told['name']} was not evaluated: {told['cause']}")
        elif event["kind"] == "skipped":
            rows = event["skipped"]["rows"]
            more = f" and {len(rows) - 3:,} more" if len(rows) > 3 else ""
            lines.append(f"{where}: loss or gradient was NaN or infinite and was not applied; rows {', '.join(rows[:3])}{more}")
        elif event["kind"] in ("mismatch", "redrawn", "unscored"):
            lines.append(f"{where}: {event[event['kind']]['text']}")
    return lines


def signs(metrics: Sequence[Record], evaluations: Mapping[str, Mapping[str, Mapping[int, Record]]]) -> list[str]:
    """A line for each rule that holds somewhere in a stage: where, what was seen, what to do.

    metrics: records of metrics.jsonl in order; evaluations: name -> stage -> step -> statistics.accuracy_table's result.
    """
    stages: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for record in metrics:
        for sign in SIGNS:
            value = record.get(sign.metric)
            if isinstance(value, int | float) and math.isfinite(value):  # NaN has its own line
                stages.setdefault(record["stage"], {}).setdefault(sign.metric, []).append((record["step"], float(value)))
    lines = _undefined(metrics)
    for stage, of in stages.items():
        for sign in SIGNS:
            values = of.get(sign.metric, [])
            if found := sign.found(values):
                worst = sign.worst(value for _, value in found)
                where = _steps([step for step, _ in found], [step for step, _ in values])
                lines.append(
                    f"{stage} {where}: {sign.says} (at worst {WRITTEN[sign.unit](worst)}). {sign.advice[0].upper()}{sign.advice[1:]}."
                )
    lines += [line for name, of_stage in evaluations.items() for stage, steps in of_stage.items() for line in _fallen(name, stage, steps)]
    return lines + risen(losses_of(metrics))


def _undefined(metrics: Sequence[Record]) -> list[str]:
    """A line for each figure that must be a number and was none at some step."""
    lines = []
    for stage in dict.fromkeys(record["stage"] for record in metrics):
        for name in DEFINED:
            values = [(record["step"], record[name]) for record in metrics if record["stage"] == stage and name in record]
            if bad := [step for step, value in values if not math.isfinite(value)]:
                where = _steps(bad, [step for step, _ in values])
                lines.append(
                    f"{stage} {where}: {name} was NaN or infinite. A step whose loss or gradient is so is not applied; look at the rows of "
                    "the first one, and lower optim.lr if it comes again."
                )
    return lines


def _fallen(name: str, stage: str, steps: Mapping[int, Record]) -> list[str]:
    """Whether the last evaluation of a stage lies below its best one of as many rows: on the rows of both, by the paired interval, or where
    these were not recorded, so far that their 95% intervals do not meet."""
    last = max(steps)
    end = steps[last]["overall"]
    alike = [step for step in steps if steps[step]["overall"].get("n") == end.get("n")]
    best = max(alike, key=lambda step: (steps[step]["overall"]["accuracy"], step))
    top, change = steps[best]["overall"], paired(steps[best], steps[last])
    if change is not None:
        fell, why = change.clear and change.difference < 0, "the paired 95% interval of the change lies below 0"
    else:
        fell, why = end["interval"][1] < top["interval"][0], "the 95% intervals do not meet"
    if not fell:
        return []
    return [
        f"{stage} step {last:,}: accuracy on {name} fell from {100 * top['accuracy']:.1f}% at step {best:,} to {100 * end['accuracy']:.1f}%"
        f", and {why}. The checkpoint of step {best:,} is the better model, if save.keep left it."
    ]


def _steps(found: Sequence[int], recorded: Sequence[int]) -> str:
    """The steps as ranges of those that were recorded: "steps 3, 10 to 40 and 2 more times"."""
    place = {step: i for i, step in enumerate(recorded)}
    ranges: list[list[int]] = []
    for step in found:
        if ranges and place[step] == place[ranges[-1][1]] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    shown = ", ".join(f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in ranges[:3])
    more = f" and {len(ranges) - 3:,} more times" if len(ranges) > 3 else ""
    return f"{'step' if len(found) == 1 else 'steps'} {shown}{more}"
