"""Viewpoint geometry in plain numpy: which way is up, where the object is, and how one camera lies to another.

COLMAP's camera looks along +z with x to the right and y DOWN in the image, so the rows of a cam_from_world rotation are, in world
coordinates: right, image-down, forward. The world itself has an arbitrary rotation, origin and scale, so every direction below is
measured about an estimated `up` (frame.py), and every length in units of the first camera's horizontal distance from the object.

Seen from above (up points at the reader), O the object, both cameras aimed at it:

            O
          ^   ^           camera 1 stands south of O and looks north; east is on its right.
          |     \\         camera 2 stands further counterclockwise on the ring (azimuth change > 0). Therefore:
          |       \\         ego translation     right  the camera's centre went to the right of camera 1's horizontal right axis
          1 - - - > 2       object translation  left   O faces camera 1, so O's left is camera 1's right
                            ego rotation        left   the viewing direction turned counterclockwise (yaw > 0)

Source: this project's issue 2; camera convention: COLMAP's documentation of its output format.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def unit(v: np.ndarray) -> np.ndarray:
    """`v` (..., 3) scaled to length 1; zero vectors stay zero."""
    length = np.linalg.norm(v, axis=-1, keepdims=True)
    return v / np.where(length > 0, length, 1.0)


def horizontal(v: np.ndarray, up: np.ndarray) -> np.ndarray:
    """The part of `v` (..., 3) perpendicular to the unit vector `up` (3,)."""
    return v - (v @ up)[..., None] * up


def signed_angle(a: np.ndarray, b: np.ndarray, up: np.ndarray) -> np.ndarray:
    """The angle in radians, in (-pi, pi], that turns `a` into `b` about `up`; counterclockwise seen from above is positive.

    a, b: (..., 3), any length; only their horizontal parts count. up: (3,), unit."""
    a, b = horizontal(a, up), horizontal(b, up)
    return np.arctan2(np.cross(a, b) @ up, (a * b).sum(-1))


def qvec(rotation: np.ndarray) -> np.ndarray:
    """The unit quaternion (w, x, y, z), w >= 0, of a rotation matrix (3, 3), as COLMAP's images.txt writes it."""
    r = rotation
    # The quaternion is the eigenvector of Bar-Itzhack's symmetric matrix: no case distinction by the trace, stable for every rotation.
    k = np.array(
        [
            [r[0, 0] + r[1, 1] + r[2, 2], r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]],
            [0, r[0, 0] - r[1, 1] - r[2, 2], r[0, 1] + r[1, 0], r[0, 2] + r[2, 0]],
            [0, 0, r[1, 1] - r[0, 0] - r[2, 2], r[1, 2] + r[2, 1]],
            [0, 0, 0, r[2, 2] - r[0, 0] - r[1, 1]],
        ]
    )
    q = np.linalg.eigh(k, UPLO="U")[1][:, -1]
    return q if q[0] >= 0 else -q


def rotation(qvec: np.ndarray) -> np.ndarray:
    """The rotation matrix (3, 3) of a quaternion (w, x, y, z) of any length."""
    w, x, y, z = np.asarray(qvec, float) / np.linalg.norm(qvec)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


@dataclass(frozen=True, eq=False)
class Motion:
    """The move from camera 1 to camera 2 for M pairs; arrays (M,). See the sketch at the top of this file for the signs.

    azimuth: radians about the object, counterclockwise +. yaw: radians of the viewing direction about up, counterclockwise (left) +.
    ego: how far camera 2 lies along camera 1's horizontal right axis, right +, in units of camera 1's horizontal distance from the object.
    object: the same move along the right axis of an object that faces camera 1, the object's right +, same units."""

    azimuth: np.ndarray
    yaw: np.ndarray
    ego: np.ndarray
    object: np.ndarray


def motion(rotations: np.ndarray, centers: np.ndarray, center: np.ndarray, up: np.ndarray, first: np.ndarray, second: np.ndarray) -> Motion:
    """The moves between cameras `first` and `second` (integer indices, (M,) each) of rotations (N, 3, 3) and camera centres (N, 3)."""
    facing = unit(horizontal(center - centers[first], up))  # from camera 1 to the object, (M, 3)
    distance = np.linalg.norm(horizontal(center - centers[first], up), axis=-1)
    step = (centers[second] - centers[first]) / np.where(distance > 0, distance, 1.0)[:, None]
    forward = rotations[:, 2]
    ego_right = np.cross(unit(horizontal(forward[first], up)), up)
    object_right = np.cross(-facing, up)  # the object looks back at camera 1
    return Motion(
        azimuth=signed_angle(centers[first] - center, centers[second] - center, up),
        yaw=signed_angle(forward[first], forward[second], up),
        ego=(step * ego_right).sum(-1),
        object=(step * object_right).sum(-1),
    )
