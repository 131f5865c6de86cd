"""When a reply is right: what a person would say, and the paper's rule."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actial_fast.data.cot.checking import check_cot
from actial_fast.data.sources.answers import is_right, lettered_options, matches
from actial_fast.data.sources.row import Row, Turn
from actial_fast.tasks.rewards import RewardConfig, score

ASKED = "<image>Which way did it move?\nA. Move to the left\nB. Move to the right\nC. no movement"
CHOICES = ("Move to the left", "Move to the right", "no movement")
ROW = Row((Turn("user", ASKED), Turn("assistant", "B")), truth="B", choices=CHOICES)
RIGHT = [
    "B",
    "b",
    " B\n",
    "B.",
    "B)",
    "(B)",
    "[B]",
    "**B**",
    "`B`",
    '"B"',
    "$B$",
    "{B}",
    "\\boxed{B}",
    "$\\boxed{\\text{B}}$",
    "\\(\\boxed{B}\\)",
    "\uff22",
    "B: Move to the right",
    "B. move to the right.",
    "(B) Move to the right",
    "B - Move to the right",
    "B, to the right",
    "**B. Move to the right**",
    "Move to the right",
    "move to the RIGHT.",
    "Answer: B",
    "The answer is B.",
    "the correct option is (b)",
    "Option B",
    "Choice B",
    "option (B)",
    "So the final answer is: **B**",
    "Therefore, the best choice is B",
    "answer = B",
]
WRONG = [
    "",
    "A",
    "C.",
    "A or B",
    "B or A",
    "B and C",
    "B, C",
    "B,A",
    "AB",
    "B A",
    "not B",
    "B. Move to the left",
    "B: A",
    "Move to the left",
    "Move",
    "Option A",
    "The answer is A",
    "The answer is not B",
    "I cannot tell",
    "B or maybe A",
    "no movement",
    "the right",
    "\\boxed{A}",
]


@pytest.mark.parametrize("frame", ["{}", "<answer>{}</answer>", "<think>A, or B?</think>\n{}", "<think>A</think><answer> {} </answer>"])
def test_a_letter_in_its_usual_spellings_and_its_text(frame):
    for row in (ROW, Row(ROW.turns, truth="B")):  # the options' texts are in the question as well
        said = {text: is_right(frame.format(text), row) for text in RIGHT + WRONG}
        assert said == {text: text in RIGHT for text in said}


@pytest.mark.parametrize(
    "reply, right",
    [
        ("I looked at both.\n\nFinal answer: **B**", True),
        ("More of its right is seen. The answer is B.", True),
        ("More of its right is seen, so the answer is \\boxed{B}. Good.", True),
        ("The answer is A. The answer is B.", False),  # several guesses
        ("<answer>A</answer><answer>B</answer>", False),
        ("<answer>B</answer><answer>B</answer>", False),
        ("<answer>B", False),
        ("B</answer>", False),
        ("<think>The answer is B.", False),  # it never came to an answer
        ("<think>The answer is B.</think>", False),
        ("<think>The answer is A.</think>The answer is B.", True),
        ("A is tempting. B is not it.", False),
    ],
)
def test_replies_in_sentences(reply, right):
    assert is_right(reply, ROW) is right


@pytest.mark.parametrize(
    "reply, truth, choices, right",
    [
        ("3", "3", (), True),
        ("3.0", "3", (), True),
        ("3.", "3", (), True),
        ("1,000", "1000", (), True),
        ("30", "3", (), False),
        ("Yes.", "yes", (), True),
        ("**Left**", "left", ("left", "right"), True),
        ("left or right", "left", ("left", "right"), False),
        ("A", "left", ("left", "right"), False),  # no letter was shown
        ("b", "B", ("left", "b"), True),
        ("a, b", "A,B", (), True),
        ("the answer sheet", "sheet", (), False),
        ("$\\frac{1}{2}$", "\\frac{1}{2}", (), True),
        ("", "", (), False),
    ],
)
def test_other_truths(reply, truth, choices, right):
    assert matches(reply, [truth], choices) is right


def test_a_text_that_was_shown_with_a_letter_may_be_told_by_it():
    asked = "Where?\nA. left\nB. right"
    assert (
        matches("B", ["right"], asked=asked)
        and matches("B. right", ["right"], ("left", "right"), asked)
        and not matches("A", ["right"], asked=asked)
    )
    assert not matches("B", ["right"], ("left", "right"), "Where? Answer with one of these options: left or right")


def test_any_of_several_accepted_answers():
    row = Row((Turn("user", "q"),), truth="seven", accepted=("7", "VII"))
    assert [is_right(reply, row) for reply in ("Seven", "7.0", "vii.", "8")] == [True, True, True, False]
    assert is_right("<answer>VII</answer>", row, strict=True) and not is_right("7.0", row, strict=True)


@pytest.mark.parametrize(
    "asked", ["A. one B. two C. three", "(A) one\n(B) two\n(C) three", "q? A: one\nB: two\nC: three", "A) one\nB) two\nC) three"]
)
def test_options_are_read_from_the_question(asked):
    assert lettered_options(asked) == ("one", "two", "three")


@pytest.mark.parametrize("asked", ["Plan A. is better", "", "A man and a dog", "A. B. C."])
def test_no_options(asked):
    assert lettered_options(asked) == ()


def test_one_rule_everywhere_and_a_strict_one():
    replies = [f"<think>t</think><answer>{text}</answer>" for text in ("B", "b", "B.", "Move to the right", "A")] + ["B"]
    both = score(replies, [ROW] * 6, [RewardConfig("accuracy"), RewardConfig("accuracy", strict=True)])
    assert both.T.tolist() == [[1, 1, 1, 1, 0, 1], [1, 1, 0, 0, 0, 0]]
    assert [is_right(reply, ROW) for reply in replies] == both[:, 0].astype(bool).tolist()
    assert [is_right(reply, ROW, strict=True) for reply in replies] == [True, True, False, False, False, True]
    assert [check_cot(reply, ROW) for reply in replies[:5]] == [None, None, None, None, "wrong answer"]
    with pytest.raises(ValueError, match="strict: only accuracy"):
        RewardConfig("format", strict=True)


@given(st.text(alphabet="AB.()[]{}*$\\`\"' answer:is\nor<>/think", max_size=120))
def test_any_text_is_judged(text):
    assert matches(text, ["B"], CHOICES, ASKED) in (True, False)


@pytest.mark.parametrize("piece", ["(", "answer is ", "A. ", "**", "\\boxed{", "{", "option ", " "])
def test_hostile_text_takes_no_time(piece):
    start = time.process_time()
    for text in (piece * (300_000 // len(piece)), piece * (300 // len(piece))):
        assert not matches(text, ["B"], CHOICES, ASKED)
    assert time.process_time() - start < 1


def test_a_judge_that_fails_does_not_punish(grpo_recipe):
    from dataclasses import replace

    from actial_fast.ops.spec import AdvantageSpec
    from actial_fast.rollout.choosing import advantages_of, differ, totals_of

    recipe = replace(grpo_recipe, rewards=(RewardConfig("accuracy"), RewardConfig("format")), advantages=AdvantageSpec(scale="std"))
    alike = np.array([[1, 0.5], [1, 0.5], [1, 0.5], [np.nan, 0.5]], np.float32)
    assert advantages_of(alike, recipe).tolist() == [0, 0, 0, 0] and not differ(alike, recipe)
    mixed = np.array([[1, 0.5], [0, 0.5], [np.nan, 0.5], [np.nan, np.nan]], np.float32)
    found = advantages_of(mixed, recipe)
    assert found[0] > 0 > found[1] and abs(found[2]) < 1e-6 and found[3] == 0
    assert totals_of(mixed, recipe)[:3].tolist() == [1.5, 0.5, 1.0] and np.isnan(totals_of(mixed, recipe)[3])
