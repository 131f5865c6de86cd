"""Which way is up, where the object is, and how sure that is: what all angles of a capture are measured in.

Nothing in a reconstruction says either. Each is estimated from several signs, weighed by how well each agrees with itself over the
capture's pictures, so that one that this photographer does not give (level pictures, say) hardly counts:

    up       pictures are level (rolls are small); the cameras stay about as high over the object (elevations are alike)
    object   cameras look at it, past it by the same angle at most; it is what they see, whose visible side is turned to each of them

The covariances are those of the weighted least squares, and say how far an angle between two cameras may be off (`angle_errors`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actial_fast.data.captures.geometry import horizontal, motion, signed_angle, unit

ROUNDS, SETTLED = 30, 1e-4  # of reweighting; until nothing moves by more, in radians or of the cameras' distance
UP_PRIOR = 0.003  # weight of "image-up is up" against the right vectors: decides few or narrow views, shifts a wide arc by < 1 degree
LEVEL = np.radians(2)  # no photographer's rolls, nor elevations over a walk, are taken for more alike than these
HEIGHT = 0.05
SAME_ROLL = np.radians(2)  # all pictures may be rolled by about this, without its being known
AIM = 0.01  # nor are aims, in radians
PAN = np.radians(6)  # all cameras may look past the object by about this, without being known to
OBJECT = 0.4  # of the cameras' distance: how far from the object's middle its points are looked for
DEPTH, DEPTH_ERROR = 0.5, 0.3  # how far towards the camera the visible points' middle lies, and how sure that is, over their spread
SHAPE = 0.1  # how far that middle is off because no object is a ball, over the spread
MEDIANS = {1: 0.674, 2: 1.177, 3: 1.538}  # of the sizes of normal residuals of that many dimensions, over their standard deviation
MIN_SEEN = 5  # points in a picture whose middle says anything
SURE = 2.2  # standard deviations for 95 per cent: more than 2, as they are estimated from the same pictures


@dataclass(frozen=True, eq=False)
class Frame:
    """up: unit (3,); center: of the object (3,); both in world units, with the covariances (3, 3) of their errors."""

    up: np.ndarray
    center: np.ndarray
    up_cov: np.ndarray
    center_cov: np.ndarray


def estimate_frame(rotations: np.ndarray, centers: np.ndarray, points: np.ndarray, owner: np.ndarray) -> Frame:
    """The frame of cameras with cam_from_world rotations (N, 3, 3), N >= 1, at `centers` (N, 3).

    points: (T, 3) in world units, what the pictures show; owner: int (T,), the camera that saw each, -1 where that is not known."""
    center, center_cov = estimate_center(rotations, centers, points, owner)
    up, up_cov = estimate_up(rotations, centers - center)
    return Frame(up, center, up_cov, center_cov)


def estimate_up(rotations: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The world's up direction, unit (3,), and the covariance (3, 3) of its error, from cam_from_world rotations (N, 3, 3) and the cameras'
    places as seen from the object (N, 3), N >= 1.

    People hold cameras level but tilted down, so image-up averages to up on a full ring only; on an arc it leans towards the object. The
    right vectors are horizontal whatever the tilt. They begin, as the direction they have least of, in absolute value (one badly rolled
    camera does not count much), on the side of the images' tops; a weak pull to the mean image-up decides where they cannot (one view, or
    all in parallel). From there rolls and elevations are made small and alike together, by Gauss-Newton steps."""
    up = _up_of_rights(rotations)
    rights, tops, forward, outward = rotations[:, 0], -rotations[:, 1], rotations[:, 2], unit(offsets)
    lean = unit(tops.mean(0))
    info = np.eye(2)
    for _ in range(ROUNDS):
        plane = _plane(up)
        level = np.sqrt(np.maximum(1 - (forward @ up) ** 2, 0.05))
        roll, by_roll = rights @ up / level, rights @ plane.T / level[:, None]
        elevation, by_elevation = np.arcsin(np.clip(outward @ up, -1, 1)), unit(horizontal(outward, up)) @ plane.T
        weight, roll_var = _trust(np.abs(roll - np.median(roll)), 1, LEVEL)
        alike, elevation_var = _trust(np.abs(elevation - np.median(elevation)), 1, HEIGHT)
        elevation = elevation - alike @ elevation / alike.sum()
        by_elevation = by_elevation - alike @ by_elevation / alike.sum()
        pull = UP_PRIOR * len(rights) / roll_var
        known = roll_var / SAME_ROLL**2  # that the roll which all pictures share is small, in pictures
        shared = weight @ by_roll / (weight.sum() + known)
        info = (by_roll.T * weight) @ by_roll - np.outer(shared, weight @ by_roll)
        slope = by_roll.T @ (weight * roll) - shared * (weight @ roll)
        info = info / roll_var + (by_elevation.T * alike) @ by_elevation / elevation_var + pull * np.eye(2)
        slope = slope / roll_var + by_elevation.T @ (alike * elevation) / elevation_var - pull * plane @ lean
        step = np.linalg.solve(info, slope)
        up = unit(up - plane.T @ (step * min(1.0, 0.3 / max(float(np.linalg.norm(step)), 1e-12))))
        if np.linalg.norm(step) < SETTLED:
            break
    plane = _plane(up)
    return up, plane.T @ np.linalg.inv(info) @ plane


def _up_of_rights(rotations: np.ndarray) -> np.ndarray:
    rights, tops = rotations[:, 0], -rotations[:, 1]
    lean = unit(tops.mean(0))
    prior = UP_PRIOR * (np.eye(3) - np.outer(lean, lean))
    weights = np.ones(len(rights))
    for _ in range(20):
        scatter = np.einsum("n,ni,nj->ij", weights / weights.sum(), rights, rights)
        up = np.linalg.eigh(scatter + prior)[1][:, 0]
        weights = 1 / np.maximum(np.abs(rights @ up), 0.02)
    return up if (tops @ up).sum() >= 0 else -up


def estimate_center(rotations: np.ndarray, centers: np.ndarray, points: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The object's middle (3,) and the covariance (3, 3) of its error; arguments as of estimate_frame."""
    across = np.eye(3) - rotations[:, 2, :, None] * rotations[:, 2, None, :]  # (N, 3, 3): onto the plane each optical axis is normal to
    anchor = np.median(points, axis=0) if len(points) else centers.mean(0)
    nowhere = 1e-3 * np.eye(3)  # decides nothing but what nothing else does
    center, weight = anchor, np.ones(len(centers))
    for _ in range(ROUNDS):  # the point that the axes pass nearest to, in absolute distance: one that looks elsewhere does not count much
        share = weight / weight.sum()
        pulled = np.einsum("n,nij,nj->i", share, across, centers) + nowhere @ anchor
        center = np.linalg.solve(np.einsum("n,nij->ij", share, across) + nowhere, pulled)
        miss = np.linalg.norm(np.einsum("nij,nj->ni", across, center - centers), axis=1)
        weight = 1 / np.maximum(miss, 0.1 * np.median(np.linalg.norm(center - centers, axis=1)) + 1e-300)
    looked_at = [(rotations[:, 2] * unit(place - centers)).sum(1).mean() for place in (center, anchor)]
    center = anchor if len(points) and looked_at[1] > looked_at[0] else center
    info = np.eye(3)
    for _ in range(ROUNDS):
        away = np.linalg.norm(center - centers, axis=1)
        reach = float(np.median(away))
        info, pulled = _of_axes(rotations, centers, center, away + 1e-9 * reach)
        if len(points):
            more, also = _of_points(centers, center, reach, points, owner)
            info, pulled = info + more, pulled + also
        weak = 1e-6 / max(reach, 1e-300) ** 2 * np.eye(3)
        center, before = np.linalg.solve(info + weak, pulled + weak @ anchor), center
        if np.linalg.norm(center - before) < SETTLED * reach:
            break
    return center, np.linalg.inv(info + weak)


def _of_axes(rotations: np.ndarray, centers: np.ndarray, center: np.ndarray, away: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the optical axes say of the centre, as information (3, 3) and information times place (3,): it lies off them by angles that
    scatter about one that is the same for all cameras, and nearly zero."""
    sideways = rotations[:, :2] / away[:, None, None]  # (N, 2, 3): from a place to the angles by which a camera looks past it
    off = np.einsum("nij,nj->ni", sideways, center - centers)
    weight, var = _trust(np.linalg.norm(off - np.median(off, axis=0), axis=1), 2, AIM)
    known = var / PAN**2  # that the angle which all share is small, in pictures
    mean = np.einsum("n,nij->ij", weight, sideways)
    info = np.einsum("n,nki,nkj->ij", weight, sideways, sideways) - mean.T @ mean / (weight.sum() + known)
    aim = np.einsum("nij,nj->ni", sideways, centers)
    pulled = np.einsum("n,nki,nk->i", weight, sideways, aim) - mean.T @ (weight @ aim) / (weight.sum() + known)
    return info / var, pulled / var


def _of_points(
    centers: np.ndarray, center: np.ndarray, reach: float, points: np.ndarray, owner: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the points say, as _of_axes: the middle of those a camera sees lies before the centre, by a depth that is the same for all."""
    near = (1 + ((points - center) ** 2).sum(1) / (OBJECT * reach) ** 2) ** -2.0
    group = np.where(owner < 0, len(centers), owner)
    sums = np.stack([np.bincount(group, near * column, len(centers) + 1) for column in (np.ones(len(points)), *points.T)], 1)
    middle = sums[:, 1:] / np.maximum(sums[:, :1], 1e-300)
    spread2 = np.bincount(group, near * ((points - middle[group]) ** 2).sum(1), len(centers) + 1) / np.maximum(sums[:, 0], 1e-300)
    some = np.bincount(group, minlength=len(centers) + 1) >= MIN_SEEN
    if not some.any():
        return np.zeros((3, 3)), np.zeros(3)
    spread = float(np.sqrt(np.median(spread2[some]))) + 1e-6 * reach
    shape = SHAPE * spread / near.mean()  # where most of what is seen lies elsewhere, its middle says less
    middle, outward = middle[some], unit(np.append(centers, centers.mean(0)[None], axis=0)[some] - center)
    depth = DEPTH * spread
    missed = middle - center - depth * outward
    weight, var = _trust(np.linalg.norm(missed - np.median(missed, axis=0), axis=1), 3, shape)
    toward, total = weight @ outward, weight.sum()
    known = var / (DEPTH_ERROR * spread) ** 2
    info = total * np.eye(3) - np.outer(toward, toward) / (total + known)
    pulled = weight @ middle - toward * ((weight @ (middle * outward).sum(1)) + known * depth) / (total + known)
    found = np.linalg.solve(info + 1e-9 * total * np.eye(3), pulled + 1e-9 * total * center)
    info = np.linalg.inv(np.linalg.inv(info / var + 1e-9 * total / var * np.eye(3)) + shape**2 * np.eye(3))
    return info, info @ found


def angle_errors(rotations: np.ndarray, centers: np.ndarray, frame: Frame, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How far off the angle about the object, or the turn, between cameras `first` and `second` (indices, (M,) each) may be for what is not
    known of `frame`: radians (M,), the larger of the two, 95 per cent sure."""
    here = motion(rotations, centers, frame.center, frame.up, first, second)
    azimuth, yaw = np.zeros(len(first)), np.zeros(len(first))
    for cov, of_center in ((frame.center_cov, True), (frame.up_cov, False)):
        for variance, axis in zip(*_axes(cov), strict=True):
            step = np.sqrt(max(variance, 0.0)) * axis
            center, up = (frame.center + step, frame.up) if of_center else (frame.center, unit(frame.up + step))
            there = motion(rotations, centers, center, up, first, second)
            azimuth += _wrapped(there.azimuth - here.azimuth) ** 2
            yaw += _wrapped(there.yaw - here.yaw) ** 2
    return SURE * np.sqrt(np.maximum(azimuth, yaw))


def azimuth_elevation(centers: np.ndarray, center: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Azimuth in (-pi, pi] and elevation in [-pi/2, pi/2], radians (N,) each, of camera centres (N, 3) about the object.

    Azimuth grows counterclockwise seen from above; its zero is the first camera."""
    offset = centers - center
    azimuth = signed_angle(np.broadcast_to(offset[0], offset.shape), offset, up)
    height = offset @ up
    return azimuth, np.arctan2(height, np.linalg.norm(horizontal(offset, up), axis=-1))


def _trust(sizes: np.ndarray, dimensions: int, floor: float) -> tuple[np.ndarray, float]:
    """Weights in (0, 1] of residuals of these sizes, near 0 for those far larger than usual, and the variance of usual ones in each of
    their 1, 2 or 3 dimensions, which `floor`, a standard deviation, adds to."""
    usual = float(np.median(sizes)) / MEDIANS[dimensions]
    var = usual**2 + floor**2
    return (1 + sizes**2 / (12 * var * dimensions)) ** -2.0, var


def _plane(up: np.ndarray) -> np.ndarray:
    """Two directions (2, 3) normal to `up` and to each other."""
    return np.linalg.svd(up[None])[2][1:]


def _axes(cov: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    variances, axes = np.linalg.eigh(cov)
    return variances, axes.T


def _wrapped(angle: np.ndarray) -> np.ndarray:
    return np.angle(np.exp(1j * angle))
