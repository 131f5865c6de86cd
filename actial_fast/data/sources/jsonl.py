"""JSON records by byte offset: the random access that every JSON source shares.

Only the offsets stay in memory (24 bytes a row); a row is read and parsed when it is asked for, so a file may be larger than RAM and
one bad line costs one row, not the file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actial_fast.data.sources.fields import absent, as_written, full_name
from actial_fast.data.sources.row import BadRow, shortened

CHUNK = 1 << 24  # bytes read at a time while indexing
BLANK = re.compile(r"[ \t\r\n]*")
BOM = b"\xef\xbb\xbf"


class JsonRecords:
    """Random access to the records of a JSON Lines file, or of a file that holds one JSON array.

    Args:
        path: the file. A first character of `[` means one array; anything else means one record a line (blank lines are skipped).

    Raises ValueError when the file cannot be an array of records (cut off, or not JSON between two records).
    """

    column_names: tuple[str, ...] = ()
    """Of a table; records need not have the same keys."""

    def __init__(self, path: Path):
        self.path, self.folder = path, path.parent
        self._file = open(path, "rb", buffering=0)  # held open: records are read on demand
        head = os.pread(self._file.fileno(), 1 << 16, 0)
        skip = len(BOM) if head.startswith(BOM) else 0
        self._array = head[skip:].lstrip()[:1] == b"["
        self._start, self._end, self._number = self._index_array(skip) if self._array else self._index_lines(skip)

    def __len__(self) -> int:
        return len(self._start)

    def where(self, index: int) -> str:
        """`file:row`, counted from 1: the line of a JSON Lines file, the element of an array."""
        return f"{self.path}:{self._number[index]}"

    def __getitem__(self, index: int) -> Any:
        """Record `index` (from 0), parsed; BadRow when it is not JSON."""
        start, end = int(self._start[index]), int(self._end[index])
        try:
            return parsed_json(os.pread(self._file.fileno(), end - start, start))
        except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            raise BadRow(self.where(index), f"not JSON ({error})") from None

    def some(self, index: int, keys: Sequence[str]) -> dict[str, Any]:
        """What record `index` has of these keys; BadRow when it is not JSON, {} when it is no object."""
        record = self[index]
        return {key: record[key] for key in keys if key in record} if isinstance(record, dict) else {}

    def identity(self, index: int, keys: Sequence[str]) -> tuple[str, ...]:
        """What tells the images under the first of these keys that has any from those of another record: as they are written."""
        values = [value for value in self.some(index, keys).values() if not absent(value)]
        return as_written(values[0], self.where(index)) if values else ()

    def pictures(self, index: int, keys: Sequence[str]) -> tuple[str, ...]:
        """The full names of the files under the first of these keys that has any; other forms as they are written."""
        return tuple(full_name(name, self.folder) for name in self.identity(index, keys))

    def _index_lines(self, skip: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        breaks, base = [], 0
        self._file.seek(0)
        while chunk := self._file.read(CHUNK):
            breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + base)
            base += len(chunk)
        ends = np.concatenate([*breaks, [base]]).astype(np.int64)
        starts = np.concatenate([[skip], ends[:-1] + 1])
        keep = np.ones(len(ends), bool)
        for i in np.flatnonzero(ends - starts < 64):  # no row is this short: look whether the line is blank
            keep[i] = bool(os.pread(self._file.fileno(), max(int(ends[i] - starts[i]), 0), int(starts[i])).strip())
        return starts[keep], ends[keep], np.flatnonzero(keep) + 1

    def _index_array(self, skip: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # latin-1 maps every byte to one character, so positions in the text are byte offsets; the structure of JSON is ASCII.
        text = self.path.read_bytes().decode("latin-1")
        decoder = json.JSONDecoder()
        spans: list[tuple[int, int]] = []
        at = _past_blank(text, text.index("[", skip) + 1)
        while text[at : at + 1] != "]" or spans:
            try:
                _, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{self.path}: not a JSON array after {len(spans)} records ({error}); "
                    "a cut-off file must be written again, or saved as one record a line (.jsonl)"
                ) from None
            spans.append((at, end))
            at = _past_blank(text, end)
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise ValueError(
                    f"{self.path}: expected ',' or ']' at byte {at}, after {len(spans)} records; the array is damaged or cut off"
                )
            at = _past_blank(text, at + 1)
        if _past_blank(text, at + 1) != len(text):
            raise ValueError(f"{self.path}: text after the end of the array, at byte {at + 1}; one array a file")
        table = np.array(spans, np.int64).reshape(-1, 2)
        return table[:, 0], table[:, 1], np.arange(1, len(table) + 1)


def _past_blank(text: str, at: int) -> int:
    blank = BLANK.match(text, at)
    assert blank is not None  # the pattern matches the empty text as well
    return blank.end()


def parsed_json(data: bytes) -> Any:
    """What UTF-8 bytes say as JSON; ValueError or RecursionError for what is none, or has a key twice."""
    return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once each: of two values Python would take the last, in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shortened(next(name for name in names if names.count(name) > 1), 40)!r} is there twice")
    return found


def recover(path: Path) -> list[Any]:
    """The records of a JSON Lines file that is about to be appended to; [] when there is none. A last line cut off by a kill is removed.

    Raises ValueError when another line is not JSON: the file is not one that this project wrote."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    try:
        records = [json.loads(line) for line in data[:whole].splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} cannot be continued, a line of it is not JSON ({error}); move it away or name another file") from None
    if whole < len(data):
        os.truncate(path, whole)
    return records
