"""Boxes: the form of a reply, boxes as models write them, and the rewards for looking and for answering, worked out by hand."""

import time

import numpy as np
import pytest

from actial_fast.data.sources.row import BadRow, Row, Turn
from actial_fast.data.sources.task import prepared
from actial_fast.tasks.boxes import answered, boxes_in, f1, look, matches, parts_of, precision_recall, thought_looked_answered

TRUTH = [[0, 0, 10, 10], [50, 50, 70, 70]]
ROW = Row((Turn("user", "find"),), meta={"boxes": TRUTH}, where="f:1")
NONE = Row((Turn("user", "find"),), meta={"boxes": []}, where="f:2")


def reply(answer: str, looked: str = "") -> str:
    return f"<think>so</think>\n<look>{looked}</look><answer>{answer}</answer>"


@pytest.mark.parametrize(
    "response, formed",
    [
        (reply("x"), True),
        ("<THINK></think><look></look><Answer></answer>", True),
        (" " + reply("x") + "\n", True),
        ("<think>a</think><answer>b</answer>", False),
        ("<look>a</look><think>b</think><answer>c</answer>", False),
        (reply("x") + "y", False),
        ("so " + reply("x"), False),
        ("<think>a</think>b<look>c</look><answer>d</answer>", False),
        (reply("x") * 2, False),
        ("<think><look></think></look><answer></answer>", False),
        ("", False),
    ],
)
def test_form(response, formed):
    assert thought_looked_answered(response, ROW) == formed == (parts_of(response) is not None)


@pytest.mark.parametrize(
    "text, boxes",
    [
        ("[1, 2, 3, 4]", [[1, 2, 3, 4]]),
        ("[[1,2,3,4],[5.5, 6, 7, 8]]", [[1, 2, 3, 4], [5.5, 6, 7, 8]]),
        ("(3, 4, 1, 2)", [[1, 2, 3, 4]]),
        ('{"bbox_2d": [1, 2, 3, 4], "label": "red"}', [[1, 2, 3, 4]]),
        ("[1, 2, 3]", []),
        ("[1, 2, 1, 4]", []),
        ("none", []),
        ("[1, 2, 3, 4]" * 300, []),
    ],
)
def test_boxes_in_texts(text, boxes):
    assert boxes_in(text).tolist() == boxes


def test_answers_with_and_without_tags():
    assert answered("[0, 0, 1, 1]").tolist() == [[0, 0, 1, 1]] == answered("<answer>[0, 0, 1, 1]</answer>").tolist()
    assert answered("<think>[0, 0, 9, 9]</think><answer>[0, 0, 1, 1]</answer>").tolist() == [[0, 0, 1, 1]]
    assert not len(answered("<answer>[0, 0, 1, 1]")) and not len(answered("<answer>[0, 0, 1, 1]</answer><answer></answer>"))


def test_pairs_are_the_best_in_all():
    """The first found box fits both, the second only one: the greedy choice would leave one out."""
    found, truth = np.array([[0, 0, 10, 10], [0, 0, 10, 5.5]], float), np.array([[0, 0, 10, 9], [0, 0, 10, 10.0]])
    np.testing.assert_allclose(matches(found, truth), [5.5 / 9, 1])


@pytest.mark.parametrize(
    "answer, precision, recall",
    [
        ("[0, 0, 10, 10]\n[50, 50, 70, 70]", 1, 1),
        ("[0, 0, 10, 10]", 1, 0.5),
        ("[0, 0, 10, 10]\n[50, 50, 70, 70]\n[80, 80, 90, 90]", 2 / 3, 1),
        ("[0, 0, 10, 8]\n[50, 50, 70, 70]", 0.9, 0.9),
        ("[0, 0, 10, 4]", 0, 0),
        ("[0, 0, 10, 10]\n[0, 0, 10, 10]", 0.5, 0.5),
    ],
)
def test_precision_and_recall_by_fit(answer, precision, recall):
    assert precision_recall(reply(answer), ROW) == pytest.approx((precision + recall) / 2)


def test_f1():
    assert f1(reply("[0, 0, 10, 8]\n[50, 50, 70, 70]"), ROW) == 1
    assert f1(reply("[0, 0, 10, 8]"), ROW) == pytest.approx(2 / 3)
    assert f1(reply("none"), ROW) == 0 == precision_recall(reply("none"), ROW)
    assert f1(reply("none"), NONE) == 1 == f1("[]", NONE) == precision_recall(reply(""), NONE)
    assert f1(reply("I see two"), NONE) == 0 == f1(reply("[0, 0, 1, 1]"), NONE)


def test_looking_counts_where_the_group_disagrees():
    """Both find the first box, one the second: only the second is uncertain."""
    both, one = "[0, 0, 10, 10]\n[50, 50, 70, 70]", "[0, 0, 10, 10]"
    group = [reply(both, "[45, 45, 75, 75]"), reply(one, "[0, 0, 10, 10]"), reply(one, "[0, 0, 100, 100]"), reply(one, "")]
    assert look(group, ROW) == [1, 0, 0, 0]
    assert look([reply(one, "[0, 0, 10, 10]")] * 2, ROW) == [0.5, 0.5], "of one mind: all boxes alike"
    assert look([reply(both, "[50, 50, 60, 70]"), "nothing"], ROW) == [0.5, 0], "half of a box is enough"
    assert look(["", ""], NONE) == [1, 1]


@pytest.mark.parametrize("boxes", ["x", [[1, 2, 3]], [[3, 2, 1, 4]], [[1, 2, float("nan"), 4]], None])
def test_rows_without_sound_boxes(boxes):
    with pytest.raises(BadRow, match="boxes: a list of"):
        prepared(Row(ROW.turns, meta={"boxes": boxes}, where="f:1"), "boxes")
    assert prepared(NONE, "boxes").meta["boxes"] == []


@pytest.mark.parametrize("piece", ["<look>", "[1, 2, ", "[1,2,3,4]", "<answer>", "-1"])
def test_hostile_text_takes_linear_time(piece):
    response, start = piece * (200_000 // len(piece)), time.process_time()
    f1(response, ROW), look([response] * 2, ROW), thought_looked_answered(response, ROW)
    assert time.process_time() - start < 1.5
