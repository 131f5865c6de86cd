"""The intervals against the roots of their defining equation and scans of known coverage; the table against counts made by hand."""

import json
import math

import numpy as np
import pytest

from actial_fast.evaluation.statistics import Record, accuracy_table, clustered, clusters_of, render_table, wilson


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 20), (7, 20), (20, 20), (930, 1000), (99_999, 100_000)])
def test_wilson_bounds_are_where_the_score_test_turns(correct, n):
    """A bound b is inside (0, 1) exactly where |p - b| = z * sqrt(b(1-b)/n)."""
    p = correct / n
    low, high = wilson(correct, n)
    assert 0 <= low <= p <= high <= 1
    for bound, clamped in ((low, correct == 0), (high, correct == n)):
        if clamped:
            assert bound == p
        else:
            assert abs(p - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / n), rel=1e-9)


def test_wilson_covers_the_true_proportion_as_often_as_it_says():
    n, p = 60, 0.85
    chance = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    coverage = sum(c for k, c in enumerate(chance) if wilson(k, n)[0] <= p <= wilson(k, n)[1])
    assert 0.93 < coverage < 0.97
    narrow = sum(c for k, c in enumerate(chance) if wilson(k, n, z=1.0)[0] <= p <= wilson(k, n, z=1.0)[1])
    assert 0.6 < narrow < 0.76


def test_wilson_refuses_what_is_no_proportion_and_knows_nothing_of_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
    for correct, n in ((5, 4), (-1, 4), (0, -1)):
        with pytest.raises(ValueError, match="must lie between"):
            wilson(correct, n)
    with pytest.raises(ValueError, match="must be positive"):
        wilson(1, 2, z=0)


@pytest.mark.parametrize(
    ("likely", "clusters", "size", "low", "high"),
    [
        (0.8, 333, 3, 0.93, 0.97),  # a pair's three questions are one bit
        (0.8, 20, 15, 0.91, 0.98),
        (0.95, 300, 3, 0.92, 0.98),
    ],
)
def test_clustered_interval_covers_what_rows_alone_would_not(likely, clusters, size, low, high):
    rng = np.random.default_rng(0)
    knows = rng.random((2000, clusters)) < likely
    found = {
        int(k): (clustered([[i < k] * size for i in range(clusters)]), wilson(int(k) * size, clusters * size)) for k in set(knows.sum(1))
    }
    covered = [[a <= likely <= b for a, b in found[int(k)]] for k in knows.sum(1)]
    ours, rows = np.mean(covered, axis=0)
    assert low < ours < high
    assert rows < 0.8


def test_clusters_that_are_not_alike_cost_nothing():
    rng = np.random.default_rng(1)
    covered, width = [], []
    for _ in range(500):
        right = rng.random((200, 3)) < 0.7
        low, high = clustered(right.tolist())
        plain = wilson(int(right.sum()), right.size)
        covered.append(low <= 0.7 <= high)
        width.append((high - low) / (plain[1] - plain[0]))
    assert 0.93 < np.mean(covered) < 0.98
    assert 1 <= np.mean(width) < 1.06


def test_clustered_interval_at_its_ends():
    assert clustered([[True]] * 3 + [[False]]) == wilson(3, 4), "rows by themselves are Wilson's"
    low, high = clustered([[True] * 3] * 100)
    assert high == 1 and low == pytest.approx(wilson(100, 100, z=1.9842)[0], abs=1e-4), "three right rows of a pair are one"
    assert clustered([[True, False, True, True]]) == wilson(0.75, 1), "one cluster is one trial"
    with pytest.raises(ValueError, match="no outcomes"):
        clustered([])


def test_records_that_are_linked_by_pictures_are_one_cluster():
    shown = [("a", "b"), ("c",), (), ("b", "d"), ("d",), (), ("c", "e")]
    of = clusters_of([Record("k", True, True, 1, "x", 2, images) for images in shown])
    assert of[0] == of[3] == of[4] and of[1] == of[6]
    assert len(set(of)) == 4


def records():
    right = [Record("rotation", True, True, 10, "left", 3)] * 3 + [Record("rotation", False, True, 20, "right", 3)]
    free = [Record("count", True, False, 1, "4", 0), Record("count", False, False, 2, "7", 4)]
    return right + free


def test_table_counts():
    table = accuracy_table(iter(records()))
    assert list(table["kinds"]) == ["count", "rotation"]
    rotation, count, overall = table["kinds"]["rotation"], table["kinds"]["count"], table["overall"]
    assert (rotation["n"], rotation["correct"], rotation["accuracy"]) == (4, 3, 0.75)
    assert rotation["chance"] == pytest.approx(1 / 3) and rotation["majority"] == 0.75
    assert rotation["format_rate"] == 1 and rotation["mean_response_length"] == 12.5
    assert rotation["interval"] == list(wilson(3, 4)) and rotation["clusters"] == 4
    assert count["well_formed_and_correct"] == 0 and count["well_formed_and_correct_interval"] == list(wilson(0, 2))
    assert count["chance"] == pytest.approx((0 + 1 / 4) / 2)
    assert (overall["n"], overall["correct"]) == (6, 4)
    assert overall["majority"] == pytest.approx((3 + 1) / 6)
    assert overall["well_formed_and_correct"] == pytest.approx(3 / 6)
    assert overall["format_rate"] == pytest.approx(4 / 6)
    assert json.loads(json.dumps(table)) == table


def test_table_has_the_intervals_of_its_clusters():
    """A pair's three questions are a cluster of all of them, and one row each of their kinds."""
    pairs = [Record(kind, pair < 80, True, 1, "left", 3, (f"{pair}a", f"{pair}b")) for pair in range(100) for kind in "xyz"]
    table = accuracy_table(pairs)
    assert table["kinds"]["x"]["interval"] == list(wilson(80, 100))
    assert table["overall"]["clusters"] == 100
    low, high = table["overall"]["interval"]
    assert high - low == pytest.approx(1.01 * np.subtract(*wilson(80, 100)[::-1]), rel=0.02)


def test_table_needs_records():
    with pytest.raises(ValueError, match="no records"):
        accuracy_table([])
    with pytest.raises(ValueError, match="negative"):
        accuracy_table([Record("a", True, True, 1, "x", -1)])


def test_rendered_table_shows_every_figure_without_colour_codes():
    text = render_table(accuracy_table(records()), title="held-out")
    assert "held-out" in text and "\x1b" not in text
    row = next(line for line in text.splitlines() if line.startswith("rotation"))
    low, high = (f"{100 * x:.1f}" for x in wilson(3, 4))
    for cell in ("75.0", "33.3", "100.0", "12.5", f"{low}-{high}"):
        assert cell in row
    assert [line.split()[0] for line in text.splitlines() if line and line.split()[0] in ("count", "rotation", "all")] == [
        "count",
        "rotation",
        "all",
    ]
    assert max(map(len, text.splitlines())) <= 110
