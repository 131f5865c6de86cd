"""Sparkle's basics (arXiv 2410.16162): direction, distance and place of marks on a plane, the parts of which spatial reasoning is made.

Pictures are a plain with a red and a blue mark. Lengths are in hundredths of the picture's side, places are "x, y" from its upper left
corner.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actial_fast.data.made.files import asked, write_png, write_rows
from actial_fast.data.sources.row import Row

DIRECTIONS = ("right", "upper right", "above", "upper left", "left", "lower left", "below", "lower right")  # counterclockwise, 45 degrees
KINDS = ("direction", "distance", "place")
NAMES = ("red", "blue")
COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220)}


@dataclass(frozen=True)
class SparkleConfig:
    """What `write_sparkle` makes."""

    kinds: tuple[str, ...] = KINDS
    """Kinds of question: direction, distance, place."""
    train: int = 6000
    """Training questions, the kinds in turn."""
    test: int = 300
    """Test questions, about other pictures."""
    size: int = 56
    """Sides of the picture, in pixels."""
    steps: int = 5
    """Marks stand on a lattice of so many places a side, which keeps the answers few; 0 = anywhere."""
    seed: int = 0
    """Seed of the marks."""

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"kinds: {unknown[0]!r} is not one of {', '.join(KINDS)}")
        if not self.kinds or min(self.train, self.test) < 1:
            raise ValueError("kinds, train, test: at least one of each")
        if self.size < 16 or self.steps == 1 or self.steps < 0:
            raise ValueError(f"size, steps: at least 16 pixels and 0 or at least 2 places a side, got {self.size} and {self.steps}")


def question(kind: str, first: str, second: str) -> str:
    """What is asked about a mark, or about where the first is as seen from the second."""
    if kind == "direction":
        return f"As seen from the {second} mark, in which direction is the {first} mark?"
    if kind == "distance":
        return f"How far is the {first} mark from the {second} mark? Answer in hundredths of the picture's side."
    return f"Where is the {first} mark? Answer with x, y in hundredths of the picture's side, from its upper left corner."


def write_sparkle(out: Path, config: SparkleConfig) -> dict[str, int]:
    """Write train.jsonl and test.jsonl into `out`, and their pictures; how many rows each has."""
    rng = np.random.default_rng(config.seed)
    counts = {"train": config.train, "test": config.test}
    return {split: write_rows(_rows(out / split, count, config, rng), out / f"{split}.jsonl") for split, count in counts.items()}


def _rows(folder: Path, count: int, config: SparkleConfig, rng: np.random.Generator) -> Iterator[Row]:
    for n in range(count):
        kind = config.kinds[n % len(config.kinds)]
        marks = dict(zip(NAMES, _two(config.steps, rng), strict=True))
        picture = write_png(_drawn(marks, config.size, rng), folder / f"{n:05}.png")
        first, second = rng.permutation(NAMES).tolist()
        truth = _truth(kind, marks[first], marks[second])
        offered = DIRECTIONS if kind == "direction" else ()
        text = f"<think>{_thought(kind, first, marks[first], second, marks[second])}</think><answer>{truth}</answer>"
        meta = {"measure": kind, "marks": {name: place.tolist() for name, place in marks.items()}}
        name = f"sparkle/{folder.name}/{n:05}"
        yield asked(question(kind, first, second), text, picture, truth=truth, kind=kind, choices=offered, id=name, meta=meta)


def _two(steps: int, rng: np.random.Generator) -> np.ndarray:
    """Two places (2, 2), in hundredths, apart by more than marks are wide."""
    while True:
        places = rng.integers(10, 91, (2, 2)) if not steps else np.rint(10 + 80 * rng.integers(0, steps, (2, 2)) / (steps - 1)).astype(int)
        if np.hypot(*(places[0] - places[1])) >= 15:
            return places


def _truth(kind: str, first: np.ndarray, second: np.ndarray) -> str:
    if kind == "direction":
        right, down = first - second
        return DIRECTIONS[round(math.degrees(math.atan2(-down, right)) / 45) % 8]
    return str(round(math.dist(first, second))) if kind == "distance" else f"{first[0]}, {first[1]}"


def _thought(kind: str, first: str, one: np.ndarray, second: str, other: np.ndarray) -> str:
    shown = f"The {first} mark is at {one[0]}, {one[1]}."
    return shown if kind == "place" else f"{shown} The {second} mark is at {other[0]}, {other[1]}."


def _drawn(marks: dict[str, np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (size, size, 3): round marks on a plain that is not all of one grey."""
    y, x = (np.mgrid[0:size, 0:size] + 0.5) * 100 / size
    picture = np.full((size, size, 3), rng.uniform(170, 230)) + rng.normal(0, 6, (size, size, 3))
    for name, (right, down) in marks.items():
        picture[np.hypot(x - right, y - down) < 8] = COLOURS[name] + rng.normal(0, 10, 3)
    return np.clip(picture, 0, 255).astype(np.uint8)
