"""JSON records by byte offset: this project's JSONL rows, and the random access that every JSON source shares.

Only the offsets stay in memory (24 bytes a row); a row is read and parsed when it is asked for, so a file may be larger than RAM and
one bad line costs one row, not the file.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from actial_fast.data.sources.row import BadRow, Row

CHUNK = 1 << 24  # bytes read at a time while indexing
BLANK = re.compile(r"[ \t\r\n]*")
BOM = b"\xef\xbb\xbf"


class JsonRecords:
    """Random access to the records of a JSON Lines file, or of a file that holds one JSON array.

    Args:
        path: the file. A first character of `[` means one array; anything else means one record a line (blank lines are skipped).

    Raises ValueError when the file cannot be an array of records (cut off, or not JSON between two records).
    """

    def __init__(self, path: Path):
        self.path = path
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
            return json.loads(os.pread(self._file.fileno(), end - start, start).decode("utf-8"))
        except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            raise BadRow(self.where(index), f"not JSON ({error})") from None

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


class JsonlSource:
    """This project's own rows (row.Row.from_json); image paths are relative to the file's folder."""

    def __init__(self, path: Path):
        self._records = JsonRecords(path)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Row:
        """Row `index`; BadRow when it is not a row."""
        where = self._records.where(index)
        try:
            return Row.from_json(self._records[index], self._records.path.parent, where)
        except (TypeError, AttributeError) as error:  # a number where a list belongs, and the like
            raise BadRow(where, f"a field of the wrong type ({error})") from None

    def kind(self, index: int) -> str:
        """The question type of row `index`, without checking the rest of it; BadRow when it is not JSON."""
        record = self._records[index]
        return str(record.get("kind", "")) if isinstance(record, dict) else ""

    def images(self, index: int) -> tuple[str, ...]:
        """The image paths of row `index` as they are written, () when it has no list of them; BadRow when it is not JSON."""
        record = self._records[index]
        images = record.get("images") if isinstance(record, dict) else None
        return tuple(str(image) for image in images) if isinstance(images, list) else ()
