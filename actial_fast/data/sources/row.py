"""The one row type that every source yields and everything downstream reads.

A row is a conversation with images, and what is needed to train on it or to score a reply to it. Its JSON form (one object a line) is
this project's own file format, so a builder writes rows and a source reads them back without a second schema:

    {"id": "car/0001/003-010/ego_rotation",
     "messages": [{"role": "user", "content": "<image><image>Which way ..."}, {"role": "assistant", "content": "B"}],
     "images": ["../captures/car/0001/images/003.jpg", ...],      relative to the file's folder
     "truth": "B", "kind": "ego_rotation", "choices": ["left", "right", "no rotation"], "meta": {...}}
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

IMAGE_TAG = "<image>"
MAX_PIXELS = 50_000_000  # a decoded image above this is a decompression bomb, not a photograph
ROLES = ("system", "user", "assistant")


class BadRow(ValueError):
    """A row that cannot be used. `where` is `file:row`, `reason` says what is wrong with it."""

    def __init__(self, where: str, reason: str):
        super().__init__(f"{where}: {reason}")
        self.where, self.reason = where, reason

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str]]:
        return BadRow, (self.where, self.reason)


@dataclass(frozen=True)
class Turn:
    """One message. `content` holds `<image>` where an image belongs."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One question, its images and its answer.

    turns: the conversation; for training it ends with the assistant, for sampling everything from the last assistant turn on is dropped.
    images: a path, or the encoded bytes (JPEG, PNG, ...), in the order of the `<image>` tags.
    truth: what the accuracy reward and the evaluation compare with; empty when the row has no checkable answer.
    kind: the question type, for figures per type.
    choices: the options' texts (their number gives chance); empty for free-form questions.
    where: `file:row`, for error messages.
    """

    turns: tuple[Turn, ...]
    images: tuple[Path | bytes, ...] = ()
    truth: str = ""
    kind: str = ""
    choices: tuple[str, ...] = ()
    id: str = ""
    where: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The turns a reply is sampled for: all before the last assistant turn."""
        last = max((i for i, t in enumerate(self.turns) if t.role == "assistant"), default=len(self.turns))
        return self.turns[:last]

    def with_system(self, text: str) -> Row:
        """The row under the system prompt `text` (replacing its own); unchanged when `text` is empty."""
        if not text:
            return self
        return replace(self, turns=(Turn("system", text), *(t for t in self.turns if t.role != "system")))

    def check(self) -> Row:
        """The row itself, or BadRow: roles known, a user turn, an answer where one is due, as many images as tags."""
        if not self.turns:
            raise BadRow(self.where, "no messages")
        for turn in self.turns:
            if turn.role not in ROLES:
                raise BadRow(self.where, f"unknown role {turn.role!r}; expected one of {', '.join(ROLES)}")
            if turn.role == "assistant" and not turn.content.strip():
                raise BadRow(self.where, "empty answer")
        if not any(turn.role == "user" for turn in self.turns):
            raise BadRow(self.where, "no user message")
        tags = sum(turn.content.count(IMAGE_TAG) for turn in self.turns)
        if tags != len(self.images):
            raise BadRow(self.where, f"{tags} {IMAGE_TAG} tags but {len(self.images)} images")
        return self

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
        for key in ("truth", "kind", "choices", "meta"):
            if value := getattr(self, key):
                out[key] = list(value) if key == "choices" else value
        return out

    @staticmethod
    def from_json(obj: Mapping[str, Any], folder: Path, where: str) -> Row:
        """The row of a JSON object; BadRow when it is not one."""
        if not isinstance(obj, Mapping) or not isinstance(obj.get("messages"), list):
            raise BadRow(where, "not an object with a list `messages`")
        try:
            turns = tuple(Turn(str(m["role"]), str(m["content"])) for m in obj["messages"])
        except (TypeError, KeyError) as error:
            raise BadRow(where, f"a message without role or content ({error})") from None
        return Row(
            turns=turns,
            images=tuple(folder / str(image) for image in obj.get("images") or ()),
            truth=str(obj.get("truth", "")),
            kind=str(obj.get("kind", "")),
            choices=tuple(str(c) for c in obj.get("choices") or ()),
            id=str(obj.get("id", "")),
            where=where,
            meta=obj.get("meta") or {},
        ).check()


def decode(image: Path | bytes, where: str) -> np.ndarray:
    """The pixels of one image, uint8 (H, W, 3); BadRow when it is missing, truncated or larger than MAX_PIXELS."""
    name = str(image) if isinstance(image, Path) else f"{len(image)} embedded bytes"
    try:
        with Image.open(image if isinstance(image, Path) else io.BytesIO(image)) as handle:
            if handle.width * handle.height > MAX_PIXELS:  # before decoding: the header alone tells
                raise BadRow(where, f"image {name} is {handle.width}x{handle.height}, over {MAX_PIXELS} pixels")
            return np.asarray(handle.convert("RGB"))
    except FileNotFoundError:
        raise BadRow(where, f"image {name} does not exist") from None
    except Image.DecompressionBombError as error:
        raise BadRow(where, f"image {name}: {error}") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow(where, f"image {name} cannot be decoded ({error})") from None
