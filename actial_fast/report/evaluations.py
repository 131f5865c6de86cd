"""Evaluations in the report: the page's first lines, and a table each, with what changed from one stage to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from actial_fast.report.curves import eval_charts, grid
from actial_fast.report.held_out import loss_line, losses_of
from actial_fast.report.html import folded
from actial_fast.report.paired import Paired, paired
from actial_fast.report.run import Moment, Run, source_of

TOLD = 4  # moments in a sentence of the page's beginning: the last ones


def headline(run: Run) -> str:
    """Two sentences: accuracy at the end of each stage beside chance, and well-formed-and-correct where GRPO changed it; after each what
    changed from stage to stage on the same rows."""
    tables = run.tables
    if not tables:
        return loss_line(losses_of(run.metrics))
    compared = [name for name, moments in tables.items() if len(moments) > 1 and any(m.stage in run.rl and m.step for m in moments)]
    name = min(compared or tables, key=lambda n: n != source_of(n))
    base = tables[name][-1].result["overall"]
    guess = f"(chance {_percent(base['chance'])}, majority {_percent(base['majority'])})"
    told = tables[name][-TOLD:]
    out = sentence(f"Accuracy on <i>{escape(name)}</i>", told, pairwise(told), "accuracy", guess)
    same = [n for n in tables if source_of(n) == source_of(name) and len(tables[n]) > 1]
    trained = [n for n in same if tables[n][-1].stage in run.rl and tables[n][-1].step]
    if trained:
        name = max(trained, key=lambda n: n != source_of(n))
        told = tables[name][-TOLD:]
        out += sentence(f"Well-formed and correct on <i>{escape(name)}</i>", told, pairwise(told), "well_formed_and_correct")
    return out


def sentence(title: str, moments: Sequence[Moment], pairs: Iterable[tuple[Moment, Moment]], share: str, guess: str = "") -> str:
    """A share at each moment, and a line for each pair, the second against the first. title: HTML."""
    path = " &rarr; ".join(f"<b>{_percent(m.result['overall'][share])}</b> {escape(m.label)}" for m in moments)
    guess = f' <span class="muted">{guess}</span>' if guess else ""
    changes = [(a, b, paired(a.result, b.result, share)) for a, b in pairs]
    lines = "".join(f"<li>{escape(a.label)} &rarr; {escape(b.label)}: {_change(a, b, change)}</li>" for a, b, change in changes if change)
    if lines:
        lines = f'<ul class="changes">{lines}</ul>'
    elif changes:
        lines = f'<p class="muted">No comparison row by row: {_why(*changes[-1][:2])}.</p>'
    return f'<p class="lead">{title}: {path}{guess}.</p>{lines}'


def _why(first: Moment, second: Moment) -> str:
    kept = "rows" in first.result and "rows" in second.result
    return "they have no row in common" if kept else "these evaluations were recorded without their rows"


def _change(first: Moment, second: Moment, change: Paired) -> str:
    """A paired difference in words: "+0.9 points, 95% interval -0.3 to +2.1: no clear change (the same 900 rows; ...)"."""
    verdict, css = _verdict(change)
    if change.clusters < 2:  # all rows show one picture, or are linked: nothing is known of the spread
        interval = "; no interval, as all rows hang together"
    elif change.low == change.high:
        interval = f"; no interval, as all {change.clusters:,} clusters of rows changed alike"
    else:
        interval = f", 95% interval {_points(change.low)} to {_points(change.high)}"
    told = f"the same {change.n:,} rows; right only {first.label}: {change.only_first:,}, only {second.label}: {change.only_second:,}"
    verdict = f'<span class="{css}">{verdict}</span> <span class="muted">({escape(told)})</span>'
    return f"<b>{_points(change.difference)} points</b>{interval}: {verdict}"


def _verdict(change: Paired) -> tuple[str, str]:
    """A word and its class."""
    if not change.clear:
        return "no clear change", "muted"
    return ("better", "good") if change.difference > 0 else ("worse", "bad")


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "&minus;")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def evaluation(run: Run) -> str:
    """A table an evaluation; folded away with their curves are those of one stage that is not the last one evaluated."""
    if not run.evals:
        return ""
    evals, tables, steps = run.evals, run.tables, run.steps
    last = max((stage for stages in evals.values() for stage in stages), key=list(steps).index)
    reach = {source_of(name): {s for n in evals if source_of(n) == source_of(name) for s in evals[n]} for name in evals}
    passing = [name for name in evals if len(reach[source_of(name)]) == 1 and last not in evals[name]]
    out = "".join(_stages_table(name, tables[name]) for name in evals if name not in passing)
    out += (
        "<p class='muted'>In percent, with 95% intervals (rows that show the same picture are not taken for independent). Bars, 0 to 100%: "
        "the interval, the accuracy (dot) and chance (tick). Majority: always giving the most frequent answer of a type.</p>"
    )
    inner = "".join(
        figure_table(name, tables[name], list(pairwise(tables[name]))[-1:]) + grid(eval_charts({"": run}, name, evals[name]))
        for name in passing
    )
    return out + (folded(f"Evaluations of earlier stages only: {', '.join(passing)}", inner) if inner else "")


def _stages_table(name: str, moments: Sequence[Moment]) -> str:
    return figure_table(name, moments, list(pairwise(moments))[-1:])


def figure_table(name: str, moments: Sequence[Moment], pairs: Sequence[tuple[Moment, Moment]]) -> str:
    """One line a question type and one for all; for each moment the accuracy, with the marks beside it where a task gives some in part,
    and, if any reply was so, well-formed and correct; at the end, for each pair, what changed from its first to its second."""
    shares = [("accuracy", "accuracy", "interval")]
    overall = [m.result["overall"] for m in moments]
    if any(f.get("partial") for f in overall) and all("score" in f for f in overall):  # not in runs from before there were marks
        shares.append(("score", "score", "score_interval"))
    if any(m.result["overall"]["format_rate"] for m in moments):
        shares.append(("well-formed<br>and correct", "well_formed_and_correct", "well_formed_and_correct_interval"))
    count = moments[-1].result["overall"]["n"]
    pairs = [pair for pair in pairs if paired(pair[0].result, pair[1].result)]
    lines = []
    for kind in (*dict.fromkeys(kind for m in moments for kind in m.result["kinds"]), None):
        figures = [m.result["overall"] if kind is None else m.result["kinds"].get(kind) for m in moments]
        base = next(f for f in reversed(figures) if f)
        guesses = (("n", f"{base['n']:,}"), ("chance", f"{100 * base['chance']:.1f}"), ("majority", f"{100 * base['majority']:.1f}"))
        row = "".join(f'<td data-label="{label}">{cell}</td>' for label, cell in guesses)
        for m, f in zip(moments, figures, strict=True):
            cells = [(title, _share(f, share, interval) if f else "&ndash;") for title, share, interval in shares]
            row += "".join(
                f'<td class="share{"" if i else " first"}" data-label="{escape(m.label)}, {title.replace("<br>", " ")}">{cell}</td>'
                for i, (title, cell) in enumerate(cells)
            )
        for first, second in pairs:
            change = paired(first.result, second.result, kind=kind)
            label = f"change of accuracy, {first.label} to {second.label}"
            row += f'<td class="change first" data-label="{escape(label)}">{_short(change) if change else "&ndash;"}</td>'
        label = "all" if kind is None else kind or "(no type)"
        lines.append(f'<tr class="{"all" if kind is None else ""}"><th>{escape(label)}</th>{row}</tr>')
    heads = "".join(f'<th rowspan="2">{head}</th>' for head in ("question type", "n", "chance", "majority"))
    for m in moments:
        f = m.result["overall"]
        note = f"well-formed {_percent(f['format_rate'])}, {f['mean_response_length']:.0f} tokens" + f", n {f['n']:,}" * (f["n"] != count)
        heads += f'<th class="moment" colspan="{len(shares)}">{escape(m.label)} <small>{note}</small></th>'
    for first, second in pairs:
        about = f"of accuracy on the same rows,<br>{escape(first.label)} &rarr; {escape(second.label)}"
        heads += f'<th class="moment" rowspan="2">change <small>{about}</small></th>'
    titles = "".join(f'<th class="share{"" if i else " first"}">{title}</th>' for _ in moments for i, (title, *_) in enumerate(shares))
    return (
        f'<h3>{escape(name)}</h3><div class="wide"><table class="figures narrow"><thead><tr>{heads}</tr><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _short(change: Paired) -> str:
    ends = f"{_points(change.low)} to {_points(change.high)}" if change.low < change.high else "no interval"
    return f'<b class="{_verdict(change)[1]}">{_points(change.difference)}</b><small>{ends}</small>'


def _share(figures: Mapping[str, Any], share: str, interval: str) -> str:
    """A share over its interval; the accuracy with a bar at its side."""
    value, low, high = (100 * v for v in (figures[share], *figures[interval]))
    bar = (
        f"<span class='bar'><i style='left:{low:.1f}%;width:{high - low:.1f}%'></i>"
        f"<u style='left:{100 * figures['chance']:.1f}%'></u><b style='left:{value:.1f}%'></b></span>"
    )
    return f"<b>{value:.1f}</b>{bar if share == 'accuracy' else ''}<small>{low:.1f}&ndash;{high:.1f}</small>"
