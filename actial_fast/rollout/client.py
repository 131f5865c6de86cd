"""Asking a model behind an OpenAI-compatible address: one question at a time, with images in it, tried again where that may help."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import openai

from actial_fast.data.sources.picture import encoded
from actial_fast.data.sources.row import IMAGE_TAG

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionContentPartParam, ChatCompletionMessageParam

FATAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)


class Unanswered(ValueError):
    """No reply to one question, after all retries."""


@dataclass(frozen=True)
class Answer:
    """A reply. tokens: their number as the server counts them, 0 where it does not say; finished: False where a limit cut it."""

    text: str
    tokens: int
    finished: bool


class Client:
    """Safe to use from several threads.

    Args:
        base_url: such as http://localhost:8000/v1.
        model: the name that the endpoint knows.
        api_key: default $OPENAI_API_KEY; local servers need none.
        retries: how often a request is repeated, with growing pauses, after 408, 409, 429, 5xx, a lost connection or a timeout.
        timeout: seconds to wait for the server to send anything.
    """

    def __init__(self, base_url: str, model: str, *, api_key: str | None = None, retries: int = 5, timeout: float = 120.0):
        self._client = openai.OpenAI(
            base_url=base_url, api_key=api_key or os.environ.get("OPENAI_API_KEY") or "none", max_retries=retries, timeout=timeout
        )
        self._model = model

    def ask(
        self, messages: Iterable[ChatCompletionMessageParam], *, temperature: float, seed: int, max_tokens: int | None = None
    ) -> Answer:
        """One reply. ValueError when the endpoint refuses the key or does not know the model, Unanswered for anything else."""
        limit = openai.omit if max_tokens is None else max_tokens
        try:
            reply = self._client.chat.completions.create(
                model=self._model, messages=messages, temperature=temperature, seed=seed, max_tokens=limit
            )
            choice = reply.choices[0]
            tokens = reply.usage.completion_tokens if reply.usage else 0
            return Answer((choice.message.content or "").strip(), tokens, choice.finish_reason != "length")
        except FATAL as error:
            raise ValueError(f"the endpoint {self._client.base_url} refuses model {self._model!r}: {error}") from error
        except (openai.OpenAIError, IndexError, TypeError, AttributeError) as error:  # the last three: a reply that is no chat completion
            raise Unanswered(f"{type(error).__name__}: {error}") from error


def parts(text: str, images: Sequence[Path | bytes], where: str) -> list[ChatCompletionContentPartParam]:
    """A text as OpenAI message parts, each image where its tag stands. BadRow, naming `where`, for one that cannot be decoded."""
    left = iter(images)
    made: list[ChatCompletionContentPartParam] = []
    for number, piece in enumerate(text.split(IMAGE_TAG)):
        if number:
            made.append({"type": "image_url", "image_url": {"url": data_url(next(left), where)}})
        if piece.strip():
            made.append({"type": "text", "text": piece.strip()})
    return made


def data_url(image: Path | bytes, where: str) -> str:
    """The image as a data URL: its own bytes where every server shows them as we do, else PNG. BadRow when it cannot be decoded."""
    data, kind = encoded(image, where)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
