"""Random access to the rows of parquet files and `datasets` folders, without holding them in memory.

Parquet can only be read a row group at a time (7 ms a row with groups of 1,000 images, 800 ms with one group), so each file is rewritten
once as an Arrow file, streamed in small batches, and memory-mapped from then on. Against datasets.load_dataset on 100,000 rows in 1 GB this
opens in a tenth of the time and peaks at 155 MB instead of 1.2 to 3.4 GB (it reads whole row groups). The copy lives in
$XDG_CACHE_HOME/actial_fast (default ~/.cache/actial_fast) under a name made from the file's content (of a file above 64 MB from its size,
time, footer and 256 places in it); it can be deleted at will. It carries a checksum for each row, and is made anew when it is damaged,
wherever that is.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import threading
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from actial_fast.data.sources import cache
from actial_fast.data.sources.content import content, glimpse_of
from actial_fast.data.sources.places import SPLIT_OF, by_split, files_of, of_split
from actial_fast.data.sources.row import BadRow
from actial_fast.data.sources.told import told

BATCH = 256  # rows converted at a time: memory while converting, and the unit of the Arrow file
SUM = "\0sum"  # the copy's column of checksums
UNREADABLE = (pa.ArrowException, ValueError, OverflowError)  # text that is not UTF-8, times that Python does not have


class Table:
    """Rows of a parquet file, of those that a pattern names, of a folder's (in name order), or a folder written by datasets.save_to_disk.

    split: which one, of a folder that holds several. Raises ValueError when the path is none of these, a file is damaged, the files'
    columns differ, or the split is not told.
    """

    def __init__(self, path: Path, split: str = ""):
        self.path = path
        files = _files(path, split)
        self.folder = path if path.is_dir() else files[0].parent
        self._parts = [_Part(file) for file in files]
        self._batches = [(part, n) for part in self._parts for n in range(len(part.batches))]
        first = next((part for part in self._parts if part.batches), None)
        self.column_names: list[str] = first.names if first else []
        for part in self._parts:
            if part.batches and part.names != self.column_names:
                raise ValueError(f"{part.file}: columns {part.names}, but {first and first.file} has {self.column_names}")
        # row number at which each batch starts
        self._first = np.cumsum([0] + [len(batch) for part in self._parts for batch in part.batches])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index` as Python values; an image is bytes or {"bytes", "path"}, still encoded. BadRow when a value cannot be read."""
        part, number, at = self._where(index)
        for _ in range(2):
            batch = part.whole(number)
            known = batch.column(SUM)[at].as_py() if SUM in batch.schema.names else None
            if known is None:
                return self._read(batch, at, index, self.column_names)
            with contextlib.suppress(BadRow):  # what could be read once
                if _sum(row := self._read(batch, at, index, self.column_names)) == known:
                    return row
            part.renew(batch)
        raise BadRow(self.where(index), f"the copy of {part.file} is damaged again as soon as it is made; look after the disk")

    def some(self, index: int, keys: Sequence[str]) -> dict[str, Any]:
        """What row `index` has in these columns, without touching the others."""
        batch, at = self._place(index)
        return self._read(batch, at, index, keys)

    def _read(self, batch: pa.RecordBatch, at: int, index: int, keys: Sequence[str]) -> dict[str, Any]:
        try:
            return {key: batch.column(key)[at].as_py() for key in keys if key in self.column_names}
        except UNREADABLE as error:
            raise BadRow(self.where(index), f"a value cannot be read ({error})") from None

    def identity(self, index: int, keys: Sequence[str]) -> tuple[pa.Scalar, ...]:
        """What row `index` has in the first of these columns that there is, left in its place: () when it is null, an empty list or a list
        with a null.

        Two are equal when all in them is (of {"bytes", "path"}, both); bytes are read for that only when they are equally long.
        """
        column = next((key for key in keys if key in self.column_names), None)
        if column is None:
            return ()
        batch, at = self._place(index)
        cell = batch.column(column)[at]
        usable = cell.is_valid and (not isinstance(cell, pa.ListScalar) or (len(cell.values) and not cell.values.null_count))
        return (cell,) if usable else ()

    def pictures(self, index: int, keys: Sequence[str]) -> tuple[str, ...]:
        """For each image under the first of these columns a digest of its size, beginning and end, or its file's full name."""
        found: list[str] = []
        for cell in self.identity(index, keys):
            for one in cell.values if isinstance(cell, pa.ListScalar) else [cell]:
                given = [one[name] for name in ("bytes", "path") if name in one.type.names] if isinstance(one, pa.StructScalar) else [one]
                value = next((each for each in given if each.is_valid), None)
                if isinstance(value, pa.BinaryScalar | pa.LargeBinaryScalar) and not isinstance(
                    value, pa.StringScalar | pa.LargeStringScalar
                ):
                    found.append(glimpse_of(memoryview(value.as_buffer())))
                elif value is not None:
                    found.append(os.path.normpath(self.folder / str(value)))
        return tuple(found)

    def where(self, index: int) -> str:
        """`file:row`, counted from 1."""
        return f"{self.path}:{index + 1}"

    def _place(self, index: int) -> tuple[pa.RecordBatch, int]:
        part, number, at = self._where(index)
        return part.whole(number), at

    def _where(self, index: int) -> tuple[_Part, int, int]:
        """The file of a row, the number of its batch there, and its place in that."""
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        if not 0 <= number < len(self._batches):
            raise IndexError(index)
        return *self._batches[number], index - int(self._first[number])


class _Part:
    """The rows of one of the user's files, mapped: of a parquet file its copy, which carries a checksum for each row. Threads share it."""

    def __init__(self, file: Path):
        self.file, self._lock = file, threading.Lock()
        self._valid: set[int] = set()
        self._open()

    def _open(self) -> None:
        if self.file.suffix == ".arrow":
            self.batches = _mapped(self.file, self.file)
        else:
            try:
                self.batches = _mapped(_converted(self.file), self.file)
            except ValueError:
                self.batches = _mapped(_converted(self.file, anew=True), self.file)
        self.names = [name for name in self.batches[0].schema.names if name != SUM] if self.batches else []

    def whole(self, number: int) -> pa.RecordBatch:
        """A batch, once all in it but the values was seen to be sound: pyarrow reads where a damaged offset points. ValueError for a
        damaged one that is no copy."""
        batch = self.batches[number]
        if number in self._valid:
            return batch
        for column in batch.columns:
            try:
                column.validate(full=True)
            except pa.ArrowInvalid as error:
                if "UTF8" in str(error).upper():  # some row's, and told when that is read
                    continue
                if SUM not in batch.schema.names:
                    raise ValueError(f"{self.file}: not a readable table ({error})") from None
                self.renew(batch)
                batch = self.batches[number]
                break
        self._valid.add(number)
        return batch

    def renew(self, damaged: pa.RecordBatch) -> None:
        """Make the copy anew that this batch is of, unless another thread has."""
        with self._lock:
            if any(damaged is batch for batch in self.batches):
                told("a damaged copy of a table: it is made anew", str(self.file))
                self.batches = _mapped(_converted(self.file, anew=True), self.file)
                self._valid.clear()


def _files(path: Path, split: str) -> list[Path]:
    """The user's files, one or a folder's in order, of a folder with several splits those of one. ValueError for a folder without, or with
    several and none named."""
    if not path.is_dir():
        return files_of(path)
    if (state := path / "state.json").exists():
        return [path / part["filename"] for part in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    splits = _splits(path)
    if not splits:
        others = sorted(file.name for pattern in ("*.json", "*.jsonl") for file in path.glob(pattern))
        below = sorted({file.parent for file in path.glob("*/*.parquet")} | {file.parent for file in path.glob("*/*/*.parquet")})
        hint = f"; give {below[0]}" if below else f"; give one of its files, {', '.join(others[:5])}" if others else ""
        raise ValueError(f"{path} holds neither .parquet files nor a dataset written by datasets.save_to_disk{hint}")
    return [part for file in of_split(splits, split, path) for part in (_files(file, "") if file.is_dir() else [file])]


def _splits(path: Path) -> dict[str, list[Path]]:
    """A folder's data by split: its files, or those in its data/, as a hub's snapshot has them; or subfolders that have a split's name."""
    if (written := path / "dataset_dict.json").exists():
        return {name: [path / name] for name in json.loads(written.read_text(encoding="utf-8"))["splits"]}
    if files := sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet")):
        return by_split(files)
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for folder in sorted(path.iterdir()):
        if folder.name.lower() in SPLIT_OF and (any(folder.glob("*.parquet")) or (folder / "state.json").exists()):
            found[SPLIT_OF[folder.name.lower()]].append(folder)
    return dict(found)


def _mapped(path: Path, file: Path) -> list[pa.RecordBatch]:
    try:
        return _read(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a readable table ({error})") from None


def _converted(path: Path, *, anew: bool = False) -> Path:
    """The Arrow copy of a parquet file, made when it is missing, the file has changed, or it is to be `anew`."""
    folder = cache.folder()
    try:
        target = folder / f"{content(path)}-sums.arrow"
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if target.exists() and not anew:
        return target
    temporary = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".part")
        with os.fdopen(handle, "wb") as sink:
            with pa.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as source:  # buffered: one group may be the whole file
                schema = source.schema_arrow.append(pa.field(SUM, pa.uint32()))
                with pa.ipc.new_file(sink, schema) as writer:
                    for batch in source.iter_batches(BATCH):
                        sums = pa.array([_sum_of(batch, at) for at in range(len(batch))], pa.uint32())
                        writer.write_batch(pa.record_batch([*batch.columns, sums], schema=schema))
        os.replace(temporary, target)  # atomic: ranks that convert at the same time each put the same file there
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read as parquet or copied to {folder} ({error}); XDG_CACHE_HOME names another folder"
        ) from None
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
    return target


def _sum_of(batch: pa.RecordBatch, at: int) -> int | None:
    """The checksum of a row; None for one that cannot be read, whose reason is told when it is."""
    try:
        return _sum({name: batch.column(name)[at].as_py() for name in batch.schema.names})
    except UNREADABLE:
        return None


def _sum(value: Any, start: int = 0) -> int:
    """A checksum of Python values, of the same ones the same."""
    if isinstance(value, dict):
        return functools.reduce(lambda so_far, item: _sum(item[1], zlib.crc32(item[0].encode(), so_far)), value.items(), start)
    if isinstance(value, list):
        return functools.reduce(lambda so_far, each: _sum(each, so_far), value, zlib.crc32(b"[", start))
    return zlib.crc32(value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass"), start)


def _read(path: Path) -> list[pa.RecordBatch]:
    mapped = pa.memory_map(str(path))
    try:
        reader = pa.ipc.open_file(mapped)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except pa.ArrowInvalid:  # datasets writes the streaming form
        mapped.seek(0)
        return list(pa.ipc.open_stream(mapped))
