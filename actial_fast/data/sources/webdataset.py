"""Tar shards that say with texts beside their pictures what a row is: WebDataset's image-text pairs and classes.

`.txt` and `.cls` of a sample: the question and its answer; either alone is the answer to its pictures, a caption or a class. What is in
`.cls` is the truth, and so is what has <answer> tags. The keys of `.json`, and other members of text, are what a reward sees as `row.meta`.
Shards whose `.json` holds a row of another format are read as that one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actial_fast.data.sources.asked import offered
from actial_fast.data.sources.fields import IMAGE_KEYS, first_name, images_of, name_of, rest
from actial_fast.data.sources.reader import Reader
from actial_fast.data.sources.row import IMAGE_TAG, BadRow, Row, Turn
from actial_fast.data.sources.tags import tagged_answer


class WebDatasetSource(Reader):
    """Random access to the samples of tar files."""

    kind_keys = ("kind", "question_type", "category")

    def row(self, record: Mapping[str, Any], where: str, index: int) -> Row:
        """A text, a class and pictures; BadRow for a sample with neither text nor class."""
        meta = rest(record, ("txt", "cls", "id", *IMAGE_KEYS, *self.kind_keys), where)
        images = images_of(record, self.records.folder, where)
        said, label = (name_of(record.get(key), f".{key}", where).strip() for key in ("txt", "cls"))
        question, answer = (said, label) if said and label else ("", said or label)
        if not answer:
            raise BadRow(where, "neither .txt nor .cls says anything")
        if not images and not question:
            raise BadRow(where, "no picture, and no question")
        asked = question if IMAGE_TAG in question else IMAGE_TAG * len(images) + question
        truth = label or tagged_answer(answer) or ""
        return Row(
            turns=(Turn("user", asked), Turn("assistant", answer)),
            images=images,
            truth=truth,
            kind=first_name(record, self.kind_keys, where),
            choices=offered(question, [truth]) if truth else (),
            id=name_of(record.get("id"), "id", where),
            where=where,
            meta=meta,
        ).check()
