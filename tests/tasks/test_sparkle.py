"""Sparkle's basics: numbers as models write them, and marks for being near."""

import pytest

from actial_fast.data.made.sparkle import DIRECTIONS
from actial_fast.data.sources.row import BadRow, Row, Turn
from actial_fast.data.sources.task import prepared
from actial_fast.tasks.sparkle import measured, nearness, numbers_in, relative_accuracy


def row(measure: str, truth: str, **more) -> Row:
    return Row((Turn("user", "where?"),), truth=truth, kind=measure, where="f:1", **more)


@pytest.mark.parametrize(
    "answer, numbers",
    [
        ("42", [42]),
        ("about 42.5 hundredths", [42.5]),
        ("(10, 20)", [10, 20]),
        ("x=10, y=20.", [10, 20]),
        ("-3", [-3]),
        ("none", []),
        ("a1 2b", []),
        ("1.2.3", []),
        ("9" * 400, []),
    ],
)
def test_numbers(answer, numbers):
    assert numbers_in(answer) == numbers


@pytest.mark.parametrize("found, marks", [(100, 1), (105, 1), (94, 0.9), (149, 0.1), (150, 0.1), (151, 0), (0, 0), (-100, 0)])
def test_relative_accuracy(found, marks):
    assert relative_accuracy(found, 100) == pytest.approx(marks)
    assert relative_accuracy(-found, -100) == pytest.approx(marks)


def test_relative_accuracy_of_nothing():
    with pytest.raises(ValueError, match="a truth of 0"):
        relative_accuracy(1, 0)


@pytest.mark.parametrize("found, marks", [((50, 50), 1), ((53, 54), 1), ((50, 59), 0.8), ((75, 50), 0.2), ((76, 50), 0)])
def test_nearness(found, marks):
    assert nearness(found, (50, 50)) == pytest.approx(marks)


@pytest.mark.parametrize(
    "measure, truth, response, marks",
    [
        ("direction", "upper left", "<think>x</think><answer>Upper left.</answer>", 1),
        ("direction", "upper left", "left", 0),
        ("distance", "40", "<answer>40 hundredths</answer>", 1),
        ("distance", "40", "41 or 42", 0),
        ("distance", "40", "far", 0),
        ("distance", "40", "<think>50</think><answer>30</answer>", 0.6),
        ("place", "30, 70", "(30, 70)", 1),
        ("place", "30, 70", "x = 40, y = 70", 0.8),
        ("place", "30, 70", "30", 0),
        ("place", "30, 70", "30, 70, 1", 0),
    ],
)
def test_marks(measure, truth, response, marks):
    asked = row(measure, truth, choices=DIRECTIONS if measure == "direction" else ())
    assert measured(response, prepared(asked, "sparkle")) == pytest.approx(marks)


def test_a_measure_may_stand_in_meta():
    assert measured("40", row("any kind", "40", meta={"measure": "distance"})) == 1
    assert measured("40", row("distance", "")) is None


@pytest.mark.parametrize(
    "asked, problem",
    [
        (row("colour", "red"), "'colour' is not one of direction, distance, place"),
        (row("distance", "far"), "truth: a distance is a number above 0"),
        (row("distance", "0"), "truth: a distance is a number above 0"),
        (row("place", "30"), "truth: a place is two numbers"),
    ],
)
def test_rows_that_cannot_be_measured(asked, problem):
    with pytest.raises(BadRow, match=problem):
        prepared(asked, "sparkle")
