"""ShareGPT rows as LLaMA-Factory reads them, from a JSON array or JSON Lines.

Both spellings: `messages` with role/content and `conversations` with from/value (human, gpt, user, assistant, system). Images in `images`
(a list or one path) or `image`, relative to the file's folder; the system prompt as a message or as a top-level `system`. The truth is
the text in the last assistant turn's <answer> tags, or that whole turn when it has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actial_fast.data.sources.jsonl import JsonRecords
from actial_fast.data.sources.row import BadRow, Row, Turn
from actial_fast.data.sources.tags import extract_answer

SPELLINGS = {"messages": ("role", "content"), "conversations": ("from", "value")}
ROLE_OF = {"human": "user", "gpt": "assistant"}
KIND_KEYS = ("kind", "question_type", "type", "category")  # the first present one is the question type


class ShareGptSource:
    """Random access to the rows of one file."""

    def __init__(self, path: Path):
        self._records = JsonRecords(path)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Row:
        """Row `index`; BadRow when it is not a conversation with its images."""
        record, where = self._records[index], self._records.where(index)
        if not isinstance(record, dict):
            raise BadRow(where, "not a JSON object")
        if media := [key for key in ("videos", "audios") if record.get(key)]:
            raise BadRow(where, f"has {media[0]}; only images are supported")
        turns = _turns(record, where)
        images = _images(record, where)
        answer = next((turn.content for turn in reversed(turns) if turn.role == "assistant"), "")
        return Row(
            turns=turns,
            images=tuple(self._records.path.parent / image for image in images),
            truth=extract_answer(answer),
            kind=_kind(record),
            id=str(record.get("id", "")),
            where=where,
        ).check()

    def kind(self, index: int) -> str:
        """The question type of row `index`; BadRow when it is not JSON."""
        record = self._records[index]
        return _kind(record) if isinstance(record, dict) else ""

    def images(self, index: int) -> tuple[str, ...]:
        """The image paths of row `index` as they are written; BadRow when it is not JSON or they are no paths."""
        record = self._records[index]
        return _images(record, self._records.where(index)) if isinstance(record, dict) else ()


def _images(record: dict[str, Any], where: str) -> tuple[str, ...]:
    images = record.get("images", record.get("image")) or []
    images = [images] if isinstance(images, str) else images
    if not (isinstance(images, list) and all(isinstance(image, str) for image in images)):
        raise BadRow(where, "images is neither a path nor a list of paths")
    return tuple(images)


def _kind(record: dict[str, Any]) -> str:
    return next((str(record[key]) for key in KIND_KEYS if record.get(key)), "")


def _turns(record: dict[str, Any], where: str) -> tuple[Turn, ...]:
    key = next((key for key in SPELLINGS if key in record), None)
    if key is None:
        raise BadRow(where, f"none of {', '.join(SPELLINGS)}")
    role_key, content_key = SPELLINGS[key]
    messages = record[key]
    if not isinstance(messages, list):
        raise BadRow(where, f"`{key}` is not a list")
    turns = [Turn("system", record["system"])] if isinstance(record.get("system"), str) and record["system"] else []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {role_key, content_key} <= set(message):
            raise BadRow(where, f"message {number} has no `{role_key}` and `{content_key}`")
        role, content = message[role_key], message[content_key]
        if not isinstance(content, str):
            raise BadRow(where, f"message {number}'s `{content_key}` is not text")
        turns.append(Turn(ROLE_OF.get(role, role) if isinstance(role, str) else str(role), content))
    if sum(turn.role == "system" for turn in turns) > 1:
        raise BadRow(where, "more than one system prompt")
    return tuple(turns)
