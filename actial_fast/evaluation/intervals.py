"""How far the figures of a benchmark may be off.

A set's figures may be any function of its scores (means of means, products over rotated options), so their intervals come from leaving
clusters of questions out, not from a formula for each. Two models that answered the same questions are compared in report/paired.py.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from actial_fast.evaluation.items import Figure, Item, Metric
from actial_fast.evaluation.statistics import wilson
from actial_fast.report.paired import linked

BLOCKS = 64  # of clusters, that are left out one after the other


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
