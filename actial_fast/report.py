"""report.html: what a run did, on one page that needs nothing but itself (inline SVG and images, no script, no fetch; light and dark).

It reads metrics.jsonl, events.jsonl, summary.json, recipe*.yaml and versions.json of the run folder, whichever are there, so that a run
that still goes on, or was killed, can be looked at as well.
"""

from __future__ import annotations

import base64
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

from actial_fast.chart import Guide, Series, line_chart, number
from actial_fast.data.tags import extract_answer, is_well_formed, same_answer
from actial_fast.metrics import read_events, read_metrics
from actial_fast.style import CSS

GRPO_CHARTS = (  # title, metrics drawn in one chart
    ("Response length (tokens)", ("response_length",)),
    ("KL to the reference, per token", ("kl",)),
    ("Entropy (nats per token)", ("entropy",)),
    ("Clip fraction", ("clip_fraction",)),
    ("Probability ratio", ("ratio", "ratio_max")),
    ("Finished replies, share", ("finished",)),
    ("Groups of equal rewards, share", ("zero_variance_groups",)),
    ("Policy loss", ("loss",)),
)
ALL_CHARTS = (
    ("Tokens per second", ("tokens_per_s",)),
    ("Seconds per step", ("seconds", "sampling_seconds")),
    ("Gradient norm", ("grad_norm",)),
    ("Learning rate", ("lr",)),
    ("Answer tokens per step", ("answer_tokens",)),
)
MAY_LOG = ("loss", "grad_norm", "kl", "ratio")
GROUPS, REPLIES = 3, 4  # rollouts shown for each of the three moments: groups, and replies of each
IMAGE_BYTES, IMAGE_SIDE = 64_000, 320  # a larger image is embedded as a JPEG of at most this side

Columns = dict[str, Mapping[str, Any]]  # "after sft" -> a result of statistics.accuracy_table


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
    evals = _evals(events, list(steps))
    summary, versions = (_json(run_dir / name) for name in ("summary.json", "versions.json"))
    recipes = {path.name: path.read_text(encoding="utf-8") for path in sorted(run_dir.glob("recipe*.yaml"))}
    last = (metrics or events)[-1]
    state = "finished" if summary else f"unfinished: last record is {last['stage']} step {last['step']:,}"

    body = [
        f'<header><p class="muted">actial_fast run &middot; {time.strftime("%Y-%m-%d %H:%M")} &middot; {escape(state)}</p>',
        f"<h1>{escape(run_dir.resolve().name)}</h1>{_headline(evals, rl, steps)}</header>",
        *(_accuracy_section(name, columns) for name, columns in _columns(evals, steps).items()),
        "<p class='muted'>Ranges are 95% Wilson intervals. Bars run from 0 to 100%: the interval, the share (dot) and chance (tick). "
        "Majority is the accuracy of always giving the most frequent answer of a type.</p>" * bool(evals),
        _section("Learning", "".join(_learning(metrics, evals, rl, steps)), "grid"),
        _section("GRPO", "".join(_grpo(metrics, rl, steps)), "grid"),
        _section("Speed and optimisation", "".join(_optimisation(metrics, steps)), "grid"),
        *(_rollout_section(run_dir, stage, events) for stage in steps),
        _section("Stages", _stage_table(metrics, steps)),
        _section("Summary", _pairs(summary)),
        _section("Versions and machine", _pairs(versions)),
        *(_section(f"Recipe ({name})" if len(recipes) > 1 else "Recipe", f"<pre>{escape(text)}</pre>") for name, text in recipes.items()),
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


def _section(title: str, content: str, css: str = "") -> str:
    return f'<section><h2>{escape(title)}</h2><div class="{css}">{content}</div></section>' if content else ""


# --- evaluations ---------------------------------------------------------------------------------------------------------------------


def _evals(events: Sequence[Mapping[str, Any]], order: Sequence[str]) -> dict[str, dict[str, list[tuple[int, Mapping[str, Any]]]]]:
    """name -> stage -> [(step, result)] in order of step; names that most stages share come first, then those of later stages."""
    out: dict[str, dict[str, list[tuple[int, Mapping[str, Any]]]]] = {}
    for event in sorted((e for e in events if e["kind"] == "eval"), key=lambda e: e["step"]):
        out.setdefault(event["name"], {}).setdefault(event["stage"], []).append((event["step"], event["result"]))
    return dict(sorted(out.items(), key=lambda item: (-len(item[1]), -max(order.index(stage) for stage in item[1]))))


def _columns(evals: Mapping[str, Any], steps: Mapping[str, int]) -> dict[str, Columns]:
    """name -> what the table sets side by side: the result after every stage, and before it where step 0 was evaluated and came out
    otherwise than the stage before had ended (sampled instead of greedy, say)."""
    out = {}
    for name, stages in evals.items():
        columns: Columns = {}
        for stage in (s for s in steps if s in stages):
            first, last = stages[stage][0], stages[stage][-1]
            if first[0] == 0 and first[1] not in list(columns.values())[-1:]:
                columns[f"before {stage}"] = first[1]
            if last[0]:
                columns[f"after {stage}" if last[0] == steps[stage] else f"at {stage} step {last[0]:,}"] = last[1]
        out[name] = columns
    return out


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _interval(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.1f}&ndash;{100 * interval[1]:.1f}"


def _headline(evals: Mapping[str, Any], rl: set[str], steps: Mapping[str, int]) -> str:
    """The result in two sentences: accuracy after every stage beside chance, and what GRPO did to well-formed-and-correct."""
    tables = _columns(evals, steps)
    if not tables or not next(iter(tables.values())):
        return '<p class="lead">No evaluation yet.</p>'
    name, columns = next(iter(tables.items()))
    parts = [
        f"<b>{_percent(r['overall']['accuracy'])}</b> {escape(label)} <span class='muted'>({_interval(r['overall']['interval'])})</span>"
        for label, r in columns.items()
    ]
    base = list(columns.values())[-1]["overall"]
    text = f"Accuracy on <i>{escape(name)}</i>: {', '.join(parts)}; chance {_percent(base['chance'])}, "
    out = [f'<p class="lead">{text}always the most frequent answer {_percent(base["majority"])}.</p>']
    for stage in (s for s in steps if s in rl):
        for other, stages in evals.items():
            earlier = [stages[s][-1] for s in list(steps)[: list(steps).index(stage)] if s in stages]
            points = stages.get(stage, [])
            before = points[0] if points and points[0][0] == 0 else (earlier[-1] if earlier else None)
            if before is None or not points or points[-1][0] == 0:
                continue
            (step, result), key = points[-1], "well_formed_and_correct"
            when = "after" if step == steps[stage] else f"at step {step:,}"
            shares = (_percent(before[1]["overall"][key]), _percent(result["overall"][key]))
            out.append(
                f'<p class="lead">Replies to <i>{escape(other)}</i> that are well-formed and correct: <b>{shares[0]}</b> before '
                f"{escape(stage)}, <b>{shares[1]}</b> {when} "
                f"<span class='muted'>({_interval(result['overall'][key + '_interval'])})</span>.</p>"
            )
    return "".join(out)


def _accuracy_section(name: str, columns: Columns) -> str:
    if not columns:
        return ""
    kinds = list(dict.fromkeys(kind for result in columns.values() for kind in result["kinds"]))
    right = _figure_table(columns, kinds, "accuracy", "interval", with_base=True)
    if any(result["overall"]["format_rate"] for result in columns.values()):
        formed = _figure_table(columns, kinds, "well_formed_and_correct", "well_formed_and_correct_interval", with_base=False)
        formed = f"<h3>Well-formed and correct</h3>{formed}"
    else:
        formed = "<p class='muted'>No reply was well-formed.</p>"
    return _section(f"Evaluation: {name}", f"<h3>Accuracy</h3>{right}{formed}")


def _figure_table(columns: Columns, kinds: Sequence[str], key: str, interval: str, with_base: bool) -> str:
    """One line a kind and one for all, one column a stage; with_base: n, chance and majority as well, else the format rate and length."""
    lines = []
    for kind in (*kinds, None):
        figures = [r["overall"] if kind is None else r["kinds"].get(kind) for r in columns.values()]
        base = next(f for f in reversed(figures) if f)
        cells = [f"{base['n']:,}", _percent(base["chance"]), _percent(base["majority"])] if with_base else []
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        for f in figures:
            more = (
                "" if with_base or not f else f"<small>format {_percent(f['format_rate'])}, {f['mean_response_length']:.0f} tokens</small>"
            )
            row += f'<td class="share">{_bar(f[key], f[interval], f["chance"]) + more if f else "&ndash;"}</td>'
        name = "all" if kind is None else kind or "(no type)"
        lines.append(f'<tr class="{"all" if kind is None else ""}"><th>{escape(name)}</th>{row}</tr>')
    heads = "".join(f"<th>{head}</th>" for head in ("question type", *(("n", "chance", "majority") if with_base else ())))
    heads += "".join(f'<th class="share">{escape(label)}</th>' for label in columns)
    return f'<div class="wide"><table class="figures"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _bar(share: float, interval: Sequence[float], chance: float) -> str:
    low, high = interval
    return (
        f"<b>{100 * share:.1f}</b> <small>{_interval(interval)}</small>"
        f'<span class="bar"><i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
        f'<u style="left:{100 * chance:.1f}%"></u><b style="left:{100 * share:.1f}%"></b></span>'
    )


# --- charts --------------------------------------------------------------------------------------------------------------------------


def _series(metrics: Sequence[Mapping[str, Any]], names: Sequence[str], stages: Sequence[str]) -> list[Series]:
    """One series a metric, over the stages that recorded it."""
    out = []
    for colour, name in enumerate(names):
        points = {stage: [(m["step"], m[name]) for m in metrics if m["stage"] == stage and name in m] for stage in stages}
        out.append(Series(name, {stage: p for stage, p in points.items() if p}, colour))
    return out


def _learning(metrics: Sequence[Mapping[str, Any]], evals: Mapping[str, Any], rl: set[str], steps: Mapping[str, int]) -> Iterator[str]:
    yield line_chart(
        "Supervised loss (nats per answer token)", _series(metrics, ["loss"], [s for s in steps if s not in rl]), steps, may_log=True
    )
    for name, stages in evals.items():
        ordered = {stage: stages[stage] for stage in steps if stage in stages}
        results = [result for points in ordered.values() for _, result in points]
        kinds = list(dict.fromkeys(kind for result in results for kind in result["kinds"]))
        lines = [
            Series(kind, {s: [(n, r["kinds"][kind]["accuracy"]) for n, r in p if kind in r["kinds"]] for s, p in ordered.items()}, i, True)
            for i, kind in enumerate(kinds)
        ]
        chance = {kind: round(r["kinds"][kind]["chance"], 3) for r in results for kind in r["kinds"]}
        guides = [Guide("chance", next(iter(chance.values())))] if len(set(chance.values())) == 1 else []
        guides = guides or [Guide(f"chance, {kind}", value, kinds.index(kind)) for kind, value in chance.items()]
        yield line_chart(f"Accuracy by type ({name})", lines, steps, guides=guides, percent=True)
        if not any(result["overall"]["format_rate"] for result in results):
            continue
        shares = (("well-formed", "format_rate"), ("well-formed and correct", "well_formed_and_correct"), ("correct", "accuracy"))
        lines = [
            Series(label, {s: [(n, r["overall"][key]) for n, r in p] for s, p in ordered.items()}, i, True)
            for i, (label, key) in enumerate(shares)
        ]
        yield line_chart(f"Format and correctness ({name})", lines, steps, percent=True)


def _grpo(metrics: Sequence[Mapping[str, Any]], rl: set[str], steps: Mapping[str, int]) -> Iterator[str]:
    stages = [s for s in steps if s in rl]
    names = dict.fromkeys(key for m in metrics for key in m if key.startswith("reward"))
    yield line_chart("Reward and its parts", _series(metrics, list(names), stages), steps)
    for title, keys in GRPO_CHARTS:
        yield line_chart(title, _series(metrics, keys, stages), steps, may_log=keys[0] in MAY_LOG)


def _optimisation(metrics: Sequence[Mapping[str, Any]], steps: Mapping[str, int]) -> Iterator[str]:
    for title, keys in ALL_CHARTS:
        yield line_chart(title, _series(metrics, keys, list(steps)), steps, may_log=keys[0] in MAY_LOG)
    drawn = {"stage", "step", "time", "loss", *(key for _, keys in (*GRPO_CHARTS, *ALL_CHARTS) for key in keys)}
    for key in dict.fromkeys(key for m in metrics for key in m if key not in drawn and not key.startswith("reward")):
        yield line_chart(key, _series(metrics, [key], list(steps)), steps)


# --- rollouts ------------------------------------------------------------------------------------------------------------------------


def _rollout_section(run_dir: Path, stage: str, events: Sequence[Mapping[str, Any]]) -> str:
    moments = sorted((e for e in events if e["kind"] == "rollouts" and e["stage"] == stage), key=lambda e: e["step"])
    moments = [moments[i] for i in sorted({0, len(moments) // 2, len(moments) - 1})] if moments else []
    out = []
    for event in moments:
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for rollout in event["rollouts"]:
            groups.setdefault(json.dumps([rollout["images"], rollout["prompt"], rollout["truth"]]), []).append(rollout)
        cards = "".join(_rollout_group(run_dir, group) for group in list(groups.values())[:GROUPS])
        out.append(f'<h3>Step {event["step"]:,}</h3><div class="cards">{cards}</div>')
    return _section(f"Sampled replies: {stage}", "".join(out))


def _rollout_group(run_dir: Path, group: Sequence[Mapping[str, Any]]) -> str:
    first = group[0]
    replies = []
    for rollout in group[:REPLIES]:
        formed, right = is_well_formed(rollout["response"]), same_answer(extract_answer(rollout["response"]), rollout["truth"])
        marks = "".join(
            f'<span class="{"good" if ok else "bad"}">{"&#10003;" if ok else "&#10007;"} {label}</span>'
            for ok, label in ((right, "answer"), (formed, "format"))
        )
        replies.append(
            f'<div class="reply"><div class="marks">{marks}<span>reward <b>{number(float(rollout["reward"]))}</b></span></div>'
            f"<pre>{escape(rollout['response']) or '(empty)'}</pre></div>"
        )
    hidden = f'<p class="muted">{len(group) - REPLIES} more replies in events.jsonl</p>' if len(group) > REPLIES else ""
    images = "".join(_image(run_dir, image) for image in first["images"])
    return (
        f'<article><div class="images">{images}</div><pre class="prompt">{escape(first["prompt"])}</pre>'
        f"<p>truth <b>{escape(str(first['truth']))}</b></p>{''.join(replies)}{hidden}</article>"
    )


def _image(run_dir: Path, source: str) -> str:
    """An <img> that holds the picture; a note in its place when the file is gone, for a report must come out of an old run too."""
    from PIL import Image

    try:
        data = base64.b64decode(source.partition(",")[2]) if source.startswith("data:") else (run_dir / source).read_bytes()
        with Image.open(BytesIO(data)) as picture:
            kind, small = picture.format, max(picture.size) <= 64
            if len(data) > IMAGE_BYTES or kind not in ("PNG", "JPEG"):
                picture = picture.convert("RGB")
                picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
                picture.save(buffer := BytesIO(), "JPEG", quality=85)
                kind, data = "JPEG", buffer.getvalue()
    except (OSError, ValueError) as error:
        return f'<span class="lost">image not readable: {escape(str(error))}</span>'
    encoded = base64.b64encode(data).decode()
    return f'<img alt="" class="{"pixels" if small else ""}" src="data:image/{kind.lower()};base64,{encoded}">'


# --- the rest ------------------------------------------------------------------------------------------------------------------------


def _stage_table(metrics: Sequence[Mapping[str, Any]], steps: Mapping[str, int]) -> str:
    rows = []
    for stage, last in steps.items():
        own = [m for m in metrics if m["stage"] == stage]
        seconds = math.fsum(m["seconds"] for m in own if math.isfinite(m.get("seconds", math.nan)))
        speed = [m["tokens_per_s"] for m in own if "tokens_per_s" in m]
        cells = (f"{last:,}", f"{seconds:,.1f}" if seconds else "&ndash;", number(median(speed)) if speed else "&ndash;")
        rows.append(f"<tr><th>{escape(stage)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "<tr><th>stage</th><th>steps</th><th>seconds in steps</th><th>tokens/s, median</th></tr>"
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
