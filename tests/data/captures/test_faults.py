"""Rendered objects photographed badly: a right answer or a reason, never a wrong answer.

The objects are rendered by render.py, 24 photographs each; a fault turns, mirrors or mislabels their files, or the cameras that took them,
as photographers and their software do. The oracle is what the upright camera of the picture that is shown saw."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycolmap
import pytest
from PIL import Image

from actial_fast.data.captures import photos as reasons
from actial_fast.data.captures.capture import read_capture
from actial_fast.data.captures.geometry import motion
from actial_fast.data.captures.moves import pairs
from actial_fast.data.captures.photos import BadCapture
from actial_fast.data.captures.questions import KINDS
from actial_fast.data.captures.render import RenderConfig, render
from actial_fast.data.captures.settings import ViewpointConfig
from actial_fast.data.sources.picture import decode
from tests.data.captures.test_turned import SENSOR
from tests.data.sources.test_picture import exif

CONFIG = ViewpointConfig(pairs_per_object=10_000)
REASONS = {value for name, value in vars(reasons).items() if name.isupper() and isinstance(value, str)}
VIEWS = 24
WIDE = (30, 20)  # pixels of a photograph, width and height: 3:2, so that a quarter turn shows


@dataclass(frozen=True)
class Fault:
    """quarters: by how many quarter turns to the right each picture lies, which nothing tells. tags: EXIF's orientation of each.
    made_from: the pixels that the model was made from. flip: the files show a mirror image. arc, roll, pan: the photographer's, degrees."""

    quarters: tuple[int, ...] = (0,)
    tags: tuple[int, ...] = (1,)
    made_from: str = "stored"
    flip: bool = False
    arc: float = 360.0
    roll: float = 0.0
    pan: float = 0.0


FAULTS = {
    "upright": Fault(),
    "sideways, all": Fault(quarters=(1,)),
    "sideways, half": Fault(quarters=(0, 1)),
    "upside down, half": Fault(quarters=(0, 2)),
    **{f"EXIF {tag}, model of stored pixels": Fault(tags=(tag,)) for tag in range(2, 9)},
    **{f"EXIF {tag}, model of shown pixels": Fault(tags=(tag,), made_from="shown") for tag in range(2, 9)},
    "EXIF of every kind": Fault(tags=(1, 6, 3, 8)),
    "EXIF of every kind, model of shown pixels": Fault(tags=(1, 6, 3, 8), made_from="shown"),
    "mirrored": Fault(flip=True),
    "rolled": Fault(roll=30),
    "panned": Fault(pan=20),
    "arc of 180": Fault(arc=180),
    "arc of 90": Fault(arc=90),
    "arc of 40": Fault(arc=40),
    "rolled arc": Fault(arc=90, roll=30),
    "panned arc": Fault(arc=180, pan=20),
    "rolled and sideways": Fault(quarters=(1,), roll=20, arc=120),
}
QUICK = (
    "upright",
    "sideways, all",
    "sideways, half",
    "EXIF 6, model of stored pixels",
    "EXIF 5, model of shown pixels",
    "mirrored",
    "rolled",
)
QUICK += ("EXIF of every kind", "panned arc", "rolled arc")
NEVER = {"sideways, all", "sideways, half", "mirrored", "rolled and sideways"}  # of which nothing can be known, so that no row is written


def spin(angle, axis=2):
    """A rotation of a camera about its own axis."""
    c, s = np.cos(angle), np.sin(angle)
    out = np.eye(3)
    i, j = [k for k in range(3) if k != axis]
    out[i, i], out[i, j], out[j, i], out[j, j] = c, s, -s, c
    return out


def retaken(capture: Path, out: Path, fault: Fault, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The capture as it is with the fault: the same places and points, other pictures; each name's true camera, as the picture is shown."""
    rng = np.random.default_rng(seed)
    facts = json.loads((capture / "scene.json").read_text())
    old = pycolmap.Reconstruction(str(capture / "sparse/0"))
    points = np.array([point.xyz for point in old.points3D.values()])
    up, middle = np.array(facts["up"]), np.array(facts["center"])
    side = np.cross(up, [1.0, 0, 0]) if abs(up[0]) < 0.9 else np.cross(up, [0, 1.0, 0])
    side /= np.linalg.norm(side)
    start = rng.uniform(0, 2 * np.pi)
    (out / "images").mkdir(parents=True)
    (out / "sparse/0").mkdir(parents=True)
    width, height = WIDE
    focal = 0.9 * width
    model, truth, seen = pycolmap.Reconstruction(), {}, []
    for number, (w, h) in enumerate((WIDE, WIDE[::-1]), 1):
        camera = pycolmap.Camera(model="SIMPLE_PINHOLE", width=w, height=h, params=[focal, w / 2, h / 2], camera_id=number)
        model.add_camera_with_trivial_rig(camera)
    for n in range(VIEWS):
        around = start + np.radians(fault.arc) * (n + rng.uniform(0, 1)) / VIEWS
        elevation, distance = np.radians(rng.uniform(8, 32)), facts["radius"] * rng.uniform(2.8, 3.8)
        ahead = np.cos(around) * side + np.sin(around) * np.cross(up, side)
        eye = middle + distance * (np.cos(elevation) * ahead + np.sin(elevation) * up)
        forward = middle + facts["radius"] * rng.uniform(-0.08, 0.08, 3) - eye
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, up) / np.linalg.norm(np.cross(forward, up))
        shown = np.stack([right, np.cross(forward, right), forward])
        shown = spin(np.radians(rng.uniform(-1, 1) * (fault.roll or 1.5))) @ spin(np.radians(fault.pan), 1) @ shown
        lies = spin(np.pi / 2 * fault.quarters[n % len(fault.quarters)]) @ shown  # what nothing tells is as it is shown
        tag = fault.tags[n % len(fault.tags)]
        sensor, name = np.array(SENSOR[tag], float), f"{n:03d}.jpg"
        quarter = fault.quarters[n % len(fault.quarters)] % 2 or tag > 4
        stored = Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))
        stored.save(out / "images" / name, exif=exif(tag))
        assert decode(out / "images" / name, "").shape[:2] == ((width, height) if tag > 4 else (height, width))
        raw = fault.made_from == "stored"
        camera = model.cameras[2 if tag > 4 and not raw else 1]
        local = (points - eye) @ lies.T
        flat = focal * local[:, :2] / local[:, 2:]
        if fault.flip:  # the file shows a mirror image of what the camera saw, and all the tool had was the file
            flat[:, 0] *= -1
        flat = (flat @ sensor if raw else flat) + [camera.width / 2, camera.height / 2]
        flat += rng.normal(size=flat.shape) * 0.01
        seen.append(np.flatnonzero((flat >= 0).all(1) & (flat < [camera.width, camera.height]).all(1)))
        back = np.eye(3)
        if raw and np.linalg.det(sensor) > 0:  # no camera mirrors
            back[:2, :2] = sensor.T
        image = pycolmap.Image(name=name, keypoints=flat[seen[-1]], camera_id=camera.camera_id, image_id=n + 1)
        pose = back @ lies
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pycolmap.Rotation3d(pose), -pose @ eye))
        truth[name] = None if quarter and fault.quarters != (0,) else (shown, eye)
    for p, xyz in enumerate(points):
        track = pycolmap.Track()
        for n, visible in enumerate(seen):
            if p in visible:
                track.add_element(n + 1, int(np.searchsorted(visible, p)))
        model.add_point3D(xyz, track, np.zeros(3, np.uint8))
    model.write(str(out / "sparse/0"))
    return truth, middle, up


def judged(capture: Path, out: Path, fault: Fault, seed: int) -> tuple[str, list[float]]:
    """'' and each pair's error in degrees, or why the capture was rejected; AssertionError for an answer that is not right."""
    truth, middle, up = retaken(capture, out, fault, seed)
    try:
        found = pairs(read_capture(out), CONFIG)
    except BadCapture as error:
        assert error.reason in REASONS
        return error.reason, []
    off = []
    for pair in found:
        shown = [truth[name] for name in pair["pair"]]
        assert all(each is not None for each in shown), f"{pair['pair']}: a picture that lies on its side is asked about"
        rotations, centers = (np.array(each) for each in zip(*shown, strict=True))
        true = motion(rotations, centers, middle, up, np.array([0]), np.array([1]))
        sides = ["left" if true.ego[0] < 0 else "right", "left" if true.object[0] < 0 else "right", "left" if true.yaw[0] > 0 else "right"]
        assert [pair[kind] for kind in KINDS] == sides, (pair["pair"], sides)
        for key, value in (("azimuth_change_deg", true.azimuth[0]), ("yaw_deg", true.yaw[0])):
            off.append(abs((pair[key] - np.degrees(value) + 180) % 360 - 180))
    return "", off


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> list[Path]:
    """13 rendered objects of all families."""
    root = tmp_path_factory.mktemp("objects")
    render(root, RenderConfig(objects=4, views=12, points=160, workers=1), progress=False)
    return sorted(file.parent for file in root.glob("*/*/scene.json"))[:13]


def look(objects, tmp_path, name):
    told, off = Counter(), []
    for number, capture in enumerate(objects):
        out = tmp_path / f"{number}"
        reason, errors = judged(capture, out, FAULTS[name], 100 * number + 7)
        told[reason] += 1
        off += errors
        shutil.rmtree(out)
    print(f"{name}: {dict(told)}, {len(off) // 2} pairs, p95 {np.percentile(off, 95) if off else 0:.2f} degrees")
    assert told.total() == len(objects) and (name not in NEVER or not off)
    assert not off or np.percentile(off, 95) < (5 if name == "rolled arc" else 3)  # whose few sure pairs are the luckiest
    return told


@pytest.mark.parametrize("name", QUICK)
def test_one_object_with_each_fault(objects, tmp_path, name):
    look(objects[5:6], tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_thirteen_objects_with_each_fault(objects, tmp_path, name):
    told = look(objects, tmp_path, name)
    if name in ("upright", "rolled", "panned", "arc of 180", "arc of 90"):
        assert told[""] == len(objects)
