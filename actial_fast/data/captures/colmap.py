"""COLMAP's models, binary or text, of every version: sparse/0, sparse/, or the largest of several.

    car/0001/images/000.jpg ...                                what MVImgNet ships for each object, and `data render` writes
    car/0001/sparse/0/{cameras,images,points3D}.bin

nerfstudio and DL3DV keep theirs in colmap/sparse/0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pycolmap

from actial_fast.data.captures.model import check_files, model_folder
from actial_fast.data.captures.photos import TOO_FEW, UNREADABLE, BadCapture, Photos, Track

FOLDERS = ("sparse", "colmap/sparse")
OBSERVATIONS = 50  # tracks read of an image: enough for a median, and reading them is what a capture costs


def photos(path: Path) -> Photos | None:
    """The registered images of the capture's model; None where there is none. BadCapture, or pycolmap's errors, for a damaged one."""
    folder = next(filter(None, (model_folder(path / name) for name in FOLDERS)), None)
    if folder is None or not (path / "images").is_dir():
        return None
    check_files(folder)
    model = pycolmap.Reconstruction(str(folder))
    images = sorted((image for image in model.images.values() if image.has_pose), key=lambda image: image.name)
    if not images:
        raise BadCapture(path, TOO_FEW, "the model has no registered image")
    cameras = tuple(model.cameras[image.camera_id] for image in images)
    if any(min(camera.width, camera.height) < 1 for camera in cameras):
        raise BadCapture(path, UNREADABLE, "a camera without pixels")
    poses = [image.cam_from_world() for image in images]
    tracks = tuple(_track(model, image) for image in images)
    tracked = any(len(track.ids) for track in tracks)
    return Photos(
        folder=path / "images",
        names=tuple(image.name for image in images),
        rotations=np.array([pose.rotation.matrix() for pose in poses]),
        translations=np.array([pose.translation for pose in poses]),
        cameras=cameras,
        cloud=np.array([] if tracked else [point.xyz for point in model.points3D.values()]).reshape(-1, 3),
        tracks=tracks,
    )


def _track(model: pycolmap.Reconstruction, image: pycolmap.Image) -> Track:
    keypoints = image.points2D
    index = image.get_observation_point2D_idxs()
    index = index[:: max(1, len(index) // OBSERVATIONS)]
    ids = [keypoints[i].point3D_id for i in index]
    return Track(
        np.array([keypoints[i].xy for i in index]).reshape(-1, 2),
        np.array([model.points3D[k].xyz for k in ids]).reshape(-1, 3),
        np.array(ids, np.int64),
    )
