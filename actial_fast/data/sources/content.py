"""Whether a file is still what it was: a name made from its content."""

from __future__ import annotations

import hashlib
from pathlib import Path

SMALL = 64 << 20  # bytes of a file that is read whole
PLACES, BLOCK = 256, 1 << 16  # looked at in a larger one


def content(path: Path, *, here: bool = True) -> str:
    """A name that a file, or the data files of a folder, have only with this content. Of a file above 64 MB the size, the time, the end and
    255 other places of 64 KB decide, and where it lies; without `here` neither time nor place, so that a copy has the same name. OSError
    when one cannot be read."""
    digest = hashlib.blake2b(digest_size=12)
    if path.is_dir():
        for part in sorted(part for pattern in ("*.parquet", "*.arrow") for part in path.rglob(pattern)):
            digest.update(f"{part.relative_to(path)}\0{content(part, here=here)}\0".encode())
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
