"""This project's own rows, one JSON object a line (see row.py); image paths are relative to the file's folder.

Nothing that stands in such a row is ignored: a key that is not one of KEYS is an error. What a reward or a metric needs goes into `meta`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actial_fast.data.sources.fields import IMAGE_KEYS, MEANING, absent, conversation, images_of, name_of, refuse, texts, truths
from actial_fast.data.sources.reader import Reader
from actial_fast.data.sources.row import BadRow, Row, shortened

KEYS = ("id", "messages", *IMAGE_KEYS, "truth", "kind", "choices", "meta")
OURS = ("truth", "kind", "choices", "meta")  # that no other format has beside messages


def from_json(record: Any, folder: Path, where: str) -> Row:
    """The row of a JSON object, image paths relative to `folder`; BadRow when it is not one."""
    if not isinstance(record, Mapping) or not isinstance(record.get("messages"), list):
        raise BadRow(where, "not an object with a list `messages`")
    refuse(record, [key for key in record if key not in MEANING], where)
    if unknown := [key for key, value in record.items() if key not in (*KEYS, *MEANING) and not absent(value)]:
        raise BadRow(where, f"unknown key {shortened(unknown[0], 40)!r}; a row has {', '.join(KEYS)}, and what a reward needs is in meta")
    turns, parts = conversation(record["messages"], "messages", where)
    truth, accepted = truths(record.get("truth"), "truth", where)
    meta = record.get("meta")
    if not absent(meta) and not isinstance(meta, Mapping):
        raise BadRow(where, "meta is not an object")
    return Row(
        turns=turns,
        images=images_of(record, folder, where, parts=parts),
        truth=truth,
        kind=name_of(record.get("kind"), "kind", where),
        choices=texts(record.get("choices"), "choices", where),
        id=name_of(record.get("id"), "id", where),
        where=where,
        meta=meta or {},
        accepted=accepted,
    ).check()


class JsonlSource(Reader):
    """Random access to the rows of one file."""

    kind_keys = ("kind",)

    def row(self, record: Mapping[str, Any], where: str, index: int) -> Row:
        """As from_json."""
        return from_json(record, self.records.folder, where)
