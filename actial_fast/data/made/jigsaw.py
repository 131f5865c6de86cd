"""Jigsaws: a picture is cut into pieces which are shuffled, and the question is where they belong.

The shown board's places are numbered from the left to the right and from the top to the bottom. `order` names for each of them, in the
whole picture, the place where its piece is shown. turns.jsonl has the same boards solved in turns, each answered by the board as it then
is, which is what a model has to see before it can play them (AGILE, arXiv 2510.01304).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from actial_fast.data.made.files import asked, parted, pictures_below, write_png, write_rows
from actial_fast.data.sources.picture import decode
from actial_fast.data.sources.row import IMAGE_TAG, Row, Turn


@dataclass(frozen=True)
class JigsawConfig:
    """What `write_jigsaw` makes."""

    grid: tuple[int, int] = (2, 2)
    """Rows and columns of pieces."""
    train: int = 4000
    """Training boards."""
    test: int = 200
    """Test boards, of other pictures."""
    turns: int = 2000
    """Training boards that turns.jsonl has solved in turns; 0 = no such file."""
    size: int = 56
    """Sides of the shown picture, in pixels, less what does not divide into the rows and columns."""
    seed: int = 0
    """Seed of pictures and shuffles."""

    def __post_init__(self) -> None:
        rows, cols = self.grid
        if not (1 <= rows <= 9 and 1 <= cols <= 9 and rows * cols > 1):
            raise ValueError(f"grid: rows and columns from 1 to 9 and more than one piece, got {rows} x {cols}")
        if min(self.train, self.test) < 1 or self.turns < 0:
            raise ValueError(f"train, test, turns: at least 1, 1 and 0, got {self.train}, {self.test} and {self.turns}")
        if self.size < 2 * max(rows, cols):
            raise ValueError(f"size: at least 2 pixels a piece, got {self.size}")


def question(rows: int, cols: int) -> str:
    """What a board asks for in one reply."""
    return f"{_told(rows, cols)} For each place of the whole picture, in order, which place shows its piece now?"


def turns_question(rows: int, cols: int) -> str:
    """What a board asks for in turns."""
    return f"{_told(rows, cols)} Put the pieces right: swap two places at a time, and say done when the picture is whole."


def _told(rows: int, cols: int) -> str:
    return (
        f"This picture was cut into {rows} rows and {cols} columns of pieces, and the pieces were shuffled. The places are numbered from "
        "the left to the right and from the top to the bottom."
    )


def observed(a: int, b: int) -> str:
    """What is told with the board after a swap."""
    return f"{IMAGE_TAG}Places {a} and {b} changed their pieces. What next?"


def cell(place: int, shape: Sequence[int], rows: int, cols: int) -> tuple[slice, slice]:
    """The pixels of place `place`, counted from 1, of a board of pixels (H, W, 3); what does not divide stays at the right and bottom."""
    height, width = shape[0] // rows, shape[1] // cols
    row, col = divmod(place - 1, cols)
    return slice(row * height, (row + 1) * height), slice(col * width, (col + 1) * width)


def swapped(board: np.ndarray, a: int, b: int, rows: int, cols: int) -> np.ndarray:
    """The board (H, W, 3) with the pieces of two places exchanged."""
    one, other, out = cell(a, board.shape, rows, cols), cell(b, board.shape, rows, cols), board.copy()
    out[one], out[other] = board[other], board[one]
    return out


def exchanged(order: Sequence[int], a: int, b: int) -> list[int]:
    """The order once the pieces of two places were exchanged."""
    return [{a: b, b: a}.get(place, place) for place in order]


def shuffled(picture: np.ndarray, order: Sequence[int], rows: int, cols: int) -> np.ndarray:
    """The board (H, W, 3) that shows the piece of each place of the picture at order's place."""
    out = picture.copy()
    for place, shown in enumerate(order, 1):
        out[cell(shown, picture.shape, rows, cols)] = picture[cell(place, picture.shape, rows, cols)]
    return out


def landscape(size: int, rng: np.random.Generator) -> np.ndarray:
    """A drawn landscape, uint8 (size, size, 3), that is only right one way: sky above ground, light from the left."""
    y, x = np.mgrid[0:size, 0:size] / size
    horizon = rng.uniform(0.42, 0.58) + 0.05 * np.sin(2 * np.pi * (x * rng.uniform(0.5, 1.5) + rng.random()))
    sky, ground = rng.uniform([90, 130, 190], [150, 190, 255]), rng.uniform([60, 90, 30], [130, 150, 80])
    picture = np.where((y < horizon)[..., None], sky, ground) * (1.15 - 0.5 * x + 0.1 * (y - 0.5))[..., None]
    for _ in range(rng.integers(1, 4)):  # trees
        foot, height, width = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.3), rng.uniform(0.02, 0.06)
        tree = (abs(x - foot) < width) & (y < 0.62) & (y > 0.62 - height)
        picture[tree] = rng.uniform([20, 50, 20], [60, 90, 40])
    return np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)


def write_jigsaw(out: Path, config: JigsawConfig, pictures: Path | None = None) -> dict[str, int]:
    """Write train.jsonl, test.jsonl and turns.jsonl into `out`, and their boards; how many rows each has.

    pictures: a folder of yours, of which a tenth is for the test; without it landscapes are drawn. ValueError for a folder without two
    pictures, BadRow for one that cannot be decoded.
    """
    rng = np.random.default_rng(config.seed)
    rows, cols = config.grid
    files = parted(pictures_below(pictures), 0.1, rng) if pictures else ([], [])

    def boards(split: str, count: int, of: list[Path]) -> Iterator[Row]:
        for n in range(count):
            file = of[int(rng.integers(len(of)))] if of else None
            picture = landscape(config.size, rng) if file is None else _square(decode(file, str(file)), config.size)
            picture = picture[: config.size // rows * rows, : config.size // cols * cols]
            order = (1 + _deranged(rows * cols, rng)).tolist()
            yield _row(shuffled(picture, order, rows, cols), order, out / split / f"{n:05}.png", config)

    train = list(boards("train", config.train, files[0]))
    done = {"train": write_rows(train, out / "train.jsonl")}
    done["test"] = write_rows(boards("test", config.test, files[1]), out / "test.jsonl")
    if config.turns:
        played = (_played(row, out / "turns", config) for row in train[: config.turns])
        done["turns"] = write_rows(played, out / "turns.jsonl")
    return done


def _deranged(pieces: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation that is not the identity: on a whole picture there is nothing to do."""
    while True:
        order = rng.permutation(pieces)
        if (order != np.arange(pieces)).any():
            return order


def _square(pixels: np.ndarray, size: int) -> np.ndarray:
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return np.asarray(Image.fromarray(pixels[top : top + side, left : left + side]).resize((size, size), Image.Resampling.BICUBIC))


def _row(board: np.ndarray, order: list[int], path: Path, config: JigsawConfig) -> Row:
    answer = " ".join(map(str, order))
    thought = " ".join(f"Place {place}: the piece at {shown}." for place, shown in enumerate(order, 1))
    meta = {"grid": list(config.grid), "order": order}
    text = f"<think>{thought}</think><answer>{answer}</answer>"
    name = f"jigsaw/{path.parent.name}/{path.stem}"
    return asked(question(*config.grid), text, write_png(board, path), truth=answer, kind="jigsaw", id=name, meta=meta)


def _played(row: Row, folder: Path, config: JigsawConfig) -> Row:
    """The row with its board solved place by place, a swap a turn, each answered by the board as it then is."""
    order, images, name = list(row.meta["order"]), list(row.images), row.id.rsplit("/", 1)[1]
    board = decode(images[0], row.where)
    turns = [Turn("user", IMAGE_TAG + turns_question(*config.grid))]
    for place in range(1, len(order) + 1):
        shown = order[place - 1]
        if shown == place:
            continue
        a, b = sorted((place, shown))
        turns.append(Turn("assistant", f"swap {a} {b}"))
        board, order = swapped(board, a, b, *config.grid), exchanged(order, a, b)
        images.append(write_png(board, folder / f"{name}-{len(images)}.png"))
        turns.append(Turn("user", observed(a, b)))
    turns.append(Turn("assistant", "done"))
    return replace(row, turns=tuple(turns), images=tuple(images), truth="", id=f"{row.id}/turns")
