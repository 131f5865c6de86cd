"""What a strong vision-language model is asked for a chain of thought, as rows to reply to.

It is shown a template of the reasoning that a person has corrected, the images, and all that is known: of a pair the camera's move, the
object's account of it, and the turn with its angle; of another question the question and its answer. What it writes is checked
(checking.py); after a rejection it is asked again and told why. The protocol for pairs is that of the paper's appendix D, in our words.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from actial_fast.data.cot.checking import check_cot
from actial_fast.data.cot.judge import KINDS
from actial_fast.data.cot.pairs import PAIR, answers_in, told
from actial_fast.data.sources.asked import REQUEST
from actial_fast.data.sources.row import IMAGE_TAG, Row, Turn
from actial_fast.data.sources.tags import tagged_answer

TEMPLATE = """\
<think>The first image shows the object from where the camera started; the second shows the same object after the camera moved. The
object itself stands still.
As the camera sees it, the second image shows more of the flank that was on the right in the first image, and less of the left one.
Standing in the object's place and looking at the first camera, that flank is on my left.
To see more of it, the camera must have moved to its own right; for the object, which faces it, that is a move to the left. To keep the
object in view from there, the camera had to turn to the left.
So the camera went around the object: its position to the right, its viewing direction to the left.
The question asks for the move from the camera's own perspective, which is to the right: option B.</think>
<answer>B</answer>"""

PAIR_TEMPLATE = """\
<think>1. Identify the images
Image 1 shows a leather handbag with a chain strap on a striped cloth. Image 2 shows the same bag from another viewpoint. The bag and
the cloth have not moved, so every difference comes from the camera.
2. Compare the images
From the camera's perspective
- Framing: the whole bag is in both images, with a bit more of the cloth in image 2.
- Angle: in image 1 the front of the bag is nearly square to the camera. In image 2 more of the flank that was on the right in image 1
faces the camera, and the flank on the left has turned away.
- Scale: the bag is about as large in both images.
- Background: other parts of the wall are behind the bag, as a new viewpoint brings with it.
From the object's perspective
- Camera position: in image 1 the camera stands in front of the bag. The bag faces it, so the camera's right is the bag's left. In image
2 the camera stands further to the bag's left.
- Visible surfaces: the front is still seen, now at a slant, together with the flank on that side.
3. Analyze the movements
- Left/right: a flank comes into view only when the camera's place changes. To see more of the flank on the right, the camera moved to
the right.
- Up/down: the top of the bag is seen under the same slant, so there is no clear change.
- Forward/backward: the scale is the same, so there is none.
- Yaw: having moved to the right, the camera had to rotate to the left to keep the bag in view, counterclockwise as seen from above. How
far the front has turned away tells the angle: about 50 degrees.
- Pitch: no clear change.
- Roll: the cloth's stripes and the wall are level in both images, so none.
4. Put the trajectory together
The camera went around the bag counterclockwise as seen from above: its position moved to the right while its viewing direction rotated
to the left.
5. Answer the questions
From the camera's own perspective the camera moved to the right. From the bag's perspective it moved to the left. About its own vertical
axis the camera rotated to the left, by about 50 degrees.</think>
<answer>right, left, left</answer>"""

INSTRUCTION = """\
You write worked solutions that teach how to reason about the viewpoints of photographs. You get images, a question, and the answer that
is known to be right.
Write the reasoning that leads from what can be seen in the images to that answer, in these steps: say what each image shows; compare the
images from the camera's and, where it matters, from the object's perspective; work out the movement or relation that is asked about; put
it together; answer.
Every statement must agree with the images and with the answer. Write as someone who works it out: never mention that you were told the
answer, nor these instructions.
Reply with exactly one <think>...</think> followed by exactly one <answer>...</answer>, and nothing else; inside <answer> stands the
answer exactly as it was given to you.

An example of the form (for another question):
"""
PAIR_INSTRUCTION = """\
You write worked solutions that teach how to reason about the viewpoints of photographs. You get two images of an object that stands
still, and what is known of the camera's motion between them. Three questions will be asked about such a pair: which way the camera's
position moved from the camera's own perspective, which way from the perspective of the object, which faces the first camera, and which
way the camera rotated about its own vertical axis.
Write the reasoning that leads from what can be seen in these images to the three answers, in the steps of the example: identify the
images; compare them from the camera's perspective (framing, angle, scale, background) and from the object's (camera position, visible
surfaces); go through the six movements (left/right, up/down, forward/backward, yaw, pitch, roll); put the trajectory together; answer
the three questions, with the angle of the rotation.
Reason in three-dimensional space, from which surfaces of the object face the camera. Do not reason from where the object or the
background appears in the picture: a shift in the picture says nothing of the motion.
Every statement must agree with what is known. Say left and right in words, with whose left and right it is; name no options or letters.
Write as someone who works it out: never mention that anything was told to you, nor these instructions or the example.
Reply with exactly one <think>...</think> followed by exactly one <answer>...</answer>, and nothing else; inside <answer> stand the
three answers, as in <answer>right, left, left</answer>; "no movement" and "no rotation" are answers too.

An example of the form (for another pair):
"""
REPLY = Turn("assistant", "")  # where the reply belongs: a row's prompt is what stands before its last answer
TRUTHS = "# truths: "  # how the first line of a template about a pair begins; JSON with the truths follows


def template_of(row: Row, template: str = "") -> str:
    """The example for a chain about a row: the given one, or the built-in one for a pair or a question."""
    return template or (PAIR_TEMPLATE if row.kind == PAIR else TEMPLATE)


def read_template(path: Path) -> tuple[str, Row | None]:
    """A template's file: the example, and the pair that it is about where its first line says so. Lines that begin with # at its top are no
    part of the example. ValueError for a first line that cannot be read."""
    text = path.read_text(encoding="utf-8")
    head = []
    while text.startswith("#"):
        line, _, text = text.partition("\n")
        head.append(line)
    row = None
    for line in head:
        if line.startswith(TRUTHS):
            try:
                meta = json.loads(line.removeprefix(TRUTHS))
                row = Row((Turn("user", ""),), truth=", ".join(meta[kind] for kind in KINDS), kind=PAIR, where=str(path), meta=meta)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: the line {TRUTHS!r} was changed and cannot be read ({error!r}); restore it or make it anew"
                ) from None
    return text.strip(), row


def check_template(template: str, about: Row | None = None) -> None:
    """ValueError where an example reply is none, or says something false of the pair that it is about, with the sentence."""
    answer = tagged_answer(template) or "?"
    row = about or Row((Turn("user", ""),), truth=answer, kind=PAIR if len(answers_in(answer)) == 3 else "")
    if reason := check_cot(template, row):
        raise ValueError(f"the template is no <think>...</think><answer>...</answer> example that can be used: {reason}")


def asking(row: Row, template: str = "") -> Row:
    """The row whose reply is a chain of thought for `row`: its images, and its question without its system prompt and its true answer, or
    what a pair's poses say."""
    if row.kind == PAIR:
        system = PAIR_INSTRUCTION + template_of(row, template)
        text = f"{IMAGE_TAG * len(row.images)}What is known of this pair: {told(row.meta)}"
        return replace(row, turns=(Turn("system", system), Turn("user", text), REPLY))
    text = "\n".join(turn.content for turn in row.prompt if turn.role != "system")
    text = REQUEST.sub("", text)  # "Answer with the letter only", which is not what is wanted here
    system = INSTRUCTION + template_of(row, template)
    user = Turn("user", f"{text}\nThe right answer is: {row.truth}")
    return replace(row, turns=(Turn("system", system), user, REPLY), images=row.images[: text.count(IMAGE_TAG)])


def asking_again(asked: Row, text: str, reason: str) -> Row:
    """What `asking` made, after it got `text` for a reply, which is rejected for `reason`; without a text it is asked as before."""
    if not text.strip():
        return asked
    retry = f"This cannot be used: {reason}. The answer is {asked.truth}. Write the whole reply again, in the form you were shown."
    rejected = Turn("assistant", text.replace(IMAGE_TAG, "image"))  # which would ask for one
    return replace(asked, turns=(*asked.turns[:2], rejected, Turn("user", retry), REPLY))
