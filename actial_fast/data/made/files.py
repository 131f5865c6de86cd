"""Writing made rows: pictures as PNG, rows as JSON Lines, whole or not at all; and the pictures that a user brings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from actial_fast.data.sources.row import IMAGE_TAG, Row, Turn

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def pictures_below(folder: Path) -> list[Path]:
    """The pictures in a folder and below, by name. ValueError where there is none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"{folder}: no pictures ({', '.join(sorted(SUFFIXES))}) in it or below")
    return found


def parted(files: Sequence[Path], share: float, rng: np.random.Generator) -> tuple[list[Path], list[Path]]:
    """Pictures for training and for the test, none in both. ValueError where one of them would have none."""
    if len(files) < 2:
        raise ValueError("at least two pictures are needed: none is shown in training and in the test")
    held = set(rng.choice(len(files), min(len(files) - 1, max(1, round(share * len(files)))), replace=False).tolist())
    return [f for i, f in enumerate(files) if i not in held], [f for i, f in enumerate(files) if i in held]


def write_png(pixels: np.ndarray, path: Path) -> Path:
    """uint8 (H, W, 3) into a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_rows(rows: Iterable[Row], path: Path) -> int:
    """Rows into a JSON Lines file; how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, count = path.with_name(path.name + ".tmp"), 0
    with open(temporary, "w") as file:
        for row in rows:
            file.write(json.dumps(row.check().to_json(path.parent), ensure_ascii=False) + "\n")
            count += 1
    temporary.replace(path)
    return count


def asked(question: str, answer: str, image: Path, **more: object) -> Row:
    """A row that shows one picture, asks and answers."""
    turns = (Turn("user", f"{IMAGE_TAG}{question}"), Turn("assistant", answer))
    return Row(turns=turns, images=(image,), **more)  # type: ignore[arg-type]
