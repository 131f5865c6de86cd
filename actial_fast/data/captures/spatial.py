"""Other spatial questions from the same captures, in SAT's parquet rows: what stage 2 trains on beside the viewpoint questions.

    facing_side  one photograph: which side of the object faces the camera (needs the front, which scene.json gives)
    closer       two photographs: in which of them the camera stood closer to the object
    higher       two photographs: in which of them the camera was held higher
    turn_size    two photographs: about how far the camera travelled round the object

Cases that are not clear by the config's thresholds are not asked, every answer of a kind is the right one equally often, and nothing but
the poses (capture.py) and the object's front decides an answer.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from actial_fast.data.captures.capture import Capture, find_captures, object_id, read_capture
from actial_fast.data.captures.frame import angle_errors
from actial_fast.data.captures.geometry import horizontal, signed_angle
from actial_fast.data.captures.photos import BadCapture
from actial_fast.data.sources.files import writing

KINDS = ("facing_side", "closer", "higher", "turn_size")
TURN_SIZES = (30, 60, 90)  # degrees
HALF_STEP = 15  # from here on another size is right
OPTIONS = {
    "facing_side": ("front", "left side", "back", "right side"),  # counterclockwise seen from above, every 90 degrees
    "closer": ("first", "second"),
    "higher": ("first", "second"),
    "turn_size": tuple(f"about {size} degrees" for size in TURN_SIZES),
}
QUESTIONS = {
    "facing_side": (
        "Which side of the object do we see in this photo, told by the object's own front, left and right?",
        "Which side of the object is turned towards the camera?",
        "The object has a front, a back, a left and a right side of its own. From which side was this photo taken?",
        "If you walked straight at the object from where the camera stands, which of its sides would you meet?",
    ),
    "closer": (
        "Both photos show one object that stays still. In which photo was the camera closer to it?",
        "A camera took two photos of the same object from different places. Which photo was taken from the shorter distance?",
        "Compare how far the camera is from the object in the two photos. In which one is it nearer?",
        "In which of these two photos did the photographer stand nearer to the object?",
    ),
    "higher": (
        "Both photos show one object that stays still. In which photo was the camera higher above the ground?",
        "A camera took two photos of the same object from different heights. Which photo was taken from the higher place?",
        "Compare the two photos. In which one was the camera held higher?",
        "In which of these two photos does the camera look from higher up?",
    ),
    "turn_size": (
        "Both photos show one object that stays still. About how far did the camera travel round it from the first photo to the second?",
        "Seen from above, how large is the angle at the object between the two places from which these photos were taken?",
        "The camera was carried round the object between the two photos. About how many degrees round it did the camera go?",
        "By about which angle round the object do the two camera positions differ?",
    ),
}
NO_FRONT = "no front in scene.json"
SCHEMA = pa.schema(
    [
        ("image_bytes", pa.list_(pa.binary())),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("question_type", pa.string()),
        ("correct_answer", pa.string()),
    ]
)
GROUP = 256  # rows written at a time: bounds memory, and lets readers read in parts


@dataclass(frozen=True)
class SpatialConfig:
    """What `spatial_questions` asks."""

    kinds: tuple[str, ...] = KINDS
    """Kinds of question: facing_side, closer, higher, turn_size."""
    train_per_kind: int = 1000
    """Training questions of each kind; fewer when the captures do not have as many clear cases."""
    test_per_kind: int = 100
    """Test questions of each kind, from the test objects only."""
    validation_per_kind: int = 0
    """Questions of each kind to stop stages on, from the validation objects only; 0: no such file."""
    facing_margin_deg: float = 30.0
    """facing_side: the camera stands at most this far from the middle of the side."""
    min_distance_ratio: float = 1.15
    """closer: the farther camera is at least this many times as far from the object as the nearer one."""
    min_height: float = 0.12
    """higher: the cameras' heights differ by at least this share of their mean distance from the object."""
    turn_tolerance_deg: float = 8.0
    """turn_size: the angle lies at most this far from the size that is named."""
    max_turn_deg: float = 120.0
    """closer and higher: the cameras stand at most this far apart round the object."""
    seed: int = 0
    """Seed of the choice of cases, the wordings and the order of the options."""

    def check(self) -> SpatialConfig:
        """The config itself; ValueError naming the field that makes no sense."""
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"kinds: {unknown[0]!r} is not known; choose from {', '.join(KINDS)}")
        if not self.kinds or min(self.train_per_kind, self.test_per_kind, self.validation_per_kind) < 0:
            sizes = (
                f"train_per_kind {self.train_per_kind}, test_per_kind {self.test_per_kind}, validation_per_kind {self.validation_per_kind}"
            )
            raise ValueError(f"nothing to ask: kinds {self.kinds}, {sizes}")
        if not 0 < self.facing_margin_deg < 45:
            raise ValueError(f"facing_margin_deg is {self.facing_margin_deg}: beyond 45 degrees it is another side that faces the camera")
        if not 0 < self.turn_tolerance_deg < HALF_STEP:
            raise ValueError(f"turn_tolerance_deg is {self.turn_tolerance_deg}: from 15 degrees on two of {TURN_SIZES} are right")
        if self.min_distance_ratio <= 1 or self.min_height <= 0:
            raise ValueError(f"min_distance_ratio {self.min_distance_ratio} must be over 1 and min_height {self.min_height} over 0")
        return self


@dataclass(frozen=True)
class Case:
    """One clear case: the photographs and the right answer (an entry of OPTIONS[kind])."""

    kind: str
    answer: str
    images: tuple[Path, ...]


def cases(capture: Capture, config: SpatialConfig, front: np.ndarray | None = None) -> Iterator[Case]:
    """Every clear case of a capture: single photographs for facing_side, each unordered pair once, in either order, for the others.

    front: (3,) where the object looks, in the capture's world frame; facing_side is left out without it.
    """
    offset = capture.centers - capture.center
    if front is not None and "facing_side" in config.kinds:
        azimuth = np.degrees(signed_angle(front, offset, capture.up))
        side = np.round(azimuth / 90).astype(int)
        for i in np.flatnonzero(np.abs(azimuth - 90 * side) <= config.facing_margin_deg):
            yield Case("facing_side", OPTIONS["facing_side"][side[i] % 4], (capture.image(i),))

    draw = random.Random(f"{config.seed}/{capture.object}/order")
    i, j = np.triu_indices(len(capture.names), 1)
    swap = np.array([draw.random() < 0.5 for _ in i], bool)
    i, j = np.where(swap, j, i), np.where(swap, i, j)
    distance, height = np.linalg.norm(offset, axis=1), offset @ capture.up
    turn = np.abs(np.degrees(signed_angle(offset[i], offset[j], capture.up)))
    near = turn <= config.max_turn_deg
    ratio, rise = distance[i] / distance[j], 2 * (height[i] - height[j]) / (distance[i] + distance[j])
    size = np.abs(turn[:, None] - TURN_SIZES).argmin(1)
    off, errors = np.abs(turn - np.array(TURN_SIZES)[size]), angle_errors(capture.rotations, capture.centers, capture.frame, i, j)
    clear = {
        "closer": (near & (np.maximum(ratio, 1 / ratio) >= config.min_distance_ratio), (ratio > 1).astype(int)),
        "higher": (near & (np.abs(rise) >= config.min_height), (rise < 0).astype(int)),
        "turn_size": ((off <= config.turn_tolerance_deg) & (off + np.degrees(errors) < HALF_STEP), size),
    }
    for kind, (mask, answer) in clear.items():
        if kind in config.kinds:
            for m in np.flatnonzero(mask):
                yield Case(kind, OPTIONS[kind][answer[m]], (capture.image(i[m]), capture.image(j[m])))


def _front(capture: Capture) -> np.ndarray | None:
    """The object's front that scene.json gives, when there is one and it is not vertical."""
    try:
        front = json.loads((capture.path / "scene.json").read_text(encoding="utf-8")).get("front")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{capture.path / 'scene.json'} is not a JSON object ({error}); remove it or render the capture again") from None
    if front is None:
        return None
    front = np.asarray(front, float)
    return front if np.linalg.norm(horizontal(front, capture.up)) > 0.5 * np.linalg.norm(front) else None


class _Sample:
    """A uniform sample of all cases it is shown: as many of each kind as asked for, the same number for each of its answers.

    Holds no more than that many cases however many there are (reservoir sampling), since captures have far more pairs than are asked about.
    """

    def __init__(self, config: SpatialConfig, per_kind: int, draw: random.Random):
        self.draw = draw
        self.room = {kind: per_kind // len(OPTIONS[kind]) for kind in config.kinds}  # for each answer
        self.kept: dict[str, dict[str, list[Case]]] = {kind: {answer: [] for answer in OPTIONS[kind]} for kind in config.kinds}
        self.shown: Counter[tuple[str, str]] = Counter()

    def show(self, case: Case) -> None:
        kept, room = self.kept[case.kind][case.answer], self.room[case.kind]
        self.shown[case.kind, case.answer] += 1
        if len(kept) < room:
            kept.append(case)
        elif (place := self.draw.randrange(self.shown[case.kind, case.answer])) < room:
            kept[place] = case

    def take(self) -> list[Case]:
        """The sample in a random order."""
        chosen = []
        for answers in self.kept.values():
            each = min(map(len, answers.values()))
            for kept in answers.values():
                chosen += self.draw.sample(kept, each)
        self.draw.shuffle(chosen)
        return chosen


def _write(path: Path, chosen: list[Case], draw: random.Random) -> None:
    """SAT's rows as parquet, under its name only when complete."""
    partial = path.with_name(path.name + ".partial")
    with writing(partial), pq.ParquetWriter(partial, SCHEMA) as writer:
        for start in range(0, len(chosen), GROUP):
            some = chosen[start : start + GROUP]
            columns = (
                [[image.read_bytes() for image in case.images] for case in some],
                [draw.choice(QUESTIONS[case.kind]) for case in some],
                [draw.sample(OPTIONS[case.kind], len(OPTIONS[case.kind])) for case in some],
                [case.kind for case in some],
                [case.answer for case in some],
            )
            writer.write_table(pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA))
    os.replace(partial, path)


def viewpoint_objects(split: Path) -> set[str]:
    """The objects of one split of a viewpoint build: every `meta.object` of its test.jsonl or validation.jsonl."""
    with open(split, encoding="utf-8") as lines:
        return {json.loads(line)["meta"]["object"] for line in lines}


def spatial_questions(
    captures: Path,
    out: Path,
    config: SpatialConfig,
    test_objects: set[str],
    validation_objects: set[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes OUT/train.parquet, OUT/test.parquet and, where there are validation objects, OUT/validation.parquet from `captures`.

    test_objects: ids ("vehicle/0001": the folder below `captures`) of the objects that are asked about in the test file and nowhere else;
    viewpoint_objects reads them from a viewpoint build; none gives an empty test file. validation_objects: the same for the third file.
    Returns {"train", "test" and, if asked for, "validation": {kind: rows}, "objects": {split: objects}, "rejected": {reason: captures},
    "seconds"}. ValueError: a field of the config makes no sense, no usable capture, an object in two splits, validation questions asked for
    without objects, or test or validation questions asked for and none of their objects found.
    """
    config.check()
    started = time.perf_counter()
    captures, out = Path(captures), Path(out)
    draw = random.Random(f"{config.seed}/spatial")
    held = {"test": test_objects} | ({"validation": validation_objects} if validation_objects else {})
    sizes = {"train": config.train_per_kind, "test": config.test_per_kind, "validation": config.validation_per_kind}
    if config.validation_per_kind and not validation_objects:
        raise ValueError(f"validation_per_kind is {config.validation_per_kind}: name the objects, by a viewpoint build's validation.jsonl")
    if shared := test_objects & (validation_objects or set()):
        raise ValueError(f"{min(shared)!r} is a test object and a validation object; build both files in one go (validation_examples)")
    samples = {split: _Sample(config, sizes[split], draw) for split in ("train", *held)}
    objects: Counter[str] = Counter(dict.fromkeys(samples, 0))
    rejected: Counter[str] = Counter()
    paths = find_captures(captures)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        for path in bar.track(paths, description="spatial questions"):
            split = next((name for name, those in held.items() if object_id(path, captures) in those), "train")
            try:
                capture = read_capture(path, captures)
            except BadCapture as bad:
                rejected[bad.reason] += 1
                continue
            objects[split] += 1
            front = _front(capture)
            if front is None and "facing_side" in config.kinds:
                rejected[NO_FRONT] += 1  # for that kind only
            for case in cases(capture, config, front):
                samples[split].show(case)
    if not sum(objects.values()):
        raise ValueError(f"{captures} has no usable capture among {len(paths)} ({dict(rejected)})")
    for split, those in held.items():
        if sizes[split] and those and not objects[split]:
            raise ValueError(f"none of the {len(those)} {split} objects (such as {min(those)!r}) is a usable capture below {captures}")

    out.mkdir(parents=True, exist_ok=True)
    if "validation" not in samples:
        (out / "validation.parquet").unlink(missing_ok=True)  # of an earlier build: its objects may be in train.parquet now
    counts = {}
    for split, sample in samples.items():
        chosen = sample.take()
        _write(out / f"{split}.parquet", chosen, draw)
        counts[split] = {kind: sum(case.kind == kind for case in chosen) for kind in config.kinds}
    return {**counts, "objects": dict(objects), "rejected": dict(rejected), "seconds": time.perf_counter() - started}
