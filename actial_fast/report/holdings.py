"""What sources hold (data/sources/stats.py), as text and as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from actial_fast.report.bars import histogram
from actial_fast.report.chart import number
from actial_fast.report.style import CSS

LENGTHS = {  # of stats(), in the order in which they are shown
    "sequence_tokens": "Tokens of a row, as the model reads it",
    "prompt_tokens": "Tokens of its prompt, with those of its images",
    "image_tokens": "Tokens of its images",
    "reply_tokens": "Tokens of its answers",
    "patches": "Patches of its images",
    "question_characters": "Characters of its question",
    "reply_characters": "Characters of its answers",
    "image_width": "Width of a picture (pixels)",
    "image_height": "Height of a picture (pixels)",
}
SHOWN = ("mean", "min", "p5", "median", "p95", "p99", "max")
MARKS = ("p5", "median", "p95")


def holdings_text(name: str, found: Mapping[str, Any]) -> str:
    """The figures of one source, in lines."""
    return "\n".join([f"{name}: {_lead(found)}", *_lines(found)])


def holdings_page(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """An HTML page of the figures of sources by their names."""
    title = "What the data holds" if len(sources) > 1 else escape(next(iter(sources)))
    body = "".join(_section(name, found, alone=len(sources) == 1) for name, found in sources.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{CSS}</style></head><body><h1>{title}</h1>{body}</body></html>"
    )


def _lead(found: Mapping[str, Any]) -> str:
    looked = "" if found["looked_at"] == found["rows"] else f", {found['looked_at']:,} of them looked at"
    return f"{found['rows']:,} rows{looked}, {found['bad']:,} bad"


def _images(found: Mapping[str, Any]) -> str:
    of = found["images"]
    each = ", ".join(f"{n}: {count:,} rows" for n, count in of["per_row"].items())
    embedded = f", {of['embedded']:,} embedded" if of["embedded"] else ""
    return f"images a row: {each or 'none'}; {of['files']:,} files{embedded}; {of['missing']:,} missing"


def _counts(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Tables of names and counts."""
    yield "Why rows are bad", found["reasons"]
    yield "Question types", {kind or "(none)": count for kind, count in found["kinds"].items()}
    yield _differing("Answers", found["answers"]), found["answers"]["commonest"]
    yield "Options offered", {n: count for n, count in found["choices"].items() if n != "0"}
    for key, value in found["meta"].items():
        if "different" in value:
            yield _differing(f"meta.{key}", value), value["commonest"]
    yield "Pictures that are missing", dict.fromkeys(found["images"]["missing_files"], 1)


def _differing(name: str, value: Mapping[str, Any]) -> str:
    more = value["different"] > len(value["commonest"])
    return f"{name} ({value['different']:,} different{', the commonest' if more else ''})"


def _distributions(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from ((title, found["lengths"][key]) for key, title in LENGTHS.items() if key in found["lengths"])
    yield from ((f"meta.{key}", value) for key, value in found["meta"].items() if "edges" in value)


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield _images(found)
    for title, counts in _counts(found):
        if counts:
            yield f"{title[:1].lower()}{title[1:]}:"
            yield from (f"  {count:8,}  {name}" for name, count in counts.items())
    if rows := list(_distributions(found)):
        width = max(len(title) for title, _ in rows)
        yield f"{'':{width}}  " + "  ".join(f"{name:>8}" for name in SHOWN)
        yield from (f"{title:{width}}  " + "  ".join(f"{_short(of[name]):>8}" for name in SHOWN) for title, of in rows)


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else number(value, 4)


def _section(name: str, found: Mapping[str, Any], *, alone: bool) -> str:
    heading = "" if alone else f"<h2>{escape(name)}</h2>"
    rows = list(_distributions(found))
    charts = "".join(
        histogram(title, of["edges"], of["counts"], {mark: of[mark] for mark in MARKS}) for title, of in rows if of["min"] < of["max"]
    )
    head = "".join(f"<th>{mark}</th>" for mark in SHOWN)
    body = "".join(f"<tr><th>{escape(title)}</th>{''.join(f'<td>{_short(of[mark])}</td>' for mark in SHOWN)}</tr>" for title, of in rows)
    lengths = f'<div class="wide"><table class="figures"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    tables = "".join(_table(title, counts) for title, counts in _counts(found) if counts)
    return (
        f'{heading}<p class="lead">{_lead(found)}</p><p>{escape(_images(found))}</p><div class="grid">{charts}</div>'
        f'<h2>Lengths and meta</h2>{lengths if rows else ""}<h2>What there is</h2><div class="grid">{tables}</div>'
    )


def _table(title: str, counts: Mapping[str, int]) -> str:
    body = "".join(f"<tr><th>{escape(name)}</th><td>{count:,}</td></tr>" for name, count in counts.items())
    return f'<div class="wide"><h3>{escape(title)}</h3><table class="figures"><tbody>{body}</tbody></table></div>'
