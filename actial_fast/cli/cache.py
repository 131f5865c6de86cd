"""`actial cache`: what is kept between runs, and clearing it."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from actial_fast.cli.shared import Commands, add_json, write_json
from actial_fast.data.sources import cache

DAY = 86400.0
WHAT = {"images": "decoded images", "tables": "converted parquet files", "rates": "measured speeds"}


@dataclass(frozen=True)
class Kept:
    """One thing in the cache. bytes: on the disk; days: since it was last written or read; used: whether a process has it open."""

    what: str
    path: str
    bytes: int
    days: float
    used: bool


def add(commands: Commands) -> None:
    """The commands of this group."""
    parser = commands.add_parser("cache", help="what is kept between runs (decoded images, converted files), its size, and clearing it")
    parser.add_argument("--clear", choices=("images", "tables", "rates", "all"), help="remove these; what a run has open stays")
    parser.add_argument("--older-than", type=float, default=0, metavar="DAYS", help="with --clear: only what nobody has used for so long")
    add_json(parser)
    parser.set_defaults(run=_cache)


def _cache(args: argparse.Namespace) -> int:
    everything = list(kept())
    if args.clear:
        for one in [one for one in everything if args.clear in ("all", one.what) and one.days >= args.older_than and not one.used]:
            shutil.rmtree(one.path) if os.path.isdir(one.path) else os.remove(one.path)
            everything.remove(one)
    if args.json != "-":
        print(f"{cache.folder()}: {_size(sum(one.bytes for one in everything))}")
        for one in everything:
            told = "in use" if one.used else f"{one.days:.0f} days ago" if one.days >= 1 else "today"
            print(f"  {_size(one.bytes):>9}  {WHAT[one.what]:24}{told:>14}  {one.path}")
    if args.json:
        write_json([asdict(one) for one in everything], args.json)
    return 0


def kept() -> Iterator[Kept]:
    """What is in the cache, largest first of its kind: a store of images for each way of resizing, a file for each table."""
    folder, opened = cache.folder(), _opened()
    found = {
        "images": sorted(folder.glob("images/*/")),
        "tables": sorted(path for path in folder.glob("*") if path.is_file()),
        "rates": sorted(folder.glob("rates/*")),
    }
    for what, paths in found.items():
        all_of = [(path, [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]) for path in paths]
        for path, files in sorted(all_of, key=lambda one: -_bytes(one[1])):
            recent = max((max(file.stat().st_mtime, file.stat().st_atime) for file in files), default=time.time())
            yield Kept(what, str(path), _bytes(files), max(0.0, (time.time() - recent) / DAY), any(str(file) in opened for file in files))


def _bytes(files: list[Path]) -> int:
    return sum(512 * file.stat().st_blocks for file in files)  # the files of pixels are sparse


def _opened() -> set[str]:
    """Files that processes have open or mapped, as far as this user may see it (Linux; elsewhere none)."""
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            found |= {line.split(maxsplit=5)[5] for line in (process / "maps").read_text().splitlines() if "/" in line}
            for entry in (process / "fd").iterdir():
                with contextlib.suppress(OSError):  # closed meanwhile, the one that lists them among them
                    found.add(os.readlink(entry))
    return found


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
