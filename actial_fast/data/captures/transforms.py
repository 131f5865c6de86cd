"""transforms.json, as nerfstudio, DL3DV and instant-ngp write it; NeRF's transforms_train.json, _val and _test together.

A frame's `transform_matrix` takes places of the camera to the world's. Its axes are OpenGL's (x right, y up, looking along -z), as is
documented, or OpenCV's (y down, looking along +z), as many files have it all the same: photographs of an object look at it, which tells.
`applied_transform`, which went over the world before it was written, is taken back. Intrinsics stand in the file or in its frames.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap

from actial_fast.data.captures.frame import estimate_center
from actial_fast.data.captures.photos import MIRRORED_AXES, UNREADABLE, BadCapture, Photos
from actial_fast.data.captures.ply import points_of
from actial_fast.data.sources.picture import header

FILES = (("transforms.json",), ("transforms_train.json", "transforms_val.json", "transforms_test.json"))
SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".JPG", ".webp")
SMALLER = ("images_2", "images_4", "images_8")  # where only smaller copies of images/ were kept
CLOUDS = ("sparse_pc.ply", "points3d.ply")
MODELS = {
    **dict.fromkeys(("OPENCV", "PERSPECTIVE", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL"), "OPENCV"),
    "OPENCV_FISHEYE": "OPENCV_FISHEYE",
}
DISTORTION = {"OPENCV": ("k1", "k2", "p1", "p2"), "OPENCV_FISHEYE": ("k1", "k2", "k3", "k4")}
OPENGL = np.diag([1.0, -1, -1])
_Frames = dict[str, tuple[np.ndarray, pycolmap.Camera]]


def files(path: Path) -> list[Path]:
    """The files of this format in a folder; [] where it has none."""
    return next((there for names in FILES if (there := [path / name for name in names if (path / name).is_file()])), [])


def photos(path: Path) -> Photos | None:
    """The frames of the folder's files; None where it has none. BadCapture for poses that are no rotations."""
    if not (found := files(path)):
        return None
    frames: _Frames = {}
    cloud = np.empty((0, 3))
    for file in found:
        try:
            here, points = _read(path, file)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, np.linalg.LinAlgError) as error:
            raise BadCapture(path, UNREADABLE, f"{file.name} is not as nerfstudio writes it: {type(error).__name__} {error}") from None
        frames |= here
        cloud = points if len(points) else cloud
    names = tuple(sorted(frames))
    world_from_camera = np.array([frames[name][0] for name in names]).reshape(-1, 4, 4)
    axes, centers = _rotations(path, world_from_camera[:, :3, :3]), world_from_camera[:, :3, 3]
    rotations = _facing(np.einsum("ij,njk->nik", OPENGL, axes.transpose(0, 2, 1)), centers, cloud)
    return Photos(
        folder=path,
        names=names,
        rotations=rotations,
        translations=-np.einsum("nij,nj->ni", rotations, centers),
        cameras=tuple(frames[name][1] for name in names),
        cloud=cloud,
    )


def _read(path: Path, file: Path) -> tuple[_Frames, np.ndarray]:
    """Each frame's pose and camera by the picture's name, and the points of the file's cloud, in the world before it was turned."""
    about = json.loads(file.read_text(encoding="utf-8-sig"))
    undo = np.linalg.inv(_square(about.get("applied_transform") or np.eye(4)))
    frames = {}
    for frame in about["frames"]:
        name = _name(path, str(frame["file_path"]))
        frames[name] = undo @ _square(frame["transform_matrix"]), _camera(path, path / name, {**about, **frame})
    clouds = (path / name for name in (about.get("ply_file_path"), *CLOUDS) if name)
    cloud = next((points_of(there) for there in clouds if there.is_file()), np.empty((0, 3)))
    return frames, cloud @ undo[:3, :3].T + undo[:3, 3]


def _square(matrix: Any) -> np.ndarray:
    """A 3x4 or 4x4 matrix as 4x4."""
    out = np.eye(4)
    rows = np.asarray(matrix, float)
    if rows.shape not in ((3, 4), (4, 4)) or not np.isfinite(rows).all():
        raise ValueError(f"a matrix of shape {rows.shape} or with values that are not finite, where 3x4 or 4x4 is expected")
    out[: len(rows)] = rows
    return out


def _rotations(path: Path, axes: np.ndarray) -> np.ndarray:
    """The rotations (N, 3, 3) of camera axes that may be scaled, all alike; BadCapture for what is none."""
    scale = np.linalg.norm(axes, axis=1, keepdims=True)
    turned = axes / np.where(scale > 0, scale, 1)
    if len(turned) and np.abs(turned.transpose(0, 2, 1) @ turned - np.eye(3)).max() > 0.02:
        raise BadCapture(path, UNREADABLE, "a transform_matrix whose axes are not at right angles")
    if (np.linalg.det(turned) < 0).any():
        raise BadCapture(path, MIRRORED_AXES, "a transform_matrix that swaps left and right")
    return turned


def _facing(rotations: np.ndarray, centers: np.ndarray, cloud: np.ndarray) -> np.ndarray:
    """The cameras' rotations read with OpenGL's axes, or with OpenCV's where they would look away from what they show."""
    if not len(rotations):
        return rotations
    target = np.median(cloud, axis=0) if len(cloud) else estimate_center(rotations, centers, cloud, np.empty(0, int))[0]
    ahead = ((target - centers) * rotations[:, 2]).sum(1)
    return rotations if np.median(ahead) >= 0 else np.einsum("ij,njk->nik", OPENGL, rotations)


def _name(path: Path, written: str) -> str:
    """Where a frame's picture is, below the folder; as it is written where there is none."""
    name = os.path.normpath(written.replace("\\", "/"))
    name = os.path.relpath(name, path.absolute()) if os.path.isabs(name) else name
    first, _, rest = name.partition("/")
    for folder in ("", *SMALLER) if first == "images" else ("",):
        for suffix in SUFFIXES:
            if (path / (there := (f"{folder}/{rest}" if folder else name) + suffix)).is_file():
                return there
    return name


def _camera(path: Path, picture: Path, said: Mapping[str, Any]) -> pycolmap.Camera:
    """The camera of a frame, whose own intrinsics go before the file's; the size is the picture's where none is told."""
    model = MODELS.get(str(said.get("camera_model", "OPENCV")).upper())
    if model is None:
        raise BadCapture(path, UNREADABLE, f"camera_model {said['camera_model']!r}; one of {', '.join(MODELS)} is read")
    width, height = (int(said.get(key) or 0) for key in ("w", "h"))
    if not (width and height):
        width, height = header(picture)[:2] if picture.is_file() else (1, 1)  # one that is missing is left out
    focal = said.get("fl_x") or (width / 2 / math.tan(said["camera_angle_x"] / 2) if said.get("camera_angle_x") else 0)
    if not focal:
        raise BadCapture(path, UNREADABLE, "neither fl_x nor camera_angle_x")
    middle = [said.get("cx") or width / 2, said.get("cy") or height / 2]
    bent = [float(said.get(key) or 0) for key in DISTORTION[model]]
    return pycolmap.Camera(model=model, width=width, height=height, params=[focal, said.get("fl_y") or focal, *middle, *bent])
