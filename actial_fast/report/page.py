"""report.html: what a run did, on one page that needs nothing but itself (inline SVG and images, no script, no fetch; light and dark).

It reads metrics.jsonl, events.jsonl, summary.json, recipe*.yaml and versions.json of the run folder, whichever are there, so that a run
that still goes on, or was killed, can be looked at as well.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from actial_fast.report.cards import rollout_cards
from actial_fast.report.chart import Guide, Series, line_chart, moving_average, number
from actial_fast.report.held_out import loss_charts, loss_line, loss_table, losses_of, risen
from actial_fast.report.metrics import LOSSES, read_events, read_metrics
from actial_fast.report.speed import TAKEN, speed_charts
from actial_fast.report.style import CSS
from actial_fast.report.troubles import signs, warned

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
SAMPLED = " at temperature "  # in an evaluation's name, after the source's: replies were sampled, not greedy

Result = Mapping[str, Any]  # of statistics.accuracy_table
Evals = dict[str, dict[str, dict[int, Result]]]  # name -> stage -> step -> result
Chart = Callable[..., str]  # line_chart with all its arguments but `wide`


class Moment(NamedTuple):
    """One column group of an evaluation's table."""

    label: str  # "after sft"
    stage: str
    step: int
    result: Result


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html (whole or not at all) and return its path.

    Raises ValueError when the folder has neither metrics nor events, or when one of its files cannot be read.
    """
    run_dir = Path(run_dir)
    metrics, events = read_metrics(run_dir), read_events(run_dir)
    if not metrics and not events:
        raise ValueError(f"{run_dir}: no metrics.jsonl and no events.jsonl with a record; is this the folder of a run?")
    steps: dict[str, int] = {}
    for record in sorted([*metrics, *events], key=lambda r: r.get("time", 0.0)):
        steps[record["stage"]] = max(steps.get(record["stage"], 0), record["step"])
    rl = {m["stage"] for m in metrics if "reward" in m}
    evals = _evals(events, list(steps), rl)
    losses = losses_of(metrics)
    tables = {name: _moments(stages, steps) for name, stages in evals.items()}
    summary, versions = (_json(run_dir / name) for name in ("summary.json", "versions.json"))
    recipes = {path.name: path.read_text(encoding="utf-8") for path in sorted(run_dir.glob("recipe*.yaml"))}
    last = (metrics or events)[-1]
    done = (run_dir / last["stage"] / "final" / "model").is_dir()  # written whole or not at all, when a stage is over
    state = "finished" if summary else f"{'finished' if done else 'unfinished'}: last record is {last['stage']} step {last['step']:,}"

    body = [
        f'<header><p class="muted">actial_fast run &middot; {time.strftime("%Y-%m-%d %H:%M")} &middot; {escape(state)}</p>',
        f"<h1>{escape(run_dir.resolve().name)}</h1>{_headline(tables, rl) or loss_line(losses)}</header>",
        _section("What went wrong", _list(warned(events))),
        _section("Signs of trouble", _list([*signs(metrics, evals), *risen(losses)])),
        _section("Evaluation", _evaluation(evals, tables, steps) + loss_table(losses)),
        _section("Learning", _grid([*loss_charts(losses, metrics, steps, rl), *_learning(metrics, evals, rl, steps)])),
        _section("GRPO", _grid(_grpo(metrics, evals, rl, steps))),
        *(_section(f"Sampled replies: {stage}", rollout_cards(run_dir, stage, events)) for stage in steps),
        _section("Where the time goes", _grid(speed_charts(metrics, events, steps))),
        _section("Speed and optimisation", _grid(_optimisation(metrics, steps))),
        _section("Stages", _stage_table(metrics, events, steps)),
        _section("Summary", _pairs(summary)),
        _section("Versions and machine", _pairs(versions)),
        *(_folded(name, f"<pre>{escape(text)}</pre>") for name, text in recipes.items()),
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(run_dir.resolve().name)} - actial_fast</title><style>{CSS}</style></head><body>{''.join(body)}</body></html>\n"
    )
    path, temporary = run_dir / "report.html", run_dir / "report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it or write it again") from None
    return value if isinstance(value, dict) else {path.stem: value}


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


# --- evaluations ---------------------------------------------------------------------------------------------------------------------


def _source(name: str) -> str:
    return name.partition(SAMPLED)[0]


def _evals(events: Sequence[Mapping[str, Any]], order: Sequence[str], rl: set[str]) -> Evals:
    """The last result of every step. Sources in the order in which the last stage before GRPO evaluated them: its data are what the run is
    about, while a stage of pretraining may look in passing at any of them. Then those of other stages, later ones first; greedy before
    sampled."""
    found: Evals = {}
    first: dict[str, dict[str, int]] = {}  # source -> stage -> place of its first evaluation there
    for place, event in enumerate(e for e in events if e["kind"] == "eval"):
        found.setdefault(event["name"], {}).setdefault(event["stage"], {})[event["step"]] = event["result"]
        first.setdefault(_source(event["name"]), {}).setdefault(event["stage"], place)
    begin = min((order.index(stage) for stage in rl), default=len(order))
    evaluated = sorted({stage for stages in first.values() for stage in stages}, key=order.index)
    main = ([stage for stage in evaluated if order.index(stage) < begin] or evaluated)[-1:]

    def rank(name: str) -> tuple[bool, int, int, str]:
        stages = first[_source(name)]
        stage = next((s for s in main if s in stages), max(stages, key=order.index))
        return stage not in main, -order.index(stage), stages[stage], name

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


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _headline(tables: Mapping[str, list[Moment]], rl: set[str]) -> str:
    """Two sentences: accuracy before and after the last stage beside chance, and well-formed-and-correct before and after GRPO. "" where
    no replies were drawn."""
    if not tables:
        return ""

    def change(name: str, share: str) -> str:
        return " &rarr; ".join(f"<b>{_percent(m.result['overall'][share])}</b> {escape(m.label)}" for m in tables[name][-2:])

    compared = [name for name, moments in tables.items() if len(moments) > 1 and any(m.stage in rl and m.step for m in moments)]
    name = min(compared or tables, key=lambda n: n != _source(n))
    base = tables[name][-1].result["overall"]
    guess = f"(chance {_percent(base['chance'])}, majority {_percent(base['majority'])})"
    out = f'<p class="lead">Accuracy on <i>{escape(name)}</i>: {change(name, "accuracy")} <span class="muted">{guess}</span>.</p>'
    same = [n for n in tables if _source(n) == _source(name) and len(tables[n]) > 1]
    trained = [n for n in same if tables[n][-1].stage in rl and tables[n][-1].step]
    if trained:
        name = max(trained, key=lambda n: n != _source(n))
        out += f'<p class="lead">Well-formed and correct on <i>{escape(name)}</i>: {change(name, "well_formed_and_correct")}.</p>'
    return out


def _evaluation(evals: Evals, tables: Mapping[str, list[Moment]], steps: Mapping[str, int]) -> str:
    """A table an evaluation; folded away with their curves are those of one stage that is not the last one evaluated."""
    if not evals:
        return ""
    last = max((stage for stages in evals.values() for stage in stages), key=list(steps).index)
    reach = {_source(name): {s for n in evals if _source(n) == _source(name) for s in evals[n]} for name in evals}
    passing = [name for name in evals if len(reach[_source(name)]) == 1 and last not in evals[name]]
    out = "".join(_figure_table(name, tables[name]) for name in evals if name not in passing)
    out += (
        "<p class='muted'>In percent, with 95% intervals (rows that show the same picture are not taken for independent). Bars, 0 to 100%: "
        "the interval, the accuracy (dot) and chance (tick). Majority: always giving the most frequent answer of a type.</p>"
    )
    folded = "".join(_figure_table(name, tables[name]) + _grid(_eval_charts(name, evals[name], evals[name], steps)) for name in passing)
    return out + (_folded(f"Evaluations of earlier stages only: {', '.join(passing)}", folded) if folded else "")


def _figure_table(name: str, moments: Sequence[Moment]) -> str:
    """One line a question type and one for all; for each moment the accuracy, with the marks beside it where a task gives some in part,
    and, if any reply was so, well-formed and correct."""
    shares = [("accuracy", "accuracy", "interval")]
    overall = [m.result["overall"] for m in moments]
    if any(f.get("partial") for f in overall) and all("score" in f for f in overall):  # not in runs from before there were marks
        shares.append(("score", "score", "score_interval"))
    if any(m.result["overall"]["format_rate"] for m in moments):
        shares.append(("well-formed<br>and correct", "well_formed_and_correct", "well_formed_and_correct_interval"))
    count = moments[-1].result["overall"]["n"]
    lines = []
    for kind in (*dict.fromkeys(kind for m in moments for kind in m.result["kinds"]), None):
        figures = [m.result["overall"] if kind is None else m.result["kinds"].get(kind) for m in moments]
        base = next(f for f in reversed(figures) if f)
        row = "".join(f"<td>{cell}</td>" for cell in (f"{base['n']:,}", f"{100 * base['chance']:.1f}", f"{100 * base['majority']:.1f}"))
        for f in figures:
            cells = (_share(f, share, interval) if f else "&ndash;" for _, share, interval in shares)
            row += "".join(f'<td class="share{"" if i else " first"}">{cell}</td>' for i, cell in enumerate(cells))
        label = "all" if kind is None else kind or "(no type)"
        lines.append(f'<tr class="{"all" if kind is None else ""}"><th>{escape(label)}</th>{row}</tr>')
    heads = "".join(f'<th rowspan="2">{head}</th>' for head in ("question type", "n", "chance", "majority"))
    for m in moments:
        f = m.result["overall"]
        note = f"well-formed {_percent(f['format_rate'])}, {f['mean_response_length']:.0f} tokens" + f", n {f['n']:,}" * (f["n"] != count)
        heads += f'<th class="moment" colspan="{len(shares)}">{escape(m.label)} <small>{note}</small></th>'
    titles = "".join(f'<th class="share{"" if i else " first"}">{title}</th>' for _ in moments for i, (title, *_) in enumerate(shares))
    return (
        f'<h3>{escape(name)}</h3><div class="wide"><table class="figures"><thead><tr>{heads}</tr><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _share(figures: Mapping[str, Any], share: str, interval: str) -> str:
    """A share over its interval; the accuracy with a bar at its side."""
    value, low, high = (100 * v for v in (figures[share], *figures[interval]))
    bar = (
        f"<span class='bar'><i style='left:{low:.1f}%;width:{high - low:.1f}%'></i>"
        f"<u style='left:{100 * figures['chance']:.1f}%'></u><b style='left:{value:.1f}%'></b></span>"
    )
    return f"<b>{value:.1f}</b>{bar if share == 'accuracy' else ''}<small>{low:.1f}&ndash;{high:.1f}</small>"


# --- charts --------------------------------------------------------------------------------------------------------------------------


def _grid(charts: Iterable[Chart]) -> str:
    """Two charts a row; of an odd number the last one takes a row, so that no cell stays empty. "" when none has a point."""
    drawn = [(chart, figure) for chart in charts if (figure := chart())]
    figures = [figure for _, figure in drawn]
    if len(drawn) % 2:
        figures[-1] = drawn[-1][0](wide=True)
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def _series(metrics: Sequence[Mapping[str, Any]], names: Sequence[str], stages: Sequence[str]) -> list[Series]:
    """One series a metric, over the stages that recorded it."""
    out = []
    for colour, name in enumerate(names):
        points = {stage: [(m["step"], m[name]) for m in metrics if m["stage"] == stage and name in m] for stage in stages}
        out.append(Series(name, {stage: p for stage, p in points.items() if p}, colour))
    return out


def _marks(figures: Mapping[str, Any]) -> float:
    """The mean score: the accuracy where no marks are partial, and in runs from before there were any."""
    return float(figures.get("score", figures["accuracy"]))


def _eval_charts(name: str, stages: Mapping[str, Mapping[int, Result]], wanted: Iterable[str], steps: Mapping[str, int]) -> Iterator[Chart]:
    """Accuracy, or marks, by type and, replies were well-formed, the format, over each wanted stage that evaluated more than once."""
    for stage in (s for s in wanted if len(stages.get(s, ())) > 1):
        points = stages[stage].items()
        kinds = list(dict.fromkeys(kind for _, result in points for kind in result["kinds"]))
        lines = [
            Series(kind, {stage: [(n, _marks(r["kinds"][kind])) for n, r in points if kind in r["kinds"]]}, i, True)
            for i, kind in enumerate(kinds)
        ]
        chance = {kind: round(r["kinds"][kind]["chance"], 3) for _, r in points for kind in r["kinds"]}
        guides = [Guide("chance", next(iter(chance.values())))] if len(set(chance.values())) == 1 else []
        guides = guides or [Guide(f"chance, {kind}", value, kinds.index(kind)) for kind, value in chance.items()]
        yield partial(line_chart, f"Accuracy by type ({name})", lines, {stage: steps[stage]}, guides=guides, percent=True)
        shares = (("well-formed", "format_rate"), ("well-formed and correct", "well_formed_and_correct"), ("correct", "accuracy"))
        lines = [Series(label, {stage: [(n, r["overall"][key]) for n, r in points]}, i, True) for i, (label, key) in enumerate(shares)]
        if any(result["overall"]["format_rate"] > FEW for _, result in points):
            yield partial(line_chart, f"Format and correctness ({name})", lines, {stage: steps[stage]}, percent=True)


def _learning(metrics: Sequence[Mapping[str, Any]], evals: Evals, rl: set[str], steps: Mapping[str, int]) -> Iterator[Chart]:
    """The last supervised stage from close by, its loss beside its accuracy; then the loss of all of them."""
    supervised = [s for s in steps if s not in rl and any(m["stage"] == s and "loss" in m for m in metrics)]
    if supervised:
        stage = supervised[-1]
        (series,) = _series(metrics, ["loss"], [stage])
        later = [v for n, v in moving_average(series.stages[stage]) if n > steps[stage] / DESCENT and math.isfinite(v)]
        top = 1.25 * max(later, default=math.inf)
        yield partial(line_chart, f"Supervised loss, {stage} (nats per answer token)", [series], {stage: steps[stage]}, top=top)
    for name, stages in evals.items():
        yield from _eval_charts(name, stages, supervised[-1:], steps)
    yield partial(
        line_chart, "Supervised loss, all stages (nats per answer token)", _series(metrics, ["loss"], supervised), steps, may_log=True
    )


def _grpo(metrics: Sequence[Mapping[str, Any]], evals: Evals, rl: set[str], steps: Mapping[str, int]) -> Iterator[Chart]:
    stages = [s for s in steps if s in rl]
    names = dict.fromkeys(key for m in metrics for key in m if key.startswith("reward"))
    yield partial(line_chart, "Reward and its parts", _series(metrics, list(names), stages), steps)
    for name, results in evals.items():
        yield from reversed(list(_eval_charts(name, results, stages, steps)))  # format first: it is what GRPO moves
    for title, keys, percent in GRPO_CHARTS:
        yield partial(line_chart, title, _series(metrics, keys, stages), steps, percent=percent, may_log=keys[0] in MAY_LOG)


def _optimisation(metrics: Sequence[Mapping[str, Any]], steps: Mapping[str, int]) -> Iterator[Chart]:
    for title, keys in ALL_CHARTS:
        yield partial(line_chart, title, _series(metrics, keys, list(steps)), steps, may_log=keys[0] in MAY_LOG)
    drawn = {"stage", "step", "time", "loss", *(key for _, keys, *_ in (*GRPO_CHARTS, *ALL_CHARTS) for key in keys)}
    for key in dict.fromkeys(key for m in metrics for key in m if key not in drawn and not key.startswith(("reward", LOSSES, *TAKEN))):
        yield partial(line_chart, key, _series(metrics, [key], list(steps)), steps)


# --- the rest ------------------------------------------------------------------------------------------------------------------------


def _stage_table(metrics: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], steps: Mapping[str, int]) -> str:
    rows = []
    rates = {e["stage"]: e["rate"] for e in events if e["kind"] == "rate"}
    for stage, last in steps.items():
        own = [m for m in metrics if m["stage"] == stage]
        seconds = math.fsum(m["seconds"] for m in own if math.isfinite(m.get("seconds", math.nan)))
        speed = [m["tokens_per_s"] for m in own if "tokens_per_s" in m]
        share, peak = ([m[name] for m in own if name in m] for name in ("mfu", "peak_gib"))
        cells = (
            f"{last:,}",
            f"{seconds:,.1f}" if seconds else "&ndash;",
            number(median(speed)) if speed else "&ndash;",
            f"{100 * median(share):.1f}%" if share else "&ndash;",
            f"{number(rates[stage]['tflops'])}<small> {escape(rates[stage]['what'])}</small>" if stage in rates else "&ndash;",
            f"{max(peak):.2f}" if peak else "&ndash;",
        )
        rows.append(f"<tr><th>{escape(stage)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    names = ("stage", "steps", "seconds in steps", "tokens/s, median", "MFU, median", "of measured TFLOP/s", "peak GiB")
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    return f'<table class="figures"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, f"{name} / {key}" if name else str(key))
    elif isinstance(value, float):
        yield name, f"{value:.5g}"
    elif isinstance(value, list):
        yield name, ", ".join(f"{item:.5g}" if isinstance(item, float) else str(item) for item in value)
    else:
        yield name, str(value)


def _pairs(value: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _flatten(value))
    return f"<dl>{rows}</dl>" if rows else ""
