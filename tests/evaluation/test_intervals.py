"""Intervals of any figure by leaving clusters out."""

import numpy as np
import pytest

from actial_fast.evaluation.intervals import clusters_of_items, intervals
from actial_fast.evaluation.items import Figure, Item
from actial_fast.evaluation.statistics import wilson


def items(count: int, *, size: int = 1, groups: int = 0) -> list[Item]:
    """Of clusters of so many; groups: of so many items each."""
    return [
        Item(
            str(k),
            "q",
            (),
            "A",
            ("a", "b"),
            category="even" if k % 2 == 0 else "odd",
            cluster=str(k // size),
            group=str(k // groups) if groups else "",
        )
        for k in range(count)
    ]


def mean(items, scores):
    return [Figure("all", float(np.mean(scores)), len(scores))]


def of_means(items, scores):
    """A macro mean, which is left out where a category is."""
    parts = [[s for i, s in zip(items, scores, strict=True) if i.category == c] for c in ("even", "odd")]
    return [Figure("macro", float(np.mean([np.mean(p) for p in parts])), len(scores))] if all(parts) else []


def test_of_independent_items_it_is_near_wilsons():
    scores = [float(s) for s in np.random.default_rng(0).random(2000) < 0.7]
    ((figure, low, high),) = intervals(items(2000), scores, mean)
    expected = wilson(sum(scores), 2000)
    assert figure.value == np.mean(scores) and low < figure.value < high
    assert (high - low) == pytest.approx(expected[1] - expected[0], rel=0.3), "64 blocks tell the error up to a ninth or so"


@pytest.mark.parametrize("metric", [mean, of_means])
def test_items_of_one_mind_count_once(metric):
    """Three questions about a pair are one bit: 95% intervals of 300 pairs hold the truth about as often as they say."""
    rng, truth, inside = np.random.default_rng(1), 0.8, 0
    asked = items(900, size=3)
    for _ in range(30):
        scores = np.repeat(rng.random(300) < truth, 3).astype(float).tolist()
        ((_, low, high),) = intervals(asked, scores, metric)
        inside += low <= truth <= high
    assert inside >= 26, "95% of 30 is 28; Wilson's of 900 would hold it in about 21"


def test_all_right_is_as_sure_as_there_are_clusters():
    ((_, low, high),) = intervals(items(30, size=3), [1.0] * 30, mean)
    assert (low, high) == wilson(10, 10)
    ((_, low, high),) = intervals(items(4, size=4), [1.0, 0.0, 1.0, 0.0], mean)
    assert (low, high) == wilson(0.5, 1), "one cluster says as much as one trial"


def test_a_figure_of_some_clusters_is_as_sure_as_these():
    """Half of the clusters are of each category: an all-right one has 5 of 10, or 100 of 200."""

    def even(items, scores):
        kept = [s for i, s in zip(items, scores, strict=True) if i.category == "even"]
        return [Figure("even", float(np.mean(kept)), len(kept))] if kept else []

    for clusters in (10, 200):
        asked = [
            Item(f"{k}{j}", "q", (), "A", category="odd" if k % 2 else "even", cluster=str(k)) for k in range(clusters) for j in (0, 1)
        ]
        ((figure, low, high),) = intervals(asked, [1.0] * len(asked), even)
        assert figure.n == clusters and high == 1
        assert low == pytest.approx(wilson(clusters / 2, clusters / 2)[0], abs=0 if clusters == 10 else 0.02)


def test_a_group_is_a_cluster_whatever_its_items_say():
    assert len(set(clusters_of_items(items(12, size=3, groups=4)))) == 1, "chained: 0-3, 3-5, 4-7, ..."
    assert len(set(clusters_of_items(items(12, size=3)))) == 4 and len(set(clusters_of_items(items(12, groups=4)))) == 3
