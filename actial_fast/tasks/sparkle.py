"""Sparkle's basics: directions in words, distances and places in numbers (arXiv 2410.16162).

A row's meta has `measure`: direction, distance or place; without it the row's kind says so. A direction is right or wrong. A distance has
the mean relative accuracy (VSI-Bench, arXiv 2412.14171): the share of the tolerances 50%, 45%, ... 5% that its error is within. A place
"x, y" has the share of TOLERANCES, in the truth's own unit, that it is within of the truth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from actial_fast.data.sources.answers import is_right
from actial_fast.data.sources.row import BadRow, Row
from actial_fast.data.sources.tags import extract_answer
from actial_fast.data.sources.task import Task

MEASURES = {"direction": 0, "distance": 1, "place": 2}  # numbers of the answer
TOLERANCES = (5, 10, 15, 20, 25)
RELATIVE = [k / 20 for k in range(1, 11)]
NUMBER = re.compile(r"(?<![\w.])[-+]?[0-9]+(?:\.[0-9]+)?(?![\w]|\.[0-9])")
LONGEST = 300  # characters of an answer


def numbers_in(answer: str) -> list[float]:
    """The numbers of an answer, in order; none where it is longer than an answer is."""
    return [float(each) for each in NUMBER.findall(answer)] if len(answer) <= LONGEST else []


def relative_accuracy(found: float, truth: float) -> float:
    """The share of the tolerances 5% to 50% of the truth that the error is within; the truth itself is within all. ValueError for a truth
    of 0."""
    if not truth:
        raise ValueError("relative accuracy: a truth of 0 has no relative error")
    error = abs(found - truth) / abs(truth)
    return sum(error <= tolerance + 1e-9 for tolerance in RELATIVE) / len(RELATIVE)


def nearness(found: Sequence[float], truth: Sequence[float]) -> float:
    """The share of TOLERANCES that a point is within of the truth."""
    error = math.dist(found, truth)
    return sum(error <= tolerance for tolerance in TOLERANCES) / len(TOLERANCES)


def measured(response: str, row: Row) -> float | None:
    """The marks of an answer; None for a row without a truth."""
    if not row.truth:
        return None
    measure = _measure(row)
    if measure == "direction":
        return float(is_right(response, row))
    found, truth = numbers_in(extract_answer(response)), numbers_in(row.truth)
    if len(found) != MEASURES[measure]:
        return 0.0
    return relative_accuracy(found[0], truth[0]) if measure == "distance" else nearness(found, truth)


def _measure(row: Row) -> str:
    return str(row.meta.get("measure", row.kind))


def _checked(row: Row) -> Row:
    measure, wanted = _measure(row), MEASURES.get(_measure(row), -1)
    if wanted < 0:
        raise BadRow(row.where, f"measure: {measure!r} is not one of {', '.join(MEASURES)}; give it in meta, or as kind")
    truth = numbers_in(row.truth)
    if row.truth and wanted and (len(truth) != wanted or (measure == "distance" and not truth[0])):
        raise BadRow(row.where, f"truth: a {measure} is {'a number above 0' if wanted == 1 else 'two numbers'}, got {row.truth!r}")
    return row


SPARKLE = Task(metric=measured, prompt=_checked)
