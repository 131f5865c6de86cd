"""A run's folder as the report reads it: its record, its stages in their order, and its evaluations in the order of their weight.

It reads metrics.jsonl, events.jsonl, summary.json, the recipes and versions.json, whichever are there, so that a run that still goes on, or
was killed, can be looked at as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from actial_fast.report.metrics import read_events, read_metrics
from actial_fast.report.paired import Result

SAMPLED = " at temperature "  # in an evaluation's name, after the source's: replies were sampled, not greedy
VALIDATION = {"val", "valid", "validation", "dev"}  # words in the name of rows that stages are stopped by

Record = Mapping[str, Any]
Evals = dict[str, dict[str, dict[int, Result]]]  # name -> stage -> step -> result


class Moment(NamedTuple):
    """One column group of an evaluation's table."""

    label: str  # "after sft"
    stage: str
    step: int
    result: Result


@dataclass(frozen=True)
class Run:
    """steps: last step of each stage, in the order in which they began. rl: the stages with a reward. tables: the moments of each
    evaluation that are compared. summary, versions: of the files of these names, empty where there are none."""

    folder: Path
    metrics: Sequence[Record]
    events: Sequence[Record]
    steps: Mapping[str, int]
    rl: frozenset[str]
    evals: Evals
    tables: Mapping[str, Sequence[Moment]]
    summary: Mapping[str, Any]
    versions: Mapping[str, Any]
    recipes: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def state(self) -> str:
        """Whether it is over, and where it stands if that is not known of the whole."""
        if self.summary:
            return "finished"
        last = (self.metrics or self.events)[-1]
        stage, where = self.folder / last["stage"], f"last record is {last['stage']} step {last['step']:,}"
        if (stage / "final" / "model").is_dir():  # written whole or not at all, when a stage is over
            return f"finished: {where}"
        kept = [int(name) for path in stage.glob("step-*") if (name := path.name.removeprefix("step-")).isdecimal()]
        return f"unfinished: {where}" + (f", last checkpoint step {max(kept):,}" if kept else "")


def read_run(folder: Path) -> Run:
    """Raises ValueError when the folder has neither metrics nor events, or when one of its files cannot be read."""
    metrics, events = read_metrics(folder), read_events(folder)
    if not metrics and not events:
        raise ValueError(f"{folder}: no metrics.jsonl and no events.jsonl with a record; is this the folder of a run?")
    steps: dict[str, int] = {}
    for record in sorted([*metrics, *events], key=lambda r: r.get("time", 0.0)):
        steps[record["stage"]] = max(steps.get(record["stage"], 0), record["step"])
    rl = frozenset(m["stage"] for m in metrics if "reward" in m)
    evals = _evals(events, list(steps), rl)
    return Run(
        folder,
        metrics,
        events,
        steps,
        rl,
        evals,
        {name: _moments(stages, steps) for name, stages in evals.items()},
        _json(folder / "summary.json"),
        _json(folder / "versions.json"),
        _recipes(folder, steps),
    )


def _recipes(folder: Path, stages: Iterable[str]) -> dict[str, str]:
    """The run's recipe, or where it has none of its own, those of its stages."""
    own = sorted(folder.glob("recipe*.yaml")) or [path for stage in stages if (path := folder / stage / "recipe.yaml").is_file()]
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in own}


def source_of(name: str) -> str:
    """The name of what was evaluated, without how."""
    return name.partition(SAMPLED)[0]


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it or write it again") from None
    return value if isinstance(value, dict) else {path.stem: value}


def _evals(events: Sequence[Record], order: Sequence[str], rl: frozenset[str]) -> Evals:
    """The last result of every step. Sources in the order in which the last stage before GRPO evaluated them: its data are what the run is
    about, while a stage of pretraining may look in passing at any of them. Then those of other stages, later ones first; what a stage was
    chosen by after what it was not; greedy before sampled."""
    found: Evals = {}
    first: dict[str, dict[str, int]] = {}  # source -> stage -> place of its first evaluation there
    for place, event in enumerate(e for e in events if e["kind"] == "eval"):
        found.setdefault(event["name"], {}).setdefault(event["stage"], {})[event["step"]] = event["result"]
        first.setdefault(source_of(event["name"]), {}).setdefault(event["stage"], place)
    begin = min((order.index(stage) for stage in rl), default=len(order))
    evaluated = sorted({stage for stages in first.values() for stage in stages}, key=order.index)
    main = ([stage for stage in evaluated if order.index(stage) < begin] or evaluated)[-1:]

    def rank(name: str) -> tuple[bool, bool, int, int, str]:
        stages = first[source_of(name)]
        stage = next((s for s in main if s in stages), max(stages, key=order.index))
        words = set(re.split(r"[^a-z]+", source_of(name).lower()))
        return stage not in main, bool(words & VALIDATION), -order.index(stage), stages[stage], name

    return {name: {stage: dict(sorted(steps.items())) for stage, steps in found[name].items()} for name in sorted(found, key=rank)}


def _moments(stages: Mapping[str, Mapping[int, Result]], steps: Mapping[str, int]) -> list[Moment]:
    """The result that ends each stage, and the one at its step 0 unless that says no more than the end of the stage before."""
    out: list[Moment] = []
    for stage in (s for s in steps if s in stages):
        step = max(stages[stage])
        if 0 in stages[stage] and not (out and _repeats(stages[stage][0], out[-1].result)):
            out.append(Moment(f"before {stage}" if steps[stage] else stage, stage, 0, stages[stage][0]))
        if step:
            out.append(Moment(f"after {stage}" if step == steps[stage] else f"at {stage} step {step:,}", stage, step, stages[stage][step]))
    return out


def _repeats(new: Result, old: Result) -> bool:
    """Whether `old` has no fewer rows and agrees with `new` within its intervals."""
    a, b = new["overall"], old["overall"]
    pairs = (("accuracy", "interval"), ("well_formed_and_correct", "well_formed_and_correct_interval"))
    return b["n"] >= a["n"] and all(a[interval][0] <= b[share] <= a[interval][1] for share, interval in pairs)
