"""Worths and figures against values made by hand."""

import pytest

from actial_fast.evaluation.figures import Mean, average, each, macro, meta, micro, products, together
from actial_fast.evaluation.items import Figure, Item
from actial_fast.evaluation.numbers import mean_relative_accuracy, quantities, within_factor
from actial_fast.evaluation.specs import worth


def item(category="", group="", **changes):
    return Item(**{**dict(id="1", prompt="?", images=(), answer="A", options=("x", "y"), category=category, group=group), **changes})


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        (5, 5, 1),
        (4, 4.04, 1),
        (9, 10, 0.9),
        (11, 10, 0.9),
        (4, 5, 0.6),
        (3, 4, 0.6),
        (7, 10, 0.5),
        (2, 3, 0.4),
        (3, 2, 0.1),
        (1, 5, 0),
        (15, 5, 0),
        (0, 0, 1),
        (1, 0, 0),
    ],
)
def test_mean_relative_accuracy(answer, truth, score):
    """|a - t| / t <= 1 - theta for theta = .5, .55, ..., .95, in doubles: of 4 for 5, 0.2 is more than 1 - 0.8."""
    assert mean_relative_accuracy(answer, truth) == pytest.approx(score)


def test_within_a_factor_of_two():
    for answer, truth, near in ((1, 1.99, True), (1, 2, False), (2, 1, False), (3.9, 2, True), (0, 0, True), (0, 1, False), (-1, 1, False)):
        assert within_factor(answer, truth) is near


@pytest.mark.parametrize(
    ("truth", "measure", "tolerance", "answer", "score"),
    [
        ("2 meters", "length", 0, "150 cm", 1),
        ("2 meters", "length", 0, "5 feet", 1),
        ("2 meters", "length", 0, "2 feet", 0),
        ("2 meters", "length", 0, "2.5", 1),  # without a unit: the answer's
        ("2 meters", "length", 0, "2 square meters", 0),
        ("12 inches", "equal", 0, "1 foot", 1),
        ("100", "equal", 0, "101", 0),
        ("100", "equal", 0.05, "104", 1),
        ("100", "equal", 0.05, "106", 0),
        ("0.1", "equal", 0, ".1", 1),
        ("1000", "equal", 0, "1,000", 1),
        ("4", "mra", 0, "5", 0.6),
    ],
)
def test_numbers_are_worth(truth, measure, tolerance, answer, score):
    number = item(answer=truth, options=(), form="number", measure=measure, tolerance=tolerance)
    assert worth(number, answer) == pytest.approx(score)


def test_other_answers_are_worth_all_or_nothing():
    assert worth(item(), "A") == 1 and worth(item(), "B") == 0 and worth(item(accepted=("B",)), "B") == 1
    assert worth(item(answer="yes", form="yes-no"), "yes") == 1 and worth(item(answer="3", accepted=("4",), form="number"), "4") == 1
    text = item(answer="Red", options=(), form="text", accepted=("crimson",))
    assert [worth(text, reply) for reply in ("red.", "The answer is red", "Crimson", "blue")] == [1, 1, 1, 0]


def test_quantities_in_their_order():
    assert [str(each) for each in quantities("two cups, 3.5 m, 1,000 feet, 5 ft 6 in, 1 to 2 km, img7, -4%")] == [
        "2",
        "3.5 m",
        "1000 feet",
        "5.5 ft",
        "-4 %",
    ]


def test_figures_by_hand():
    items = [item("a", meta={"s": "x"}), item("a", meta={"s": "y"}), item("b", meta={"s": "y"}), item("c"), item("")]
    scores = [1, 0, 1, 0.5, 1]
    figures = together(
        each(order=["b"]),
        macro("macro"),
        micro(),
        average("ab", Mean("a", "b")),
        average("nested", Mean("c", Mean("a", "b"))),
        average("gone", Mean("a", "d")),
        each(meta("s"), "from {}"),
    )
    assert figures(items, scores) == [
        Figure("b", 1, 1), Figure("a", 0.5, 2), Figure("c", 0.5, 1), Figure("macro", 2 / 3, 4), Figure("accuracy", 3.5 / 5, 5),
        Figure("ab", 0.75, 3), Figure("nested", (0.5 + 0.75) / 2, 4), Figure("from x", 1, 1), Figure("from y", 0.5, 2),
    ]  # fmt: skip
    for bad in ([], [1.0]):
        with pytest.raises(ValueError, match="one score for each of at least one item"):
            figures(items[:0] if not bad else items, bad)


def test_products_are_counted_by_group():
    items = [item("a", "1"), item("a", "1"), item("b", "2"), item("b", "2"), item("b", ""), item("b", "")]
    got = products("circular", lambda each: each.group, lambda each: each.category)(items, [1, 1, 1, 0, 1, 0.5])
    assert got == [Figure("circular: a", 1, 2, 1), Figure("circular: b", 0.5, 4, 3), Figure("circular", 2.5 / 4, 6, 4)]
