"""Crops are what a panned camera would have taken: held against pictures that one did take, ray by ray."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace

import numpy as np
import pycolmap
import pytest
from PIL import Image

from actial_fast.data.captures import crops as module
from actial_fast.data.captures.capture import read_capture
from actial_fast.data.captures.crops import crops, taken, write_crops
from actial_fast.data.captures.geometry import motion, qvec, rotation
from actial_fast.data.captures.moves import NINE
from actial_fast.data.captures.photos import pinhole
from actial_fast.data.captures.raycast import Cameras, Caster, Surroundings, photographs
from actial_fast.data.captures.render import RenderConfig, _cameras, render
from actial_fast.data.captures.settings import ViewpointConfig
from actial_fast.data.captures.shapes import procedural
from actial_fast.data.captures.turned import TURNED
from actial_fast.data.captures.viewpoint import build
from tests.data.captures.test_viewpoint import read_rows

SETTINGS = RenderConfig(families=("chair",), objects=2, views=36, azimuths="front", image_size=96, fov_deg=80.0, workers=1, format="jpg")
CONFIG = ViewpointConfig(composition="balanced", crops=0.4, pairs_per_object=9, test_examples=0, workers=1, probes=False)


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Two rendered walks that were built from crops; (captures, rows' folder, rows)."""
    root = tmp_path_factory.mktemp("cut")
    render(root / "c", SETTINGS, progress=False)
    build(root / "c", root / "o", CONFIG, progress=False)
    return root / "c", root / "o", read_rows(root / "o/train.jsonl")


def scene(number):
    """What render.py drew for an object: its rays, and the similarity from the object's frame to the model's world."""
    rng = np.random.default_rng([SETTINGS.seed, zlib.crc32(b"chair"), number])
    shape = procedural("chair", rng)
    _cameras(SETTINGS, shape.center, rng)
    around = Surroundings.draw(False, rng)
    world = rotation(rng.normal(size=4)), rng.normal(size=3) * 3, float(np.exp(rng.uniform(-1, 1)))
    return shape, around, world


def test_a_crop_is_the_picture_of_a_camera_with_its_pose_and_intrinsics(cut):
    """Every crop of an object is rendered anew from the pose and the camera that are stored with it."""
    for number in (1, 2):
        folder = cut[1] / f"crops/chair/{number:04d}"
        record = json.loads((folder / module.RECORD).read_text())
        assert sorted(record) == sorted(path.name for path in folder.glob("*.jpg")) and len(record) >= NINE
        shape, around, (turn, shift, scale) = scene(number)
        cast = Caster(shape.triangles)
        for name, told in record.items():
            pose, size, focal = rotation(told["qvec"]), told["camera"]["width"], told["camera"]["params"][0]
            assert told["camera"]["model"] == "PINHOLE" and told["camera"]["params"][2:] == [size / 2, size / 2] and size == 38
            center = turn.T @ (-pose.T @ np.array(told["tvec"]) - shift) / scale
            anew = photographs(cast, shape, around, Cameras(center[None], (pose @ turn)[None], np.zeros(1), focal, size), 2)[0]
            crop = np.asarray(Image.open(folder / name)).astype(float)
            other = np.abs(crop - np.asarray(Image.open(cut[0] / f"chair/{number:04d}/images" / told["of"]).resize((size, size)))).mean()
            assert np.abs(crop - anew).mean() < min(7, 0.5 * other), name


def test_rows_of_crops_carry_their_poses_and_the_answers_follow_from_them(cut):
    assert len(cut[2]) == 2 * NINE * 3
    for row in cut[2]:
        meta = row.meta
        record = json.loads((row.images[0].parent / module.RECORD).read_text())
        assert [path.name for path in row.images] == meta["pair"] and all(path.is_file() for path in row.images)
        rotations = np.stack([rotation(record[name]["qvec"]) for name in meta["pair"]])
        centers = np.stack([-r.T @ np.array(record[name]["tvec"]) for r, name in zip(rotations, meta["pair"], strict=True)])
        assert [record[name]["camera"] for name in meta["pair"]] == meta["cameras"]
        for pose, name in zip(meta["poses"], meta["pair"], strict=True):
            np.testing.assert_allclose(pose["qvec"], record[name]["qvec"], atol=1e-6)
        one = motion(rotations, centers, np.array(meta["center"]), np.array(meta["up"]), np.array([0]), np.array([1]))
        same_place = record[meta["pair"][0]]["of"] == record[meta["pair"][1]]["of"]
        assert (meta["ego_translation"] == "no movement") == same_place
        if not same_place:
            assert meta["ego_translation"] == ("right" if one.ego[0] > 0 else "left")
        yaw = np.degrees(one.yaw[0])
        assert {"left": yaw >= 10, "right": yaw <= -10, "no rotation": abs(yaw) <= 2}[meta["ego_rotation"]]


@pytest.mark.slow
def test_crops_are_made_once_and_again_when_they_are_gone(cut, tmp_path):
    first = build(cut[0], tmp_path, CONFIG, progress=False)
    content = {path.name: path.read_bytes() for path in (tmp_path / "crops").rglob("*.jpg")}
    assert first["captures_reused"] == 0 and build(cut[0], tmp_path, CONFIG, progress=False)["captures_reused"] == 2
    next((tmp_path / "crops/chair/0001").glob("*.jpg")).unlink()
    assert build(cut[0], tmp_path, CONFIG, progress=False)["captures_reused"] == 1
    assert content == {path.name: path.read_bytes() for path in (tmp_path / "crops").rglob("*.jpg")}
    build(cut[0], tmp_path, replace(CONFIG, seed=1), progress=False)
    used = {path for row in read_rows(tmp_path / "train.jsonl") for path in row.images}
    assert {path.resolve() for path in used} == {path.resolve() for path in (tmp_path / "crops").rglob("*.jpg")}, "none is left over"


def test_a_lens_with_distortion_is_undone():
    """A far point that a distorting camera saw stands where a panned pinhole sees it."""
    lens = pycolmap.Camera(model="OPENCV", width=400, height=300, params=[300, 300, 200, 150, -0.15, 0.05, 0.002, -0.001])
    turn = module._about(np.array([0.0, 1, 0]), 9) @ module._spin(2, 0) @ module._spin(-3, 2)
    crop = pinhole(160, 120, (300, 300), (80, 60))
    for seen in ([0.05, -0.03, 1], [-0.1, 0.08, 1], [0.12, 0.1, 1]):
        ray = turn @ np.array(seen)  # in the lens's axes
        x, y = lens.img_from_cam(ray[None])[0]
        canvas = np.zeros((300, 400, 3), np.uint8)
        canvas[round(y - 0.5) - 1 : round(y - 0.5) + 2, round(x - 0.5) - 1 : round(x - 0.5) + 2] = 255
        spot = np.argwhere(taken(canvas, lens, turn, crop)[..., 0] > 100).mean(0)
        np.testing.assert_allclose(spot[::-1] + 0.5, 300 * np.array(seen[:2]) + [80, 60], atol=1.0)


@pytest.mark.parametrize("tag", [3, 6, 8])
def test_photographs_that_exif_turns_are_cut_as_they_are_shown(tmp_path, tag):
    """A model of stored pixels: the crop shows the middle of the picture as a viewer has it."""
    rng = np.random.default_rng(0)
    shown = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).resize((160, 120), Image.Resampling.BICUBIC)
    stored = shown.transpose({3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[tag])
    exif = Image.Exif()
    exif[0x0112] = tag
    stored.save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
    render(tmp_path / "c", RenderConfig(families=("pot",), objects=1, views=8, workers=1), progress=False)
    capture = read_capture(tmp_path / "c/pot/0001")
    camera = pycolmap.Camera(
        model="SIMPLE_PINHOLE", width=stored.width, height=stored.height, params=[150, stored.width / 2, stored.height / 2]
    )
    one = replace(
        capture,
        folder=tmp_path,
        names=("a.jpg",),
        **{key: getattr(capture, key)[:1] for key in ("rotations", "translations", "centers", "azimuth", "elevation")},
        cameras=(camera,),
        turns=np.array([TURNED[tag]], float),
    )
    made = crops(one, 0.5, tmp_path / "crops", 0)
    assert made.capture.cameras[0].width == 80 and made.capture.cameras[0].height == 60
    turn = np.einsum("nij,kj->nik", made.capture.rotations, one.rotations[0])
    straight = int(np.argmin(np.arccos(np.clip((np.trace(turn, axis1=1, axis2=2) - 1) / 2, -1, 1))))
    name = made.capture.names[straight]
    write_crops(one, made, {name})
    cut = np.asarray(Image.open(tmp_path / "crops" / name)).astype(float)
    expected = taken(np.asarray(shown), pinhole(160, 120, (150, 150), (80, 60)), turn[straight].T, made.intrinsics[0])
    assert np.abs(cut - expected).mean() < 8 < np.abs(cut - expected[::-1, ::-1]).mean()
    np.testing.assert_allclose(
        json.loads((tmp_path / "crops" / module.RECORD).read_text())[name]["qvec"], qvec(made.capture.rotations[straight])
    )


def test_a_walk_whose_crops_cannot_pan_enough_is_rejected_and_told_why(cut, tmp_path):
    with pytest.raises(ValueError, match=r"no usable pair.*smaller crops pan further"):
        build(cut[0], tmp_path, replace(CONFIG, crops=0.9), progress=False)
    with pytest.raises(ValueError, match="no usable pair"):
        build(cut[0], tmp_path, replace(CONFIG, crops=0.1), progress=False)  # 10 pixels show nothing
