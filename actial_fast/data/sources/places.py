"""Where a source's files are: one file or folder, several by a pattern, or on a network, from where they are fetched once."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from actial_fast.data.sources import cache
from actial_fast.data.sources.told import told

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
MOST_FILES = 100_000  # that a pattern may name
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def place(path: str) -> Path:
    """Where a source's path is on this machine: the path itself, which may have a pattern as its name, or for an address (hf://, https://,
    whatever fsspec knows) what was fetched from it, now or before. ValueError when it cannot be."""
    return _fetched(path) if is_remote(path) else Path(path).expanduser()


def is_remote(path: str) -> bool:
    """Whether a path is an address on a network."""
    return bool(REMOTE.match(path)) and not path.lower().startswith("file://")


def files_of(path: Path) -> list[Path]:
    """The file or folder that a path is, or the files that its pattern names: braces ({000..019}, {a,b}) in their order, then `*`, `?` and
    `[...]` in order of name; [] where there is none. ValueError when braces name some that are there and some that are not."""
    if path.exists():
        return [path]
    found: list[Path] = []
    names = expanded(str(path))
    if names == [str(path)] and not glob.has_magic(str(path)):
        return []
    missing = []
    for name in names:
        matched = sorted(map(Path, glob.glob(name))) if glob.has_magic(name) else [Path(name)] * os.path.exists(name)
        missing += [name] * (not matched)
        found += matched
    if found and missing:
        raise ValueError(f"data source {path}: {len(missing)} of its {len(names)} files are not there, {missing[0]} the first")
    return found


def exists(path: Path) -> bool:
    """Whether a path, or a pattern, names anything."""
    return bool(files_of(path))


def expanded(pattern: str) -> list[str]:
    """The names that a pattern's braces stand for, in their order; braces that hold neither a range nor a comma are letters like others."""
    for braces in BRACES.finditer(pattern):
        body = braces[1]
        if bounds := RANGE.fullmatch(body):
            low, high = int(bounds[1]), int(bounds[2])
            step = 1 if high >= low else -1
            if abs(high - low) >= MOST_FILES:
                raise ValueError(f"data source {pattern}: {{{body}}} names more than {MOST_FILES} files")
            width = max(map(len, bounds.groups())) if any(len(b) > 1 and b[0] == "0" for b in bounds.groups()) else 0
            choices = [f"{n:0{width}}" for n in range(low, high + step, step)]
        elif "," in body:
            choices = body.split(",")
        else:
            continue
        made = [name for choice in choices for name in expanded(pattern[: braces.start()] + choice + pattern[braces.end() :])]
        if len(made) > MOST_FILES:
            raise ValueError(f"data source {pattern}: it names more than {MOST_FILES} files")
        return made
    return [pattern]


def by_split(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Files by the split that their names tell, those that tell none under "no split"."""
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for file in files:
        words = re.findall(r"[a-z]+", file.stem.lower())
        found[next((SPLIT_OF[word] for word in words if word in SPLIT_OF), "no split")].append(file)
    return dict(found)


def of_split(splits: dict[str, list[Path]], split: str, path: Path) -> list[Path]:
    """The files of one split, or of the only one. ValueError when it is not told, or there is none of this name."""
    told = "; ".join(
        f"{name} ({', '.join(f.name for f in files[:3])}{', ...' if len(files) > 3 else ''})" for name, files in splits.items()
    )
    if split:
        wanted = SPLIT_OF.get(split.lower(), split)
        if wanted not in splits:
            raise ValueError(f"{path} has no split {split!r}; it holds {told}")
        return splits[wanted]
    if len(splits) > 1:
        raise ValueError(f"{path} holds files of several splits: {told}; set split to one of them, or give a file or a folder of one")
    (chosen,) = splits.values()
    return chosen


@functools.cache
def _fetched(address: str) -> Path:
    """A folder of links to the files that were fetched, or the link of the only one, under their names there. Where it cannot be fetched
    now, as it was before."""
    folder = cache.folder() / "fetched" / hashlib.blake2b(address.encode(), digest_size=8).hexdigest()
    whole = folder / ".whole"
    try:
        links = _linked(folder, address)
        whole.write_text(json.dumps(links))
    except ImportError as error:
        raise ValueError(f"data source {address}: {error}; for http:// and https:// that is pip install 'fsspec[http]'") from None
    except Exception as error:  # of the network, the server, or whatever fsspec loads for an address
        reason = f"it cannot be fetched ({type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]})"
        links = json.loads(whole.read_text()) if whole.exists() else []
        if not links or not all((folder / link).exists() for link in links):
            raise ValueError(f"data source {address}: {reason}") from None
        told(f"{reason}: what was fetched before is read", address)
    return folder / links[0] if len(links) == 1 else folder


def _linked(folder: Path, address: str) -> list[str]:
    """Fetch the files of an address, those that are new, and link them in the folder; their names there, in order."""
    from datasets import DownloadConfig, DownloadManager  # takes a second

    addresses = list(_addresses(address))
    files = DownloadManager(download_config=DownloadConfig(max_retries=3, disable_tqdm=True)).download(addresses)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [PurePosixPath(one.partition("://")[2].partition("?")[0]).parts for one in addresses]
    bases = Counter(part[-1] for part in parts)
    names = [part[-1] if bases[part[-1]] == 1 else "-".join(part) for part in parts]
    for name, file in zip(names, files, strict=True):
        unnamed = folder / f".{name}.{os.getpid()}"
        unnamed.symlink_to(file)
        os.replace(unnamed, folder / name)  # ranks that fetch at the same time each put the same link there
    for other in folder.iterdir():
        if other.name not in names and not other.name.startswith("."):
            other.unlink(missing_ok=True)  # it is there no longer
    return names


def _addresses(address: str) -> Iterator[str]:
    """The files of an address: by its braces and stars, or the parquet files below it where it has no suffix of a file."""
    from datasets.data_files import resolve_pattern

    for one in expanded(address):
        path = one.partition("?")[0] if one.startswith(("http://", "https://")) else one
        pattern = one if PurePosixPath(path).suffix else f"{one.rstrip('/')}/**/*.parquet"
        yield from sorted(resolve_pattern(pattern, "")) if glob.has_magic(pattern.partition("?")[0]) else [pattern]
