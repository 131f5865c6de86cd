"""Photographs that EXIF turns: were the poses made from the stored pixels, or from those that are shown?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pycolmap
from PIL import Image

from actial_fast.data.captures.photos import DAMAGED, EXIF_MIRROR, SHAPE, UNPROVEN
from actial_fast.data.sources.picture import header

# EXIF's orientation -> the camera of the shown picture from that of the stored pixels; the other ones mirror
TURNED = {3: [[-1, 0, 0], [0, -1, 0], [0, 0, 1]], 6: [[0, -1, 0], [1, 0, 0], [0, 0, 1]], 8: [[0, 1, 0], [-1, 0, 0], [0, 0, 1]]}
NO_HEADER = (0, 0, 1)  # of a picture that cannot be read


def turns(files: Sequence[Path | None], cameras: Sequence[pycolmap.Camera]) -> tuple[np.ndarray, list[str]]:
    """What turns each camera with its picture as it is shown, (N, 3, 3), and why a picture cannot be used, '' where it can. files: None for
    one that is not looked at.

    A picture that EXIF turns by a quarter shows by its camera's shape whether the model was made from stored or from shown pixels. One tool
    read all pictures of a model the same way, so that those tell of the ones whose shape does not."""
    heads = [NO_HEADER if file is None else _header(file) for file in files]
    stored = [fits(w, h, camera) for (w, h, _), camera in zip(heads, cameras, strict=True)]
    shown = [fits(*((h, w) if tag > 4 else (w, h)), camera) for (w, h, tag), camera in zip(heads, cameras, strict=True)]
    told = {s for (_, _, tag), s, t in zip(heads, stored, shown, strict=True) if tag > 1 and s != t}
    found, problems = [], []
    for head, s, t in zip(heads, stored, shown, strict=True):
        tag = head[2]
        of_stored = s if s != t else told == {True} if len(told) == 1 else None  # None: not known
        turn, problem = np.eye(3), ""
        if not (s or t):
            problem = SHAPE if head != NO_HEADER else DAMAGED
        elif tag > 1 and of_stored is None:
            problem = UNPROVEN
        elif tag > 1 and of_stored:
            turn, problem = np.array(TURNED.get(tag, np.eye(3)), float), "" if tag in TURNED else EXIF_MIRROR
        found.append(turn)
        problems.append(problem)
    return np.stack(found), problems


def fits(width: int, height: int, camera: pycolmap.Camera) -> bool:
    """Whether a picture has the camera's shape, to 5 per cent; its size may be another."""
    return 0.95 * height * camera.width < width * camera.height < 1.05 * height * camera.width


def _header(file: Path) -> tuple[int, int, int]:
    try:
        return header(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # no picture
        return NO_HEADER
