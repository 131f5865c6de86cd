"""Captures whose pictures are turned, lie on their side or are damaged: a right answer or a reason, never a wrong answer."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pycolmap
import pytest
from PIL import Image

from actial_fast.data.captures import photos as module
from actial_fast.data.captures.capture import read_capture
from actial_fast.data.captures.moves import pairs
from actial_fast.data.captures.photos import BadCapture
from actial_fast.data.captures.questions import KINDS
from actial_fast.data.captures.settings import ViewpointConfig
from tests.data.captures.test_viewpoint import around, look_at, write_capture
from tests.data.sources.test_picture import exif

CONFIG = ViewpointConfig(pairs_per_object=200)
# what the photographer's camera is from the sensor's: x and y of a shown pixel, from those of a stored one
SENSOR = {1: [[1, 0], [0, 1]], 2: [[-1, 0], [0, 1]], 3: [[-1, 0], [0, -1]], 4: [[1, 0], [0, -1]], 5: [[0, 1], [1, 0]], 6: [[0, -1], [1, 0]],
          7: [[0, -1], [-1, 0]], 8: [[0, 1], [-1, 0]]}  # fmt: skip


def photographed(folder: Path, poses, tags, *, made_from="stored", size=(96, 64)) -> Path:
    """A capture by upright cameras (`poses`), whose files are stored turned so that EXIF's tag, one a picture, turns them back.

    made_from: the pixels that the model was made from. size: of the stored pixels of tag 1, width and height."""
    rng = np.random.default_rng(3)
    (folder / "images").mkdir(parents=True)
    (folder / "sparse" / "0").mkdir(parents=True)
    model, points, seen = pycolmap.Reconstruction(), rng.normal(size=(100, 3)) * [0.5, 0.3, 0.3], []
    sizes = {False: size, True: size[::-1]}
    for number, flipped in enumerate(sizes, 1):
        w, h = sizes[flipped]
        model.add_camera_with_trivial_rig(
            pycolmap.Camera(model="SIMPLE_PINHOLE", width=w, height=h, params=[70.0, w / 2, h / 2], camera_id=number)
        )
    for n, ((r, t), tag) in enumerate(zip(poses, tags, strict=True)):
        stored = np.zeros((size[1], size[0], 3), np.uint8) + 100
        Image.fromarray(stored).save(folder / "images" / f"{n:03d}.jpg", exif=exif(tag))
        turn = np.array(SENSOR[tag], float)
        raw = made_from == "stored"
        camera = model.cameras[2 if tag > 4 and not raw else 1]
        local = points @ r.T + t
        flat = 70.0 * local[:, :2] / local[:, 2:]
        flat = (flat @ turn if raw else flat) + [camera.width / 2, camera.height / 2]  # the turn's inverse is its transpose
        seen.append(np.nonzero((flat >= 0).all(1) & (flat < [camera.width, camera.height]).all(1))[0])
        image = pycolmap.Image(name=f"{n:03d}.jpg", keypoints=flat[seen[-1]], camera_id=camera.camera_id, image_id=n + 1)
        back = np.eye(3)
        if raw:
            back[:2, :2] = turn.T
        if np.linalg.det(back) < 0:  # no camera mirrors: what a reconstruction makes of such pixels is another world
            back = np.eye(3)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pycolmap.Rotation3d(back @ r), back @ t))
    for p, xyz in enumerate(points):
        track = pycolmap.Track()
        for n, visible in enumerate(seen):
            if p in visible:
                track.add_element(n + 1, int(np.searchsorted(visible, p)))
        model.add_point3D(xyz, track, np.zeros(3, np.uint8))
    model.write_binary(str(folder / "sparse" / "0"))
    return folder


def answers(folder: Path, verify="tracks") -> dict:
    return {tuple(pair["pair"]): [pair[kind] for kind in KINDS] for pair in pairs(read_capture(folder, verify=verify), CONFIG)}


RING = around(np.random.default_rng(1), np.arange(0, 360, 30), roll_deg=0)


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """Every pair's answers from upright pictures."""
    return answers(photographed(tmp_path_factory.mktemp("plain") / "a", RING, [1] * 12))


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("made_from", ["stored", "shown"])
def test_every_orientation_of_exif(tmp_path, tag, made_from, right):
    folder = photographed(tmp_path / "a", RING, [tag] * 12, made_from=made_from)
    wanted = {(2, m): module.UNPROVEN for m in ("stored", "shown")} | {
        (tag, m): module.UNPROVEN for tag in (3, 4) for m in ("stored", "shown")
    }
    wanted |= {(tag, "stored"): module.EXIF_MIRROR for tag in (5, 7)}
    for verify in ("tracks", "off"):
        if (tag, made_from) in wanted:
            with pytest.raises(BadCapture) as raised:
                read_capture(folder, verify=verify)
            assert raised.value.reason == wanted[tag, made_from]
        else:
            got = answers(folder, verify)
            assert got == {pair: right[pair] for pair in got} and len(got) > 30


def test_the_shape_of_some_pictures_tells_of_all(tmp_path, right):
    got = answers(photographed(tmp_path / "a", RING, [6, 3, 1, 8, 3, 1] * 2))
    assert got == {pair: right[pair] for pair in got} and len(got) > 30
    got = answers(photographed(tmp_path / "b", RING, [6, 3, 1, 8, 3, 1] * 2, made_from="shown"))
    assert got == {pair: right[pair] for pair in got} and len(got) > 30


def test_a_square_picture_proves_nothing(tmp_path):
    with pytest.raises(BadCapture, match="EXIF turns the picture"):
        read_capture(photographed(tmp_path / "a", RING, [6] * 12, size=(64, 64)))


def rolled(poses, turns):
    """The same cameras, their pictures turned by so many quarters, which nothing tells."""
    out = []
    for (r, t), quarters in zip(poses, turns, strict=True):
        c, s = np.cos(np.pi / 2 * quarters).round(), np.sin(np.pi / 2 * quarters).round()
        turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        out.append((turn @ r, turn @ t))
    return out


@pytest.mark.parametrize("arc", [360, 180, 120, 90, 60])
@pytest.mark.parametrize("turns", ["all left", "all right", "every second", "every second upside down", "every third"])
def test_sideways_pictures_are_rejected(tmp_path, arc, turns):
    quarters = {
        "all left": [1] * 14,
        "all right": [3] * 14,
        "every second": [0, 1] * 7,
        "every second upside down": [0, 2] * 7,
        "every third": ([0, 0, 1] * 5)[:14],
    }[turns]
    for elevation in (15, 45):
        rng = np.random.default_rng(arc + elevation)
        poses = around(rng, np.linspace(0, arc, 14, endpoint=False), elevation_deg=elevation)
        write_capture(tmp_path / f"up{elevation}", np.random.default_rng(0), poses)
        write_capture(tmp_path / f"side{elevation}", np.random.default_rng(0), rolled(poses, quarters))
        right = answers(tmp_path / f"up{elevation}")
        try:
            got = answers(tmp_path / f"side{elevation}")
        except BadCapture as error:
            assert error.reason in (module.SIDEWAYS, module.NEAR_VERTICAL, module.OFF_AXIS, module.ROLLED, module.TOO_FEW), error
            continue
        upright = [n for n, q in enumerate(quarters) if q == 0]  # none lies on its side and is asked about
        assert all(int(name[:3]) in upright for pair in got for name in pair) and got == {pair: right[pair] for pair in got}


def test_a_few_rolled_pictures_are_left_out(tmp_path):
    rng = np.random.default_rng(4)
    poses = around(rng, np.arange(0, 360, 24))
    write_capture(tmp_path / "a", rng, rolled(poses, [1] + [0] * 13 + [2]))
    capture = read_capture(tmp_path / "a")
    assert len(capture.names) == 13 and capture.left_out == {module.ROLLED: 2}


def test_rolled_arcs_and_two_rings_stay_usable(tmp_path):
    rng = np.random.default_rng(5)
    poses = [
        look_at(4 * np.array([np.cos(a), np.sin(a), 0.4]), np.zeros(3), np.radians(rng.uniform(-25, 25))) for a in np.linspace(0, 1.6, 12)
    ]
    write_capture(tmp_path / "rolled", rng, poses)
    write_capture(tmp_path / "rings", rng, around(rng, np.arange(0, 360, 45), 5) + around(rng, np.arange(20, 380, 45), 40))
    for name in ("rolled", "rings"):
        assert answers(tmp_path / name)


# ---- several models, damaged models


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "a"
    write_capture(folder, np.random.default_rng(6), around(np.random.default_rng(6), np.arange(0, 360, 30)))
    return folder


def test_the_largest_model_is_read(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "a")
    (tmp_path / "a/sparse/0").rename(tmp_path / "a/sparse/1")
    write_capture(tmp_path / "small", np.random.default_rng(8), around(np.random.default_rng(8), np.arange(0, 90, 15)))
    shutil.copytree(tmp_path / "small/sparse/0", tmp_path / "a/sparse/0")
    assert len(read_capture(tmp_path / "a").names) == 12
    shutil.copytree(whole, tmp_path / "b")
    for file in (tmp_path / "b/sparse/0").iterdir():
        file.rename(tmp_path / "b/sparse" / file.name)
    (tmp_path / "b/sparse/0").rmdir()
    assert len(read_capture(tmp_path / "b").names) == 12
    model = pycolmap.Reconstruction(str(whole / "sparse/0"))
    shutil.copytree(whole, tmp_path / "c")
    shutil.rmtree(tmp_path / "c/sparse/0")
    (tmp_path / "c/sparse/0").mkdir()
    model.write_text(str(tmp_path / "c/sparse/0"))
    assert len(read_capture(tmp_path / "c").names) == 12


@pytest.mark.parametrize("name", ["cameras.bin", "images.bin", "points3D.bin", "rigs.bin", "frames.bin"])
@pytest.mark.parametrize(
    "how", ["cut 20%", "cut 60%", "cut 95%", "cut to 5 bytes", "zeros", "zeros behind", "ones behind", "noise", "huge count"]
)
def test_a_damaged_file_costs_one_capture_and_no_time(tmp_path, whole, name, how):
    shutil.copytree(whole, tmp_path / "a")
    file = tmp_path / "a/sparse/0" / name
    data = file.read_bytes()
    at = int(0.6 * len(data))
    noise = np.random.default_rng(len(data)).integers(0, 256, len(data), np.uint8).tobytes()
    file.write_bytes(
        {
            "cut 20%": data[: len(data) // 5],
            "cut 60%": data[:at],
            "cut 95%": data[: int(0.95 * len(data))],
            "cut to 5 bytes": data[:5],
            "zeros": data[:8] + bytes(len(data) - 8),
            "zeros behind": data[:at] + bytes(len(data) - at),
            "ones behind": data[:at] + b"\xff" * (len(data) - at),
            "noise": data[:8] + noise[8:],
            "huge count": b"\xff" * 7 + b"\x00" + data[8:],
        }[how]
    )
    start = time.process_time()
    with pytest.raises(BadCapture):
        read_capture(tmp_path / "a")
    assert time.process_time() - start < 2


def test_other_damage_costs_what_it_touches(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "a")
    (tmp_path / "a/images/003.png").write_bytes(b"<html>")
    capture = read_capture(tmp_path / "a")
    assert len(capture.names) == 11 and capture.left_out == {module.DAMAGED: 1}
    model = pycolmap.Reconstruction(str(whole / "sparse/0"))
    model.images[1].name = model.images[2].name
    model.write_binary(str(tmp_path / "a/sparse/0"))
    assert read_capture(tmp_path / "a").left_out == {module.DAMAGED: 1, module.TWICE: 2}
    model = pycolmap.Reconstruction(str(whole / "sparse/0"))
    model.cameras[1].width = model.cameras[1].height = 0
    model.write_binary(str(tmp_path / "a/sparse/0"))
    with pytest.raises(BadCapture, match="unreadable model"):
        read_capture(tmp_path / "a")
