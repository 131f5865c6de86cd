"""Captures from your own photographs: a folder of them for each object in, COLMAP's cameras beside upright pictures out.

    PHOTOS/mug/IMG_0001.jpg ...          a folder is an object, at any depth; a video's frames will do
    OUT/mug/images/IMG_0001.jpg ...      pictures as a viewer shows them (sfm.py), no larger than max_side
           sparse/0/*.bin                the model with most of them
    OUT/reconstruct.json                 the settings, and what became of each object

Every object is one process, so that COLMAP may end there without the others. What is done, or was left out with a reason, is not done
again while its photographs stay as they are. The layout is that of every other capture: `data viewpoint OUT` asks questions of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from PIL import Image

from actial_fast.data.captures.capture import read_capture
from actial_fast.data.captures.photos import BadCapture
from actial_fast.data.captures.sfm import CRASHED, NO_PICTURE, ReconstructConfig, solve
from actial_fast.data.sources.files import writing

RECORD = "reconstruct.json"
EXTRA = (".heic", ".heif", ".avif")  # pictures that PIL knows with a package more; without it picture.py says so of each
FRAMES = "only pictures are read; take frames with: ffmpeg -i VIDEO -vf fps=2 FOLDER/%04d.jpg"

Told = Callable[[str, str, dict[str, Any] | None], None]


def find_objects(root: Path) -> dict[str, list[Path]]:
    """Each object's photographs, sorted by name: those that lie in one folder at or below `root`, under its path (`root` itself: its name).

    A folder with nothing to look at but other files is an object without photographs; hidden ones are passed over. `images` within an
    object's folder is the object's. ValueError when `root` is no folder or holds nothing."""
    if not root.is_dir():
        raise ValueError(f"photographs {root}: no such folder; give one that has a folder of photographs for each object")
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN} - {".pdf"} | set(EXTRA)
    found: dict[str, list[Path]] = {}
    for folder, subfolders, files in os.walk(root, followlinks=False):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        here = Path(folder)
        visible = [here / name for name in sorted(files) if not name.startswith(".")]
        photographs = [file for file in visible if file.suffix.lower() in known]
        if photographs or (visible and not subfolders and here != root):
            owner = here.parent if here.name == "images" and here != root else here
            relative = owner.relative_to(root).as_posix()
            found.setdefault(root.resolve().name if relative == "." else relative, []).extend(photographs)
    if not found:
        raise ValueError(f"photographs {root}: neither pictures nor folders of pictures in it")
    return found


def reconstruct(photos: Path, out: Path, config: ReconstructConfig, told: Told = lambda name, phase, entry: None) -> dict[str, Any]:
    """Make the captures that are not there yet, and return what became of every object, as OUT/reconstruct.json has it.

    told: called with an object's name and the phase it is in, and once it is done with its entry. ValueError for a config or a folder that
    cannot be used, and for one that holds captures of other settings."""
    objects, record = find_objects(Path(photos)), _record(Path(out), config.check())
    if Path(out).resolve() == Path(photos).resolve() or Path(photos).resolve() in Path(out).resolve().parents:
        raise ValueError(f"captures {out} lie in the photographs' folder, where they would be taken for objects; name a folder outside it")
    entries = record["objects"]
    with writing(out):
        for name, photographs in objects.items():
            state = _state(photographs)
            there = entries.get(name, {})
            if there.get("photographs") == state and (there["reason"] or (out / name / "sparse").exists()):
                told(name, "there already", there)
                continue
            began = time.perf_counter()
            entry = _made(name, photographs, Path(out), config, lambda phase, name=name: told(name, phase, None))  # type: ignore[misc]
            if entry["reason"] and there:
                shutil.rmtree(out / name, ignore_errors=True)  # of photographs that are others now
            entries[name] = {**entry, "photographs": state, "seconds": round(time.perf_counter() - began, 1)}
            _write(out / RECORD, record)
            told(name, "done", entries[name])
    return {name: entries[name] for name in objects}


def _made(name: str, photographs: list[Path], out: Path, config: ReconstructConfig, tell: Callable[[str], None]) -> dict[str, Any]:
    """One object, in a process of its own: its entry, and OUT/name where it has a capture."""
    if not photographs:
        return {"reason": NO_PICTURE, "detail": FRAMES}
    partial = out / ".partial" / name
    shutil.rmtree(out / ".partial", ignore_errors=True)  # what a killed run left
    partial.parent.mkdir(parents=True)
    context = get_context("spawn")  # a fork of a process with threads can hang
    ours, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(theirs, photographs, partial, config), daemon=True)
    worker.start()
    theirs.close()
    try:
        entry = _heard(ours, tell)
        worker.join()
        if entry is None:
            return {"reason": CRASHED, "detail": f"exit status {worker.exitcode}; it may have had too little memory"}
        if isinstance(entry, OSError):
            raise entry
        if not entry["reason"]:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(out / name, ignore_errors=True)  # of other photographs
            os.replace(partial, out / name)
        return entry
    finally:
        worker.terminate()
        worker.join()
        shutil.rmtree(out / ".partial", ignore_errors=True)


def _heard(connection: Connection, tell: Callable[[str], None]) -> dict[str, Any] | OSError | None:
    """What a worker ends with: its entry, or the disk's error; None where it ends without. Its phases are told on."""
    while True:
        try:
            said = connection.recv()
        except EOFError:
            return None
        if isinstance(said, dict | OSError):
            return said
        tell(said)


def _work(connection: Connection, photographs: list[Path], partial: Path, config: ReconstructConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    entry: dict[str, Any] | OSError
    try:
        solved = solve(photographs, partial, config, connection.send)
        entry = {"reason": "", **asdict(solved), "viewpoint": _viewpoint(partial)}
    except BadCapture as error:
        entry = {"reason": error.reason, "detail": error.detail}
    except OSError as error:  # a full disk is nobody's photographs' fault
        entry = OSError(error.errno, error.strerror, str(error.filename or partial))
    except Exception as error:  # COLMAP's, on whatever the photographs show
        entry = {"reason": CRASHED, "detail": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    connection.send(entry)


def _viewpoint(capture: Path) -> str:
    """Why `data viewpoint` would leave the capture out by its defaults; '' where it takes it."""
    try:
        read_capture(capture)
    except BadCapture as error:
        return error.reason + (f" ({error.detail})" if error.detail else "")
    return ""


def _record(out: Path, config: ReconstructConfig) -> dict[str, Any]:
    """What OUT/reconstruct.json has; a new one is begun. Captures of two configs are never mixed in one folder."""
    path, ours = out / RECORD, {key: value for key, value in asdict(config).items() if key != "threads"}
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        return {"settings": ours, "objects": {}}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        theirs, _ = record["settings"], record["objects"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not what this command wrote; move it away, or name another folder") from None
    if changed := [key for key in ours if theirs.get(key) != ours[key]]:
        told = "; ".join(f"{key} was {theirs.get(key)!r}, now {ours[key]!r}" for key in changed)
        raise ValueError(f"{out} holds captures made with other settings ({told}): name another folder, or remove this one")
    return dict(record)


def _write(path: Path, record: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def _state(photographs: list[Path]) -> str:
    """Another where a photograph was added, removed or changed."""
    digest = hashlib.blake2b(digest_size=12)
    for photograph in photographs:
        stat = photograph.stat()
        digest.update(f"{photograph.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
