"""Left, right and turn, against what one would see: oracles here project landmarks through cameras and look where they fall."""

from __future__ import annotations

import numpy as np
import pycolmap
import pytest

from actial_fast.data.captures.geometry import horizontal, motion, qvec, rotation, signed_angle, unit

Z = np.array([0.0, 0.0, 1.0])


def look_at(eye, target, roll=0.0):
    """cam_from_world (3, 3) and centre (3,) of a camera at `eye` aimed at `target`, in a world whose up is +z; roll in radians."""
    forward = unit(np.asarray(target, float) - eye)
    right = unit(np.cross(forward, Z))
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    return np.stack([c * right + s * down, c * down - s * right, forward]), np.asarray(eye, float)


def column(camera, point):
    """Where `point` falls in the camera's picture, x only: negative is the left half. The point must be in front."""
    r, eye = camera
    x, _, z = r @ (point - eye)
    assert z > 0
    return x / z


def ring(azimuths_deg, elevation_deg=0.0, radius=4.0, aim=None, roll=None):
    a, e = np.radians(azimuths_deg), np.broadcast_to(np.radians(elevation_deg), np.shape(azimuths_deg))
    eyes = radius * np.stack([np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.sin(e)], 1)
    aim = np.zeros_like(eyes) if aim is None else aim
    roll = np.zeros(len(eyes)) if roll is None else roll
    cameras = [look_at(eye, target, angle) for eye, target, angle in zip(eyes, aim, roll, strict=True)]
    return np.array([r for r, _ in cameras]), np.array([c for _, c in cameras])


def random_similarity(rng):
    q, upper = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(upper))
    return q * np.sign(np.linalg.det(q)), rng.normal(size=3) * 10, rng.uniform(0.1, 10)


def moved(rotations, centers, similarity):
    """The same cameras in the world x' = scale * turn @ x + shift."""
    turn, shift, scale = similarity
    return rotations @ turn.T, scale * centers @ turn.T + shift


def degrees_between(a, b):
    return np.degrees(np.arccos(np.clip(unit(a) @ unit(b), -1, 1)))


def one(rotations, centers, i=0, j=1, center=(0, 0, 0), up=Z):
    m = motion(rotations, centers, np.asarray(center, float), up, np.array([i]), np.array([j]))
    return {key: float(getattr(m, key)[0]) for key in ("azimuth", "yaw", "ego", "object")}


def test_the_sketch_in_numbers():
    # Camera 1 stands south of the object looking north; east is on its right. Camera 2 stands to the south-east.
    m = one(*ring([-90, -45]))
    assert m["ego"] == pytest.approx(np.sin(np.pi / 4))  # to the right
    assert m["object"] == pytest.approx(-np.sin(np.pi / 4))  # an object that looks south has east on its left
    assert np.degrees(m["yaw"]) == pytest.approx(45)  # from north to north-west: a left turn
    assert np.degrees(m["azimuth"]) == pytest.approx(45)  # counterclockwise seen from above


@pytest.mark.parametrize("seed", range(40))
def test_signs_are_what_the_pictures_show_in_any_world_frame(seed):
    rng = np.random.default_rng(seed)
    start = rng.uniform(-180, 180)
    change = rng.choice([-1, 1]) * rng.uniform(20, 80)
    rotations, centers = ring(
        [start, start + change], rng.uniform(-10, 40, 2), rng.uniform(3, 5), rng.normal(size=(2, 3)) * 0.05, rng.normal(size=2) * 0.05
    )
    similarity = turn, shift, _ = random_similarity(rng)
    m = one(*moved(rotations, centers, similarity), center=shift, up=turn @ Z)
    first, second = zip(rotations, centers, strict=True)
    # Sliding to the right past two posts, the near one falls behind to the left of the far one (posts on camera 1's line of sight).
    toward = unit(horizontal(-first[1], Z))
    near, far = -0.3 * toward, 0.3 * toward
    assert np.sign(column(second, near) - column(second, far)) == -np.sign(m["ego"])
    # Someone standing in the object's place, looking at camera 1, sees camera 2 in the right half of the view: the object's right.
    inside = look_at((0, 0, 0), first[1] * [1, 1, 0])
    assert np.sign(column(inside, second[1])) == np.sign(m["object"])
    # The mountain that camera 1 looks at is seen farther right after a turn to the left.
    mountain = first[1] + 1e6 * unit(horizontal(first[0][2], Z))
    assert np.sign(column(second, mountain)) == np.sign(m["yaw"])
    assert np.degrees(m["azimuth"]) == pytest.approx(change, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_motion_does_not_depend_on_frame_or_scale_and_flips_with_the_order(seed):
    rng = np.random.default_rng(seed)
    rotations, centers = ring(rng.uniform(-180, 180, 2), rng.uniform(-20, 40, 2), 3.0, rng.normal(size=(2, 3)) * 0.2)
    similarity = turn, shift, _ = random_similarity(rng)
    here = one(rotations, centers)
    there = one(*moved(rotations, centers, similarity), center=shift, up=turn @ Z)
    assert there == pytest.approx(here, abs=1e-9)
    back = one(rotations, centers, 1, 0)
    assert (back["azimuth"], back["yaw"]) == pytest.approx((-here["azimuth"], -here["yaw"]))


@pytest.mark.parametrize(("a", "b", "expected"), [(179, -179, 2), (-179, 179, -2), (170, -100, 90), (-100, 170, -90), (0, 179, 179)])
def test_angles_wrap_at_half_a_turn(a, b, expected):
    m = one(*ring([a, b]))
    assert np.degrees(m["azimuth"]) == pytest.approx(expected)
    assert np.degrees(m["yaw"]) == pytest.approx(expected)
    if abs(expected) != 179:
        assert np.sign(m["ego"]) == np.sign(expected)


def test_opposite_directions_are_half_a_turn_apart():
    assert abs(signed_angle(np.array([1.0, 0, 0]), np.array([-1.0, 0, 5]), Z)) == pytest.approx(np.pi)


@pytest.mark.parametrize("seed", range(20))
def test_quaternions_agree_with_colmap(seed):
    rng = np.random.default_rng(seed)
    r = random_similarity(rng)[0]
    if seed < 4:  # half turns, where w = 0
        axis = unit(rng.normal(size=3) if seed == 3 else np.eye(3)[seed])
        r = 2 * np.outer(axis, axis) - np.eye(3)
    q = qvec(r)
    theirs = pycolmap.Rotation3d(q[[1, 2, 3, 0]])
    assert np.allclose(theirs.matrix(), r, atol=1e-9)
    assert np.allclose(rotation(q), r, atol=1e-9)
    assert q[0] >= 0
