"""Random access to the samples of tar files in WebDataset's convention.

Members that stand together and have a name in common up to its first dot are one sample: 000.json, 000.0.jpg, 000.1.jpg. Where each member
lies is found once, by reading the headers, and kept in $XDG_CACHE_HOME/actial_fast under a name made from the file's content; after that a
sample is a few reads, so that shuffling, resuming and sharing out among ranks are exact, as for any other source.

A sample's record is the object in its `.json`, with what its other members hold under their suffix: `.txt` and `.cls` as text, NAME.txt and
NAME.json under NAME. Its pictures are its `images`, in order of their suffixes, numbers by their value; a record that names pictures gets
those members.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actial_fast.data.sources import cache
from actial_fast.data.sources.content import glimpse
from actial_fast.data.sources.fields import IMAGE_KEYS, absent, listed
from actial_fast.data.sources.jsonl import parsed_json
from actial_fast.data.sources.places import by_split, files_of, of_split
from actial_fast.data.sources.row import BadRow, shortened
from actial_fast.data.sources.told import told

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "heic", "avif")
TEXTS = ("txt", "cls")
COMPRESSED = re.compile(r"\.(tgz|tar\.(gz|bz2|xz|zst))$")
MEMBER = np.dtype([("at", np.int64), ("size", np.int64), ("suffix", np.int32)])


def is_shards(path: Path) -> bool:
    """Whether a path is a tar file, a pattern of them, or a folder that holds them and no table."""
    if path.is_dir():
        return any(path.glob("*.tar")) and not any(path.glob("*.parquet"))
    return path.suffix == ".tar" or bool(COMPRESSED.search(path.name))


class ShardRecords:
    """The samples of a tar file, of those that a pattern names, or of a folder's (of one `split` of it), shard by shard in order.

    Raises ValueError for a shard that is compressed or no tar file, and for a split that is not told. What is damaged inside of one costs
    the samples that it is part of.
    """

    column_names: tuple[str, ...] = ()
    """Of a table; samples need not have the same members."""

    def __init__(self, path: Path, split: str = ""):
        files = files_of(path)
        if path.is_dir():
            files = of_split(by_split(sorted(path.glob("*.tar"))), split, path)
        self.path, self.folder, self._files = path, files[0].parent, files
        shards = [_index(file) for file in files]
        self._first = np.cumsum([0, *(len(keys) for keys, *_ in shards)])
        self._shards = shards

    def __len__(self) -> int:
        return int(self._first[-1])

    def where(self, index: int) -> str:
        """`shard:key`."""
        shard, at = self._place(index)
        return f"{self._files[shard]}:{self._shards[shard][0][at]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The record of sample `index`, pictures as encoded bytes; BadRow when it is none."""
        where, members = self.where(index), self._members(index)
        record = self._said(index)
        pictures = {suffix: self._read(index, suffix) for suffix in _pictures(members)}
        if not pictures:
            return record
        for key in IMAGE_KEYS:
            if not absent(names := record.get(key)):
                record[key] = [_named(name, pictures, self._key(index), where) for name in listed(names, where)]
        if all(absent(record.get(key)) for key in IMAGE_KEYS):
            record["images"] = list(pictures.values())
        return record

    def some(self, index: int, keys: Sequence[str]) -> dict[str, Any]:
        """What the sample has of these keys, without its pictures."""
        record = self._said(index)
        return {key: record[key] for key in keys if key in record}

    def identity(self, index: int, keys: Sequence[str]) -> tuple[Any, ...]:
        """(): a sample has its own pictures, and whether they are another's as well would have to be read."""
        return ()

    def pictures(self, index: int, keys: Sequence[str]) -> tuple[str, ...]:
        """For each picture a digest of its size, beginning and end."""
        members, (shard, _) = self._members(index), self._place(index)
        with open(self._files[shard], "rb") as file:
            return tuple(glimpse(file.fileno(), *members[suffix]) for suffix in _pictures(members))

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a sample, and its place in that."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return shard, index - int(self._first[shard])

    def _key(self, index: int) -> str:
        shard, at = self._place(index)
        return self._shards[shard][0][at]

    def _members(self, index: int) -> dict[str, tuple[int, int]]:
        """Where a sample's members lie, first byte and size by suffix; BadRow where two have the same."""
        shard, at = self._place(index)
        _, starts, members, suffixes = self._shards[shard]
        found = {suffixes[m["suffix"]]: (int(m["at"]), int(m["size"])) for m in members[starts[at] : starts[at + 1]]}
        if len(found) < starts[at + 1] - starts[at]:
            counts = Counter(suffixes[m["suffix"]] for m in members[starts[at] : starts[at + 1]])
            raise BadRow(self.where(index), f"two members .{counts.most_common(1)[0][0]} of one sample")
        return found

    def _said(self, index: int) -> dict[str, Any]:
        """What a sample's members other than pictures say."""
        where, members = self.where(index), self._members(index)
        record: dict[str, Any] = {}
        if "json" in members:
            data = self._read(index, "json")
            try:
                value = parsed_json(data)
            except (ValueError, RecursionError) as error:
                raise BadRow(where, f"its .json is not JSON ({error})") from None
            if not isinstance(value, dict):
                raise BadRow(where, "its .json is not an object")
            record = value
        for suffix in members:
            name, _, form = suffix.rpartition(".")
            if suffix == "json" or form in PICTURES:
                continue
            if form not in (*TEXTS, "json"):
                told(f"members .{form} of shards are not read", where)
                continue
            try:
                data = self._read(index, suffix)
                value = parsed_json(data) if form == "json" else data.decode("utf-8-sig").strip()
            except (ValueError, RecursionError) as error:
                raise BadRow(where, f"its .{suffix} cannot be read ({error})") from None
            record.setdefault(name or form, value)
        record.setdefault("id", self._key(index))
        return record

    def _read(self, index: int, suffix: str) -> bytes:
        """A member's bytes; BadRow where they are not all there."""
        shard, _ = self._place(index)
        at, size = self._members(index)[suffix]
        try:
            with open(self._files[shard], "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, at)
        except OSError as error:
            raise BadRow(self.where(index), f"its .{suffix} cannot be read ({error.strerror})") from None
        if len(data) < size:
            raise BadRow(self.where(index), f"its .{suffix} is cut off: {len(data)} of {size} bytes are there")
        return data


Shard = tuple[list[str], np.ndarray, np.ndarray, list[str]]  # keys; where each one's members begin, (n + 1,); members, MEMBER; suffixes


def _index(file: Path) -> Shard:
    """Where the members of a shard's samples lie, as it was found before or is now."""
    if COMPRESSED.search(file.name):
        raise ValueError(f"{file}: compressed, and rows are drawn at random from everywhere in it; decompress it to .tar")
    kept = cache.folder() / f"{_name(file)}-members.npz"
    with contextlib.suppress(OSError, ValueError, KeyError):  # none, or a damaged one
        with np.load(kept) as found:
            keys, suffixes = json.loads(bytes(found["keys"])), json.loads(bytes(found["suffixes"]))
            return keys, found["starts"], found["members"], suffixes
    made = _walked(file)
    keys, starts, members, suffixes = made
    kept.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=kept.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as sink:
            keyed, suffixed = (np.frombuffer(json.dumps(of).encode(), np.uint8) for of in (keys, suffixes))
            np.savez(sink, starts=starts, members=members, keys=keyed, suffixes=suffixed)
        os.replace(temporary, kept)  # atomic: ranks that look at the same time each put the same there
    finally:
        Path(temporary).unlink(missing_ok=True)
    return made


def _name(file: Path) -> str:
    """A name that a shard has only as it is: where it lies, its size and time, its beginning and end."""
    try:
        with open(file, "rb", buffering=0) as opened:
            status = os.fstat(opened.fileno())
            digest = hashlib.blake2b(f"{file.resolve()}\0{status.st_mtime_ns}".encode("utf-8", "surrogateescape"), digest_size=12)
            digest.update(glimpse(opened.fileno(), 0, status.st_size).encode())
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _walked(file: Path) -> Shard:
    """The same by reading every header."""
    keys: list[str] = []
    starts: list[int] = []
    members: list[tuple[int, int, int]] = []
    suffixes: dict[str, int] = {}
    for name, at, size in _headers(file):
        folder, _, base = name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not (stem and dot) or (stem.startswith("__") and base.endswith("__")):  # hidden files, READMEs, WebDataset's own
            continue
        key = f"{folder}/{stem}" if folder else stem
        if not keys or keys[-1] != key:
            keys.append(key)
            starts.append(len(members))
        members.append((at, size, suffixes.setdefault(suffix.lower(), len(suffixes))))
    return keys, np.array([*starts, len(members)], np.int64), np.array(members, MEMBER), list(suffixes)


def _headers(file: Path) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and size of each plain file of a tar file. What lies between damaged headers is passed over, and told."""
    try:
        with tarfile.open(file, "r:", ignore_zeros=True) as shard:
            end = found = 0
            while True:
                try:
                    member = shard.next()
                except tarfile.TarError as error:
                    told(f"a shard is damaged or cut off ({error}): what is whole before that is read", str(file))
                    return
                if _damaged(file, end, member.offset if member else file.stat().st_size) and found:
                    told("a shard has damage between its members: what is whole is read", str(file))
                if member is None:
                    break
                found += 1
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                shard.members = []  # type: ignore[attr-defined]  # all of them would take a lot of memory
                if member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{file}: not a tar file ({error})") from None
    if not found and _damaged(file, 0, tarfile.BLOCKSIZE):
        raise ValueError(f"{file}: not a tar file (no header in it)")


def _damaged(file: Path, start: int, end: int) -> bool:
    """Whether there is something where only padding belongs."""
    if start >= end:
        return False
    with open(file, "rb") as opened:
        return bool(os.pread(opened.fileno(), min(end - start, 1 << 16), start).strip(b"\0"))


def _pictures(members: Mapping[str, Any]) -> list[str]:
    """The suffixes of pictures, in order: numbers by their value."""
    found = [suffix for suffix in members if suffix.rpartition(".")[2] in PICTURES]

    def order(suffix: str) -> tuple[Any, ...]:
        *names, form = suffix.split(".")
        return len(names) > 0, [(not name.isdecimal(), int(name) if name.isdecimal() else 0, name) for name in names], form

    return sorted(found, key=order)


def _named(name: Any, pictures: Mapping[str, bytes], key: str, where: str) -> Any:
    """The picture that a record names as a member: by its whole name, its file's name, or what is behind the key; other forms stay."""
    if not isinstance(name, str) or name[:5].lower() == "data:":
        return name
    base = key.rpartition("/")[2]
    for suffix, data in pictures.items():
        if name.lower() in (suffix, f".{suffix}", f"{base}.{suffix}".lower(), f"{key}.{suffix}".lower()) or name.lower().endswith(
            f"/{base}.{suffix}".lower()
        ):
            return data
    raise BadRow(where, f"image {shortened(name, 80)} is no member of its sample, which has {', '.join(f'.{s}' for s in pictures)}")
