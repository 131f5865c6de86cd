"""Viewpoint questions from captures: pairs of photographs of one object, three questions a pair, the answers computed from the poses.

geometry.py has the sketch that fixes left and right. Each pair gives three rows that lie next to each other in the file and share their two
images: ego_translation (the camera's move from its own perspective), object_translation (the same move from the perspective of the
object, which faces the camera) and ego_rotation (the camera's turn about the vertical axis).

    summary = build(Path("captures"), Path("data"), ViewpointConfig(seed=0))   # writes data/{train,test}.jsonl and data/build.json
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from actial_fast.data.captures.capture import find_captures, object_id, read_capture, state
from actial_fast.data.captures.crops import crops, write_crops
from actial_fast.data.captures.moves import pairs
from actial_fast.data.captures.photos import BadCapture
from actial_fast.data.captures.probes import leak_report
from actial_fast.data.captures.questions import KINDS, OPPOSITE, OPTIONS, rows
from actial_fast.data.captures.settings import ViewpointConfig
from actial_fast.data.captures.split import ordered, split, strata
from actial_fast.data.sources.files import writing
from actial_fast.data.sources.row import Row

NO_PAIR = "no usable pair"
CENTRE = "test-centre"
CODE = (
    "capture",
    "co3d",
    "colmap",
    "crops",
    "frame",
    "geometry",
    "matches",
    "model",
    "moves",
    "photos",
    "ply",
    "questions",
    "settings",
    "tracks",
    "transforms",
    "turned",
    "viewpoint",
)
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def build(captures: Path, out: Path, config: ViewpointConfig, progress: bool = True) -> dict[str, Any]:
    """Write out/train.jsonl, out/test.jsonl, validation.jsonl if asked for (see row.py) and out/build.json, whose contents are returned.

    Beside them stands out/test-centre.jsonl: the test rows whose first photograph was taken amid the walk, from where the camera could
    have gone about as far to either side.

    Captures that cannot be used are counted by reason in build.json, with each one's message. What a capture gave is kept in
    out/.captures.jsonl: a build that was killed, or is repeated with other `examples`, reads only captures that are new or changed.
    ValueError when `captures` holds no usable capture, or fewer than the splits asked for."""
    start = time.perf_counter()
    captures, out = Path(captures), Path(out)
    paths = find_captures(captures)
    if not paths:
        raise ValueError(f"no capture below {captures}; a capture is a folder with images/ and sparse/0/, or one with transforms.json")
    out.mkdir(parents=True, exist_ok=True)
    found, reused = _read_all(paths, captures, out / ".captures.jsonl", config, progress)
    good = {name: part["pairs"] for name, part in found.items() if "reason" not in part}
    bad = {name: part for name, part in found.items() if "reason" in part}
    rejected = Counter(part["reason"] for part in bad.values())
    if not good:
        raise ValueError(
            f"none of the {len(paths)} captures below {captures} is usable: {dict(rejected)}; first: {next(iter(bad.values()))['message']}"
        )

    asked = {"train": config.examples, "test": config.test_examples, "validation": config.validation_examples}
    taken = split(good, config, captures)
    if not config.validation_examples:
        (out / "validation.jsonl").unlink(missing_ok=True)  # of an earlier build: its objects may be in train.jsonl now
    folder = {name: captures / found[name]["folder"] for name in good}
    presuming = config.composition == "paper"
    balance: dict[str, dict[str, dict[str, int]]] = {}
    written: dict[str, int] = {}
    for name, chosen in taken.items():
        lines = (
            row
            for pair in ordered(chosen, config, name)
            for row in rows(pair, folder[pair["object"]], config.seed, config.ask_letter, presuming)
        )
        files = {name: lambda row: True, **({CENTRE: lambda row: row.meta["centre"][0]} if name == "test" else {})}
        counted = _write(out, files, islice(lines, asked[name]))
        balance[name] = {
            kind: {side: n for side in OPTIONS[kind] if (n := counted[name][kind, side]) or side in OPPOSITE} for kind in KINDS
        }
        written |= {file: counts.total() for file, counts in counted.items()}
    report, leaks = leak_report(out, config)
    seconds = time.perf_counter() - start
    summary = {
        "config": asdict(config),
        "captures": len(paths),
        "captures_reused": reused,
        "objects": {name: len({pair["object"] for pair in chosen}) for name, chosen in taken.items()},
        "pairs": {name: len(chosen) for name, chosen in taken.items()},
        "examples": {name: written[name] for name in taken},
        "examples_asked": {name: asked[name] for name in taken},
        "centre_examples": written[CENTRE],
        "balance": balance,
        "strata": {name: strata(chosen) for name, chosen in taken.items()},
        "probes": report,
        "warnings": leaks,
        "rejected": dict(sorted(rejected.items())),
        "rejected_captures": {name: part["message"] for name, part in sorted(bad.items())},
        "images_left_out": dict(sorted(sum((Counter(part["left_out"]) for part in found.values()), Counter()).items())),
        "seconds": round(seconds, 3),
        "examples_per_second": round(sum(written[name] for name in taken) / seconds, 1),
    }
    with _atomic(out / "build.json") as file:
        file.write(json.dumps(summary, indent=2) + "\n")
    return summary


def _write(out: Path, files: Mapping[str, Callable[[Row], bool]], lines: Iterable[Row]) -> dict[str, Counter[tuple[str, str]]]:
    """Write the rows into out/NAME.jsonl for every file that takes them; how often each (kind, answer) is in each."""
    counted: dict[str, Counter[tuple[str, str]]] = {name: Counter() for name in files}
    with ExitStack() as stack:
        open_files = {name: stack.enter_context(_atomic(out / f"{name}.jsonl")) for name in files}
        for row in lines:
            line = json.dumps(row.to_json(out), separators=(",", ":")) + "\n"
            for name, takes in files.items():
                if takes(row):
                    open_files[name].write(line)
                    counted[name][row.kind, row.meta[row.kind]] += 1
    return counted


def _read_all(paths: list[Path], root: Path, cache: Path, config: ViewpointConfig, progress: bool) -> tuple[dict[str, dict[str, Any]], int]:
    """What each capture gives, {object: part} in the order of `paths`, and how many were found in `cache`."""
    # What a part depends on; the rest of the config only decides which parts are used.
    sizes: dict[str, Any] = {
        "examples": None,
        "test_examples": 0,
        "validation_examples": 0,
        "max_test_fraction": 0.0,
        "test_pairs_per_object": 1,
    }
    free = replace(config, **sizes, ask_letter=False, workers=0, probes=True, max_leak=ViewpointConfig.max_leak)
    code = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in CODE)
    settings = f"{free} {hashlib.sha256(code).hexdigest()}"
    keys = {object_id(path, root): _key(path, settings) for path in paths}
    parts = {}
    if cache.exists():
        for line in cache.read_text(encoding="utf-8").splitlines():
            try:
                part = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that was being written when the build was killed
            if keys.get(part["object"]) == part["key"] and (not config.crops or _has_crops(part, root)):
                parts[part["object"]] = part
    reused = len(parts)
    with _atomic(cache) as file:
        file.writelines(json.dumps(part) + "\n" for part in parts.values())
    todo = [(path, root, cache.parent, free, keys[name]) for name, path in zip(keys, paths, strict=True) if name not in parts]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with writing(cache), cache.open("a", encoding="utf-8") as file, Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("captures", total=len(paths), completed=reused)
        for part in _map(_read_one, todo, config.workers or min(os.cpu_count() or 1, len(todo) // 100)):
            file.write(json.dumps(part) + "\n")
            file.flush()
            parts[part["object"]] = part
            bar.advance(task)
    return {name: parts[name] for name in keys}, reused


def _key(path: Path, settings: str) -> str:
    """Changes when the settings, the capture's model or its list of images do."""
    return hashlib.sha256(repr((settings, state(path))).encode()).hexdigest()[:16]


def _has_crops(part: Mapping[str, Any], root: Path) -> bool:
    """Whether a capture's crops are still where they were written."""
    return all((root / part["folder"] / name).is_file() for pair in part.get("pairs", ()) for name in pair["pair"])


def _read_one(job: tuple[Path, Path, Path, ViewpointConfig, str]) -> dict[str, Any]:
    """One capture's part: at most pairs_per_object pairs in random order, or the reason there are none."""
    path, root, out, config, key = job
    name = object_id(path, root)
    part: dict[str, Any] = {"object": name, "key": key, "left_out": {}}
    try:
        capture = read_capture(path, root, min_images=config.min_images, max_elevation_deg=config.max_elevation, verify=config.verify)
        part["left_out"] = capture.left_out
        made = crops(capture, config.crops, out / "crops" / name, config.seed) if config.crops else None
        part["folder"] = os.path.relpath((made.capture if made else capture).folder, root)
        part["pairs"] = pairs(made.capture if made else capture, config)
        if made and part["pairs"]:
            write_crops(capture, made, {name for pair in part["pairs"] for name in pair["pair"]})
            part["pairs"] = [pair | {"cameras": made.cameras(pair["pair"])} for pair in part["pairs"]]
        if not part["pairs"]:
            raise BadCapture(path, NO_PAIR, f"among {len(capture.names)} images, {_wanted(config)}")
    except BadCapture as error:
        part |= {"reason": error.reason, "message": str(error)}
    return part


def _wanted(config: ViewpointConfig) -> str:
    """What pairs were looked for, for whoever has none."""
    if config.composition == "paper":
        return f"{config.min_angle} to {config.max_angle} degrees apart"
    return "none from which there is another one for each of left, right and no move with each of left, right and no turn; " + (
        "smaller crops pan further" if config.crops else "set crops, or render with shots=6 and more views"
    )


def _map(function: Callable[[_Job], _Result], jobs: list[_Job], workers: int) -> Iterator[_Result]:
    """function over jobs, in order; in this process when there is not more than one worker."""
    if workers <= 1:
        yield from map(function, jobs)
        return
    # Spawned, because a forked child of a process that runs torch's threads may hang.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(function, jobs, chunksize=4)
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _atomic(path: Path) -> Iterator[TextIO]:
    """A text file that appears under its name only when it is complete and on disk."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(temporary), temporary.open("w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
