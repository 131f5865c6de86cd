"""Accuracy with its uncertainty, beside what guessing would give.

An accuracy means nothing alone: beside it stand `chance` (a uniform guess among the options) and `majority` (always giving the most
frequent truth of that kind), and around it a 95% interval. Rows that show the same picture are no independent trials (the three questions
about an image pair are one bit for a model that sees which way the camera went), so the interval counts clusters of such rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from actial_fast.report.paired import linked, packed


@dataclass(frozen=True)
class Record:
    """One scored reply.

    kind: the question type. correct: the answer is right, whatever the format. well_formed: the reply has the required form.
    response_length: tokens. truth: what `majority` counts; give the option's TEXT ("left"), not its letter: letters are shuffled, so only
    the text shows that "always left" earns one half; empty where a task has no one truth. choices: number of options, 0 for a free-form
    question (chance 0). images: what tells its images from others; records that share one are of one cluster, and so are those that are
    linked through others. score: the metric's marks from 0 to 1, of which 1 is correct; None where there are no others than 0 and 1. row:
    paired.KEY characters that are the same wherever this row is asked; empty where evaluations of it are not to be paired.
    """

    kind: str
    correct: bool
    well_formed: bool
    response_length: int
    truth: str
    choices: int
    images: tuple[str, ...] = ()
    score: float | None = None
    row: str = ""

    @property
    def marks(self) -> float:
        """The score, or 0 or 1."""
        return float(self.correct) if self.score is None else self.score


def wilson(correct: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval (low, high) of the proportion `correct / n`, in [0, 1]; (0, 1) when n is 0: nothing is known.

    correct, n: counts, or fractions of them for an effective number of trials. z: normal quantile, 1.96 for 95%. Raises ValueError unless
    0 <= correct <= n and z > 0.
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


def clustered(outcomes: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The 95% interval (low, high), in [0, 1], of the share of outcomes that are true, outcomes of one cluster being alike as they may.

    outcomes: those of each cluster, true or false, or marks from 0 to 1, whose variance is at most that of trials of the same mean. The
    Wilson interval for as many independent trials as the outcomes are worth: their number over the design effect, by the spread of the
    clusters' sums, never more than they are and never fewer than if every cluster were of one mind; with Student's quantile, since that
    spread is an estimate. Of clusters of one it is Wilson's. Raises ValueError without outcomes.
    Source: E. L. Korn, B. I. Graubard, Survey Methodology 24 (1998), with Wilson's interval as in Franco et al., JSSAM 7 (2019).
    """
    from scipy.stats import t

    sizes = [len(cluster) for cluster in outcomes]
    n, groups, true = sum(sizes), len(sizes), sum(map(sum, outcomes))
    if not n:
        raise ValueError("clustered: no outcomes")
    if max(sizes) == 1:
        return wilson(true, n)
    share, fewest = true / n, n * n / sum(size * size for size in sizes)
    spread = sum((sum(cluster) - share * len(cluster)) ** 2 for cluster in outcomes)
    worth = fewest
    if groups > 1 and spread:
        worth = min(n, max(fewest, share * (1 - share) * n * n * (groups - 1) / (groups * spread)))
    return wilson(share * worth, worth, float(t.ppf(0.975, groups - 1)) if groups > 1 else 1.96)


def clusters_of(records: Sequence[Record]) -> list[int]:
    """The number of each record's cluster: records that show a picture in common, or are linked through others that do. (n,)"""
    return linked([record.images for record in records])


def _interval(outcomes: Sequence[float], clusters: list[int]) -> list[float]:
    by_cluster: dict[int, list[float]] = {}
    for outcome, cluster in zip(outcomes, clusters, strict=True):
        by_cluster.setdefault(cluster, []).append(outcome)
    return list(clustered(list(by_cluster.values())))


def _figures(rows: list[Record], clusters: list[int], majority_correct: int) -> dict[str, Any]:
    n = len(rows)
    correct = sum(r.correct for r in rows)
    formed = sum(r.well_formed for r in rows)
    both = [r.correct and r.well_formed for r in rows]
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "interval": _interval([r.correct for r in rows], clusters),
        "clusters": len(set(clusters)),
        "score": sum(r.marks for r in rows) / n,
        "score_interval": _interval([r.marks for r in rows], clusters),
        "partial": any(r.marks not in (0, 1) for r in rows),
        "chance": sum(1 / r.choices if r.choices else 0.0 for r in rows) / n,
        "majority": majority_correct / n,
        "format_rate": formed / n,
        "well_formed_and_correct": sum(both) / n,
        "well_formed_and_correct_interval": _interval(both, clusters),
        "mean_response_length": sum(r.response_length for r in rows) / n,
    }


def accuracy_table(records: Iterable[Record]) -> dict[str, Any]:
    """Figures per question type and over all rows, ready for JSON: `{"kinds": {kind: figures}, "overall": figures}`, kinds by name; and
    "rows" of paired.packed, where every record says which row it is of.

    figures: n, correct, clusters (counts); accuracy, score (mean marks: the accuracy where none is partial), chance, majority, format_rate,
    well_formed_and_correct (shares in [0, 1]); partial (whether any reply has marks between); interval, score_interval,
    well_formed_and_correct_interval ([low, high], 95%, of `clustered`); mean_response_length (tokens). The overall majority gives each row
    the most frequent truth of its own kind. Raises ValueError when there are no records or a record has a negative count.
    """
    everything = list(records)
    by_kind: dict[str, list[int]] = {}
    for k, record in enumerate(everything):
        if record.choices < 0 or record.response_length < 0:
            raise ValueError(f"accuracy_table: negative choices or response_length in {record}")
        by_kind.setdefault(record.kind, []).append(k)
    if not by_kind:
        raise ValueError("accuracy_table: no records; was the evaluation given an empty source, or were all its rows rejected?")
    clusters = clusters_of(everything)
    truths = {kind: Counter(everything[k].truth for k in of if everything[k].truth) for kind, of in by_kind.items()}
    majority = {kind: max(counts.values(), default=0) for kind, counts in truths.items()}
    table: dict[str, Any] = {
        "kinds": {
            kind: _figures([everything[k] for k in of], [clusters[k] for k in of], majority[kind]) for kind, of in sorted(by_kind.items())
        },
        "overall": _figures(everything, clusters, sum(majority.values())),
    }
    if all(record.row for record in everything):
        place = {kind: k for k, kind in enumerate(table["kinds"])}
        table["rows"] = packed(
            [r.row for r in everything],
            clusters,
            [place[r.kind] for r in everything],
            [r.correct for r in everything],
            [r.well_formed for r in everything],
            [r.marks for r in everything],
        )
    return table


def render_table(result: Mapping[str, Any], title: str = "") -> str:
    """`result` of accuracy_table as text for a terminal, a line a kind and one for all; no colour codes, so that it reads in a log too."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("question type", no_wrap=True)
    kinds = result["kinds"]
    partial = result["overall"].get("partial", False)  # not in a table from before there were scores
    for name in (
        "n",
        *(("score\n%", "95%\ninterval") if partial else ()),
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
    for kind, f in (*kinds.items(), *((("all", result["overall"]),) if len(kinds) != 1 else ())):
        table.add_row(
            kind or "(none)",
            f"{f['n']:,}",
            *((_percent(f["score"]), _range(f["score_interval"])) if partial else ()),
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
