"""The same photographs in every format give the same answers; what a format cannot prove, its pictures do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pycolmap
import pytest
from PIL import Image

from actial_fast.data.captures import photos as module
from actial_fast.data.captures.capture import find_captures, object_id, read_capture
from actial_fast.data.captures.moves import pairs
from actial_fast.data.captures.photos import BadCapture
from actial_fast.data.captures.questions import KINDS
from actial_fast.data.captures.render import RenderConfig, render
from actial_fast.data.captures.settings import ViewpointConfig
from actial_fast.data.captures.viewpoint import build
from actial_fast.data.sources.source import SourceConfig, open_source
from tests.data.captures.formats import cloud, registered, write_co3d, write_ply, write_transforms

CONFIG = ViewpointConfig(pairs_per_object=500)
SWAPPED = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0.5]])  # what nerfstudio does to COLMAP's world, and a shift


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    """One vehicle in 16 photographs that have details to find."""
    root = tmp_path_factory.mktemp("rendered")
    config = RenderConfig(families=("vehicle",), objects=1, views=16, image_size=224, points=200, workers=1, supersampling=1)
    render(root, config, progress=False)
    return root / "vehicle" / "0001"


def answers(folder: Path, **options) -> dict:
    found = pairs(read_capture(folder, **options), CONFIG)
    return {tuple(Path(name).stem for name in pair["pair"]): pair for pair in found}


@pytest.fixture(scope="module")
def right(rendered) -> dict:
    return answers(rendered)


def same(got: dict, right: dict) -> bool:
    """All answers are those of the original, its angles to a degree, and nearly all pairs are there."""
    both = got.keys() & right.keys()
    sides = all(got[key][kind] == right[key][kind] for key in both for kind in KINDS)
    close = all(abs(got[key]["azimuth_change_deg"] - right[key]["azimuth_change_deg"]) < 1 for key in both)
    return sides and close and len(both) > 0.8 * len(right)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"opencv": True},
        {"applied": SWAPPED},
        {"applied": SWAPPED, "opencv": True, "ply": False},
        {"per_frame": True},
        {"images": "images_4"},
    ],
    ids=str,
)
def test_transforms_json(tmp_path, rendered, right, how):
    write_transforms(rendered, tmp_path / "a", **how)
    for verify in ("tracks", "off") if not how else ("off",):
        assert same(answers(tmp_path / "a", verify=verify), right)


@pytest.mark.parametrize("how", [{}, {"isotropic": True, "ply": False}], ids=str)
def test_co3d(tmp_path, rendered, right, how):
    write_co3d(rendered, tmp_path / "car" / "1_2", **how)
    write_co3d(rendered, tmp_path / "car" / "1_3", **how)
    shutil.copytree(tmp_path / "car" / "1_2", tmp_path / "car" / "1_4")
    assert find_captures(tmp_path) == [tmp_path / "car" / name for name in ("1_2", "1_3", "1_4")]
    assert same(answers(tmp_path / "car" / "1_3", verify="off"), right)
    with pytest.raises(BadCapture) as raised:
        read_capture(tmp_path / "car" / "1_4")
    assert raised.value.reason == module.NO_MODEL


def write(rendered, out, form, **how):
    (write_transforms if form == "transforms" else write_co3d)(rendered, out, **how)


@pytest.mark.parametrize("form", ["transforms", "co3d"])
def test_pictures_tell_of_a_world_without_tracks(tmp_path, rendered, right, form):
    write(rendered, tmp_path / "c/a", form, mirror=True, ply=False)
    assert answers(tmp_path / "c/a", verify="off").keys() & right.keys()  # whose sides would be wrong
    with pytest.raises(BadCapture) as raised:
        read_capture(tmp_path / "c/a")
    assert raised.value.reason == module.MIRRORED_X
    write(rendered, tmp_path / "d/a", form)
    assert same(answers(tmp_path / "d/a"), right)


def test_poses_of_other_pictures_and_pictures_without_details(tmp_path, rendered):
    write_transforms(rendered, tmp_path / "a", shift=5)
    with pytest.raises(BadCapture) as raised:
        read_capture(tmp_path / "a")
    assert raised.value.reason in (module.BROKEN, module.AMBIGUOUS)
    write_transforms(rendered, tmp_path / "b")
    for file in (tmp_path / "b/images").iterdir():
        Image.new("RGB", (224, 224)).save(file)
    with pytest.raises(BadCapture) as raised:
        read_capture(tmp_path / "b")
    assert raised.value.reason == module.UNVERIFIED and "verify=off" in str(raised.value)


def test_a_model_without_tracks_is_held_against_its_pictures(tmp_path, rendered, right):
    shutil.copytree(rendered, tmp_path / "a")
    model = pycolmap.Reconstruction(str(rendered / "sparse/0"))
    for number in list(model.points3D):
        model.delete_point3D(number)
    model.write_text(str(tmp_path / "a/sparse/0"))
    for file in (tmp_path / "a/sparse/0").glob("*.bin"):
        file.unlink()
    assert same(answers(tmp_path / "a"), right)


def test_nerfstudio_keeps_tracks_in_colmap(tmp_path, rendered, right):
    write_transforms(rendered, tmp_path / "a", shift=3)  # which would be wrong
    shutil.copytree(rendered / "sparse", tmp_path / "a/colmap/sparse")
    assert find_captures(tmp_path) == [tmp_path / "a"]
    assert same(answers(tmp_path / "a"), right)


def test_nerfs_splits_and_names_without_suffix(tmp_path, rendered, right):
    write_transforms(rendered, tmp_path / "a", ply=False)
    about = json.loads((tmp_path / "a/transforms.json").read_text())
    (tmp_path / "a/transforms.json").unlink()
    angle = 2 * np.arctan(about["w"] / 2 / about["fl_x"])
    (tmp_path / "a/images").rename(tmp_path / "a/train")
    for k, split in enumerate(("train", "test")):
        frames = [
            {**frame, "file_path": frame["file_path"].replace("images", "train").removesuffix(".png")} for frame in about["frames"][k::2]
        ]
        (tmp_path / f"a/transforms_{split}.json").write_text(json.dumps({"camera_angle_x": angle, "frames": frames}))
    assert find_captures(tmp_path) == [tmp_path / "a"]
    assert same(answers(tmp_path / "a", verify="off"), right)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"camera_model": "EQUIRECTANGULAR"}, "camera_model 'EQUIRECTANGULAR'"),
        ({"fl_x": None}, "neither fl_x nor camera_angle_x"),
        ({"frames": []}, "too few images"),
        ({"frames": [{"file_path": "a.png"}]}, "transform_matrix"),
        ({"applied_transform": [[1, 2], [3, 4]]}, "3x4 or 4x4"),
        ({"matrix": np.diag([1.0, -1, 1, 1])}, "mirrored"),
        ({"matrix": np.array([[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])}, "right angles"),
        ({"matrix": np.full((4, 4), np.nan)}, "not finite"),
        ("[1, 2", "unreadable model"),
        ('{"w": 1}', "transforms.json is not as nerfstudio writes it: KeyError 'frames'"),
        ({"frames": {"a": 1}}, "transforms.json is not as nerfstudio writes it"),
        ({"applied_transform": np.zeros((3, 4)).tolist()}, "Singular matrix"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_transforms_file_is_said(tmp_path, rendered, change, said):
    write_transforms(rendered, tmp_path / "a")
    file = tmp_path / "a/transforms.json"
    about = json.loads(file.read_text())
    if isinstance(change, dict) and "matrix" in change:
        for frame in about["frames"]:
            frame["transform_matrix"] = (change["matrix"] @ np.array(frame["transform_matrix"])).tolist()
    file.write_text(change if isinstance(change, str) else json.dumps({**about, **{k: v for k, v in change.items() if k != "matrix"}}))
    with pytest.raises(BadCapture, match="a: ") as raised:
        read_capture(tmp_path / "a", verify="off")
    assert said in str(raised.value)


def test_names_and_bytes_as_people_have_them(tmp_path, rendered, right):
    write_transforms(rendered, tmp_path / "a")
    file = tmp_path / "a/transforms.json"
    about = json.loads(file.read_text())
    for n, frame in enumerate(about["frames"]):
        name = frame["file_path"]
        frame["file_path"] = (str(tmp_path / "a" / name), name.replace("/", "\\"), name)[n % 3]
        frame["transform_matrix"] = (np.diag([2.5, 2.5, 2.5, 1]) @ np.array(frame["transform_matrix"])).tolist()
    del about["ply_file_path"]
    (tmp_path / "a/sparse_pc.ply").unlink()
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(about).encode())
    assert same(answers(tmp_path / "a", verify="off"), right)


def test_a_mirroring_applied_transform_is_taken_back(tmp_path, rendered, right):
    write_transforms(rendered, tmp_path / "a", applied=np.diag([1.0, 1, -1, 1])[:3])
    assert same(answers(tmp_path / "a", verify="off"), right)


def test_a_damaged_cloud_and_a_changed_file_are_noticed(tmp_path, rendered):
    write_transforms(rendered, tmp_path / "c/a")
    write_transforms(rendered, tmp_path / "c/b")
    config = ViewpointConfig(workers=1, verify="off")
    for _ in range(2):
        summary = build(tmp_path / "c", tmp_path / "o", config, progress=False)
    assert summary["captures_reused"] == 2 and not summary["rejected"]
    assert len(open_source(SourceConfig(str(tmp_path / "o/train.jsonl")))[0].images) == 2
    assert open_source(SourceConfig(str(tmp_path / "o/train.jsonl")))[0].images[0].exists()
    file = tmp_path / "c/b/transforms.json"
    file.write_text(file.read_text() + " ")
    (tmp_path / "c/b/sparse_pc.ply").write_text("ply of some kind")
    with pytest.raises(ValueError, match="one usable object"):
        build(tmp_path / "c", tmp_path / "o", config, progress=False)
    with pytest.raises(BadCapture, match=r"sparse_pc\.ply cannot be read"):
        read_capture(tmp_path / "c/b")


def test_a_rig_of_two_cameras(tmp_path, rendered, right):
    """COLMAP 3.12 and later: images of one moment are a frame of a rig, whose cameras have names with folders."""
    camera, poses = registered(rendered)
    model, rig = pycolmap.Reconstruction(), pycolmap.Rig(rig_id=1)
    for number, folder in ((1, "left"), (2, "right")):
        (tmp_path / "a/images" / folder).mkdir(parents=True)
        size = {"width": camera.width, "height": camera.height}
        model.add_camera(pycolmap.Camera(model="PINHOLE", params=camera.params, camera_id=number, **size))
    rig.add_ref_sensor(pycolmap.sensor_t(type=pycolmap.SensorType.CAMERA, id=1))
    beside = pycolmap.Rigid3d(pycolmap.Rotation3d(np.eye(3)), np.zeros(3))
    rig.add_sensor(pycolmap.sensor_t(type=pycolmap.SensorType.CAMERA, id=2), beside)
    model.add_rig(rig)
    for k, (name, rotation, translation) in enumerate(poses, 1):
        number, folder = (1, "left") if k % 2 else (2, "right")
        shutil.copy(rendered / "images" / name, tmp_path / "a/images" / folder / name)
        image = pycolmap.Image(name=f"{folder}/{name}", camera_id=number, image_id=k)
        frame = pycolmap.Frame(frame_id=k, rig_id=1)
        frame.add_data_id(image.data_id)
        frame.rig_from_world = pycolmap.Rigid3d(pycolmap.Rotation3d(rotation), translation)
        model.add_frame(frame)
        image.frame_id = k
        model.add_image(image)
        model.register_frame(k)
    for form in ("write_binary", "write_text"):
        shutil.rmtree(tmp_path / "a/sparse", ignore_errors=True)
        (tmp_path / "a/sparse").mkdir()
        getattr(model, form)(str(tmp_path / "a/sparse"))
        assert same(answers(tmp_path / "a", verify="off"), right)
    assert object_id(tmp_path / "a", tmp_path) == "a"


def test_a_cloud_of_many_points_is_thinned_out(tmp_path, rendered, right):
    write_transforms(rendered, tmp_path / "a")
    write_ply(tmp_path / "a/sparse_pc.ply", np.repeat(cloud(rendered), 300, axis=0))
    capture = read_capture(tmp_path / "a", verify="off")
    assert 0 < len(capture.points) <= 20_000 and same(answers(tmp_path / "a", verify="off"), right)
