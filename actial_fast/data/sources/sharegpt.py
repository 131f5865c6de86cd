"""ShareGPT rows as LLaMA-Factory and ms-swift read them, from a JSON array, JSON Lines or a table.

Both spellings: `messages` with role/content and `conversations` with from/value (human, gpt, user, assistant, system); a content may be
OpenAI's list of parts. Images in `images` (a list or one) or `image`, relative to the file's folder; the system prompt as a message or as
a top-level `system`. The truth is the text in the last assistant turn's <answer> tags, or that whole turn when it has none. Options are
read from the question, and so is the kind of a viewpoint question that has no field for it, as Viewpoint-100K was released.
Other keys are what a reward sees as `row.meta`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from actial_fast.data.sources.asked import offered, viewpoint_kind
from actial_fast.data.sources.fields import IMAGE_KEYS, conversation, first_name, images_of, name_of, rest, text
from actial_fast.data.sources.reader import Reader
from actial_fast.data.sources.row import BadRow, Row, Turn
from actial_fast.data.sources.tags import extract_answer

LISTS = ("messages", "conversations")


class ShareGptSource(Reader):
    """Random access to the rows of one file."""

    kind_keys = ("kind", "question_type", "type", "category")

    def row(self, record: Mapping[str, Any], where: str, index: int) -> Row:
        """A conversation with its images; BadRow when it is none."""
        meta = rest(record, (*LISTS, *IMAGE_KEYS, *self.kind_keys, "system", "id"), where)
        key = next((key for key in LISTS if record.get(key) is not None), None)
        if key is None:
            raise BadRow(where, f"none of {', '.join(LISTS)}")
        turns, parts = conversation(record[key], key, where)
        if system := text(record.get("system"), "`system`", where):
            turns = (Turn("system", system), *turns)
        if sum(turn.role == "system" for turn in turns) > 1:
            raise BadRow(where, "more than one system prompt")
        truth = extract_answer(turns[-1].content) if turns and turns[-1].role == "assistant" else ""
        question = _question(turns)
        return Row(
            turns=turns,
            images=images_of(record, self.records.folder, where, parts=parts),
            truth=truth,
            kind=first_name(record, self.kind_keys, where) or viewpoint_kind(question),
            choices=offered(question, [truth]) if truth else (),
            id=name_of(record.get("id"), "`id`", where),
            where=where,
            meta=meta,
        ).check()

    def kind(self, index: int) -> str:
        """The question type that the record names, else the one that its question shows."""
        if found := super().kind(index):
            return found
        record, where = self.records.some(index, LISTS), self.records.where(index)
        key = next((key for key in LISTS if record.get(key) is not None), None)
        return viewpoint_kind(_question(conversation(record[key], key, where)[0])) if key else ""


def _question(turns: Sequence[Turn]) -> str:
    return next((turn.content for turn in reversed(turns) if turn.role == "user"), "")
