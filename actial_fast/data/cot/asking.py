"""What a strong vision-language model is asked for a chain of thought, as rows to reply to.

It is shown a template of the reasoning that a person has corrected, the images, the question and the true answer, and writes the reasoning
that leads there. What it writes is checked (writer.check_cot); after a rejection it is asked again and told why.
"""

from __future__ import annotations

from dataclasses import replace

from actial_fast.data.cot.writer import check_cot
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
REPLY = Turn("assistant", "")  # where the reply belongs: a row's prompt is what stands before its last answer


def check_template(template: str) -> None:
    """ValueError where an example reply is none."""
    if reason := check_cot(template, Row((Turn("user", ""),), truth=tagged_answer(template) or "?")):
        raise ValueError(f"the template is no <think>...</think><answer>...</answer> example: {reason}")


def asking(row: Row, template: str = TEMPLATE) -> Row:
    """The row whose reply is a chain of thought for `row`: its images and its question, without its system prompt, and its true answer."""
    text = "\n".join(turn.content for turn in row.prompt if turn.role != "system")
    told = Turn("user", f"{text}\nThe right answer is: {row.truth}")
    return replace(row, turns=(Turn("system", INSTRUCTION + template), told, REPLY), images=row.images[: text.count(IMAGE_TAG)])


def asking_again(asked: Row, text: str, reason: str) -> Row:
    """What `asking` made, after it got `text` for a reply, which check_cot rejects for `reason`."""
    retry = f"This cannot be used: {reason}. The answer is {asked.truth}. Write the whole reply again, in the form you were shown."
    rejected = Turn("assistant", text.replace(IMAGE_TAG, "image"))  # which would ask for one
    return replace(asked, turns=(*asked.turns[:2], rejected, Turn("user", retry), REPLY))
