"""Whether a file is still what it was: a name made from its content."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from actial_fast.data.sources.places import files_of

SMALL = 64 << 20  # bytes of a file that is read whole
PLACES, BLOCK = 256, 1 << 16  # looked at in a larger one
PEEK = 2048  # bytes at either end by which an image is told from others


def content(path: Path, *, here: bool = True) -> str:
    """A name that a file, or the data files of a folder or a pattern, have only with this content. Of a file above 64 MB the size, the
    time, the end and 255 other places of 64 KB decide, and where it lies; without `here` neither time nor place, so that a copy has the
    same name. OSError when one cannot be read."""
    digest = hashlib.blake2b(digest_size=12)
    if path.is_dir() or not path.exists():
        folder = path if path.is_dir() else path.parent
        inside = sorted(part for pattern in ("*.parquet", "*.arrow", "*.tar") for part in path.rglob(pattern)) if path.is_dir() else []
        for part in inside or files_of(path):
            digest.update(f"{os.path.relpath(part, folder)}\0{content(part, here=here)}\0".encode())
        return digest.hexdigest()
    stat = path.stat()
    digest.update(f"{stat.st_size}".encode())
    with open(path, "rb") as file:
        if stat.st_size <= SMALL:
            digest.update(file.read())
        else:
            if here:
                digest.update(f"{path.resolve()}\0{stat.st_mtime_ns}".encode("utf-8", "surrogateescape"))
            step = (stat.st_size - BLOCK) / (PLACES - 1)
            for place in range(PLACES):  # the last block holds a parquet file's footer
                file.seek(round(place * step))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def glimpse(file: int, at: int, size: int) -> str:
    """A name for so many bytes of an open file, by their number, beginning and end; the same as `glimpse_of` gives them."""
    ends = (os.pread(file, min(PEEK, size), at), os.pread(file, min(PEEK, size), at + max(0, size - PEEK)))
    return _digest(size, *ends)


def glimpse_of(data: memoryview) -> str:
    """A name for bytes, by their number, beginning and end."""
    return _digest(len(data), bytes(data[:PEEK]), bytes(data[-PEEK:]))


def _digest(size: int, head: bytes, tail: bytes) -> str:
    return hashlib.blake2b(f"{size}".encode() + head + tail, digest_size=12).hexdigest()
