"""Random access to the rows of parquet files and `datasets` folders, without holding them in memory.

Parquet can only be read a row group at a time (7 ms a row with groups of 1,000 images, 800 ms with one group), so each file is rewritten
once as an Arrow file, streamed in small batches, and memory-mapped from then on. Against datasets.load_dataset on 100,000 rows in 1 GB this
opens in a tenth of the time and peaks at 155 MB instead of 1.2 to 3.4 GB (it reads whole row groups). The copy lives in
$XDG_CACHE_HOME/actial_fast (default ~/.cache/actial_fast) under a name made from the file's content (of a file above 64 MB from its size,
time, footer and 256 places in it); it can be deleted at will, and is made anew when it is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from actial_fast.data.sources.content import content
from actial_fast.data.sources.row import BadRow

BATCH = 256  # rows converted at a time: memory while converting, and the unit of the Arrow file
PEEK = 2048  # bytes at either end by which an image is told from others
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class Table:
    """Rows of a parquet file, a folder of parquet files (in name order), or a folder written by datasets.save_to_disk.

    split: which one, of a folder that holds several. Raises ValueError when the path is none of these, a file is damaged, the files'
    columns differ, or the split is not told.
    """

    def __init__(self, path: Path, split: str = ""):
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self._batches: list[pa.RecordBatch] = []
        files = _files(path, split)
        for file in files:
            batches = _batches(file)
            if batches and self._batches and batches[0].schema.names != self._batches[0].schema.names:
                raise ValueError(f"{file}: columns {batches[0].schema.names}, but {files[0]} has {self._batches[0].schema.names}")
            self._batches += batches
        self._first = np.cumsum([0] + [len(batch) for batch in self._batches])  # row number at which each batch starts
        self.column_names: list[str] = self._batches[0].schema.names if self._batches else []

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index` as Python values; an image is bytes or {"bytes", "path"}, still encoded. BadRow when a value cannot be read."""
        return self.some(index, self.column_names)

    def some(self, index: int, keys: Sequence[str]) -> dict[str, Any]:
        """What row `index` has in these columns, without touching the others."""
        batch, at = self._place(index)
        try:
            return {key: batch.column(key)[at].as_py() for key in keys if key in self.column_names}
        except (pa.ArrowException, ValueError, OverflowError) as error:  # text that is not UTF-8, times that Python does not have
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
                    data = memoryview(value.as_buffer())
                    seen = f"{len(data)}".encode() + bytes(data[:PEEK]) + bytes(data[-PEEK:])
                    found.append(hashlib.blake2b(seen, digest_size=12).hexdigest())
                elif value is not None:
                    found.append(os.path.normpath(self.folder / str(value)))
        return tuple(found)

    def where(self, index: int) -> str:
        """`file:row`, counted from 1."""
        return f"{self.path}:{index + 1}"

    def _place(self, index: int) -> tuple[pa.RecordBatch, int]:
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        if not 0 <= number < len(self._batches):
            raise IndexError(index)
        return self._batches[number], index - int(self._first[number])


def _files(path: Path, split: str) -> list[Path]:
    """The user's files, one or a folder's in order, of a folder with several splits those of one. ValueError for a folder without, or with
    several and none named."""
    if not path.is_dir():
        return [path]
    if (state := path / "state.json").exists():
        return [path / part["filename"] for part in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    splits = _splits(path)
    if not splits:
        others = sorted(file.name for pattern in ("*.json", "*.jsonl") for file in path.glob(pattern))
        below = sorted({file.parent for file in path.glob("*/*.parquet")} | {file.parent for file in path.glob("*/*/*.parquet")})
        hint = f"; give {below[0]}" if below else f"; give one of its files, {', '.join(others[:5])}" if others else ""
        raise ValueError(f"{path} holds neither .parquet files nor a dataset written by datasets.save_to_disk{hint}")
    told = "; ".join(
        f"{name} ({', '.join(f.name for f in files[:3])}{', ...' if len(files) > 3 else ''})" for name, files in splits.items()
    )
    if split:
        wanted = SPLIT_OF.get(split.lower(), split)
        if wanted not in splits:
            raise ValueError(f"{path} has no split {split!r}; it holds {told}")
        chosen = splits[wanted]
    elif len(splits) > 1:
        raise ValueError(f"{path} holds files of several splits: {told}; set split to one of them, or give a file or a folder of one")
    else:
        (chosen,) = splits.values()
    return [part for file in chosen for part in (_files(file, "") if file.is_dir() else [file])]


def _splits(path: Path) -> dict[str, list[Path]]:
    """A folder's data by split: its files, or those in its data/, as a hub's snapshot has them; or subfolders that have a split's name."""
    if (written := path / "dataset_dict.json").exists():
        return {name: [path / name] for name in json.loads(written.read_text(encoding="utf-8"))["splits"]}
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for file in sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet")):
        words = re.findall(r"[a-z]+", file.stem.lower())
        found[next((SPLIT_OF[word] for word in words if word in SPLIT_OF), "no split")].append(file)
    for folder in sorted(path.iterdir()) if not found else ():
        if folder.name.lower() in SPLIT_OF and (any(folder.glob("*.parquet")) or (folder / "state.json").exists()):
            found[SPLIT_OF[folder.name.lower()]].append(folder)
    return dict(found)


def _batches(file: Path) -> list[pa.RecordBatch]:
    """The rows of a file, mapped; of a parquet file's copy, which is made anew when it is damaged."""
    if file.suffix == ".arrow":
        return _mapped(file, file)
    copy = _converted(file)
    try:
        return _mapped(copy, file)
    except ValueError:
        copy.unlink(missing_ok=True)
        return _mapped(_converted(file), file)


def _mapped(path: Path, file: Path) -> list[pa.RecordBatch]:
    try:
        return _read(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a readable table ({error})") from None


def _converted(path: Path) -> Path:
    """The Arrow copy of a parquet file, made when it is missing or the file has changed."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "actial_fast"
    try:
        target = folder / f"{content(path)}.arrow"
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as sink:
            with pa.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as source:  # buffered: one group may be the whole file
                with pa.ipc.new_file(sink, source.schema_arrow) as writer:
                    for batch in source.iter_batches(BATCH):
                        writer.write_batch(batch)
        os.replace(temporary, target)  # atomic: ranks that convert at the same time each put the same file there
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet or copied to {folder} ({error})") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def _read(path: Path) -> list[pa.RecordBatch]:
    mapped = pa.memory_map(str(path))
    try:
        reader = pa.ipc.open_file(mapped)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except pa.ArrowInvalid:  # datasets writes the streaming form
        mapped.seek(0)
        return list(pa.ipc.open_stream(mapped))
