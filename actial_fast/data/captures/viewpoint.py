"""Viewpoint questions from captures: pairs of photographs of one object, three questions a pair, the answers computed from the poses.

geometry.py has the sketch that fixes left and right. Each pair gives three rows that lie next to each other in the file and share their two
images: ego_translation (the camera's move from its own perspective), object_translation (the same move from the perspective of the
object, which faces the camera) and ego_rotation (the camera's turn about the vertical axis).

    summary = build(Path("captures"), Path("data"), ViewpointConfig(seed=0))   # writes data/{train,test}.jsonl and data/build.json
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from actial_fast.data.captures.capture import Capture, find_captures, object_id, read_capture, state
from actial_fast.data.captures.frame import angle_errors
from actial_fast.data.captures.geometry import motion, qvec
from actial_fast.data.captures.photos import BadCapture
from actial_fast.data.sources.files import writing
from actial_fast.data.sources.row import IMAGE_TAG, Row, Turn

KINDS = ("ego_translation", "object_translation", "ego_rotation")
LETTERS = "ABC"
OPTIONS = {
    "ego_translation": ("left", "right", "no movement"),
    "object_translation": ("left", "right", "no movement"),
    "ego_rotation": ("left", "right", "no rotation"),
}
QUESTIONS = {
    "ego_translation": (
        "These two photos show one object that stays still. From the camera's own perspective, which way did its position move between the "
        "first photo and the second?",
        "A camera took the first photo, changed its place and took the second. As the camera sees it, to which side did it move?",
        "Imagine holding the camera of the first photo. To which side did you walk to take the second photo?",
        "Relative to the camera's position and view in the first photo, on which side is the position from which the second was taken?",
        "Seen by the photographer at the first photo, in which direction does the camera's place shift before the second photo?",
    ),
    "object_translation": (
        "These two photos show one object that stays still. From the perspective of the object, which faces the camera of the first photo, "
        "which way did the camera move between the two photos?",
        "Suppose the object could look straight back at the camera of the first photo. To which of its own sides did the camera then move?",
        "Imagine standing in the object's place, facing the first camera. To your left or to your right is the camera of the second photo?",
        "Told from the object's point of view as it faces the first camera, to which side did the camera's position move?",
        "If the object had eyes on the side shown in the first photo, to which side would it see the camera go before the second photo?",
    ),
    "ego_rotation": (
        "These two photos show one object that stays still. About its own vertical axis, which way did the camera turn from the first "
        "photo to the second?",
        "Compare the directions in which the camera looked. From its own perspective, did it turn to the left or to the right after the "
        "first photo?",
        "Imagine holding the camera of the first photo. To which side must you turn your view to look the way the second photo does?",
        "Leave the camera's position aside: to which side did its viewing direction rotate between the first photo and the second?",
        "Seen by the photographer, in which direction did the camera pan from the first photo to the second?",
    ),
}
REQUEST = "Answer with the letter of the right option only."
NO_PAIR = "no usable pair"
SIDES = {1: "right", -1: "left"}
OPPOSITE = {"left": "right", "right": "left"}
CODE = (
    "capture",
    "co3d",
    "colmap",
    "frame",
    "geometry",
    "matches",
    "model",
    "photos",
    "ply",
    "tracks",
    "transforms",
    "turned",
    "viewpoint",
)
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ViewpointConfig:
    """What `actial data viewpoint` builds."""

    seed: int = 0
    """decides the split, the pairs, their order, the wordings and the order of the options"""
    examples: int | None = None
    """rows in train.jsonl, three a pair; none: all there are"""
    test_examples: int = 1000
    """rows in test.jsonl, from objects that train.jsonl has none of; 0: no test set"""
    validation_examples: int = 0
    """rows in validation.jsonl, from objects that neither of the other two has: what stages stop on; 0: no such file"""
    max_test_fraction: float = 0.1
    """at most this share of the objects, and at least one, goes to the test set, and as many to validation; fewer rows if they have few"""
    pairs_per_object: int = 10
    """pairs drawn per object at most"""
    test_pairs_per_object: int = 3
    """pairs per test object as long as max_test_fraction leaves enough objects; more objects say more than more pairs of the same"""
    min_angle: float = 20.0
    """smallest horizontal angle about the object between the two cameras, degrees"""
    max_angle: float = 100.0
    """largest horizontal angle about the object between the two cameras, degrees"""
    max_angle_error: float = 3.0
    """pairs whose angle about the object, or turn, may be further off than this are left out, degrees (95 per cent sure); 0: none are"""
    min_translation: float = 0.1
    """smallest sideways move in units of the camera's horizontal distance from the object; less is neither left nor right"""
    min_yaw: float = 10.0
    """smallest turn, degrees; less (or as close to half a turn) is neither left nor right"""
    min_images: int = 4
    """captures with fewer usable images are rejected"""
    max_elevation: float = 60.0
    """views from, or looking, steeper up or down than this are left out, degrees"""
    verify: str = "tracks"
    """tracks: reject mirrored and broken worlds by their tracks, and models without; off: trust the poses"""
    ask_letter: bool = True
    """every question ends with a request for the option's letter, without which a model that was not trained on it is scored on form"""
    workers: int = 0
    """processes that read captures; 0: up to one per core, as far as starting them pays. The output does not depend on it"""

    def __post_init__(self) -> None:
        if not 0 < self.min_angle < self.max_angle < 180:
            raise ValueError(f"min_angle={self.min_angle}, max_angle={self.max_angle}: need 0 < min_angle < max_angle < 180 degrees")
        if not 0 <= self.max_angle_error < math.inf:
            raise ValueError(f"max_angle_error={self.max_angle_error}: must be at least 0 and finite, degrees")
        if not 0 <= self.max_test_fraction < 1:
            raise ValueError(f"max_test_fraction={self.max_test_fraction}: need a share in [0, 1)")
        if self.pairs_per_object < 1 or self.test_pairs_per_object < 1:
            raise ValueError("pairs_per_object and test_pairs_per_object must be at least 1")
        if min(self.test_examples, self.validation_examples) < 0 or (self.examples is not None and self.examples < 1):
            asked = f"examples={self.examples}, test_examples={self.test_examples}, validation_examples={self.validation_examples}"
            raise ValueError(f"{asked}: ask for at least one row")
        if not 0 <= self.min_yaw < 90 or self.min_translation < 0:
            raise ValueError(f"min_yaw={self.min_yaw} must be in [0, 90) degrees, min_translation={self.min_translation} at least 0")
        if self.verify not in ("tracks", "off"):
            raise ValueError(f"verify={self.verify!r}; expected 'tracks' or 'off'")


def pairs(capture: Capture, config: ViewpointConfig) -> list[dict[str, Any]]:
    """At most pairs_per_object usable pairs of the capture in random order, none twice, first image name < second: each is a row's meta.

    Usable: the horizontal angle is in range and all three answers are clear in both orders, swapping sides when the order does."""
    first, second = np.triu_indices(len(capture.names), 1)
    there = motion(capture.rotations, capture.centers, capture.center, capture.up, first, second)
    back = motion(capture.rotations, capture.centers, capture.center, capture.up, second, first)
    angle, yaw = np.degrees(np.abs(there.azimuth)), np.degrees(np.abs(there.yaw))
    usable = (angle >= config.min_angle) & (angle <= config.max_angle) & (yaw >= config.min_yaw) & (yaw <= 180 - config.min_yaw)
    for move in (there, back):
        usable &= (np.abs(move.ego) >= config.min_translation) & (np.abs(move.object) >= config.min_translation)
        usable &= np.sign(move.ego) == -np.sign(move.object)  # a camera that looks past the object may see it otherwise
    if config.max_angle_error:
        errors = angle_errors(capture.rotations, capture.centers, capture.frame, first, second)
        usable &= np.degrees(errors) <= config.max_angle_error
    found = np.nonzero(usable)[0].tolist()
    found = random.Random(f"{config.seed}/{capture.object}").sample(found, min(config.pairs_per_object, len(found)))
    return [
        {
            "object": capture.object,
            "pair": [capture.names[i], capture.names[j]],
            "azimuth_deg": _round(np.degrees(capture.azimuth[[i, j]])),
            "azimuth_change_deg": _round(np.degrees(there.azimuth[m])),
            "yaw_deg": _round(np.degrees(there.yaw[m])),
            "ego_translation": SIDES[int(np.sign(there.ego[m]))],
            "object_translation": SIDES[int(np.sign(there.object[m]))],
            "ego_rotation": "left" if there.yaw[m] > 0 else "right",
            "up": _round(capture.up),
            "center": _round(capture.center),
            "poses": [{"qvec": _round(qvec(capture.rotations[k])), "tvec": _round(capture.translations[k])} for k in (i, j)],
        }
        for m, i, j in zip(found, first[found], second[found], strict=True)
    ]


def reverse(pair: dict[str, Any]) -> dict[str, Any]:
    """The same pair with the second image first: every side and sign swaps."""
    return {
        **pair,
        **{key: pair[key][::-1] for key in ("pair", "azimuth_deg", "poses")},
        **{key: -pair[key] for key in ("azimuth_change_deg", "yaw_deg")},
        **{kind: OPPOSITE[pair[kind]] for kind in KINDS},
    }


def rows(pair: dict[str, Any], folder: Path, seed: int, ask_letter: bool = False) -> list[Row]:
    """The three rows of a pair, in the order of KINDS. Wording and order of the options are drawn from seed and pair.

    pair: as from pairs() or reverse(). folder: that its images are in. ask_letter: as in ViewpointConfig."""
    name = f"{pair['object']}/{'-'.join(Path(n).with_suffix('').as_posix() for n in pair['pair'])}"
    images = tuple(folder / n for n in pair["pair"])
    out = []
    for kind in KINDS:
        draw = random.Random(f"{seed}/{name}/{kind}")
        question = draw.choice(QUESTIONS[kind])
        choices = draw.sample(OPTIONS[kind], 3)
        letter = LETTERS[choices.index(pair[kind])]
        options = "\n".join(f"{a}. {text}" for a, text in zip(LETTERS, choices, strict=True))
        request = f"\n{REQUEST}" if ask_letter else ""
        turns = (Turn("user", f"{IMAGE_TAG}{IMAGE_TAG}{question}\n{options}{request}"), Turn("assistant", letter))
        out.append(Row(turns, images, letter, kind, tuple(choices), f"{name}/{kind}", meta=pair))
    return out


def build(captures: Path, out: Path, config: ViewpointConfig, progress: bool = True) -> dict[str, Any]:
    """Write out/train.jsonl, out/test.jsonl, validation.jsonl if asked for (see row.py) and out/build.json, whose contents are returned.

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
    split = _split(good, config, captures)
    if not config.validation_examples:
        (out / "validation.jsonl").unlink(missing_ok=True)  # of an earlier build: its objects may be in train.jsonl now
    folder = {name: captures / found[name]["folder"] for name in good}
    balance, written = {}, {}
    for name, chosen in split.items():
        limit = asked[name]
        ordered = _balance(chosen, random.Random(f"{config.seed}/order/{name}"))
        lines = (row for pair in ordered for row in rows(pair, folder[pair["object"]], config.seed, config.ask_letter))
        sides: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        written[name] = 0
        with _atomic(out / f"{name}.jsonl") as file:
            for row in lines:
                if written[name] == limit:
                    break
                file.write(json.dumps(row.to_json(out), separators=(",", ":")) + "\n")
                sides[row.kind][row.meta[row.kind]] += 1
                written[name] += 1
        balance[name] = {kind: {side: counts[side] for side in OPPOSITE} for kind, counts in sides.items()}
    seconds = time.perf_counter() - start
    summary = {
        "config": asdict(config),
        "captures": len(paths),
        "captures_reused": reused,
        "objects": {name: len({pair["object"] for pair in chosen}) for name, chosen in split.items()},
        "pairs": {name: len(chosen) for name, chosen in split.items()},
        "examples": written,
        "examples_asked": {name: asked[name] for name in split},
        "balance": balance,
        "rejected": dict(sorted(rejected.items())),
        "rejected_captures": {name: part["message"] for name, part in sorted(bad.items())},
        "images_left_out": dict(sorted(sum((Counter(part["left_out"]) for part in found.values()), Counter()).items())),
        "seconds": round(seconds, 3),
        "examples_per_second": round(sum(written.values()) / seconds, 1),
    }
    with _atomic(out / "build.json") as file:
        file.write(json.dumps(summary, indent=2) + "\n")
    return summary


def _split(good: dict[str, list[dict[str, Any]]], config: ViewpointConfig, captures: Path) -> dict[str, list[dict[str, Any]]]:
    """The pairs of each split, at most one partial pair more than the rows asked for, taken evenly over the split's objects."""
    objects = sorted(good)
    random.Random(f"{config.seed}/split").shuffle(objects)
    held = {"test": config.test_examples, "validation": config.validation_examples}
    held = {name: -(-rows // len(KINDS)) for name, rows in held.items() if rows}
    if len(objects) < 1 + len(held):
        keys = " and ".join(f"{name}_examples=0" for name in held)
        number = "one usable object" if len(objects) == 1 else f"{len(objects)} usable objects"
        raise ValueError(
            f"{captures} has {number}, which cannot be split by object into train, {', '.join(held)}; add captures or set {keys}"
        )
    most = max(1, min(int(config.max_test_fraction * len(objects)), (len(objects) - 1) // max(1, len(held))))
    train = None if config.examples is None else -(-config.examples // len(KINDS))
    split: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for name, wanted in held.items():
        count = min(most, -(-wanted // config.test_pairs_per_object))
        while count < most and sum(len(good[name]) for name in objects[:count]) < wanted:
            count += 1
        split[name] = _evenly(good, objects[:count], wanted)
        objects = objects[count:]
    split["train"] = _evenly(good, objects, train)
    return split


def _evenly(good: dict[str, list[dict[str, Any]]], objects: list[str], wanted: int | None) -> list[dict[str, Any]]:
    """The first `wanted` pairs, dealt round by round: no object gives another pair before every object that can has given as many."""
    rounds = max((len(good[name]) for name in objects), default=0)
    dealt = [good[name][r] for r in range(rounds) for name in objects if r < len(good[name])]
    return dealt[:wanted]


def _balance(chosen: list[dict[str, Any]], draw: random.Random) -> list[dict[str, Any]]:
    """The pairs shuffled, each in the order that makes as many ego translations left as right (+- 1), and nearly so the other types."""
    # Usually left-moving cameras turn right. The rare pairs where they do not are dealt apart, or they could tip the rotations' balance.
    chosen = sorted(draw.sample(chosen, len(chosen)), key=lambda pair: pair["ego_translation"] == pair["ego_rotation"])
    side = draw.choice(("left", "right"))
    ordered = []
    for pair in chosen:
        ordered.append(pair if pair["ego_translation"] == side else reverse(pair))
        side = OPPOSITE[side]
    draw.shuffle(ordered)
    return ordered


def _read_all(paths: list[Path], root: Path, cache: Path, config: ViewpointConfig, progress: bool) -> tuple[dict[str, dict[str, Any]], int]:
    """What each capture gives, {object: part} in the order of `paths`, and how many were found in `cache`."""
    # What a part depends on; the rest of the config only decides which parts are used.
    rows: dict[str, Any] = {
        "examples": None,
        "test_examples": 0,
        "validation_examples": 0,
        "max_test_fraction": 0.0,
        "test_pairs_per_object": 1,
    }
    free = replace(config, **rows, ask_letter=False, workers=0)
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
            if keys.get(part["object"]) == part["key"]:
                parts[part["object"]] = part
    reused = len(parts)
    with _atomic(cache) as file:
        file.writelines(json.dumps(part) + "\n" for part in parts.values())
    todo = [(path, root, free, keys[name]) for name, path in zip(keys, paths, strict=True) if name not in parts]
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


def _read_one(job: tuple[Path, Path, ViewpointConfig, str]) -> dict[str, Any]:
    """One capture's part: at most pairs_per_object pairs in random order, or the reason there are none."""
    path, root, config, key = job
    name = object_id(path, root)
    part: dict[str, Any] = {"object": name, "key": key, "left_out": {}}
    try:
        capture = read_capture(path, root, min_images=config.min_images, max_elevation_deg=config.max_elevation, verify=config.verify)
        part["left_out"], part["folder"] = capture.left_out, os.path.relpath(capture.folder, root)
        part["pairs"] = pairs(capture, config)
        if not part["pairs"]:
            raise BadCapture(path, NO_PAIR, f"among {len(capture.names)} images, {config.min_angle} to {config.max_angle} degrees apart")
    except BadCapture as error:
        part |= {"reason": error.reason, "message": str(error)}
    return part


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


def _round(x: np.ndarray) -> float | list[float]:
    """Floats at 7 significant digits, as a number or a list."""
    return [float(f"{v:.7g}") for v in x] if np.ndim(x) else float(f"{x:.7g}")
