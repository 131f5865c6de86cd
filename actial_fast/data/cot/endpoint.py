"""Chains of thought from a strong vision-language model behind any OpenAI-compatible endpoint (a local vLLM server included).

The model is shown a template of the reasoning that a person has corrected, the images, the question and the true answer, and writes the
reasoning that leads there. What it writes is checked (cot.check_cot); after a rejection it is asked again and told why.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from actial_fast.data.cot.client import Client, Unanswered, parts
from actial_fast.data.cot.writer import WriterError, check_cot
from actial_fast.data.sources.row import Row, Turn
from actial_fast.data.sources.tags import tagged_answer

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionContentPartParam, ChatCompletionMessageParam

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


class EndpointWriter:
    """A writer for cot.write_cot: one request a row, and one more after each rejected reply. Safe to call from several threads.

    Args:
        base_url, model, api_key, retries, timeout: as of client.Client.
        template: an example reply that a person has corrected; default TEMPLATE.
        reasks: how often a rejected reply is sent back with the reason.
        temperature: of the sampling.

    Raises ValueError when the template itself is malformed, or the endpoint refuses the key or does not know the model; WriterError when a
    row got no reply.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        template: str = TEMPLATE,
        retries: int = 5,
        timeout: float = 120.0,
        reasks: int = 2,
        temperature: float = 1.0,
    ):
        if reason := check_cot(template, Row((Turn("user", ""),), truth=tagged_answer(template) or "?")):
            raise ValueError(f"the template is no <think>...</think><answer>...</answer> example: {reason}")
        self._client = Client(base_url, model, api_key=api_key, retries=retries, timeout=timeout)
        self._template, self._reasks, self._temperature = template, reasks, temperature

    def __call__(self, row: Row, rng: random.Random) -> str:
        """The last reply for `row`: the first that passes check_cot, or the one after `reasks` further attempts."""
        messages: list[ChatCompletionMessageParam] = [
            {"role": "system", "content": INSTRUCTION + self._template},
            {"role": "user", "content": _question(row)},
        ]
        for attempt in range(self._reasks + 1):
            text = self._ask(messages, rng.getrandbits(31))
            reason = check_cot(text, row)
            if reason is None or attempt == self._reasks:
                break
            retry = f"This cannot be used: {reason}. The answer is {row.truth}. Write the whole reply again, in the form you were shown."
            messages = [*messages[:2], {"role": "assistant", "content": text}, {"role": "user", "content": retry}]
        return text

    def _ask(self, messages: list[ChatCompletionMessageParam], seed: int) -> str:
        try:
            return self._client.ask(messages, temperature=self._temperature, seed=seed).text
        except Unanswered as error:
            raise WriterError(str(error)) from error


def _question(row: Row) -> list[ChatCompletionContentPartParam]:
    """The row's question as OpenAI message parts, each image where its tag stands, and the true answer at the end."""
    text = "\n".join(turn.content for turn in row.prompt if turn.role != "system")
    return [*parts(text, row.images, row.where), {"type": "text", "text": f"The right answer is: {row.truth}"}]
