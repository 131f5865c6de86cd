"""Boxes to find: pictures with a few red and green blocks on a restless ground, and the question where all the red ones are.

A box is [x1, y1, x2, y2] in hundredths of the picture's sides, from its upper left corner. Replies think, look closer at some regions and
answer, as in DIP-R1 (arXiv 2505.23179).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actial_fast.data.made.files import WORDS, asked, write_png, write_rows
from actial_fast.data.sources.row import Row

QUESTION = (
    "Find all red blocks. Think, look closer at the regions that need it, then answer with their boxes, one a line, as [x1, y1, x2, y2] in "
    "hundredths of the picture's sides from its upper left corner."
)


@dataclass(frozen=True)
class BoxesConfig:
    """What `write_boxes` makes."""

    train: int = 4000
    """Training pictures."""
    test: int = 200
    """Test pictures."""
    size: int = 56
    """Sides of the picture, in pixels."""
    most: int = 2
    """Most red blocks of a picture, up to 9; it has at least one, and up to as many green ones."""
    cells: int = 4
    """Blocks fill cells of a lattice of so many a side, but for a margin that is drawn, which keeps the answers few."""
    seed: int = 0
    """Seed of the blocks."""

    def __post_init__(self) -> None:
        if min(self.train, self.test) < 1:
            raise ValueError(f"train, test: at least 1 of each, got {self.train} and {self.test}")
        if not 2 <= self.cells <= 20 or self.size < 4 * self.cells:
            raise ValueError(f"cells, size: from 2 to 20 cells of at least 4 pixels, got {self.cells} in {self.size}")
        if not 1 <= self.most <= min(9, self.cells**2 // 2):
            raise ValueError(f"most: from 1 to 9, and to half of the {self.cells**2} cells, got {self.most}")


def written(boxes: Sequence[Sequence[int]]) -> str:
    """Boxes as an answer has them, one a line."""
    return "\n".join("[" + ", ".join(map(str, box)) + "]" for box in boxes)


def write_boxes(out: Path, config: BoxesConfig) -> dict[str, int]:
    """Write train.jsonl and test.jsonl into `out`, and their pictures; how many rows each has."""
    rng = np.random.default_rng(config.seed)
    counts = {"train": config.train, "test": config.test}
    return {split: write_rows(_rows(out / split, count, config, rng), out / f"{split}.jsonl") for split, count in counts.items()}


def _rows(folder: Path, count: int, config: BoxesConfig, rng: np.random.Generator) -> Iterator[Row]:
    for n in range(count):
        red, green = int(rng.integers(1, config.most + 1)), int(rng.integers(0, config.most + 1))
        cells = rng.choice(config.cells**2, red + green, replace=False)
        boxes = [_box(int(place), config.cells) for place in cells]
        wanted = sorted(boxes[:red], key=lambda box: (box[1], box[0]))
        picture = write_png(_drawn(boxes[:red], boxes[red:], config.size, rng), folder / f"{n:05}.png")
        thought = f"There {'is one red block' if red == 1 else f'are {WORDS[red]} red blocks'}."
        text = f"<think>{thought}</think><look>{written(wanted)}</look><answer>{written(wanted)}</answer>"
        yield asked(QUESTION, text, picture, kind=f"{WORDS[red]} red", id=f"boxes/{folder.name}/{n:05}", meta={"boxes": wanted})


def _box(place: int, cells: int) -> list[int]:
    row, col = divmod(place, cells)
    return [round(100 * edge / cells) for edge in (col, row, col + 1, row + 1)]


def _drawn(red: list[list[int]], green: list[list[int]], size: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (size, size, 3); blocks leave a margin of up to a tenth of their cell."""
    picture = rng.normal(150, 15, (size, size, 3))
    for boxes, colour in ((red, (200, 50, 50)), (green, (50, 170, 60))):
        for x1, y1, x2, y2 in boxes:
            inset = rng.uniform(0, 0.1) * (x2 - x1)
            left, top, right, bottom = (round(edge * size / 100) for edge in (x1 + inset, y1 + inset, x2 - inset, y2 - inset))
            picture[top:bottom, left:right] = np.array(colour) + rng.normal(0, 20, 3)
    return np.clip(picture, 0, 255).astype(np.uint8)
