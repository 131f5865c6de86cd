"""From a benchmark's files to its items: what their fields say, which of a set's layouts a file has, and where on this machine a set
lies."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from actial_fast.data.sources.fields import absent, kind_of, one_image, parsed, text
from actial_fast.data.sources.reader import Records, open_records
from actial_fast.data.sources.row import IMAGE_TAG, BadRow, shortened
from actial_fast.evaluation.items import Item, Items, Opener

KINDS = (".parquet", ".arrow", ".json", ".jsonl", ".tsv", ".csv")
LABEL = re.compile(r"\(?([A-Z])(?:[).:]|$)\s*")


@dataclass(frozen=True)
class Record:
    """One record of a benchmark's file, and how its fields are read. BadRow, naming `where`, for what is not what it should be.

    values: column or key -> value. where: `file:row`. number: from 1, in its file. folders: where its images' paths may begin. row_of: the
    record with an index, for VLMEvalKit's images that stand in another row.
    """

    values: Mapping[str, Any]
    where: str
    number: int
    folders: tuple[Path, ...]
    row_of: Callable[[str], Mapping[str, Any] | None] = field(default=lambda _: None)

    def has(self, key: str) -> bool:
        """Whether the field says something; "nan", as pandas writes what is missing, does not."""
        value = self.values.get(key)
        return not absent(value) and not (isinstance(value, str) and value.strip().lower() == "nan")

    def text(self, *keys: str) -> str:
        """The first of these fields that says something, as text, also where it is a number; '' when none does."""
        key = next((key for key in keys if self.has(key)), None)
        if key is None:
            return ""
        value = self.values[key]
        if isinstance(value, int | float) and not isinstance(value, bool):
            return f"{value:.15g}"
        return text(value, f"`{key}`", self.where).strip()

    def needed(self, *keys: str) -> str:
        """As `text`, but BadRow when none does."""
        if found := self.text(*keys):
            return found
        raise BadRow(self.where, f"no `{keys[0]}`")

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; numbers in it become text, a single text with several lines is split into them."""
        value = parsed(self.values.get(key), f"`{key}`", self.where)
        if absent(value):
            return ()
        if isinstance(value, str):
            value = value.splitlines()
        if not isinstance(value, list | tuple):
            raise BadRow(self.where, f"`{key}` is {kind_of(value)}, not a list")
        return tuple(Record({"": each}, self.where, self.number, ()).text("") for each in value if not absent(each))

    def images(self, *keys: str) -> tuple[Path | bytes, ...]:
        """The images of these fields, each one or a list: paths, bytes, {"bytes", "path"} or base64 text; BadRow when there is none."""
        found: list[Path | bytes] = []
        for key in keys:
            value = self.values.get(key)
            if isinstance(value, str) and len(value) <= 64 and (other := self.row_of(value.strip())):
                value = other.get(key)  # all of another row's
            value = parsed(value, f"`{key}`", self.where)
            for each in [] if absent(value) else value if isinstance(value, list | tuple) else [value]:
                found.append(self._image(each, key, len(found) + 1))
        if not found:
            raise BadRow(self.where, f"no image in {' or '.join(f'`{key}`' for key in keys)}")
        return tuple(found)

    def _image(self, value: Any, key: str, number: int) -> Path | bytes:
        if isinstance(value, str) and len(value) <= 64 and (other := self.row_of(value.strip())):
            return one_image(other.get(key), self.folders[0], self.where, number)
        first = one_image(value, self.folders[0], self.where, number)
        if isinstance(first, bytes) or first.exists():
            return first
        others = (one_image(value, folder, self.where, number) for folder in self.folders[1:])
        return next((image for image in others if isinstance(image, Path) and image.exists()), first)


def placed(prompt: str, images: Sequence[Any], where: str) -> str:
    """A prompt with a place for each image: its own places where it has as many, else all ahead of it; BadRow for another number."""
    tags = prompt.count(IMAGE_TAG)
    if tags not in (0, len(images)):
        raise BadRow(where, f"{tags} {IMAGE_TAG} places in the prompt but {len(images)} images")
    return prompt if tags else IMAGE_TAG * len(images) + prompt


def letter_of(answer: str, options: Sequence[str], where: str) -> str:
    """The letter of an answer that is written as "B", "b", "(B)", "B. text" or the option's text; BadRow for none."""
    answer = answer.strip()
    letters = ascii_uppercase[: len(options) or None]
    label = LABEL.match(answer.upper() if len(answer) == 1 else answer)
    if label and label.group(1) in letters:
        return label.group(1)
    texts = [option.strip().casefold() for option in options]
    if texts.count(answer.casefold()) == 1:
        return letters[texts.index(answer.casefold())]
    raise BadRow(where, f"the answer {shortened(answer, 60)!r} is none of the options {shortened(list(options), 120)}")


def unlettered(options: Sequence[str]) -> tuple[str, ...]:
    """The options without their letters, where all have the letters A, B, ... in this order and a text behind it."""
    labels = [LABEL.match(option) for option in options]
    texts = tuple(option[label.end() :].strip() if label else "" for option, label in zip(options, labels, strict=True))
    inorder = all(label and label.group(1) == letter for label, letter in zip(labels, ascii_uppercase, strict=False))
    return texts if inorder and all(texts) else tuple(options)


@dataclass(frozen=True)
class Layout:
    """One way in which a set's files are written. columns: which they all have, by which it is told. item: the item of a record."""

    columns: tuple[str, ...]
    item: Callable[[Record], Item]


def opener(
    title: str,
    page: str,
    layouts: Sequence[Layout],
    *,
    repos: Sequence[str] = (),
    files: Sequence[str] = (),
    tsv: Sequence[str] = (),
) -> Opener:
    """How a set is opened: from a file or folder that is named, else from VLMEvalKit's folder, else from the hub's local copy.

    layouts: tried in this order. repos: the owner's datasets on the Hugging Face Hub. files: patterns of the set's files in such a
    folder; the first that matches any is taken. tsv: VLMEvalKit's files, in $LMUData or ~/LMUData; all of them make the set."""

    def open_set(path: Path | None) -> Items:
        found = find_files(title, page, path, repos, files, tsv)
        snapshots = [snapshot for repo in repos if (snapshot := _snapshot(repo))]
        return _items([_File(file, layouts, title, snapshots) for file in found], path or found[0])

    return open_set


def find_files(title: str, page: str, path: Path | None, repos: Sequence[str], files: Sequence[str], tsv: Sequence[str]) -> list[Path]:
    """The files of a set in a file or folder, or on this machine; ValueError, saying where its owner publishes it, when there are none."""
    found = _below(path, files, tsv) if path else _on_this_machine(repos, files, tsv)
    if not found and path:
        raise ValueError(f"{title}: {path} has none of {', '.join((*files, *tsv))}; its owner publishes it at {page}")
    if not found:
        raise ValueError(
            f"{title} is not on this machine; its owner publishes it at {page}. Download it"
            + (f" (hf download {repos[0]} --repo-type dataset)" if repos else "")
            + " and give its folder or file, as NAME=PATH"
        )
    return found


class _File:
    """The items of one file."""

    def __init__(self, path: Path, layouts: Sequence[Layout], title: str, snapshots: Sequence[Path]) -> None:
        self.records = open_records(path)
        self._folders = tuple(dict.fromkeys((self.records.folder, *self.records.folder.parents[:2], *snapshots)))
        self._rows: dict[str, int] | None = None
        if not len(self.records):
            raise ValueError(f"{title}: {path} has no rows")
        names = set(_names(self.records))
        layout = next((each for each in layouts if set(each.columns) <= names), None)
        if layout is None:
            wanted = " or ".join(f"({', '.join(each.columns)})" for each in layouts)
            raise ValueError(f"{title}: {path} has the columns {sorted(names)}; expected {wanted}")
        self._layout = layout

    def __len__(self) -> int:
        return len(self.records)

    def item(self, index: int) -> Item:
        """Item `index`; BadRow when its record is none."""
        values, where = self.records[index], self.records.where(index)
        if not isinstance(values, Mapping):
            raise BadRow(where, "not an object")
        return self._layout.item(Record(values, where, index + 1, self._folders, self._row_of))

    def _row_of(self, index: str) -> Mapping[str, Any] | None:
        """The record whose `index` is this one."""
        if "index" not in self.records.column_names:
            return None
        if self._rows is None:
            self._rows = {}
            for number in range(len(self.records)):
                try:
                    self._rows.setdefault(str(self.records.some(number, ["index"]).get("index")), number)
                except BadRow:  # it is told when it is asked for
                    continue
        return self.records[self._rows[index]] if index in self._rows else None


def _names(records: Records) -> Sequence[str]:
    """The columns of a table; of JSON records the keys of the first that can be read."""
    if records.column_names:
        return records.column_names
    for index in range(min(len(records), 64)):
        try:
            record = records[index]
        except BadRow:
            continue
        if isinstance(record, Mapping):
            return list(record)
    return ()


def _items(files: Sequence[_File], path: Path) -> Items:
    ends = list(accumulate(map(len, files)))

    def get(index: int) -> Item:
        file = bisect_right(ends, index)
        return files[file].item(index - (ends[file - 1] if file else 0))

    return Items(path, ends[-1], get)


def _below(path: Path, files: Sequence[str], tsv: Sequence[str]) -> list[Path]:
    """The files that a path stands for: itself, or those of its folder that belong to the set."""
    if not path.exists():
        raise ValueError(f"{path} does not exist (looked from {Path.cwd()})")
    if path.is_file():
        if path.suffix not in KINDS:
            raise ValueError(f"{path}: the suffix {path.suffix!r} is none of {', '.join(KINDS)}")
        return [path]
    for pattern in files:
        if found := sorted(path.glob(pattern)):
            return found
    if found := [path / name for name in tsv if (path / name).is_file()]:
        return found
    return [path] if any((path / name).exists() for name in ("state.json", "dataset_dict.json")) or any(path.glob("*.parquet")) else []


def _on_this_machine(repos: Sequence[str], files: Sequence[str], tsv: Sequence[str]) -> list[Path]:
    lmu = Path(os.environ.get("LMUData") or Path.home() / "LMUData")
    if tsv and all((lmu / name).is_file() for name in tsv):
        return [lmu / name for name in tsv]
    found = (_below(snapshot, files, ()) for repo in repos if (snapshot := _snapshot(repo)))
    return next((each for each in found if each), [])


def _snapshot(repo: str) -> Path | None:
    """The folder of the hub's local copy of a dataset, None where there is none; nothing is downloaded."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        return Path(snapshot_download(repo, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        return None
