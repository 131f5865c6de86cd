"""The files of image stores: one an image, what they take together, and making room among them.

A folder has a store for each way of resizing, and one limit for all of them. A file is complete from the moment it has its name. Its time
is when it was last used; least recently used ones leave first, those that somebody claims never.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from actial_fast.packing.claims import lock, opened

LOCKS = "claims"  # the file of a store whose bytes are locked
TAKEN = "taken"  # the file of a folder that says how many bytes its stores take
UNFINISHED = ".part"  # ends the name of a file that is being written, or was when its writer was killed
SPARE = 20  # making room leaves a part of this size of the limit free, so that it is not made for each image


@dataclass(frozen=True)
class Kept:
    """A file of a store. bytes: its length; used: when it last was, seconds since the epoch."""

    path: Path
    bytes: int
    used: float

    @property
    def store(self) -> Path:
        """The folder of its store."""
        return self.path.parents[1]


def place(store: Path, key: str) -> Path:
    """The file of an image."""
    return store / key[:2] / key


def kept(store: Path) -> Iterator[Kept]:
    """The files of a store, unfinished ones included."""
    for folder in store.glob("[0-9a-f][0-9a-f]"):
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    status = entry.stat()
                    yield Kept(Path(entry.path), status.st_size, status.st_mtime)


def add(store: Path, key: str, parts: Sequence[bytes | memoryview], limit: int) -> int:
    """Write the file of an image that the caller has claimed, making room for it where the stores of the folder would take more than
    `limit` bytes. By how much they do nevertheless, since the rest is claimed; without a limit, which is 0, by nothing. OSError when it
    cannot be written."""
    over = _take(store.parent, sum(map(len, parts)), limit)
    target = place(store, key)
    unfinished = target.with_name(key + UNFINISHED)
    target.parent.mkdir(exist_ok=True)
    try:
        with open(unfinished, "wb", buffering=0) as file:
            for part in parts:
                while part:
                    part = part[file.write(part) :]
        os.replace(unfinished, target)
    except OSError:
        unfinished.unlink(missing_ok=True)  # what is left of it would take room on a full disk
        raise
    return over


def _take(root: Path, count: int, limit: int) -> int:
    with opened(root / TAKEN) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        total = int.from_bytes(os.pread(file, 8, 0), "little") + count
        if limit and total > limit:  # what somebody deleted, or was killed over, is counted until here
            total = _remove(root, max(0, limit - max(count, limit // SPARE))) + count
        os.pwrite(file, total.to_bytes(8, "little"), 0)
    return max(0, total - limit) if limit else 0


def prune(root: Path, most: float, *, before: float = math.inf) -> int:
    """Remove images of a folder's stores that nobody claims, least recently used first and only those last used before that time, until
    they take no more than `most` bytes; what they take then. OSError when one cannot be removed."""
    with opened(root / TAKEN) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        total = _remove(root, most, before)
        os.pwrite(file, total.to_bytes(8, "little"), 0)
    return total


def _remove(root: Path, most: float, before: float = math.inf) -> int:
    files = sorted((file for store in stores(root) for file in kept(store)), key=lambda file: file.used)
    total = sum(file.bytes for file in files)
    with contextlib.ExitStack() as stack:
        locks: dict[Path, int] = {}
        for file in files:
            if total <= most or file.used >= before:
                break
            if file.store not in locks:
                locks[file.store] = stack.enter_context(opened(file.store / LOCKS))
            key = file.path.name.removesuffix(UNFINISHED)
            if lock(locks[file.store], fcntl.F_WRLCK, key, wait=False):
                file.path.unlink(missing_ok=True)
                lock(locks[file.store], fcntl.F_UNLCK, key)
                total -= file.bytes
    return total


def stores(root: Path) -> list[Path]:
    """The stores of a folder."""
    return sorted(path.parent for path in root.glob(f"*/{LOCKS}"))
