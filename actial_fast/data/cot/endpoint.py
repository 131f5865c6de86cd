"""Chains of thought from a strong vision-language model behind any OpenAI-compatible endpoint (a local vLLM server included).

The model is shown a template of the reasoning that a person has corrected, the images, the question and the true answer, and writes the
reasoning that leads there. What it writes is checked (cot.check_cot); after a rejection it is asked again and told why.
"""

from __future__ import annotations

import base64
import io
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import openai
from PIL import Image

from actial_fast.data.cot.writer import WriterError, check_cot
from actial_fast.data.sources.row import IMAGE_TAG, Row, Turn, decode
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

FATAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)


class EndpointWriter:
    """A writer for cot.write_cot: one request a row, and one more after each rejected reply. Safe to call from several threads.

    Args:
        base_url: such as http://localhost:8000/v1.
        model: the name that the endpoint knows.
        api_key: default $OPENAI_API_KEY; local servers need none.
        template: an example reply that a person has corrected; default TEMPLATE.
        retries: how often a request is repeated, with growing pauses, after 408, 409, 429, 5xx, a lost connection or a timeout.
        timeout: seconds to wait for the server to send anything.
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
        self._client = openai.OpenAI(
            base_url=base_url, api_key=api_key or os.environ.get("OPENAI_API_KEY") or "none", max_retries=retries, timeout=timeout
        )
        self._model, self._template, self._reasks, self._temperature = model, template, reasks, temperature

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
            reply = self._client.chat.completions.create(model=self._model, messages=messages, temperature=self._temperature, seed=seed)
            return (reply.choices[0].message.content or "").strip()
        except FATAL as error:
            raise ValueError(f"the endpoint {self._client.base_url} refuses model {self._model!r}: {error}") from error
        except (openai.OpenAIError, IndexError, TypeError, AttributeError) as error:  # the last three: a reply that is no chat completion
            raise WriterError(f"{type(error).__name__}: {error}") from error


def _question(row: Row) -> list[ChatCompletionContentPartParam]:
    """The row's question as OpenAI message parts, each image where its tag stands, and the true answer at the end."""
    text = "\n".join(turn.content for turn in row.prompt if turn.role != "system")
    images = iter(row.images)
    parts: list[ChatCompletionContentPartParam] = []
    for number, piece in enumerate(text.split(IMAGE_TAG)):
        if number:
            parts.append({"type": "image_url", "image_url": {"url": data_url(next(images), row.where)}})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return [*parts, {"type": "text", "text": f"The right answer is: {row.truth}"}]


def data_url(image: Path | bytes, where: str) -> str:
    """The image as a data URL: the file as it is when it is JPEG, PNG or WebP, else re-encoded as PNG. BadRow when it cannot be decoded."""
    pixels = decode(image, where)
    data = image if isinstance(image, bytes) else image.read_bytes()
    kind = Image.open(io.BytesIO(data)).format
    if kind not in ("JPEG", "PNG", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        data, kind = buffer.getvalue(), "PNG"
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
