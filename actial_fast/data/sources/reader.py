"""What the readers of all formats share: records of a JSON file or of a table, one row each."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from actial_fast.data.sources.fields import IMAGE_KEYS, first_name, full_name, inside, parsed
from actial_fast.data.sources.jsonl import JsonRecords
from actial_fast.data.sources.row import BadRow, Row
from actial_fast.data.sources.shards import ShardRecords, is_shards
from actial_fast.data.sources.tsv import TsvRecords

LOOKED_AT = 64  # first records, which tell what the others are like


class Records(Protocol):
    """Random access to the records of a file or folder."""

    folder: Path

    @property
    def column_names(self) -> Sequence[str]:
        """Of a table; JSON records need not have the same keys, and name none."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """Record `index`; BadRow when it cannot be read."""
        ...

    def some(self, index: int, keys: Sequence[str]) -> dict[str, Any]:
        """What it has of these keys, read as cheaply as the file allows."""
        ...

    def identity(self, index: int, keys: Sequence[str]) -> tuple[Any, ...]:
        """What tells the images under the first of these keys from those of another record; () when it has none."""
        ...

    def pictures(self, index: int, keys: Sequence[str]) -> tuple[str, ...]:
        """A name for each image of a record, the same wherever it stands: a file's full name, or a digest of bytes."""
        ...

    def where(self, index: int) -> str:
        """`file:row`, counted from 1."""
        ...


def is_table(path: Path) -> bool:
    """Whether a path is a folder or a file of a table, neither JSON nor tar shards."""
    return (path.is_dir() and not is_shards(path)) or path.suffix in (".parquet", ".arrow")


def open_records(path: Path, split: str = "") -> Records:
    """The records of a JSON, parquet, TSV or CSV file, of tar shards, or of a folder (of one `split` of it); ValueError when they cannot be
    read."""
    if is_shards(path):
        return ShardRecords(path, split)
    if is_table(path):
        from actial_fast.data.sources.table import Table  # needs pyarrow

        return Table(path, split)
    if not path.exists():
        raise ValueError(f"{path}: a pattern is for parquet files and tar shards; give these files one by one, each as a source")
    return TsvRecords(path) if path.suffix.lower() in (".tsv", ".csv") else JsonRecords(path)


class Reader(ABC):
    """A source of rows; each format has one that makes a row of a record.

    name: for messages; columns: what a table must have; image_keys: where its images are; kind_keys: where its question type is, the first
    that says something; said_keys: whose parts may hold images where no field does. ValueError for a table without these columns.
    """

    name = ""
    columns: tuple[str, ...] = ()
    image_keys: tuple[str, ...] = IMAGE_KEYS
    kind_keys: tuple[str, ...] = ()
    said_keys: tuple[str, ...] = ("messages", "conversations", "prompt", "problem", "question")

    def __init__(self, path: Path, *, split: str = ""):
        self.path, self.records = path, open_records(path, split)
        names = self.records.column_names
        if names and not set(self.columns) <= set(names):
            raise ValueError(f"{path}: {self.name} needs the columns {' and '.join(self.columns)}; it has {sorted(names)}")

    @abstractmethod
    def row(self, record: Mapping[str, Any], where: str, index: int) -> Row:
        """The row of a record, checked; BadRow when it is none."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Row:
        """Row `index`; BadRow when its record is no row."""
        record, where = self.records[index], self.records.where(index)
        if not isinstance(record, Mapping):
            raise BadRow(where, "not a JSON object")
        return self.row(record, where, index)

    def kind(self, index: int) -> str:
        """The question type of row `index`, without reading the rest of it; BadRow when it is none."""
        return first_name(self.records.some(index, self.kind_keys), self.kind_keys, self.records.where(index))

    def images(self, index: int) -> tuple[Any, ...]:
        """What tells the images of row `index` from those of its neighbours; () when it has none, BadRow when it cannot be read."""
        return self.records.identity(index, self.image_keys) or self._in_parts(index)

    def pictures(self, index: int) -> tuple[str, ...]:
        """A name for each image of row `index`, the same wherever it stands; BadRow when it cannot be read."""
        if found := self.records.pictures(index, self.image_keys):
            return found
        return tuple(full_name(name, self.records.folder) for name in self._in_parts(index))

    def _in_parts(self, index: int) -> tuple[str, ...]:
        if not self._parts:
            return ()
        where = self.records.where(index)
        return next((found for value in self._said(index) if (found := inside(parsed(value, "content", where), where))), ())

    def _said(self, index: int) -> list[Any]:
        return list(self.records.some(index, self.said_keys).values())

    @functools.cached_property
    def _parts(self) -> bool:
        """Whether some of the first records have images in parts: looking into every one takes long, in a table above all."""
        for index in range(min(LOOKED_AT, len(self.records))):
            with contextlib.suppress(BadRow):
                where = self.records.where(index)
                if any(inside(parsed(value, "content", where), where) for value in self._said(index)):
                    return True
        return False
