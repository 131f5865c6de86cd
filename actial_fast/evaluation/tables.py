"""Figures as tables, for a terminal, for Markdown and for LaTeX: a table is rows of texts, and each form knows how it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

Result = Mapping[str, Any]  # of scoring.score
NOTHING = "–"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Table:
    """A title, the heads of the columns, rows of as many cells, and sentences below. The first column is left-aligned."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def percent(share: float | None) -> str:
    """A share in [0, 1] as per cent with one digit; a dash for None."""
    return NOTHING if share is None else f"{100 * share:.1f}"


def set_table(results: Sequence[Result]) -> Table:
    """The figures of one set, a column for each of these models with its 95% interval, then guessing, then what was published."""
    first = results[0]
    models = [result["model"] for result in results]
    published: Mapping[str, Mapping[str, float]] = first["published"]
    heads = ["figure", "n", *(head for model in models for head in (model, "95%")), "chance", "majority"]
    heads += [f"{model} (published)" for model in published]
    if any("judge" in result for result in results):
        heads += [f"{result['model']}, with the judge" for result in results if "judge" in result]
    by_name = [{figure["name"]: figure for figure in result["figures"]} for result in results]
    judged = [{f["name"]: f["value"] for f in result["judge"]["figures"]} for result in results if "judge" in result]
    rows = []
    for name in dict.fromkeys(name for figures in by_name for name in figures):
        own = [figures.get(name) for figures in by_name]
        base = next(figure for figure in own if figure)
        count = f"{base['n']:,}" + (f" in {base['groups']:,} groups" if base["groups"] else "")
        cells = [cell for figure in own for cell in _with_interval(figure)]
        theirs = [_given(published[model].get(name)) for model in published]
        added = [percent(figures.get(name)) for figures in judged]
        rows.append((name, count, *cells, percent(base["chance"]), percent(base["majority"]), *theirs, *added))
    return Table(first["title"], tuple(heads), tuple(rows), tuple(note for result in results for note in _notes(result)))


def summary_table(results: Sequence[Result]) -> Table:
    """A row a model, a column a set: the figure that stands for it, with its 95% interval."""
    heads = {result["set"]: f"{result['title']}: {result['headline']}" for result in results}
    rows = []
    for model in dict.fromkeys(result["model"] for result in results):
        row = [model]
        for name in heads:
            own = next((r for r in results if (r["set"], r["model"]) == (name, model)), None)
            found = next((f for f in own["figures"] if f["name"] == own["headline"]), None) if own else None
            row.append("{} ({})".format(*_with_interval(found)) if found else NOTHING)
        rows.append(tuple(row))
    return Table("All sets", ("model", *heads.values()), tuple(rows))


def _with_interval(figure: Mapping[str, Any] | None) -> tuple[str, str]:
    if figure is None:
        return NOTHING, NOTHING
    return percent(figure["value"]), f"{percent(figure['low'])}-{percent(figure['high'])}"


def comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> Table:
    """Pairs of models on the same questions, as scoring.comparisons gives them."""
    heads = ("set", "from", "to", "n", "difference", "95%", "only the first", "only the second", "p, McNemar", "p, by clusters")
    rows = tuple(
        (
            c["set"],
            c["first"],
            c["second"],
            f"{c['n']:,} in {c['clusters']:,}",
            f"{100 * c['difference']:+.1f}",
            f"{100 * c['low']:+.1f} to {100 * c['high']:+.1f}",
            f"{c['only_first']:,}",
            f"{c['only_second']:,}",
            NOTHING if c["mcnemar"] is None else f"{c['mcnemar']:.2g}",
            f"{c['by_clusters']:.2g}",
        )
        for c in comparisons
    )
    return Table(
        "Paired comparison",
        heads,
        rows,
        (
            "Mean score over the same questions, in points; the interval is a bootstrap over clusters. McNemar's exact test takes "
            "questions for independent, the test by clusters swaps the two models in whole clusters.",
        ),
    )


def _notes(result: Result) -> list[str]:
    told = f"{result['model']}: {result['n']:,} questions in {result['clusters']:,} clusters, {result['mean_tokens']:.0f} tokens a reply"
    if 0 < result["settings"].get("set.limit", 0) <= result["n"]:
        told += f", drawn with seed {result['settings']['set.seed']}"
    if result["unread"]:
        told += f"; no answer found in {result['unread']:,}"
    if result["cut"]:
        told += f"; {result['cut']:,} cut by the limit of {result['settings'].get('max_new_tokens')} tokens"
    if result["missing"]:
        why = next(iter(result["why_missing"]), "")
        told += f"; {result['missing']:,} without a reply, counted as wrong{f' ({why})' if why else ''}"
    if result["extractor"] != "rules":
        told += f"; answers found by {result['extractor']}"
    if "judge" in result:
        judge = result["judge"]
        told += f"; {judge['model']} was asked about {judge['asked']:,}, read {judge['read']:,}, of which {judge['right']:,} right"
    return [told]


def _given(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}"


def as_text(table: Table) -> str:
    """For a terminal or a log, without colours."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn

    drawn = Drawn(box=box.SIMPLE_HEAD, pad_edge=False)
    for k, head in enumerate(table.heads):
        drawn.add_column(head, justify="right" if k else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    out = StringIO()
    wide = sum(max(map(len, column)) + 3 for column in zip(table.heads, *table.rows, strict=True)) + 2
    Console(file=out, width=wide, color_system=None, markup=False).print(drawn)
    lines = [line[1:].rstrip() for line in out.getvalue().splitlines()]  # the box has an empty left edge
    return "\n".join([table.title, *(line for line in lines if line), *table.notes])


def as_markdown(table: Table) -> str:
    """A heading in bold, and a table that GitHub and most other readers of Markdown draw."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    rule = line(["---", *["---:"] * (len(table.heads) - 1)])
    return "\n".join([f"**{table.title}**", "", line(table.heads), rule, *map(line, table.rows), "", *table.notes])


def as_latex(table: Table) -> str:
    r"""A table with booktabs' rules: \usepackage{booktabs}."""

    def line(cells: Sequence[str]) -> str:
        return f"{' & '.join(map(_latex, cells))} \\\\"

    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{_latex(table.title)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.heads) - 1)}}}",
            r"\toprule",
            line(table.heads),
            r"\midrule",
            *map(line, table.rows),
            r"\bottomrule",
            r"\end{tabular}",
            *(f"\n{_latex(note)}" for note in table.notes),
            r"\end{table}",
        ]
    )


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", NOTHING: "--"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


FORMS: dict[str, Callable[[Table], str]] = {"text": as_text, "markdown": as_markdown, "latex": as_latex}
