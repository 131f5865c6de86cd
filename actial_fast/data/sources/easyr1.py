"""EasyR1's rows, from JSON or parquet: problem (a text with <image> tags, or OpenAI's parts), answer and images.

The problem is the user's message, so rows are for sampling (GRPO, evaluation): they carry a truth but no assistant turn. Other
keys are what a reward sees as `row.meta`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actial_fast.data.sources.fields import IMAGE_KEYS, absent, contents, images_of, name_of, rest, truths
from actial_fast.data.sources.reader import Reader
from actial_fast.data.sources.row import BadRow, Row, Turn


class EasyR1Source(Reader):
    """Random access to the rows of one file or folder."""

    name, columns = "EasyR1's format", ("problem", "answer")
    kind_keys = ("data_source", "kind", "question_type", "category")

    def row(self, record: Mapping[str, Any], where: str, index: int) -> Row:
        """A problem, its images and its answer; BadRow when the problem or the answer is missing."""
        meta = rest(record, ("problem", "answer", *IMAGE_KEYS, *self.kind_keys, "id"), where)
        if absent(record.get("problem")):
            raise BadRow(where, "empty problem")
        problem, parts = contents(record["problem"], "`problem`", where)
        truth, accepted = truths(record.get("answer"), "`answer`", where)
        if not truth:
            raise BadRow(where, "empty answer")
        return Row(
            turns=(Turn("user", problem),),
            images=images_of(record, self.records.folder, where, parts=parts),
            truth=truth,
            kind=self.kind(index),
            id=name_of(record.get("id"), "`id`", where),
            where=where,
            meta=meta,
            accepted=accepted,
        ).check()
