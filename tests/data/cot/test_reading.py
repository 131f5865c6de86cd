"""What is read from single sentences, about one pair: the camera moved to the right (the object's left) and turned left by 38 degrees."""

import time

import pytest

from actial_fast.data.cot.judge import Truths, judge, weighed
from actial_fast.data.cot.reading import read
from actial_fast.data.cot.wording import sentences

RIGHT = Truths("right", "left", "left", 42, 38)
TRUE = """
The camera has moved to the right.
This indicates the camera physically moved **right** relative to the scene between shots.
To achieve this while translating right, it must have rotated **left** (counter-clockwise when viewed from above) around its vertical axis.
From taking Image 1 to Image 2, the camera primarily moved **right** and slightly **forward**.
Simultaneously, it rotated **left** around its vertical axis (yaw).
From the camera's perspective, comparing its position in the second shot to the first, the camera moved to the **right**.
Therefore, from the object's perspective, the camera's horizontal translation relative to the object was to the **left**.
Estimating this change suggests a rotation of approximately **45 degrees** to the left.
The answer to question 1 is right.
Question 1: The camera moved right.
Question 2: From the object's point of view, the camera moved left.
Question 3: left.
Translation (camera): right. Translation (object): left. Rotation: left.
Horizontal translation from the object's perspective: left.
The second camera is located to the right of the first.
The camera is now positioned further right than before.
It moved to the right, not the left.
I can exclude that the camera moved left.
The camera could not have moved left.
There is no evidence that the camera moved left.
For the object, the camera went left.
The mug would say that the camera moved to its left.
The camera moved toward the object's left side.
The camera moved to its own right.
Viewed from above, the camera orbits the object counterclockwise.
The camera traverses a 40-degree arc to the right.
It turned left by 30° to 40°.
It turned left by at least 20 degrees.
The camera pans leftward.
The yaw changed by roughly forty-five degrees to the left.
A leftward rotation of about 40 degrees.
A rightward translation.
So the camera moves right while rotating left.
The camera moved from left to right.
The camera moved from the left side of the mug to its right side.
The photographer sidestepped to the right.
The viewpoint is shifted right.
The camera swings around to the right side of the object.
The left side of the mug is less visible now.
We now see more of the right side.
Since the camera moved right, it must have turned left.
Object-centric frame: camera moves left.
In the camera's frame it is a move to the right.
The rotation is counterclockwise as seen from above.
The optical axis turned anticlockwise.
It's left from the object's perspective and right from the camera's.
It must have been a move to the right, since otherwise the right flank would be hidden.
It was a move to the right rather than to the left.
Rather than to the left, it moved to the right.
The camera rotated about 40 degrees, to the left.
The camera did not just move right but also rotated left.
""".strip().splitlines()
FALSE = """
The camera has moved to the left.
To achieve this while translating right, it must have rotated **left** (clockwise when viewed from above) around its vertical axis.
From taking Image 1 to Image 2, the camera primarily moved **left** and slightly **forward**.
From the camera's perspective, comparing its position in the second shot to the first, the camera moved to the **left**.
Therefore, from the object's perspective, the camera's horizontal translation relative to the object was to the **right**.
Estimating this change suggests a rotation of approximately **64 degrees** to the left.
Translation (camera): left. Translation (object): left. Rotation: left.
Translation (camera): right. Translation (object): right. Rotation: left.
Translation (camera): right. Translation (object): left. Rotation: right.
Horizontal translation from the object's perspective: right.
The second camera is located to the left of the first.
The camera is now positioned further left than before.
It moved to the left, not the right.
The camera never moved right.
I can exclude that the camera moved right.
The camera could not have moved right.
There is no evidence of any rotation.
The camera's orientation is unchanged.
The camera's position is unchanged.
The camera stayed in place.
For the object, the camera went right.
The mug would say that the camera moved to its right.
The camera moved toward the object's right side.
The camera moved to its own left.
Viewed from above, the camera orbits the object clockwise.
The camera traverses a 100-degree arc to the right.
It turned left by at most 15 degrees.
It turned left by more than 60 degrees.
It turned left by a half turn.
The camera pans rightward.
A rightward rotation of about 40 degrees.
A leftward translation.
So the camera moves right while rotating right.
So the camera moves left while rotating left.
The camera moved from right to left.
The photographer sidestepped to the left.
The right side of the mug is less visible now.
We now see more of the left side.
Since the camera moved right, it must have turned right.
The camera rotated to the left, then back to the right.
Object-centric frame: camera moves right.
The rotation is clockwise as seen from above.
It's right from the object's perspective and left from the camera's.
It was no move to the right.
The camera did not rotate to the left.
Without rotating, the camera moved right.
""".strip().splitlines()
NOTHING = """
In Image 1, the camera views the book slightly from the left.
The sign on the wall is clearly visible on the right.
A power outlet is now visible further to the right on the wall.
The object stayed in place and did not rotate.
Did the camera move left?
If the camera had moved left, we would see the left flank.
One could think that it moved left.
Suppose the camera moved left. Then we would see more of the left flank.
The mug's handle points to the right.
We see the mug from a 45-degree downward angle.
The camera tilted down by about 10 degrees.
The left side of the mug is decorated.
The camera moved.
The answer is not obvious.
""".strip().splitlines()


@pytest.mark.parametrize(("texts", "wanted"), [(TRUE, {True}), (FALSE, {False}), (NOTHING, set())], ids=["true", "false", "nothing"])
def test_sentences(texts, wanted):
    got = {text: {holds for _, holds in weighed(text, RIGHT)} for text in texts}
    wrong = {text: found for text, found in got.items() if (found != wanted if wanted != {False} else False not in found)}
    assert not wrong


MIRROR = {"left": "right", "right": "left", "counterclockwise": "clockwise", "clockwise": "counterclockwise"}


def test_what_is_true_of_a_pair_is_false_of_its_mirror_image():
    """Every true statement of a side turns false when the truths swap, and the other way round; angles stay."""
    mirrored = Truths("left", "right", "right", -42, -38)
    for text in [*TRUE, *FALSE]:
        for (one, holds), (other, swapped) in zip(weighed(text, RIGHT), weighed(text, mirrored), strict=False):
            if one == other and one.about in ("ego_translation", "object_translation", "ego_rotation") and one.value != "none":
                assert holds != swapped, text


@pytest.mark.parametrize(
    ("degrees", "holds"),
    [
        ("24", True),
        ("22", False),
        ("53", True),
        ("57.5", False),
        ("forty", True),
        ("twenty", False),
        ("50 to 60", True),
        ("60-70", False),
        ("0", False),
    ],
)
def test_an_angle_may_be_off_by_fifteen_degrees(degrees, holds):
    (found,) = [
        truth for statement, truth in weighed(f"The camera rotated left by about {degrees} degrees.", RIGHT) if statement.about == "angle"
    ]
    assert found is holds


def test_a_condition_counts_when_it_holds():
    rule = "When a camera moves to the {} around an object, it has to rotate to the {} to keep it in view."
    assert judge(rule.format("right", "right"), RIGHT).false and not judge(rule.format("right", "left"), RIGHT).false
    assert not judge(rule.format("left", "left"), RIGHT).false, "it is about another camera"


def test_what_cannot_be_decided_is_told_apart():
    assert [statement.unclear for statement in read("It is not the case that the camera never moved right.")] == [True]
    verdict = judge("It is not the case that the camera never moved right.", RIGHT)
    assert not verdict.false and "It is not the case" in verdict.undecided[0]


def test_a_contradiction_is_called_one():
    verdict = judge("The camera moved right. In the end the camera moved left.", RIGHT)
    assert verdict.false[0].startswith("contradicts itself; the camera's move from its own perspective is right: 'In the end")


def test_static_and_turned_only_pairs():
    still, turned = Truths("none", "none", "none", 0, 0), Truths("none", "none", "left", 0, 45)
    text = "There is no movement of the camera to either side. From the object's perspective there is no movement. "
    assert not judge(text + "The camera did not rotate.", still).false and judge(text + "The camera did not rotate.", turned).false
    assert not judge(text + "The camera rotated to the left.", turned).false and judge(text + "It rotated to the left.", still).false
    assert judge("The camera circled the object clockwise.", still).false and judge("More of the right flank is visible.", still).false


def test_sentences_keep_decimals_and_lose_marks():
    said = [sentence.said for sentence in sentences("1. **Yaw**: about 38.5 degrees, i.e. left.\n- Roll: none")]
    assert said == ["Yaw: about 38.5 degrees, that is, left.", "Roll: none"]


def test_reading_is_fast_on_long_text():
    start = time.process_time()
    for piece in (
        "to the left, ",
        "the camera moved left or right and ",
        "not ",
        "if the camera ",
        '"left" (',
        "- 38 degrees ",
        "the object's left of ",
    ):
        judge(piece * (5_000 // len(piece)), RIGHT)
    assert time.process_time() - start < 5
