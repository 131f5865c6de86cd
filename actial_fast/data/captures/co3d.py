"""CO3D's sequences: CATEGORY/SEQUENCE/images, with the cameras of all sequences of a category in CATEGORY/frame_annotations.jgz.

The cameras are PyTorch3D's: a point of the world, as a row, times R plus T is its place in a camera with x to the LEFT, y UP and z ahead;
focal lengths and principal points are in units of half the picture. CO3D keeps a point cloud for each sequence, and no tracks.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap

from actial_fast.data.captures.photos import MIRRORED_AXES, UNREADABLE, BadCapture, Photos, pinhole
from actial_fast.data.captures.ply import points_of

ANNOTATIONS, CLOUD = "frame_annotations.jgz", "pointcloud.ply"
PYTORCH3D = np.diag([-1.0, -1, 1])
BOUNDS, ISOTROPIC = "ndc_norm_image_bounds", "ndc_isotropic"
_Frame = tuple[str, np.ndarray, np.ndarray, pycolmap.Camera]


def annotation_file(path: Path) -> Path:
    """The file that has a sequence's cameras, if there is one."""
    return path.parent / ANNOTATIONS


def photos(path: Path) -> Photos | None:
    """The annotated frames of the sequence in this folder; None where its category has no annotations, or none of it."""
    if not (file := annotation_file(path)).is_file():
        return None
    frames = _frames(file, file.stat().st_mtime_ns).get(path.name, [])
    if not frames:
        return None
    read = sorted((_frame(path, frame) for frame in frames), key=lambda frame: frame[0])
    rotations = np.array([frame[1] for frame in read])
    if np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max() > 0.02:
        raise BadCapture(path, UNREADABLE, "a viewpoint whose R is no rotation")
    if (np.linalg.det(rotations) < 0).any():
        raise BadCapture(path, MIRRORED_AXES, "a viewpoint whose R swaps left and right")
    return Photos(
        folder=path,
        names=tuple(frame[0] for frame in read),
        rotations=rotations,
        translations=np.array([frame[2] for frame in read]),
        cameras=tuple(frame[3] for frame in read),
        cloud=points_of(path / CLOUD) if (path / CLOUD).is_file() else np.empty((0, 3)),
    )


@functools.lru_cache(maxsize=2)  # the sequences of a category follow one another
def _frames(file: Path, changed: int) -> dict[str, list[dict[str, Any]]]:
    """What each sequence's frames are annotated with, of those that have a camera. changed: when the file was."""
    with gzip.open(file, "rt", encoding="utf-8") as text:
        everything = json.load(text)
    found = defaultdict(list)
    for frame in everything:
        if frame.get("viewpoint"):
            found[frame["sequence_name"]].append({key: frame[key] for key in ("image", "viewpoint")})
    return dict(found)


def _frame(path: Path, frame: dict[str, Any]) -> _Frame:
    """Name below the sequence's folder, pose as COLMAP has it, and intrinsics in pixels."""
    image, view = frame["image"], frame["viewpoint"]
    name = os.path.relpath(path.parents[1] / image["path"], path)
    height, width = image["size"]
    kind = view.get("intrinsics_format", BOUNDS)
    if kind not in (BOUNDS, ISOTROPIC):
        raise BadCapture(path, UNREADABLE, f"intrinsics_format {kind!r}; {BOUNDS} and {ISOTROPIC} are read")
    half = np.array([width, height]) / 2 if kind == BOUNDS else np.full(2, min(width, height) / 2)
    focal = half * view["focal_length"]
    middle = np.array([width, height]) / 2 - half * view["principal_point"]
    rotation = PYTORCH3D @ np.array(view["R"], float).T
    return name, rotation, PYTORCH3D @ np.array(view["T"], float), pinhole(width, height, tuple(focal), tuple(middle))
