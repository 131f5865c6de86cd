"""Photographs and their cameras, as the files of a capture tell them, and why a capture or a photograph may not be used.

Every format has a reader (colmap.py, transforms.py, co3d.py) that gives Photos; capture.py looks at these and trusts none of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycolmap

# Why a capture is rejected or an image left out; build.json counts under exactly these words.
NO_MODEL = "no cameras: neither a model in sparse/ nor transforms.json nor CO3D's annotations"
UNREADABLE = "unreadable model"
UNVERIFIED = "no tracks to verify the pose with"
BEHIND = "points behind the cameras"
MIRRORED_X = "mirrored: tracks fit the images only when flipped left to right"
MIRRORED_Z = "mirrored: tracks fit the images only with near and far swapped"
MIRRORED_AXES = "mirrored: the poses are no rotations"
BROKEN = "tracks do not reproject to where they were seen"
AMBIGUOUS = "tracks fit a mirrored world as well"
TOO_FEW = "too few images"
SHAPE = "images do not have the shape the model's camera has"
MISSING = "image file missing"
DAMAGED = "image file cannot be read"
TWICE = "several images of one name"
UNPROVEN = "EXIF turns the picture, and it cannot be told whether the model's too"
EXIF_MIRROR = "EXIF mirrors the picture, and the model was made from stored pixels"
SIDEWAYS = "pictures lie on their side or disagree which way is up"
NEAR_VERTICAL = "near-vertical view"
ROLLED = "rolled camera"
OFF_AXIS = "object outside the view"


class BadCapture(ValueError):
    """A capture that cannot be used. `reason` is one of this module's constants, `detail` the figures."""

    def __init__(self, path: Path, reason: str, detail: str = ""):
        super().__init__(f"{path}: {reason}" + (f" ({detail})" if detail else ""))
        self.path, self.reason, self.detail = path, reason, detail

    def __reduce__(self) -> tuple[type[BadCapture], tuple[Path, str, str]]:
        return BadCapture, (self.path, self.reason, self.detail)


@dataclass(frozen=True, eq=False)
class Track:
    """What one photograph shows of the model's points: pixels (M, 2), the points there in the world (M, 3), and their ids (M,)."""

    pixels: np.ndarray
    points: np.ndarray
    ids: np.ndarray


@dataclass(frozen=True, eq=False)
class Photos:
    """N photographs, sorted by name.

    folder: the files are folder/name. rotations (N, 3, 3), translations (N, 3): cam_from_world, float64, of cameras as COLMAP has them: x
    right, y down, z ahead. cameras (N,): their intrinsics, for pictures of the cameras' size. cloud (P, 3): points of the world.
    tracks: for each photograph, empty for a format that keeps none.
    """

    folder: Path
    names: tuple[str, ...]
    rotations: np.ndarray
    translations: np.ndarray
    cameras: tuple[pycolmap.Camera, ...]
    cloud: np.ndarray
    tracks: tuple[Track, ...] = ()

    @property
    def centers(self) -> np.ndarray:
        """Where the cameras are, (N, 3)."""
        return -np.einsum("nji,nj->ni", self.rotations, self.translations)


def pinhole(width: int, height: int, focal: tuple[float, float], middle: tuple[float, float]) -> pycolmap.Camera:
    """A camera without distortion; all in pixels."""
    return pycolmap.Camera(model="PINHOLE", width=width, height=height, params=[*focal, *middle])
