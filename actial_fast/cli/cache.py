"""`actial cache`: what is kept between runs, and making it less."""

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
from actial_fast.packing.room import LOCKS, prune
from actial_fast.packing.room import kept as files_of

DAY = 86400.0
GB = 1e9
WHAT = {"images": "decoded images", "tables": "converted data files", "rates": "measured speeds"}


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
    parser = commands.add_parser("cache", help="what is kept between runs (decoded images, converted files), its size, and making it less")
    parser.add_argument("--clear", choices=(*WHAT, "all"), help="remove these; what a run needs at this moment stays")
    parser.add_argument("--older-than", type=float, default=0, metavar="DAYS", help="with --clear: only what nobody has used for so long")
    parser.add_argument(
        "--prune", type=float, metavar="GB", help="remove least recently used images until the others take no more than this"
    )
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="where the images are, for a recipe with data.image_cache (default: in the cache)"
    )
    add_json(parser)
    parser.set_defaults(run=_cache)


def _cache(args: argparse.Namespace) -> int:
    images = args.images.expanduser() if args.images else cache.folder() / "images"
    if args.images and not images.is_dir():
        raise ValueError(f"--images {images}: no such folder (looked from {Path.cwd()})")
    if args.prune is not None and not args.prune >= 0:
        raise ValueError(f"--prune {args.prune:g}: GB that may stay, 0 or more")
    if args.clear in ("images", "all") and images.is_dir():
        prune(images, 0, before=time.time() - args.older_than * DAY)
    if args.prune is not None and images.is_dir():
        prune(images, args.prune * GB)
    everything = list(kept(images))
    if args.clear:
        for one in [one for one in everything if args.clear in ("all", one.what) and one.days >= args.older_than and not one.used]:
            if _is_store(Path(one.path)):  # the images in it that are younger, or claimed
                continue
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


def kept(images: Path) -> Iterator[Kept]:
    """What is in the cache, largest first of its kind: a store of images for each way of resizing, a file for each table."""
    folder, opened, now = cache.folder(), _opened(), time.time()
    found = {
        "images": sorted(images.glob("*/")),
        "tables": sorted(path for path in folder.glob("*") if path.is_file()),
        "rates": sorted(folder.glob("rates/*")),
    }
    for what, paths in found.items():
        made = []
        for path in paths:
            if what == "images" and _is_store(path):
                files = [(file.bytes, file.used) for file in files_of(path)]
                used = str(path / LOCKS) in opened
                if not files:  # its folder stays, since a process may be about to open it
                    continue
            else:
                inside = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
                files = [(512 * s.st_blocks, max(s.st_mtime, s.st_atime)) for s in (file.stat() for file in inside)]
                used = any(str(file) in opened for file in inside)
            recent = max((last for _, last in files), default=now)
            made.append(Kept(what, str(path), sum(count for count, _ in files), max(0.0, (now - recent) / DAY), used))
        yield from sorted(made, key=lambda one: -one.bytes)


def _is_store(path: Path) -> bool:
    """Whether a folder is a store as this version has it, not an earlier one's."""
    return (path / LOCKS).exists()


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
