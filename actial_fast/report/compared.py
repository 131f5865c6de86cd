"""Several runs on one page: where their recipes differ, what their last models answer on the same rows, and their curves in one picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import yaml

from actial_fast.report.curves import Runs, by_time, grid, grpo, learning, optimisation, speed
from actial_fast.report.evaluations import figure_table, sentence
from actial_fast.report.held_out import loss_charts
from actial_fast.report.html import bullets, contents, document, folded, section, write
from actial_fast.report.run import Moment, Run, read_run
from actial_fast.report.stages import stage_table
from actial_fast.report.troubles import signs, warned

MOST = 4  # runs on a page: their lines have to be told apart


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Write a page of these runs, the first of which the others are compared with, to `path`; return it.

    Raises ValueError for fewer than 2 or more than MOST runs, a folder that is given twice, or one without a run.
    """
    if not 2 <= len(folders) <= MOST:
        raise ValueError(f"{len(folders)} runs cannot be compared on a page: give 2 to {MOST}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a run is given twice; give each folder once")
    found = [_alike(read_run(folder)) for folder in folders]
    runs = dict(zip(labels([run.folder for run in found]), found, strict=True))
    states = "".join(f"<li><b>{escape(label)}</b>: {escape(run.state)} ({escape(str(run.folder))})</li>" for label, run in runs.items())
    first = next(iter(runs))
    about = f"Runs compared with {first}; what is said of a change is said of the other run against it."
    sections = [
        section("What differs in the recipes", _differences({label: _settings(run) for label, run in runs.items()})),
        section("Evaluation, each run's last", "".join(_tables(runs))),
        section("Learning", grid([*loss_charts(runs), *learning(runs)])),
        section("GRPO", grid(grpo(runs))),
        section("Learning by time", grid(by_time(runs))),
        section("Where the time goes", grid(speed(runs))),
        section("Speed and optimisation", grid(optimisation(runs))),
        *(section(f"Stages: {label}", stage_table(run)) for label, run in runs.items()),
        section("What differs in versions and machine", _differences({label: dict(_leaves(run.versions)) for label, run in runs.items()})),
        section("Signs of trouble", _troubles(runs)),
    ]
    title = f'<p class="muted">actial_fast runs</p><h1>{escape(" / ".join(runs))}</h1><p>{escape(about)}</p><ul>{states}</ul>'
    head = f"<header>{title}{_headline(runs)}</header>{contents(sections)}"
    return write(path, document(" / ".join(runs), head + "".join(sections)))


def labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = next(d for d in range(1, max(map(len, parts)) + 1) if len({p[-d:] for p in parts}) == len(parts))
    return ["/".join(p[-depth:]) for p in parts]


def _headline(runs: Runs) -> str:
    """Accuracy, and well-formed and correct, of the first evaluation that most runs have."""
    told = _last(runs)
    if not told:
        return '<p class="lead">No evaluation that two of these runs have.</p>'
    name = max(told, key=lambda name: len(told[name]))
    first, *others = told[name]
    pairs = [(first, other) for other in others]
    out = sentence(f"Accuracy on <i>{escape(name)}</i>", told[name], pairs, "accuracy")
    if any(m.result["overall"]["well_formed_and_correct"] for m in told[name]):
        out += sentence(f"Well-formed and correct on <i>{escape(name)}</i>", told[name], pairs, "well_formed_and_correct")
    return out


def _last(runs: Runs) -> dict[str, list[Moment]]:
    """The last moment of each run, of every evaluation that two of them have."""
    names = dict.fromkeys(name for run in runs.values() for name in run.tables)
    moments = {name: [(label, run.tables[name][-1]) for label, run in runs.items() if run.tables.get(name)] for name in names}
    return {name: [m._replace(label=f"{label} {m.label}") for label, m in of] for name, of in moments.items() if len(of) > 1}


def _tables(runs: Runs) -> Iterator[str]:
    for name, moments in _last(runs).items():
        yield figure_table(name, moments, [(moments[0], other) for other in moments[1:]])


def _settings(run: Run) -> dict[str, str]:
    """The keys of the recipe with their values, in which {run} is the run's own folder; of several recipes, each under its stage."""
    read = {name.removesuffix("/recipe.yaml"): yaml.safe_load(text) for name, text in run.recipes.items()}
    found = dict(_leaves(next(iter(read.values())) if len(read) == 1 else read))
    own = _own(run)
    return {key: value.replace(own, "{run}") if own else value for key, value in found.items()}


def _own(run: Run) -> str:
    """What the recipe calls the run's folder; "" if it does not."""
    read = (yaml.safe_load(text) for text in run.recipes.values())
    return next((str(of["run"]) for of in read if isinstance(of, dict) and of.get("run")), "")


def _alike(run: Run) -> Run:
    """The run, in whose evaluations' names {run} is its own folder: a file there has the same name in every run."""
    names = {run.folder.resolve().name, Path(_own(run)).name} - {""}

    def told(name: str) -> str:
        first, slash, rest = name.partition("/")
        return f"{{run}}/{rest}" if slash and first in names else name

    evals = {told(name): of for name, of in run.evals.items()}
    return replace(run, evals=evals, tables={told(name): of for name, of in run.tables.items()})


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for place, item in enumerate(value):
            yield from _leaves(item, f"{key}[{place}]")
    else:
        yield key, str(value)


def _differences(values: Mapping[str, Mapping[str, str]]) -> str:
    """A table of the keys that are not the same everywhere, those that differ alike in one line; "" if no run has any."""
    if not any(values.values()):
        return ""
    alike: dict[tuple[str, ...], list[str]] = {}
    for key in dict.fromkeys(key for of in values.values() for key in of):
        alike.setdefault(tuple(of.get(key, "-") for of in values.values()), []).append(key)
    rows = [
        f"<tr><th>{'<br>'.join(map(escape, keys))}</th>"
        + "".join(f'<td data-label="{escape(label)}">{escape(value)}</td>' for label, value in zip(values, told, strict=True))
        for told, keys in alike.items()
        if len(set(told)) > 1
    ]
    if not rows:
        return "<p>Nothing.</p>"
    head = "".join(f"<th>{escape(label)}</th>" for label in values)
    body = f"<tbody>{'</tr>'.join([*rows, ''])}</tbody>"
    return f'<div class="wide"><table class="figures narrow texts"><thead><tr><th>key</th>{head}</tr></thead>{body}</table></div>'


def _troubles(runs: Runs) -> str:
    told = {label: [*warned(run.events), *signs(run.metrics, run.evals)] for label, run in runs.items()}
    return "".join(folded(f"{label}: {len(of):,}", bullets(of)) for label, of in told.items() if of)
