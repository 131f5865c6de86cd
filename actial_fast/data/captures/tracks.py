"""Does a reconstruction show what its pictures show? Its tracks tell, the pixels at which each of its points was seen.

A world is known up to rotation, translation and scale, and a mirrored one looks just as consistent by its poses alone: cameras that walk
clockwise around the object become cameras that walk counterclockwise. So a world is held against its tracks as it is, with left and right
swapped, and with near and far swapped (what a reconstruction falls into when perspective is weak: its cameras orbit the wrong way round).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pycolmap

from actial_fast.data.captures.photos import AMBIGUOUS, BEHIND, BROKEN, MIRRORED_X, MIRRORED_Z, UNVERIFIED, BadCapture, Photos

MAX_REPROJECTION = 0.01  # median reprojection error over the image diagonal; COLMAP's own is about 0.0005
MIN_OBSERVATIONS = 5


def reprojection_errors(path: Path, photos: Photos) -> np.ndarray:
    """Each photograph's median reprojection error over its diagonal, (N,), NaN with fewer than 5 observed points.

    BadCapture when the world as a whole is mirrored, broken, or fits its tracks no better than a mirror image of it does."""
    errors = np.full(len(photos.names), np.nan)
    everything, behind = [], []
    for n, track in enumerate(photos.tracks):
        if len(track.pixels) < MIN_OBSERVATIONS:
            continue
        camera = photos.cameras[n]
        local = track.points @ photos.rotations[n].T + photos.translations[n]
        swapped = local * [1, 1, -1] + [0, 0, 2 * np.median(local[:, 2])]
        diagonal = np.hypot(camera.width, camera.height)
        per_point = np.stack([_error(camera, world, track.pixels) for world in (local, local * [-1, 1, 1], swapped)], 1) / diagonal
        errors[n] = np.median(per_point[:, 0])
        everything.append(per_point)
        behind.append(local[:, 2] <= 0)
    if not everything:
        raise BadCapture(path, UNVERIFIED, f"no image has {MIN_OBSERVATIONS} observed points; verify=off trusts the poses")
    if (share := np.concatenate(behind).mean()) > 0.1:
        raise BadCapture(path, BEHIND, f"{share:.0%} of the observations")
    judge(path, np.concatenate(everything))
    return errors


def judge(path: Path, errors: np.ndarray) -> None:
    """BadCapture unless the world as it is fits far better than its mirror images. errors: (M, 3), of observations, over the diagonal, in
    the world as it is, with left and right swapped, and with near and far swapped."""
    real, flipped, swapped = np.median(errors, axis=0)
    if real <= MAX_REPROJECTION and real <= 0.5 * min(flipped, swapped):
        return
    detail = f"median error {real:.2%} of the diagonal; left and right swapped {flipped:.2%}, near and far swapped {swapped:.2%}"
    if flipped < 0.5 * real and flipped <= min(swapped, MAX_REPROJECTION):
        raise BadCapture(path, MIRRORED_X, detail)
    if swapped < 0.5 * real and swapped <= MAX_REPROJECTION:
        raise BadCapture(path, MIRRORED_Z, detail)
    raise BadCapture(path, BROKEN if real > MAX_REPROJECTION else AMBIGUOUS, detail)


def _error(camera: pycolmap.Camera, local: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Distance in pixels (M,) between where camera-space points (M, 3) fall and `pixels` (M, 2); infinite behind the camera."""
    front = local[:, 2] > 0
    error = np.full(len(local), np.inf)
    if front.any():
        error[front] = np.linalg.norm(camera.img_from_cam(local[front]) - pixels[front], axis=1)
    return error
