"""Two models, or two moments of one, on the same rows: what changed from one to the other, and how far chance may have made it.

An evaluation is recorded with its rows (`packed`), so that any two of a run, or of two runs, can be paired afterwards by the rows that both
had. Rows of one cluster, which show the same picture, are no independent trials: intervals and tests take clusters as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 4999
BATCH = 512  # resamples held at once
LEVEL = 0.05  # p-values below it are called clear
KEY = 8  # characters of what tells a row from others: 48 bits
Result = Mapping[str, Any]  # of statistics.accuracy_table


def packed(
    keys: Sequence[str],
    clusters: Sequence[int],
    kinds: Sequence[int],
    right: Sequence[bool],
    formed: Sequence[bool],
    marks: Sequence[float],
) -> dict[str, Any]:
    """The rows of one evaluation as a few compact lists, for its record; all arguments (n,).

    keys: KEY characters each, the same wherever the same row is asked. clusters: rows of one number are not independent. kinds: the place
    of a row's type among the sorted ones. marks: from 0 to 1; left out where they say no more than `right`.
    """
    assert all(len(key) == KEY for key in keys), "keys of another length cannot be told apart again"
    number = {cluster: k for k, cluster in enumerate(dict.fromkeys(clusters))}
    rows: dict[str, Any] = {
        "key": "".join(keys),
        "cluster": [number[cluster] for cluster in clusters],
        "kind": list(kinds),
        "outcome": "".join(str(r + 2 * f) for r, f in zip(right, formed, strict=True)),  # 1: right, 2: well-formed, 3: both
    }
    return rows | ({"marks": [round(m, 4) for m in marks]} if any(m not in (0, 1) for m in marks) else {})


def paired(first: Result, second: Result, share: str = "accuracy", kind: str | None = None) -> Paired | None:
    """The change from one evaluation to another on the rows that both had, rows linked by a cluster of either being one.

    share: "accuracy", "well_formed_and_correct" or "score", as in the tables. kind: of one question type, of all when None. None where
    one was recorded without its rows, or they have no row in common.
    """
    if not ("rows" in first and "rows" in second):
        return None
    before, after = _scores(first, share), _scores(second, share)
    names = sorted(first["kinds"])
    common = [key for key in before if key in after and (kind is None or names[first["rows"]["kind"][before[key][0]]] == kind)]
    if not common:
        return None
    own = [(before[key], after[key]) for key in common]
    clusters = linked([(f"a{first['rows']['cluster'][a]}", f"b{second['rows']['cluster'][b]}") for (a, _), (b, _) in own])
    return compare([a for (_, a), _ in own], [b for _, (_, b) in own], clusters)


def _scores(result: Result, share: str) -> dict[tuple[str, int], tuple[int, float]]:
    """Key -> place and score of each row; of rows that are alike in every letter, the second has a key of its own."""
    rows, seen = result["rows"], Counter[str]()
    found = {}
    for place, outcome in enumerate(rows["outcome"]):
        key = rows["key"][KEY * place : KEY * (place + 1)]
        score = {"accuracy": outcome in "13", "well_formed_and_correct": outcome == "3"}.get(share, outcome in "13")
        found[key, seen[key]] = place, float(rows["marks"][place] if share == "score" and "marks" in rows else score)
        seen[key] += 1
    return found


def linked(labels: Sequence[Iterable[str]]) -> list[int]:
    """The number of each one's cluster, given its labels: those that have one in common, or are linked through others that do. (n,)"""
    above = list(range(len(labels)))

    def top(k: int) -> int:
        while above[k] != k:
            above[k] = above[above[k]]
            k = above[k]
        return k

    first: dict[str, int] = {}
    for k, own in enumerate(labels):
        for label in own:
            above[top(k)] = top(first.setdefault(label, k))
    return [top(k) for k in range(len(labels))]


@dataclass(frozen=True)
class Paired:
    """Two models on the same items. n: items; clusters: of them. difference: the second's mean score minus the first's; low, high: its
    95% interval, of a bootstrap over clusters. only_first, only_second: items that one alone has right, and mcnemar: the exact two-sided
    p-value of these two numbers, which takes items for independent; None where scores are not just right or wrong. by_clusters: the p-value
    of a test that swaps the models in whole clusters, which does not."""

    n: int
    clusters: int
    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    mcnemar: float | None
    by_clusters: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out and the test by clusters says so too: of few clusters the interval alone would be too sure."""
        return self.by_clusters < LEVEL and (self.low > 0 or self.high < 0)


def compare(first: Sequence[float], second: Sequence[float], clusters: Sequence[int], seed: int = 0) -> Paired:
    """The paired comparison of two models' scores, item by item. clusters: the number of each item's, as `linked` gives it.

    ValueError without items, or for scores of different items. Source of the exact test: Q. McNemar, Psychometrika 12 (1947).
    """
    from scipy.stats import binomtest, bootstrap, permutation_test

    if not len(first) == len(second) == len(clusters):
        raise ValueError(f"compare: {len(first)} and {len(second)} scores of {len(clusters)} items; compare the items that both answered")
    if not len(first):
        raise ValueError("compare: the models have no item in common; run both on the same set with the same --limit and --seed")
    a, b = np.asarray(first, float), np.asarray(second, float)
    number = np.unique(np.asarray(clusters), return_inverse=True)[1]
    sums_a, sums_b, sizes = (np.bincount(number, weights) for weights in (a, b, np.ones(len(a))))
    difference = float((b - a).mean())
    low = high = difference
    p = 1.0
    if len(sizes) > 1 and np.ptp((sums_b - sums_a) / sizes) > 0:
        found = bootstrap(
            (sums_b - sums_a, sizes),
            lambda d, n, axis: d.sum(axis) / n.sum(axis),
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=BATCH,
            method="percentile",
            random_state=np.random.default_rng(seed),
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    if len(sizes) > 1 and (sums_a != sums_b).any():
        p = float(
            permutation_test(
                (sums_a, sums_b),
                lambda x, y, axis: x.sum(axis) - y.sum(axis),
                permutation_type="samples",
                vectorized=True,
                n_resamples=RESAMPLES,
                batch=BATCH,
                random_state=np.random.default_rng(seed),
            ).pvalue
        )
    right_a, right_b = a == 1, b == 1
    plain = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    exact = float(binomtest(only_a, only_a + only_b).pvalue) if plain and only_a + only_b else 1.0 if plain else None
    return Paired(len(a), len(sizes), difference, low, high, only_a, only_b, exact, p)
