"""How far the figures of a benchmark may be off, and whether one model is better than another on the same questions.

A set's figures may be any function of its scores (means of means, products over rotated options), so their intervals come from leaving
clusters of questions out, not from a formula for each. Two models that answered the same questions are compared question by question.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actial_fast.evaluation.items import Figure, Item, Metric
from actial_fast.evaluation.statistics import linked, wilson

BLOCKS = 64  # of clusters, that are left out one after the other
RESAMPLES = 4999
BATCH = 512  # resamples held at once


def clusters_of_items(items: Sequence[Item]) -> list[int]:
    """The number of each item's cluster: items of one `cluster` or of one `group`. (n,)"""
    return linked([[f"cluster {i.cluster}"] * bool(i.cluster) + [f"group {i.group}"] * bool(i.group) for i in items])


def intervals(items: Sequence[Item], scores: Sequence[float], metric: Metric) -> list[tuple[Figure, float, float]]:
    """The figures of a metric, each with its 95% interval (low, high) in [0, 1].

    A figure's standard error is that of the jackknife over at most BLOCKS blocks of clusters; its interval is Wilson's for as many
    independent trials as give the same error, at most as many as it has items or groups, with Student's quantile.
    Source: P. S. Kott, Journal of Official Statistics 17 (2001), for leaving groups of clusters out; E. L. Korn, B. I. Graubard, Survey
    Methodology 24 (1998), for the effective number of trials.
    """
    from scipy.stats import t

    figures = metric(items, scores)
    clusters = clusters_of_items(items)
    names = sorted(set(clusters))
    random.Random(0).shuffle(names)  # neighbours in a file are alike
    block = {cluster: k % BLOCKS for k, cluster in enumerate(names)}
    blocks = min(BLOCKS, len(names))
    sizes = Counter(block.values())  # clusters of each block
    without: list[dict[str, Figure]] = []
    for left_out in range(blocks if blocks > 1 else 0):
        kept = [k for k, cluster in enumerate(clusters) if block[cluster] != left_out]
        without.append({f.name: f for f in metric([items[k] for k in kept], [scores[k] for k in kept])})
    told = []
    for figure in figures:
        # a figure that a block has all items of says nothing without them
        values = np.array([left[figure.name].value for left in without if figure.name in left])
        moved = int((np.abs(values - figure.value) > 1e-12).sum())
        variance = (len(values) - 1) / len(values) * float(((values - values.mean()) ** 2).sum()) if len(values) else 0.0
        most = float(min(figure.groups or figure.n, figure.n))
        share = min(1.0, max(0.0, figure.value))
        if variance > 1e-18 and moved > 1:
            worth = min(most, max(1.0, share * (1 - share) / variance))
            z = float(t.ppf(0.975, moved - 1))
        else:  # nothing moves it: all right or all wrong, or one cluster alone; then it is worth as many trials as it has clusters
            gone = [figure.n - left[figure.name].n if figure.name in left else figure.n for left in without]
            worth = max(1.0, min(most, float(sum(min(n, sizes[k]) for k, n in enumerate(gone)))))
            z = 1.96
        low, high = wilson(share * worth, worth, z)
        told.append((figure, low, high))
    return told


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


def compare(first: Sequence[float], second: Sequence[float], clusters: Sequence[int], seed: int = 0) -> Paired:
    """The paired comparison of two models' scores, item by item. clusters: the number of each item's, as clusters_of_items gives it.

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
