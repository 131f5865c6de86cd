"""String by string: what a reply answers, and the rule that says so. Every rule that extraction.py documents, and what is no answer."""

import sys
from types import ModuleType

import pytest

from actial_fast.evaluation.catalogue import find
from actial_fast.evaluation.extraction import rules
from actial_fast.evaluation.items import Item
from actial_fast.evaluation.owners import find_extractor, mindcube, mmsi, paper, sat, spatialscore, start, viewspatial, vsi

MOVE = Item("i", "q", (), "B", ("Move to the left", "Move to the right", "No movement"))
SIDE = Item("i", "q", (), "B", ("left", "right", "front-left", "front"))
CLOSER = Item("i", "q", (), "B", ("B is closer", "A is closer"))
UNKNOWN = Item("i", "q", (), "B")  # the options are not known
COUNT = Item("i", "q", (), "3", form="number")
WIDTH = Item("i", "q", (), "2 meters", form="number", measure="length")
TRUE = Item("i", "q", (), "yes", form="yes-no")
WORDS = Item("i", "q", (), "left", ("left", "right"), form="option")

LETTERS = [
    # the whole text
    ("B", "B", "letter"),
    ("b", "B", "letter"),
    ("  B \n", "B", "letter"),
    ("B.", "B", "letter and point"),
    ("b)", "B", "letter and point"),
    ("B:", "B", "letter and point"),
    ("(B)", "B", "brackets"),
    ("(b).", "B", "brackets"),
    ("[B]", "B", "brackets"),
    ("**B**", "B", "bold"),
    ("**B.**", "B", "bold"),
    ("**(B)**", "B", "bold"),
    ("`B`", "B", "backticks"),
    ("``B``", "B", "backticks"),
    ('"B"', "B", "quotes"),
    ("\\boxed{B}", "B", "boxed"),
    ("$\\boxed{\\text{B}}$", "B", "math"),
    ("B. Move to the right", "B", "letter and text"),
    ("B) Move to the right.", "B", "letter and text"),
    ("(B) Move to the right", "B", "letter and text"),
    ("B: move to the right", "B", "letter and text"),
    ("**B. Move to the right**", "B", "bold"),
    ("B. The camera went clockwise", "B", "letter and text"),
    ("Move to the right", "B", "option text"),
    ("no movement.", "C", "option text"),
    # where the answer stands
    ("<answer>B</answer>", "B", "answer tags: letter"),
    ("<think>First A, then C.</think><answer> (B) </answer>", "B", "answer tags: brackets"),
    ("<ANSWER>b.</ANSWER>", "B", "answer tags: letter and point"),
    ("<think>It is A or C.</think>\nB", "B", "after think: letter"),
    ("<think>It is A.</think>\n\nThe answer is **B**.", "B", "after think: answer"),
    # anywhere
    ("So we get \\boxed{B} in the end.", "B", "boxed"),
    ("First \\boxed{A}, corrected to \\boxed{B}", "B", "boxed"),
    ("Answer: B", "B", "answer"),
    ("ANSWER: b", "B", "answer"),
    ("**Answer:** B", "B", "answer"),
    ("The answer is B.", "B", "answer"),
    ("The correct option is **(B)** Move to the right.", "B", "answer"),
    ("Therefore, the correct answer is B: Move to the right.", "B", "answer"),
    ("The answer is: move to the right", "B", "option text"),
    ("I'd say the answer is A. Wait, no: the answer is B.", "B", "answer"),
    ("The answer is A because it moved", "A", "answer"),
    ("I choose B", "B", "answer"),
    ("B is correct", "B", "answer"),
    ("Answer: option (b)", "B", "answer"),
    ("Hence (b) is correct.", "B", "answer"),
    ("A: Move to the left\nB: Move to the right\nC: No movement\n\nAnswer: A", "A", "answer"),
    ("Option (B) is the right one, and A is wrong.", "B", "answer"),
    ("Answer: B\n\nOption A is wrong because the book moved.", "B", "answer"),
    ("The answer is B. Option A says left. Option C says none.", "B", "answer"),
    ("The book went away, so **B** it is", "B", "bold"),
    ("The book went away, so `B` it is", "B", "backticks"),
    ("Option A is incorrect, option B it is", "B", "option"),
    ("The book went away.\n\nB", "B", "last line"),
    ("B. Move to the right\n\nBecause the book shifts.", "B", "first line"),
    ("I think it is B", "B", "only letter"),
    ("I would say B, not A.", "B", "only letter"),
    ("Not A, so B", "B", "only letter"),
    ("the camera moved to the right", "B", "option words"),
    ("The camera has not moved to the left, it moved to the right.", "B", "option words"),
    # no answer
    ("", None, ""),
    ("I am not sure.", None, ""),
    ("A or B", None, ""),
    ("Both A and B", None, ""),
    ("The answer is A or B", None, ""),
    ("answer: b or c", None, ""),
    ("B, C", None, ""),
    ("AB", None, ""),
    ("D", None, ""),
    ("The answer is E.", None, ""),
    ("not B", None, ""),
    ("It's not B", None, ""),
    ("The answer is a dog", None, ""),
    ("A dog sits there", None, ""),
    ("B. Move to the left", None, ""),
    ("It did not move to the right", None, ""),
    ("A. Move to the left\nB. Move to the right\nC. No movement", None, ""),
    ("<answer>A</answer> or <answer>B</answer>", None, ""),
    ("<think>It could be B", None, ""),
    ("<answer></answer>", None, ""),
    ("The camera is to the right of A", None, ""),
]


@pytest.mark.parametrize(("reply", "letter", "rule"), LETTERS)
def test_letters(reply, letter, rule):
    found = rules(MOVE, reply)
    assert (found.text, found.rule) == (letter, rule)


@pytest.mark.parametrize(
    ("item", "reply", "letter"),
    [
        (SIDE, "front-left", "C"),
        (SIDE, "It is to the front-left.", "C"),
        (SIDE, "B. right", "B"),
        (SIDE, "B. left", None),
        (SIDE, "left, then right", None),
        (SIDE, "left, not right", "A"),
        (SIDE, "isn't left", None),
        (CLOSER, "A is closer", "B"),  # the option's words, not a letter
        (CLOSER, "The answer is A", "A"),
        (CLOSER, "I think B is closer.", "A"),
        (UNKNOWN, "A dog is left", None),
        (UNKNOWN, "The answer is C", "C"),
        (UNKNOWN, "I am here", None),
    ],
)  # fmt: skip
def test_letters_and_the_words_of_options(item, reply, letter):
    assert rules(item, reply).text == letter


@pytest.mark.parametrize(
    ("reply", "number", "rule"),
    [
        ("3", "3", "number"),
        ("3.50", "3.5", "number"),
        ("1,234.5", "1234.5", "number"),
        ("-3", "-3", "number"),
        ("2e-3", "0.002", "number"),
        ("1/2", "0.5", "number"),
        ("three", "3", "number"),
        ("Twenty-one.", "21", "number"),
        ("three hundred and twenty one", "321", "number"),
        ("250 cm", "250 cm", "number"),
        ("**2.8 meters**", "2.8 meters", "number"),
        ("\\scalar{2.8} \\distance_unit{meters}", "2.8 meters", "scalar"),
        ("so \\boxed{12\\text{ cm}}", "12 cm", "boxed"),
        ("I see 5 cups. Answer: 4", "4", "answer"),
        ("5 cups and 3 plates, **8** in all", "8", "bold"),
        ("There are 3 chairs.", "3", "only number"),
        ("It is 8 feet (2.4 meters) wide", "8 feet", "only number"),
        ("5 feet 6 inches", "5.5 feet", "number"),
        ("I count 2 chairs and 3 tables, so 5", "5", "last number"),
        ("<think>5 and 6</think> 4", "4", "after think: number"),
        ("<answer>4</answer>", "4", "answer tags: number"),
        ("2 to 3 meters", None, ""),
        ("no idea", None, ""),
        ("image2 shows it", None, ""),
    ],
)
def test_numbers(reply, number, rule):
    found = rules(COUNT, reply)
    assert (found.text, found.rule) == (number, rule)


@pytest.mark.parametrize(
    ("reply", "word", "rule"),
    [
        ("Yes", "yes", "whole"),
        ("no.", "no", "whole"),
        ("True", "yes", "whole"),
        ("**No**", "no", "whole"),
        ("\\boxed{Yes} then", "yes", "boxed"),
        ("It is near, so the answer is no, I think", "no", "answer"),
        ("Yes, it is not far.", "yes", "first word"),
        ("There is no chair... Yes", "yes", "last word"),
        ("maybe yes then", "yes", "only word"),
        ("<answer>no</answer>", "no", "answer tags: whole"),
        ("yes or no", None, ""),
        ("It is not", None, ""),
        ("nothing", None, ""),
    ],
)
def test_yes_and_no(reply, word, rule):
    found = rules(TRUE, reply)
    assert (found.text, found.rule) == (word, rule)


def test_options_without_letters_are_named_in_words():
    for reply, said in (
        ("left", "left"),
        ("The object is left.", "left"),
        ("A", None),
        ("left or right", None),
        ("answer: right", "right"),
    ):
        assert rules(WORDS, reply).text == said


@pytest.mark.parametrize(
    ("owner", "item", "reply", "answer"),
    [
        (paper, MOVE, "<think>A C</think><answer>B.</answer>", "B"),
        (paper, MOVE, "The camera goes to B", "B"),
        (paper, MOVE, "B is right because the camera turned around it", None),  # not among the last five words
        (paper, MOVE, "The correct answer is **B** because A and C are wrong", "B"),
        (paper, MOVE, "It will move to the right", "B"),
        (paper, MOVE, "A or B", None),
        (paper, MOVE, "A dog", "A"),  # its weakness
        (mmsi, MOVE, "not A but ``C``", "C"),
        (mmsi, MOVE, "{b}", "B"),
        (mmsi, MOVE, "A cat or B", "B"),
        (viewspatial, MOVE, "A\nmaybe B", "B"),
        (viewspatial, MOVE, "A\nno", None),
        (mindcube, MOVE, "A. is wrong, B. is right", "B"),
        (mindcube, MOVE, "<Answer>The answer is C</Answer>", "C"),
        (mindcube, MOVE, "Answer: B", "B"),
        (mindcube, MOVE, "none", None),
        (vsi, MOVE, "b. Move", "B"),
        (vsi, COUNT, "one apple, room 2", "1"),
        (start, MOVE, "(b) since", "B"),
        (start, MOVE, "Because it moved", "B"),  # its weakness
        (start, MOVE, "1. B", None),
        (vsi, COUNT, "2 to 3", "2"),
        (sat, MOVE, "B! It did move", "B"),
        (sat, MOVE, "b", "B"),
        (spatialscore, MOVE, "The answer (C)", "C"),
        (spatialscore, TRUE, "That is not right", "yes"),  # its weakness
        (spatialscore, WIDTH, "2.5", None),  # a length without a unit
        (spatialscore, WIDTH, "2.5 m", "2.5 m"),
        (spatialscore, COUNT, "2 chairs, 3 cups", "2"),
    ],
)  # fmt: skip
def test_the_owners_rules_as_they_are(owner, item, reply, answer):
    assert owner(item, reply).text == answer


def test_extractors_by_name(monkeypatch):
    of = find("mmsi")
    assert [find_extractor(name, of) for name in ("rules", "owner", "paper")] == [of.extract, mmsi, paper]
    mine = ModuleType("mine")
    mine.last = lambda reply, item: reply.strip()[-1].upper() if reply.strip() else None
    mine.wrong = lambda reply, item: 3
    mine.word = "x"
    monkeypatch.setitem(sys.modules, "mine", mine)
    verdict = of.judge(MOVE, "I go for b", find_extractor("mine:last", of))
    assert (verdict.extracted, verdict.score, verdict.rule) == ("B", 1.0, "mine:last")
    assert of.judge(MOVE, " ", find_extractor("mine:last", of)).extracted is None
    for name, problem in (
        ("best", "unknown extractor 'best'; use rules, owner, paper, or module:function"),
        ("mine:none", "cannot be imported .*; is the module on PYTHONPATH"),
        ("no_such_module:f", "cannot be imported .*; is the module on PYTHONPATH"),
        ("mine:word", "is a str, not a function"),
    ):
        with pytest.raises(ValueError, match=problem):
            find_extractor(name, of)
    with pytest.raises(ValueError, match="gave 3 for i; it gives the answer as text, or None"):
        of.judge(MOVE, "B", find_extractor("mine:wrong", of))


def test_long_replies_are_read_in_time():
    for reply in (
        "A" * 100_000,
        "**" * 50_000,
        "answer is " * 20_000,
        "(" * 50_000,
        "not " * 50_000,
        "1 " * 50_000,
        "\\boxed{" * 20_000,
        "`B " * 30_000,
    ):
        for item in (MOVE, COUNT, TRUE, WORDS):
            rules(item, reply)
