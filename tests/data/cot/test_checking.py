"""What a run asks of its chains beyond truth: length, no leaks, nobody's copy; and what a pair's reply looks like."""

from dataclasses import replace

import pytest

from actial_fast.data.cot.asking import PAIR_TEMPLATE, TEMPLATE, asking, asking_again, check_template, read_template
from actial_fast.data.cot.checking import ANY, MODELS, Check, Rules, check_cot
from actial_fast.data.cot.leaks import leak
from actial_fast.data.cot.pairs import PAIR, answers_in
from actial_fast.data.sources.row import Row, Turn
from tests.viewpoint_rows import pose, question

ROW = Row((Turn("user", "<image><image>"),), (b"1", b"2"), "right, left, left", PAIR, id="car/1", meta=pose())
TRUE = "The camera moved to the right. For the mug, which faces it, that is the left. It rotated to the left by about 40 degrees."


def reply(thought: str = TRUE, answer: str = "right, left, left") -> str:
    return f"<think>{thought}</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("text", "rules", "reason"),
    [
        (reply(), ANY, None),
        (reply(answer="Right, Left, Left."), ANY, None),
        (reply(answer="1. right 2. left 3. left"), ANY, None),
        (reply(answer="right, left"), ANY, "wrong answer"),
        (reply(answer="right, left, left, left"), ANY, "wrong answer"),
        (reply(answer="left, left, left"), ANY, "wrong answer"),
        (reply(answer="B"), ANY, "wrong answer"),
        (TRUE, ANY, "malformed tags"),
        (reply(f"{TRUE} So option B."), ANY, "names an option by its letter"),
        (reply(f"{TRUE} The answer is: (C)."), ANY, "names an option by its letter"),
        (reply(f"{TRUE} An answer A person gives."), ANY, "names an option by its letter"),
        (reply(f"{TRUE} As in <image>."), ANY, "image tag in the text"),
        (reply(f"{TRUE} The ground truth agrees."), ANY, "talks of a given answer"),
        (reply(TRUE.replace("the right", "the left")), ANY, "false statement"),
        (reply(), Rules(shortest=26), "too short"),
        (reply(), Rules(shortest=25, longest=25), None),
        (reply(), Rules(longest=24), "too long"),
        (reply("The camera moved to the right. It rotated to the left."), ANY, None),
        (reply("The camera moved to the right. It rotated to the left."), Rules(states=True), "not stated"),
        (reply(f"{TRUE} It is not true that it never moved right."), ANY, "undecided statement"),
        (reply(f"{TRUE} It is not true that it never moved right."), Rules(undecided="keep"), None),
    ],
)
def test_check(text, rules, reason):
    assert (check_cot(text, ROW, rules) or "").partition(":")[0].partition(",")[0] == (reason or "")


def test_a_question_is_held_against_its_poses_too():
    row = question("ego_rotation", pose())
    good = f"<think>The camera rotated to the left, by about 35 degrees.</think><answer>{row.truth}</answer>"
    assert check_cot(good, row, Rules(states=True)) is None
    assert check_cot(good.replace("35", "80"), row).startswith("false statement: the angle is 39 degrees: 'The camera rotated")
    assert check_cot(good.replace("left, by", "right, by"), row).startswith("false statement")
    assert check_cot(good, replace(row, meta={})) is None, "no poses"


@pytest.mark.parametrize(
    "thought",
    [
        "According to the reference answer, which is B, it moved.",
        "As the prompt says the correct option is B.",
        "The given answer is right.",
        "I was told that it moved left.",
        "Since the answer is given as left, it moved left.",
        "The answer provided is left.",
        "This matches the ground truth.",
        "**Based on the provided solution**, the camera moved.",
        "We know from the hint that it turned.",
        "Following the example I was given, step one.",
        "The user wants me to explain why it is left; as instructed, I do.",
        "My reasoning must lead to the correct answer.",
        "I should not mention the answer.",
        "The metadata gives 38 degrees.",
        "We are told the rotation is to the left.",
    ],
)
def test_leaks(thought):
    assert leak(f"First I look. {thought} Then I conclude.") == thought.replace("**", "")


@pytest.mark.parametrize(
    "thought",
    [
        "So the correct answer is right.",
        "The answer to the first question is right, and I know it from the surfaces.",
        "Given the visible flank, the camera moved right.",
        "Told from the mug, it moved left.",
        "Let's analyze the two images provided.",
        "The question asks for the camera's own perspective.",
        "The label on the bottle is now visible, and the hint of a shadow.",
        "This key observation settles it.",
    ],
)
def test_no_leaks(thought):
    assert leak(thought) is None


def chain(thing: str, side: str = "right") -> str:
    other = {"right": "left", "left": "right"}[side]
    return reply(
        f"Image 1 shows {thing} in front of a wall, image 2 shows it again from another place. More of the {side} flank faces the camera, "
        f"so the camera moved to the {side}. For {thing}, which faces it, that is the {other}. It rotated to the {other} by about 40 "
        f"degrees."
    )


def test_copies_are_found_but_not_a_text_of_the_row_itself():
    check = Check(ANY, known=[("car/0", chain("a chair"))])
    again = check(chain("a chair"), ROW)
    assert again == "copies another chain: that of car/0"
    fresh = reply(
        "What do I see? A boat, twice; in the second image its right flank is far more visible. Therefore the camera moved to the right. "
        "Seen from the boat the camera moved to the left. And the camera had to turn to the left by some 40 degrees to keep looking at it."
    )
    assert check(fresh, ROW) is None and check(fresh, ROW) is None
    assert check(fresh, replace(ROW, id="car/2")) == "copies another chain: that of car/1"
    other = {"ego_translation": "left", "object_translation": "right", "ego_rotation": "right", "azimuth_change_deg": -40, "yaw_deg": -38}
    left = replace(ROW, id="car/3", truth="left, right, right", meta=other)
    swapped = chain("a chair", "left").replace("right, left, left", "left, right, right")
    assert check(swapped, left) == "copies another chain: that of car/0", "with the sides swapped it is the same text"


def test_a_copy_of_the_template_is_found():
    row = replace(ROW, meta=pose(yaw=50.0, angle=52.0))
    assert check_cot(PAIR_TEMPLATE, row, MODELS[PAIR]) is None, "it is true of such a pair"
    assert Check(MODELS[PAIR], template=PAIR_TEMPLATE)(PAIR_TEMPLATE, row) == "copies the template"


def test_rules_that_make_no_sense():
    for bad in ({"shortest": -1}, {"shortest": 9, "longest": 3}, {"undecided": "maybe"}):
        with pytest.raises(ValueError):
            Rules(**bad)


def test_answers_of_a_pair():
    assert answers_in("No movement, no movement, no rotation") == ("none", "none", "none")
    assert answers_in("1) leftward; 2) to the right; 3) None") == ("left", "right", "none")


def test_the_writer_is_told_all_truths_of_a_pair_and_to_reason_in_space():
    asked = asking(ROW)
    system, user, _ = (turn.content for turn in asked.turns)
    assert user.startswith("<image><image>") and len(asked.images) == 2
    assert "its own perspective" in user.replace("the camera's own", "its own") and "by about 39 degrees" in user
    for part in (
        "moved to the right between",
        "it moved to the left",
        "rotated to the left",
        "41 degrees around the object, counterclockwise",
    ):
        assert part in user
    assert "three-dimensional space" in system and "says nothing of the motion" in system and system.endswith(PAIR_TEMPLATE)
    mine = reply("Mine.")
    assert asking(ROW, mine).turns[0].content.endswith(mine)
    again = asking_again(asked, "<think>no</think>", "too short: 1 word")
    assert again.turns[3].content.startswith("This cannot be used: too short: 1 word. The answer is right, left, left.")
    assert asking_again(asked, " ", "refused") == asked


def test_a_request_for_a_bare_letter_does_not_reach_the_writer():
    row = question("ego_rotation", pose(), images=(b"1", b"2"))
    text = row.turns[0].content + "\nAnswer with the letter of the right option only."
    assert asking(replace(row, turns=(Turn("user", text),))) == asking(row)


def test_pairs_that_do_not_move_are_told_so():
    meta = {
        **pose(),
        "ego_translation": "no movement",
        "object_translation": "no movement",
        "ego_rotation": "no rotation",
        "azimuth_change_deg": 0,
    }
    text = asking(replace(ROW, meta=meta)).turns[1].content
    assert "the camera did not move sideways between" in text and "it did not rotate." in text and "degrees" not in text


def test_templates(tmp_path):
    check_template(TEMPLATE)
    check_template(PAIR_TEMPLATE)
    with pytest.raises(ValueError, match="malformed tags"):
        check_template("Think step by step.")
    path = tmp_path / "t.txt"
    path.write_text(f'# a note\n# truths: {{"id": "car/1", {str(pose())[1:-1]}}}\n'.replace("'", '"') + reply())
    text, about = read_template(path)
    assert text == reply() and about.truth == "right, left, left" and about.meta["id"] == "car/1"
    check_template(text, about)
    with pytest.raises(ValueError, match=r"false statement: .*It rotated to the left by about 80 degrees"):
        check_template(text.replace("40 degrees", "80 degrees"), about)
    path.write_text("# truths: broken\n" + reply())
    with pytest.raises(ValueError, match=r"t\.txt: the line '# truths: ' was changed and cannot be read"):
        read_template(path)
