"""The one row type that every source yields and everything downstream reads.

A row is a conversation with images, and what is needed to train on it or to score a reply to it. Its JSON form (one object a line) is
this project's own file format, so a builder writes rows and a source reads them back without a second schema:

    {"id": "car/0001/003-010/ego_rotation",
     "messages": [{"role": "user", "content": "<image><image>Which way ..."}, {"role": "assistant", "content": "B"}],
     "images": ["../captures/car/0001/images/003.jpg", ...],      relative to the file's folder
     "truth": "B", "kind": "ego_rotation", "choices": ["left", "right", "no rotation"], "meta": {...}}

`truth` may be a list of texts, any of which is right.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

IMAGE_TAG = "<image>"
ROLES = ("system", "user", "assistant")
LONGEST = 400  # characters of a reason; whatever stands in a row, what is said of it fits into a few lines

# Of Qwen's tokenizers: as text they would begin a turn or an image. The processor refuses what else a tokenizer has of this kind.
CONTROL = re.compile(
    r"<\|(?:endoftext|im_start|im_end|object_ref_start|object_ref_end|box_start|box_end|quad_start|quad_end|vision_start|vision_end|vision_pad"
    r"|image_pad|video_pad)\|>"
)
MEDIA = re.compile(r"<(?:video|audio|img|/image)>")  # where other formats put what is not read here
BROKEN = re.compile("[\ud800-\udfff]")  # halves of a surrogate pair: no text encoding has them


class BadRow(ValueError):
    """A row that cannot be used. `where` is `file:row`, `reason` says what is wrong with it."""

    def __init__(self, where: str, reason: str):
        reason = shortened(reason)
        super().__init__(f"{where}: {reason}")
        self.where, self.reason = where, reason

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str]]:
        return BadRow, (self.where, self.reason)


def shortened(value: object, longest: int = LONGEST) -> str:
    """The value as printable text that is not longer than a few lines."""
    text = str(value).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return text if len(text) <= longest else f"{text[: max(longest - 60, longest // 2)]}... ({len(text)} characters)"


@dataclass(frozen=True)
class Turn:
    """One message. `content` holds `<image>` where an image belongs."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One question, its images and its answer.

    turns: the conversation; for training it ends with the assistant, for sampling an assistant turn at the end is left out.
    images: a path, or the encoded bytes (JPEG, PNG, ...), in the order of the `<image>` tags.
    truth: what the accuracy reward and the evaluation compare with; empty when the row has no checkable answer.
    accepted: other answers that are as right as the truth.
    kind: the question type, for figures per type.
    choices: the options' texts (their number gives chance); empty for free-form questions.
    where: `file:row`, for error messages.
    meta: what else a reward, a metric or a task needs.
    task: the name of what the row is for (task.py), as its source's config says; empty for a question with an answer.
    """

    turns: tuple[Turn, ...]
    images: tuple[Path | bytes, ...] = ()
    truth: str = ""
    kind: str = ""
    choices: tuple[str, ...] = ()
    id: str = ""
    where: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    accepted: tuple[str, ...] = ()
    task: str = ""

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The turns a reply is sampled for: all, but an assistant turn at the end."""
        return self.turns[:-1] if self.turns and self.turns[-1].role == "assistant" else self.turns

    def with_system(self, text: str) -> Row:
        """The row under the system prompt `text` (replacing its own); unchanged when `text` is empty. BadRow where its own had images."""
        if not text:
            return self
        return replace(self, turns=(Turn("system", text), *(t for t in self.turns if t.role != "system"))).check()

    def of_task(self, name: str) -> Row:
        """The row as one of this task."""
        return replace(self, task=name) if name != self.task else self

    def check(self) -> Row:
        """The row itself, or BadRow: roles known and in place, a user turn, an answer where one is due, texts that can be tokenised, as
        many images as tags and none in an answer."""
        if not self.turns:
            raise BadRow(self.where, "no messages")
        for number, turn in enumerate(self.turns):
            if turn.role not in ROLES:
                raise BadRow(self.where, f"unknown role {turn.role!r}; expected one of {', '.join(ROLES)}")
            if turn.role == "system" and number:
                raise BadRow(self.where, "a system prompt that is not the first message")
            self._check_text(turn)
        if not any(turn.role == "user" for turn in self.turns):
            raise BadRow(self.where, "no user message")
        tags = sum(turn.content.count(IMAGE_TAG) for turn in self.turns)
        if tags != len(self.images):
            raise BadRow(self.where, f"{tags} {IMAGE_TAG} tags but {len(self.images)} images")
        return self

    def _check_text(self, turn: Turn) -> None:
        text = turn.content
        if turn.role == "assistant" and not text.strip():
            raise BadRow(self.where, "empty answer")
        if turn.role == "user" and not text.strip():
            raise BadRow(self.where, "empty user message")
        if turn.role == "assistant" and IMAGE_TAG in text:
            raise BadRow(self.where, f"an answer holds {IMAGE_TAG}; images belong to questions")
        if found := CONTROL.search(text):
            raise BadRow(self.where, f"the text contains the special token {found.group()}")
        if found := MEDIA.search(text):
            raise BadRow(self.where, f"the text contains {found.group()}; only images are supported, and {IMAGE_TAG} is their tag")
        check_characters(text, "the text", self.where)

    def to_json(self, folder: Path) -> dict[str, Any]:
        """The JSON form, image paths relative to `folder`. Rows with embedded bytes have no such form (AssertionError)."""
        images = []
        for image in self.images:
            assert isinstance(image, Path), "only images on disk can be written as JSON"
            images.append(os.path.relpath(image, folder))
        out: dict[str, Any] = {
            "id": self.id,
            "messages": [{"role": t.role, "content": t.content} for t in self.turns],
            "images": images,
        }
        if self.truth:
            out["truth"] = [self.truth, *self.accepted] if self.accepted else self.truth
        for key in ("kind", "choices", "meta"):
            if value := getattr(self, key):
                out[key] = list(value) if key == "choices" else value
        return out


def check_characters(text: str, what: str, where: str) -> None:
    """BadRow for a text that cannot be tokenised or written: half a surrogate pair in it, or NUL."""
    if "\0" in text:
        raise BadRow(where, f"{what} contains a NUL character")
    if not text.isascii() and (found := BROKEN.search(text)):
        raise BadRow(where, f"{what} contains half a surrogate pair, \\u{ord(found.group()):04x}: it was cut inside a character")
