"""Sampled replies as cards: mistakes first, what can be chosen by, and a bounded size."""

import re

import pytest

from actial_fast.report.gallery import CARDS, LONGEST, OPEN, PICTURES, REPLIES, gallery
from tests.report.test_page import Page

GOOD, UNFORMED, WRONG = "<think>So it is.</think><answer>A</answer>", "A", "<think>So it is.</think><answer>B</answer>"


def event(step, *groups, **changed):
    """groups: the replies to one question each."""
    rollouts = [
        {
            "images": [],
            "prompt": f"<image><image>Question {q}?\nA. left\nB. right",
            "response": reply,
            "reward": 1.0,
            "truth": "A",
            "kind": "turn",
        }
        | changed
        for q, replies in enumerate(groups)
        for reply in replies
    ]
    return {"kind": "rollouts", "stage": "grpo", "step": step, "rollouts": rollouts}


def cards(html):
    Page(html)
    return re.findall(r'<article data-verdict="(\w*)" data-kind="([^"]*)" data-step="(\d+)">(.*?)</article>', html, re.DOTALL)


def test_mistakes_come_first_and_later_steps_before_earlier_ones(tmp_path):
    events = [event(1, [WRONG, GOOD], [GOOD, GOOD]), event(9, [GOOD], [UNFORMED, GOOD], [WRONG], kind="move")]
    html = gallery(tmp_path, "grpo", [*events, {"kind": "eval", "stage": "grpo"}, event(5, [GOOD]) | {"stage": "other"}])
    assert [card[:3] for card in cards(html)] == [
        ("wrong", "move", "9"),
        ("wrong", "turn", "1"),
        ("form", "move", "9"),
        ("right", "move", "9"),
        ("right", "turn", "1"),
    ]
    assert "8 replies to 5 questions, kept at 2 steps from 1 to 9: 2 wrong, 1 not well-formed." in html
    assert '<option value="wrong">a wrong answer (2)</option>' in html and '<option value="9">step 9 (3)</option>' in html
    assert '<option value="move">move (3)</option>' in html and '<div class="choices" hidden>' in html, "only a script can choose"
    assert "<details>" not in html and '<pre class="prompt">Question 0?' in html


def test_a_run_of_before_and_questions_without_a_truth(tmp_path):
    old = event(1, [UNFORMED], truth="")
    del old["rollouts"][0]["kind"]
    ((verdict, kind, _, card),) = cards(gallery(tmp_path, "grpo", [old]))
    assert (verdict, kind) == ("form", "") and "no truth to compare with" in card and "answer</span>" not in card
    assert gallery(tmp_path, "grpo", []) == "" and gallery(tmp_path, "grpo", [event(1)]) == ""


def test_pictures_inside_a_question_are_numbered(tmp_path):
    html = gallery(tmp_path, "grpo", [event(1, [GOOD], prompt=" <image>\n<image> From <image> to <image>?")])
    assert '<pre class="prompt">From [picture 3] to [picture 4]?</pre>' in html


def test_two_thousand_long_replies_with_pictures_stay_bounded(tmp_path):
    large = "data:image/png;base64," + "iVBORw0KGgo" * 4000
    events = [event(step, *([[WRONG + "x" * 1500] * 10] * 100), images=["view.png", large]) for step in (1, 2)]
    for step in events:
        for k, rollout in enumerate(step["rollouts"]):
            rollout["prompt"] = f"Question {step['step']} {k // 10} " + "y" * 1500
    html = gallery(tmp_path, "grpo", events)
    found = cards(html)
    assert len(found) == CARDS and html.count('class="reply"') == CARDS * REPLIES and f"<summary>{CARDS - OPEN} more</summary>" in html
    assert "2,000 replies to 200 questions" in html and html.count("2 more replies in events.jsonl") == CARDS
    assert len(html) < PICTURES + CARDS * (REPLIES + 1) * (LONGEST + 500)
    assert f"[... {1500 + len(WRONG) - LONGEST:,} characters ...]" in html


@pytest.mark.parametrize("count", [1, 3])
def test_what_fills_the_page_is_told(tmp_path, monkeypatch, count):
    from PIL import Image

    Image.new("RGB", (300, 300), (9, 99, 199)).save(tmp_path / "view.png")
    monkeypatch.setattr("actial_fast.report.gallery.PICTURES", 10 if count == 3 else 10**6)
    events = [event(step, [GOOD], images=["view.png"]) for step in range(count)]
    html = gallery(tmp_path, "grpo", events)
    assert html.count("<img") == 1 and html.count("pictures are left out") == count - 1
