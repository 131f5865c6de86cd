"""Rows as the viewpoint builder gives them, from poses that are made up."""

import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from actial_fast.data.sources.row import Row, Turn

OPPOSITE = {"left": "right", "right": "left"}
KINDS = ("ego_translation", "object_translation", "ego_rotation")


def pose(ego: str = "right", turn: str = "left", angle: float = 41.4, yaw: float = 38.6) -> dict:
    """The meta of a pair. The camera that goes to its right goes counterclockwise around the object (see geometry.py)."""
    return {
        "object": "car/0001",
        "pair": ["000.png", "001.png"],
        "azimuth_deg": [0.0, angle],
        "azimuth_change_deg": angle if ego == "right" else -angle,
        "yaw_deg": yaw if turn == "left" else -yaw,
        "ego_translation": ego,
        "object_translation": OPPOSITE[ego],
        "ego_rotation": turn,
        "poses": [{}, {}],
    }


def question(kind: str, meta: dict, seed: int = 0, **changes) -> Row:
    choices = ["left", "right", "no rotation" if kind == "ego_rotation" else "no movement"]
    random.Random(f"{seed}/{kind}").shuffle(choices)
    truth = "ABC"[choices.index(meta[kind])]
    options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABC", choices, strict=True))
    turns = (Turn("user", f"<image><image>Which way?\n{options}"), Turn("assistant", truth))
    plain = dict(turns=turns, images=(), truth=truth, kind=kind, choices=tuple(choices), id=f"p{seed}/{kind}", meta=meta)
    return Row(**{**plain, **changes})


def viewpoint_rows(folder: Path) -> list[Row]:
    """30 rows about ten pairs, with two images in `folder`."""
    images = []
    for i in range(2):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
        images.append(folder / f"{i}.png")
    metas = [pose(ego, turn, 20 + i) for i, (ego, turn) in enumerate([("right", "left"), ("left", "right")] * 5)]
    return [question(kind, meta, i, images=tuple(images)) for i, meta in enumerate(metas) for kind in KINDS]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
