"""The Wilson interval against the roots of its defining equation and a scan of known coverage; the table against counts made by hand."""

import json
import math

import pytest

from actial_fast.evaluation.statistics import Record, accuracy_table, render_table, wilson


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
    assert rotation["interval"] == list(wilson(3, 4))
    assert count["well_formed_and_correct"] == 0 and count["well_formed_and_correct_interval"] == list(wilson(0, 2))
    assert count["chance"] == pytest.approx((0 + 1 / 4) / 2)
    assert (overall["n"], overall["correct"]) == (6, 4)
    assert overall["majority"] == pytest.approx((3 + 1) / 6)
    assert overall["well_formed_and_correct"] == pytest.approx(3 / 6)
    assert overall["format_rate"] == pytest.approx(4 / 6)
    assert json.loads(json.dumps(table)) == table


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
