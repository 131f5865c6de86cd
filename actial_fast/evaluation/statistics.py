"""Accuracy with its uncertainty, beside what guessing would give.

An accuracy means nothing alone: beside it stand `chance` (a uniform guess among the options) and `majority` (always giving the most
frequent truth of that kind), and around it the Wilson 95% interval. Pure Python: no torch, no numpy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import StringIO
from typing import Any


@dataclass(frozen=True)
class Record:
    """One scored reply.

    kind: the question type. correct: the answer is right, whatever the format. well_formed: the reply has the required tags.
    response_length: tokens. truth: what `majority` counts; give the option's TEXT ("left"), not its letter: letters are shuffled, so only
    the text shows that "always left" earns one half. choices: number of options, 0 for a free-form question (chance 0).
    """

    kind: str
    correct: bool
    well_formed: bool
    response_length: int
    truth: str
    choices: int


def wilson(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval (low, high) of the proportion `correct / n`, in [0, 1]; (0, 1) when n is 0: nothing is known.

    z: normal quantile, 1.96 for 95%. Raises ValueError unless 0 <= correct <= n and z > 0.
    Source: E. B. Wilson, JASA 22 (1927). Unlike p +- z*sqrt(p(1-p)/n) it stays inside [0, 1] and is not empty at p = 0 or 1.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"wilson: correct={correct} must lie between 0 and n={n}")
    if not z > 0:
        raise ValueError(f"wilson: z={z} must be positive (1.96 for a 95% interval)")
    if n == 0:
        return 0.0, 1.0
    p, z2 = correct / n, z * z
    centre = p + z2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # Clamped by the observed proportion: rounding must not leave it outside its own interval.
    low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    return max(0.0, min(low, p)), min(1.0, max(high, p))


def _figures(rows: list[Record], majority_correct: int) -> dict[str, Any]:
    n = len(rows)
    correct = sum(r.correct for r in rows)
    formed = sum(r.well_formed for r in rows)
    both = sum(r.correct and r.well_formed for r in rows)
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "interval": list(wilson(correct, n)),
        "chance": sum(1 / r.choices if r.choices else 0.0 for r in rows) / n,
        "majority": majority_correct / n,
        "format_rate": formed / n,
        "well_formed_and_correct": both / n,
        "well_formed_and_correct_interval": list(wilson(both, n)),
        "mean_response_length": sum(r.response_length for r in rows) / n,
    }


def accuracy_table(records: Iterable[Record]) -> dict[str, Any]:
    """Figures per question type and over all rows, ready for JSON: `{"kinds": {kind: figures}, "overall": figures}`, kinds by name.

    figures: n, correct (counts); accuracy, chance, majority, format_rate, well_formed_and_correct (shares in [0, 1]); interval,
    well_formed_and_correct_interval ([low, high], Wilson 95%); mean_response_length (tokens). The overall majority gives each row the most
    frequent truth of its own kind. Raises ValueError when there are no records or a record has a negative count.
    """
    by_kind: dict[str, list[Record]] = {}
    for record in records:
        if record.choices < 0 or record.response_length < 0:
            raise ValueError(f"accuracy_table: negative choices or response_length in {record}")
        by_kind.setdefault(record.kind, []).append(record)
    if not by_kind:
        raise ValueError("accuracy_table: no records; was the evaluation given an empty source, or were all its rows rejected?")
    majority = {kind: Counter(r.truth for r in rows).most_common(1)[0][1] for kind, rows in by_kind.items()}
    everything = [record for rows in by_kind.values() for record in rows]
    return {
        "kinds": {kind: _figures(by_kind[kind], majority[kind]) for kind in sorted(by_kind)},
        "overall": _figures(everything, sum(majority.values())),
    }


def render_table(result: Mapping[str, Any], title: str = "") -> str:
    """`result` of accuracy_table as text for a terminal, a line a kind and one for all; no colour codes, so that it reads in a log too."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("question type", no_wrap=True)
    for name in (
        "n",
        "right\n%",
        "95%\ninterval",
        "chance\n%",
        "majority\n%",
        "format\n%",
        "format+right\n%",
        "95%\ninterval",
        "length\ntokens",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    kinds = result["kinds"]
    for kind, f in (*kinds.items(), *((("all", result["overall"]),) if len(kinds) != 1 else ())):
        table.add_row(
            kind or "(none)",
            f"{f['n']:,}",
            _percent(f["accuracy"]),
            _range(f["interval"]),
            _percent(f["chance"]),
            _percent(f["majority"]),
            _percent(f["format_rate"]),
            _percent(f["well_formed_and_correct"]),
            _range(f["well_formed_and_correct_interval"]),
            f"{f['mean_response_length']:.1f}",
        )
    out = StringIO()
    Console(file=out, width=200, color_system=None).print(table)
    lines = [line[1:].rstrip() for line in out.getvalue().splitlines()]  # the box has an empty left edge
    return "\n".join([title] * bool(title) + [line for line in lines if line])


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _range(interval: Iterable[float]) -> str:
    low, high = interval
    return f"{100 * low:.1f}-{100 * high:.1f}"
