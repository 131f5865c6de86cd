"""Opening a data source by its format, and checking it as a whole.

A source is anything with `__len__()`, `__getitem__(i) -> Row` (BadRow for a malformed row), `kind(i) -> str` and `images(i) -> tuple`;
images stay encoded until picture.decode. One file per format: own, sharegpt, sat, verl, easyr1, webdataset; others are named as
module:Reader.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from actial_fast.data.sources.files import writing
from actial_fast.data.sources.jsonl import recover
from actial_fast.data.sources.own import KEYS, OURS
from actial_fast.data.sources.picture import decode
from actial_fast.data.sources.places import exists, place
from actial_fast.data.sources.plugins import find
from actial_fast.data.sources.reader import LOOKED_AT, Reader, is_table, open_records
from actial_fast.data.sources.row import BadRow, Row
from actial_fast.data.sources.shards import is_shards
from actial_fast.data.sources.task import find_task, prepared

FORMATS = {  # imported on first use, because parquet needs pyarrow
    "jsonl": "actial_fast.data.sources.own:JsonlSource",
    "sharegpt": "actial_fast.data.sources.sharegpt:ShareGptSource",
    "sat": "actial_fast.data.sources.sat:SatSource",
    "verl": "actial_fast.data.sources.verl:VerlSource",
    "easyr1": "actial_fast.data.sources.easyr1:EasyR1Source",
    "webdataset": "actial_fast.data.sources.webdataset:WebDatasetSource",
}


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture."""

    path: str
    """The file: JSON, JSON Lines, parquet or a tar shard; several parquet files or shards by a pattern (train-{000..019}.tar, *.parquet) or
    their folder; a folder written by datasets.save_to_disk; or the address of such files (hf://, https://), which are fetched once."""
    format: str = "auto"
    """jsonl (this project's rows), sharegpt, sat, verl, easyr1, webdataset (texts and classes beside pictures), or module:Reader for your
    own; auto is the task's, or else looks at the file's name and columns."""
    task: str = ""
    """What the rows are for: jigsaw, jigsaw_turns, sparkle, boxes, or module:object for your own; empty for questions with an answer."""
    weight: float = 1.0
    """This source's share of the mixture, relative to the other sources' weights."""
    system: str = ""
    """System prompt that every row gets; empty keeps the row's own."""
    letters: bool = False
    """SAT only: offer the options as A., B., ... and take the letter for the answer, instead of the option's text."""
    kinds: tuple[str, ...] = ()
    """Question types to keep; empty keeps all."""
    limit: int = 0
    """Keep only the first so many rows (of those that `kinds` keeps and `skip` leaves); 0 keeps all."""
    split: str = ""
    """Of a folder that holds several, by the names of its files or subfolders: train, validation or test."""
    skip: int = 0
    """Leave out the first so many rows (of those that `kinds` keeps): what another source with this for its `limit` holds out."""


class Source(Protocol):
    """Random access to rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        """Row `index`, checked, images still encoded; BadRow when it is malformed."""
        ...

    def kind(self, index: int) -> str:
        """The question type of row `index`, read as cheaply as the format allows."""
        ...

    def images(self, index: int) -> tuple[Any, ...]:
        """What tells the images of row `index` from those of its neighbours, read as cheaply as the format allows.

        Equal to another row's only if both have the same images in the same order; () when the row has none or it cannot be told."""
        ...


@dataclass(frozen=True)
class View:
    """Some rows of a source (`indices`, int64), of one task and under one system prompt."""

    source: Reader
    indices: np.ndarray
    system: str
    task: str = ""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Row:
        row = self.source[int(self.indices[index])]
        return (prepared(row, self.task) if self.task else row).with_system(self.system)

    def kind(self, index: int) -> str:
        return self.source.kind(int(self.indices[index]))

    def images(self, index: int) -> tuple[Any, ...]:
        return self.source.images(int(self.indices[index]))


def open_source(config: SourceConfig) -> View:
    """Open `config.path` and apply the filters.

    Returns a source: `len(source)` rows, `source[i]` a checked Row with encoded images, or BadRow naming file, row and reason.
    Raises ValueError when the path does not exist, the format is unknown or ambiguous, or no row is left.
    """
    path = place(config.path)
    if not exists(path):
        raise ValueError(
            f"data source {path} does not exist (looked from {Path.cwd()}); give the path of a .json, .jsonl, .parquet or .tar file, of a "
            "folder, or a pattern of files"
        )
    if config.split and not path.is_dir():
        raise ValueError(f"data source {path}: split is for folders, and this is a file; take it away")
    try:
        name = find_task(config.task).format if config.format == "auto" else config.format
    except ValueError as error:
        raise ValueError(f"data source {path}: {error}") from error
    name = detect_format(path, config.split) if name == "auto" else name
    if config.limit < 0:
        raise ValueError(f"data source {path}: limit is {config.limit}; use 0 for all rows or the number of rows to keep")
    if config.skip < 0:
        raise ValueError(f"data source {path}: skip is {config.skip}; use 0 for all rows or the number of rows to leave out")
    if config.letters and name != "sat":
        raise ValueError(f"data source {path}: letters is for SAT's options, and this is {name}")
    extra: dict[str, Any] = ({"letters": True} if config.letters else {}) | ({"split": config.split} if config.split else {})
    source = _reader(name, path)(path, **extra)
    indices = _of_kinds(source, config.kinds, path) if config.kinds else np.arange(len(source))
    there = len(indices)
    indices = indices[config.skip :]
    if config.limit:
        indices = indices[: config.limit]
    if not len(indices):
        left = f" behind the {config.skip} that skip leaves out; it has {there}" if config.skip and there else ""
        raise ValueError(f"data source {path} ({name}) has no rows{left}")
    return View(source, indices, config.system, config.task)


def _reader(name: str, path: Path) -> type[Reader]:
    """The class that reads a format."""
    try:
        found = find("format", name, FORMATS)
    except ValueError as error:
        raise ValueError(f"data source {path}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Reader)):
        raise ValueError(f"data source {path}: format {name!r} is no Reader of actial_fast.data.sources.reader")
    return found


def detect_format(path: Path, split: str = "") -> str:
    """The format of a file or folder, from its suffix and its columns or the keys of its first records; ValueError if they do not tell."""
    hint = "; set format to one of " + ", ".join(FORMATS)
    shards = is_shards(path)
    if not (shards or is_table(path)) and path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"data source {path}: the suffix {path.suffix!r} does not tell the format{hint}")
    records = open_records(path, split)
    keys, parts = set(records.column_names), False
    if not keys and len(records):
        try:
            first = records[0]
        except BadRow as error:
            raise ValueError(f"data source {path}: the first record is {error.reason}, so the format cannot be told{hint}") from None
        if not isinstance(first, dict):
            raise ValueError(f"data source {path}: the first record is not an object, so the format cannot be told{hint}")
        keys, parts = set(first), _in_parts(first)
        for index in range(1, min(LOOKED_AT, len(records))):
            with contextlib.suppress(BadRow):  # its own error, once it is drawn
                record = records[index]
                keys |= set(record) if isinstance(record, dict) else set()
                parts = parts or _in_parts(record)
    if {"prompt", "reward_model"} <= keys:
        return "verl"
    if "question" in keys and keys & {"answers", "answer_choices", "correct_answer", "correct_answer_idx"}:
        return "sat"
    if {"problem", "answer"} <= keys and not keys & {"messages", "conversations"}:
        return "easyr1"
    ours = not is_table(path) and path.suffix != ".json" and "messages" in keys and keys & set(OURS) and set(first) <= set(KEYS)
    if "conversations" in keys or ("messages" in keys and not ours and (shards or path.suffix != ".jsonl" or "system" in keys)):
        return "sharegpt"  # our own rows are one a line in .jsonl, or a member of a shard
    if ours:
        return "jsonl"
    if "messages" in keys and parts:
        return "sharegpt"  # OpenAI's; ours are written with texts
    if shards and keys & {"txt", "cls"}:
        return "webdataset"
    what = f"columns {sorted(keys)}" if is_table(path) else f"records with the keys {sorted(keys)}"
    either = " may be rows of ours or ShareGPT's" if "messages" in keys else " are no format's"
    raise ValueError(f"data source {path}: {what}{either}{hint}")


def _in_parts(record: Any) -> bool:
    """Whether a record's messages have content in parts."""
    messages = record.get("messages") if isinstance(record, dict) else None
    return isinstance(messages, list) and any(isinstance(each, dict) and isinstance(each.get("content"), list) for each in messages)


def _of_kinds(source: Source, kinds: tuple[str, ...], path: Path) -> np.ndarray:
    """Indices of the rows whose type is in `kinds`. An unreadable row stays in: it must be reported, not filtered away."""
    seen: Counter[str] = Counter()
    keep = []
    for index in range(len(source)):
        try:
            kind = source.kind(index)
        except BadRow:
            keep.append(index)
            continue
        seen[kind] += 1
        if kind in kinds:
            keep.append(index)
    if missing := [kind for kind in kinds if not seen[kind]]:
        raise ValueError(
            f"data source {path}: no row of kind {', '.join(missing)}; it has {', '.join(f'{k!r}' for k in sorted(seen)) or 'no kinds'}"
        )
    return np.array(keep, np.int64)


def runs(source: Source) -> np.ndarray:
    """Where each run of rows with the same images begins, and at last the number of rows: int64 (runs + 1,), ascending from 0.

    A run is as many adjacent rows as have equal, known images; a row without images, or one that cannot be read, is a run of its own.
    """
    starts, last = [], ()
    for index in range(len(source)):
        try:
            images = source.images(index)
        except BadRow:
            images = ()
        if not images or images != last:
            starts.append(index)
        last = images
    return np.array([*starts, len(source)], np.int64)


@dataclass(frozen=True)
class Scan:
    """What `scan` found. rows: rows looked at; bad: every bad row, in order; kinds: good rows per question type."""

    rows: int
    bad: tuple[BadRow, ...]
    kinds: dict[str, int]

    @property
    def reasons(self) -> dict[str, int]:
        """Bad rows per reason, commonest first; figures and file names are left out of the reason so that like counts with like."""
        return dict(Counter(outline(error.reason) for error in self.bad).most_common())


def scan(source: Source, door: Callable[[Row, int], object] | None = None, *, progress: Callable[[int], None] | None = None) -> Scan:
    """Read every row of `source` once and report all bad rows instead of raising.

    Args:
        source: from open_source.
        door: what a row has to pass, called with it and its number; what it raises as BadRow is reported. None: its images are decoded,
            each distinct file once.
        progress: called with the number of rows done after each row.
    """
    bad: list[BadRow] = []
    kinds: Counter[str] = Counter()
    look = door or _decoder()
    for index in range(len(source)):
        try:
            row = source[index]
            look(row, index)
            kinds[row.kind] += 1
        except BadRow as error:
            bad.append(error)
        if progress:
            progress(index + 1)
    return Scan(len(source), tuple(bad), dict(kinds))


def _decoder() -> Callable[[Row, int], None]:
    verdicts: dict[Path, str] = {}  # image file -> why it is bad, "" when it decodes

    def look(row: Row, index: int) -> None:
        for image in row.images:
            if not isinstance(image, Path):
                decode(image, row.where)
                continue
            if image not in verdicts:
                try:
                    decode(image, row.where)
                    verdicts[image] = ""
                except BadRow as error:
                    verdicts[image] = error.reason
            if verdicts[image]:
                raise BadRow(row.where, verdicts[image])

    return look


def outline(reason: str) -> str:
    """A bad row's reason without figures and file names, so that like counts with like."""
    reason = re.sub(r"^image .*? (?=does not exist|is |cannot be decoded|cannot be read)", "image ", reason)
    return re.sub(r"\d+", "#", re.sub(r"'[^']*'|<_io\S+ object at \S+>", "...", reason))


class Rejects:
    """Appends each distinct bad row once to a JSON Lines file ({"where", "reason"}); rows already in the file count as known.

    Args:
        path: the file, or None to keep no record. With several ranks each writes its own: rejects.jsonl -> rejects.rank3.jsonl.
    """

    def __init__(self, path: Path | None, rank: int = 0, world: int = 1):
        self.path = path.with_suffix(f".rank{rank}{path.suffix}") if path and world > 1 else path
        self._known = {record["where"] for record in recover(self.path)} if self.path else set()

    def add(self, error: BadRow) -> None:
        """Record one bad row; nothing happens when it is known."""
        if error.where in self._known:
            return
        self._known.add(error.where)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"where": error.where, "reason": error.reason}) + "\n")
