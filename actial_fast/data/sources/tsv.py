"""Tab-separated tables with a header, as VLMEvalKit's benchmarks are: random access by byte offset, a record at a time.

Cells may be quoted and hold line breaks, and may be megabytes long (pictures in base64). Every cell is text; an empty one is absent. A cell
that is written as a list ("['a', 'b']", of Python or JSON) is one.
"""

from __future__ import annotations

import ast
import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actial_fast.data.sources.fields import absent, as_written, full_name
from actial_fast.data.sources.row import BadRow, shortened

BOM = b"\xef\xbb\xbf"
csv.field_size_limit(2**31 - 1)  # of the process: the module's own limit is shorter than a picture


class TsvRecords:
    """Random access to the records of a tab-separated (.tsv) or comma-separated (.csv) file.

    Raises ValueError when the first line does not name the columns, each once."""

    def __init__(self, path: Path):
        self.path, self.folder = path, path.parent
        self._delimiter = "," if path.suffix.lower() == ".csv" else "\t"
        self._file = open(path, "rb")  # held open: records are read on demand
        taken = len(BOM) if os.pread(self._file.fileno(), len(BOM), 0) == BOM else 0

        def lines() -> Iterator[str]:
            nonlocal taken
            self._file.seek(taken)
            for raw in self._file:
                taken += len(raw)
                yield raw.decode("utf-8", "surrogateescape")

        reader = csv.reader(lines(), delimiter=self._delimiter)
        offsets: list[int] = []
        try:
            self.column_names = [name.strip() for name in next(reader, [])]
            offsets.append(taken)
            for cells in reader:
                offsets[len(offsets) - (not cells) :] = [taken]  # a blank line belongs to the record before it
        except csv.Error as error:
            raise ValueError(f"{path}: not a table after {max(len(offsets) - 1, 0)} rows ({error})") from None
        if not any(self.column_names) or len(set(self.column_names)) < len(self.column_names):
            raise ValueError(f"{path}: the first line must name the columns, each once; it has {shortened(self.column_names, 200)}")
        self._offsets = np.array(offsets, np.int64)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def where(self, index: int) -> str:
        """`file:row`, counted from 1 without the header."""
        return f"{self.path}:{index + 1}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index` (from 0); BadRow when it has more or fewer cells than the header, or is not UTF-8."""
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        try:
            text = os.pread(self._file.fileno(), end - start, start).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRow(self.where(index), f"not UTF-8 ({error.reason})") from None
        cells = next(csv.reader((f"{line}\n" for line in text.split("\n")), delimiter=self._delimiter), [])
        if len(cells) != len(self.column_names):
            raise BadRow(self.where(index), f"{len(cells)} cells, but the header names {len(self.column_names)} columns")
        return {name: _listed(cell) for name, cell in zip(self.column_names, cells, strict=True)}

    def some(self, index: int, keys: Sequence[str]) -> dict[str, Any]:
        """What record `index` has of these keys."""
        record = self[index]
        return {key: record[key] for key in keys if key in record}

    def identity(self, index: int, keys: Sequence[str]) -> tuple[str, ...]:
        """What tells the images under the first of these keys that has any from those of another record: as they are written."""
        values = [value for value in self.some(index, keys).values() if not absent(value)]
        return as_written(values[0], self.where(index)) if values else ()

    def pictures(self, index: int, keys: Sequence[str]) -> tuple[str, ...]:
        """The full names of the files under the first of these keys that has any; other forms as they are written."""
        return tuple(full_name(name, self.folder) for name in self.identity(index, keys))


def _listed(cell: str) -> Any:
    """A cell as text, or as the list that it is the spelling of."""
    if cell[:1] == "[" and cell.rstrip()[-1:] == "]":
        try:
            value = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return cell
        return value if isinstance(value, list) else cell
    return cell
