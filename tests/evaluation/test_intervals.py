"""Intervals of any figure by leaving clusters out, and the paired comparison of two models."""

import numpy as np
import pytest
from scipy.stats import binomtest

from actial_fast.evaluation.intervals import clusters_of_items, compare, intervals
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


def test_what_is_compared_is_told_exactly():
    a, b = [1.0] * 6 + [0.0] * 4, [0.0] * 1 + [1.0] * 8 + [0.0]
    told = compare(a, b, list(range(10)))
    assert (told.n, told.clusters, told.only_first, told.only_second) == (10, 10, 1, 3)
    assert told.difference == pytest.approx(0.2) and told.mcnemar == binomtest(1, 4).pvalue == 0.625
    assert told.low < 0.2 < told.high and told == compare(a, b, list(range(10))), "the same numbers every time"
    back = compare(b, a, list(range(10)))
    assert (
        back.difference == pytest.approx(-0.2)
        and back.mcnemar == told.mcnemar
        and back.by_clusters == pytest.approx(told.by_clusters, abs=0.05)
    )


def test_clusters_take_away_what_mcnemar_makes_too_much_of():
    """Ten pairs of three questions, eight of them better: for items 24 against 6, for pairs 8 against 2."""
    a, b = np.repeat([0.0] * 8 + [1.0] * 2, 3).tolist(), np.repeat([1.0] * 8 + [0.0] * 2, 3).tolist()
    told = compare(a, b, np.repeat(range(10), 3).tolist())
    assert told.mcnemar == pytest.approx(binomtest(6, 30).pvalue) and told.mcnemar < 0.002
    assert told.by_clusters == pytest.approx(binomtest(2, 10).pvalue, abs=0.02) and told.by_clusters > 0.05
    assert told.high - told.low > 0.7


def test_scores_in_between_have_no_mcnemar_and_equal_models_no_difference():
    told = compare([0.5, 1.0, 0.0], [1.0, 1.0, 0.2], [0, 1, 2])
    assert told.mcnemar is None and told.difference == pytest.approx(0.7 / 3)
    same = compare([1.0, 0.0], [1.0, 0.0], [0, 1])
    assert (same.difference, same.low, same.high, same.mcnemar, same.by_clusters) == (0, 0, 0, 1, 1)
    one = compare([1.0, 1.0], [0.0, 0.0], [7, 7])
    assert (one.clusters, one.by_clusters) == (1, 1.0)


@pytest.mark.parametrize(("first", "second", "match"), [([1.0], [1.0, 0.0], "items that both answered"), ([], [], "no item in common")])
def test_other_items_are_refused(first, second, match):
    with pytest.raises(ValueError, match=match):
        compare(first, second, [0] * len(first))
