"""Asking a model behind an OpenAI-compatible address: one question at a time, with images in it, tried again where that may help.

Servers differ in what they call a reply. Reasoning that is split off (`reasoning_content`, `reasoning`, parts of type thinking) is put back
in <think> tags; content in parts is joined; a tool call, a refusal and a filter are told apart from text; what is no chat completion at all
costs its question only.
"""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import openai

from actial_fast.data.sources.picture import encoded, smaller
from actial_fast.data.sources.row import IMAGE_TAG, shortened

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionContentPartParam, ChatCompletionMessageParam

FATAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
NEW_LIMIT = "max_completion_tokens"  # what some models want instead of max_tokens, and say so
BLANK = "whitespace"  # what some servers want in no part by itself, and say so
SHOWN = 160  # characters of a reply that is none, in its error
PAUSE = 0.5  # seconds before a reply that is none is asked for again; doubled every time


class Unanswered(ValueError):
    """No reply to one question, after all retries."""


@dataclass(frozen=True)
class Answer:
    """A reply. text: with the reasoning, where the server splits it off, in <think> tags before it; tokens: their number as the server
    counts them, 0 where it does not say; finished: False where a limit cut it; why: the reason that there is no text ("refused: ...",
    "a tool call instead of text: ...", "stopped by a content filter"); read: the prompt's tokens as the server counts them."""

    text: str
    tokens: int
    finished: bool
    why: str = ""
    read: int = 0


@dataclass(frozen=True)
class Used:
    """What a client has used: replies, and tokens read (prompts) and written (replies, with their reasoning), as the server counts them."""

    replies: int = 0
    read: int = 0
    written: int = 0

    def plus(self, answer: Answer) -> Used:
        """With one reply more."""
        return Used(self.replies + 1, self.read + answer.read, self.written + answer.tokens)


class Client:
    """Safe to use from several threads.

    Args:
        base_url: such as http://localhost:8000/v1.
        model: the name that the endpoint knows.
        api_key: default $OPENAI_API_KEY; local servers need none.
        retries: how often a request is repeated, with growing pauses, after 408, 409, 429, 5xx, a lost connection, a timeout, or a reply
            that is no chat completion.
        timeout: seconds to wait for the server to send anything.

    `used` says what all replies together have cost.
    """

    def __init__(self, base_url: str, model: str, *, api_key: str | None = None, retries: int = 5, timeout: float = 120.0):
        self._client = openai.OpenAI(
            base_url=base_url, api_key=api_key or os.environ.get("OPENAI_API_KEY") or "none", max_retries=retries, timeout=timeout
        )
        self._model, self._retries = model, retries
        self._limit = "max_tokens"
        self._blanks = True
        self._lock = threading.Lock()
        self.used = Used()

    def ask(
        self, messages: Iterable[ChatCompletionMessageParam], *, temperature: float, seed: int, max_tokens: int | None = None
    ) -> Answer:
        """One reply. ValueError when the endpoint refuses the key or does not know the model, Unanswered for anything else."""
        messages = list(messages)
        for attempt in range(self._retries + 1):
            try:
                answer = answer_of(self._asked(messages, temperature, seed, max_tokens))
            except FATAL as error:
                raise ValueError(f"the endpoint {self._client.base_url} refuses model {self._model!r}: {error}") from error
            except openai.OpenAIError as error:
                raise Unanswered(f"{type(error).__name__}: {error}") from error
            except ValueError as error:  # no chat completion, or no JSON: a proxy's page, say
                if attempt == self._retries:
                    raise Unanswered(f"{type(error).__name__}: {error}") from error
                time.sleep(min(PAUSE * 2**attempt, 8.0))
                continue
            with self._lock:
                self.used = self.used.plus(answer)
            return answer
        raise AssertionError("the last attempt returns or raises")

    def _asked(self, messages: list[ChatCompletionMessageParam], temperature: float, seed: int, max_tokens: int | None) -> object:
        def create() -> object:
            most: dict[str, Any] = {} if max_tokens is None else {self._limit: max_tokens}
            sent = messages if self._blanks else _without_blanks(messages)
            return self._client.chat.completions.create(model=self._model, messages=sent, temperature=temperature, seed=seed, **most)

        for _ in range(2):  # what a server may want otherwise, each remembered
            limit, blanks = self._limit, self._blanks
            try:
                return create()
            except openai.BadRequestError as error:
                if max_tokens is not None and limit != NEW_LIMIT and NEW_LIMIT in str(error):
                    self._limit = NEW_LIMIT
                elif blanks and BLANK in str(error).lower():
                    self._blanks = False
                else:
                    raise
        return create()


def _without_blanks(messages: list[ChatCompletionMessageParam]) -> list[ChatCompletionMessageParam]:
    """The messages without parts of nothing but spaces and line breaks, as stand between images."""

    def kept(content: Any) -> Any:
        return [p for p in content if p.get("type") != "text" or p["text"].strip()] if isinstance(content, list) else content

    return [cast("ChatCompletionMessageParam", {**message, "content": kept(message.get("content"))}) for message in messages]


def answer_of(reply: object) -> Answer:
    """The answer in a chat completion: openai's object, or the JSON of one as a batch's file has it. NoCompletion for anything else."""
    if isinstance(reply, openai.BaseModel):
        reply = reply.to_dict(mode="python", use_api_names=True, warnings=False)
    if not isinstance(reply, Mapping):
        raise NoCompletion(f"the reply is no chat completion: {shortened(repr(reply), SHOWN)}")
    choices = reply.get("choices")
    if not isinstance(choices, Sequence) or not choices or not isinstance(choices[0], Mapping):
        raise NoCompletion(f"the reply is no chat completion: {shortened(json.dumps(reply.get('error') or reply, default=str), SHOWN)}")
    choice = choices[0]
    message, usage = _mapping(choice.get("message")), _mapping(reply.get("usage"))
    text, thought = _texts(message.get("content"))
    thought = thought or next((found for key in ("reasoning_content", "reasoning") if (found := _texts(message.get(key))[0])), "")
    return Answer(
        _joined(text, thought),
        _number(usage.get("completion_tokens")),
        choice.get("finish_reason") not in ("length", "max_tokens"),
        _why(message, choice, text),
        _number(usage.get("prompt_tokens")),
    )


class NoCompletion(ValueError):
    """What came back is no chat completion."""


def parts(text: str, images: Sequence[Path | bytes], where: str, pixels: int = 0) -> list[ChatCompletionContentPartParam]:
    """A text as OpenAI message parts, each image where its tag stands and every other character as it is: a chat template puts nothing
    between parts, and spaces and line breaks around images were trained on. BadRow, naming `where`, for one that cannot be decoded.

    pixels: larger images are scaled down to so many; 0 sends them as they are."""
    left = iter(images)
    made: list[ChatCompletionContentPartParam] = []
    for number, piece in enumerate(text.split(IMAGE_TAG)):
        if number:
            made.append({"type": "image_url", "image_url": {"url": data_url(next(left), where, pixels)}})
        if piece:
            made.append({"type": "text", "text": piece})
    return made


def data_url(image: Path | bytes, where: str, pixels: int = 0) -> str:
    """The image as a data URL: its own bytes where every server shows them as we do and `pixels` (0: any number) allows them, else PNG, or
    JPEG where it was scaled down. BadRow when it cannot be decoded."""
    small = smaller(image, where, pixels) if pixels else None
    data, kind = (small, "JPEG") if small else encoded(image, where)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"


def _texts(content: Any) -> tuple[str, str]:
    """The text of a message's content, which is a text or a list of parts, and the reasoning that stands among its parts."""
    if isinstance(content, str):
        return content.strip(), ""
    said, thought = [], []
    for part in content if isinstance(content, Sequence) else ():
        if isinstance(part, str):
            said.append(part)
        elif isinstance(part, Mapping):
            if part.get("type") in ("thinking", "reasoning"):
                inner = part.get("thinking") or part.get("reasoning") or part.get("text")
                thought.append(_texts(inner)[0])
            elif isinstance(part.get("text"), str):
                said.append(part["text"])
    return "".join(said).strip(), "".join(thought).strip()


def _joined(text: str, thought: str) -> str:
    """Text and reasoning as one. A text with a <think> of its own has what was asked for: the rest is the model's private reasoning. A
    <think> that stood in the server's prompt, so that only its end is in the text, is put back."""
    lower = text.casefold()
    if "<think>" in lower:
        return text
    if "</think>" in lower:
        return f"<think>{text}"
    return f"<think>{thought}</think>\n{text}" if thought else text


def _why(message: Mapping[str, Any], choice: Mapping[str, Any], text: str) -> str:
    content = message.get("content")
    inner = [part["refusal"] for part in content if isinstance(part, Mapping) and part.get("refusal")] if isinstance(content, list) else []
    if refusal := message.get("refusal") or next(iter(inner), ""):
        return f"refused: {shortened(refusal, SHOWN)}"
    if choice.get("finish_reason") == "content_filter":
        return "stopped by a content filter"
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if calls and not text:
        return f"a tool call instead of text: {shortened(json.dumps(calls, default=str, sort_keys=True), SHOWN)}"
    return ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
