"""Captures from photographs: what is an object, what is written, what is left out; and, slow, COLMAP's cameras beside the renderer's."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from actial_fast.cli.main import main
from actial_fast.data.captures import reconstruct as module
from actial_fast.data.captures import sfm
from actial_fast.data.captures.capture import read_capture
from actial_fast.data.captures.photos import BadCapture
from actial_fast.data.captures.reconstruct import find_objects, reconstruct
from actial_fast.data.captures.sfm import ReconstructConfig
from actial_fast.data.sources.picture import decode, header
from tests.photographs import FOCAL_35MM, photograph, walk_round


def noise(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Two textured boxes, photographed by our renderer, and their true captures."""
    folder = tmp_path_factory.mktemp("walked")
    walk_round(folder)
    return folder


def test_a_folder_of_pictures_is_an_object(tmp_path):
    for name in ("toys/car/a.jpg", "toys/car/b.JPG", "mug/images/a.png", "mug/.thumbs/a.jpg", "clip/a.mp4", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_objects(tmp_path)
    assert {name: [p.name for p in paths] for name, paths in found.items()} == {
        "toys/car": ["a.jpg", "b.JPG"],
        "mug": ["a.png"],
        "clip": [],
    }
    assert list(find_objects(tmp_path / "toys" / "car")) == ["car"]
    with pytest.raises(ValueError, match="no such folder"):
        find_objects(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither pictures nor folders of pictures"):
        find_objects(tmp_path / "empty")


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("max_side", [0, 24])
def test_pictures_are_upright_and_keep_their_focal_length(orientation, max_side, tmp_path):
    photograph(noise(0), tmp_path / "in" / "a.jpg", orientation)
    assert not sfm._pictures([tmp_path / "in" / "a.jpg"], tmp_path / "images", max_side)
    written = tmp_path / "images" / "a.jpg"
    assert header(written) == ((24, 16, 1) if max_side else (48, 32, 1))
    assert Image.open(written).getexif().get_ifd(0x8769)[0xA405] == FOCAL_35MM
    shown = np.asarray(Image.fromarray(decode(tmp_path / "in" / "a.jpg", "")).resize((12, 8), Image.Resampling.BOX), float)
    assert np.abs(np.asarray(Image.fromarray(decode(written, "")).resize((12, 8), Image.Resampling.BOX), float) - shown).max() < 12


def test_pictures_of_one_name_and_of_other_formats(tmp_path):
    for name in ("a.jpg", "a.png", "b.webp", "c.tiff"):
        noise(1).save(tmp_path / name)
    (tmp_path / "d.jpg").write_text("<html>")
    unread = sfm._pictures(sorted(tmp_path.iterdir()), tmp_path / "images", 0)
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["a.jpg", "a.png", "b.jpg", "c.jpg"]
    assert list(unread) == ["d.jpg"] and "HTML" in unread["d.jpg"]


def test_one_camera_for_each_size_and_focal_length(tmp_path):
    for n in range(4):
        photograph(noise(n, (48, 32) if n < 3 else (32, 48)), tmp_path / f"{n}.jpg")
    noise(9).save(tmp_path / "4.jpg")  # of another camera
    assert sfm._cameras(tmp_path, [f"{n}.jpg" for n in range(5)]) == [["0.jpg", "1.jpg", "2.jpg"], ["3.jpg"], ["4.jpg"]]


def test_what_is_left_out_is_told_and_not_tried_again(tmp_path, capsys):
    for n in range(5):
        photograph(noise(n), tmp_path / "photos" / "few" / f"{n}.jpg")
    for n in range(8):
        photograph(noise(n, (64, 64)), tmp_path / "photos" / "apart" / f"{n}.jpg")
    (tmp_path / "photos" / "clip").mkdir()
    (tmp_path / "photos" / "clip" / "a.mp4").touch()
    command = ["data", "reconstruct", str(tmp_path / "photos"), "-o", str(tmp_path / "out")]
    assert main(command) == 1
    told = capsys.readouterr()
    for line in (
        "few: left out, too few photographs (5 that can be read, 8 are needed)",
        "apart: left out, photographs do not match",
        "ffmpeg",
    ):
        assert line in told.err
    assert "0 captures of 3 objects" in told.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["reconstruct.json"], "nothing half made stays"
    assert main(command) == 1 and "left out, too few" not in capsys.readouterr().err
    photograph(noise(5), tmp_path / "photos" / "few" / "5.jpg")
    assert main(command) == 1 and "few: left out, too few photographs (6 that" in capsys.readouterr().err
    assert main([*command, "seed=1"]) == 2 and "seed was 0, now 1" in capsys.readouterr().err
    assert main(["data", "reconstruct", str(tmp_path / "photos"), "-o", str(tmp_path / "photos" / "out")]) == 2


def test_a_capture_of_other_photographs_does_not_stay(tmp_path, monkeypatch):
    """Not where the object is left out now; and nothing goes that this command has not made."""
    photograph(noise(0), tmp_path / "photos" / "mug" / "a.jpg")
    photograph(noise(0), tmp_path / "photos" / "own" / "a.jpg")
    (tmp_path / "out" / "own" / "sparse").mkdir(parents=True)
    (tmp_path / "out" / "mug" / "sparse").mkdir(parents=True)
    monkeypatch.setattr(module, "_made", lambda name, *_: {"reason": "" if name == "mug" else sfm.FEW_PHOTOGRAPHS})
    reconstruct(tmp_path / "photos", tmp_path / "out", ReconstructConfig())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"mug", "own", "reconstruct.json"}
    photograph(noise(1), tmp_path / "photos" / "mug" / "b.jpg")
    monkeypatch.setattr(module, "_made", lambda *_: {"reason": sfm.FEW_PHOTOGRAPHS})
    assert reconstruct(tmp_path / "photos", tmp_path / "out", ReconstructConfig())["mug"]["reason"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"own", "reconstruct.json"}


def test_a_process_that_ends_and_a_full_disk(tmp_path, monkeypatch):
    """COLMAP may end its process, on checks of its own: the object is left out. What the disk says ends the command."""
    photograph(noise(0), tmp_path / "photos" / "a.jpg")
    entry = reconstruct(tmp_path / "photos", tmp_path / "out", ReconstructConfig())["photos"]
    assert entry["reason"] == sfm.FEW_PHOTOGRAPHS
    monkeypatch.setattr(module, "_work", os._exit)  # spawned by its name: os._exit fails on its arguments, without a word
    entry = module._made("photos", [tmp_path / "photos" / "a.jpg"], tmp_path / "out", ReconstructConfig(), lambda phase: None)
    assert entry["reason"] == sfm.CRASHED and "exit status 1" in entry["detail"]
    monkeypatch.setattr(module, "_heard", lambda *_: OSError(28, "No space left on device", "here"))
    with pytest.raises(OSError, match="No space left"):
        module._made("photos", [tmp_path / "photos" / "a.jpg"], tmp_path / "out", ReconstructConfig(), lambda phase: None)


class Model:
    def __init__(self, images, points):
        self.num_reg_images, self.num_points3D, self.compute_mean_reprojection_error = lambda: images, lambda: points, lambda: 0.5

    def write(self, folder):
        (folder / "images.txt").touch()


@pytest.mark.parametrize(
    ("models", "reason"),
    [([], sfm.UNMATCHED), ([(7, 50)], sfm.FEW_REGISTERED), ([(9, 50), (9, 60)], sfm.FEW_REGISTERED), ([(12, 50), (8, 60)], "")],
)
def test_which_models_are_kept(models, reason, tmp_path, monkeypatch):
    paths = [tmp_path / f"{n}.jpg" for n in range(20)]
    for n, path in enumerate(paths):
        photograph(noise(n), path)
    monkeypatch.setattr(sfm, "_models", lambda *_: [Model(*each) for each in models])
    if reason:
        with pytest.raises(BadCapture, match=reason):
            sfm.solve(paths, tmp_path / "out", ReconstructConfig())
    else:
        solved = sfm.solve(paths, tmp_path / "out", ReconstructConfig())
        assert (solved.registered, solved.models) == (12, (12, 8)) and (tmp_path / "out" / "sparse" / "0" / "images.txt").exists()


@pytest.mark.parametrize("word", ["matching=vocab", "max_side=8", "min_images=2", "min_share=2", "features=1"])
def test_settings_that_make_no_sense(word, tmp_path, capsys):
    photograph(noise(0), tmp_path / "photos" / "a.jpg")
    assert main(["data", "reconstruct", str(tmp_path / "photos"), "-o", str(tmp_path / "out"), word]) == 2
    assert word.split("=")[0] in capsys.readouterr().err


@pytest.mark.slow
def test_cameras_are_those_of_the_renderer(walked, tmp_path):
    """Whole circle, four EXIF orientations: azimuths within 2 degrees, the same to the bit a second time, and questions about it."""
    command = ["data", "reconstruct", str(walked / "photos"), "threads=1", "-o"]
    assert main([*command, str(tmp_path / "one")]) == 0
    assert main([*command, str(tmp_path / "frames"), "matching=sequential"]) == 0
    for run, name in (("one", "box"), ("one", "tower"), ("frames", "box"), ("frames", "tower")):
        ours, true = read_capture(tmp_path / run / name), read_capture(walked / "true" / "meshes" / name)
        place = [[n.split(".")[0] for n in true.names].index(n.split(".")[0]) for n in ours.names]
        assert len(ours.names) >= (24 if run == "one" else 16)  # the frames of a video do not know that the last meets the first
        off = ours.azimuth - (true.azimuth[place] - true.azimuth[place[0]])
        assert np.degrees(np.abs(np.angle(np.exp(1j * off)))).max() < 2
    shutil.rmtree(tmp_path / "one" / "tower")  # what is not there any more is made again, and only that
    kept = (tmp_path / "one" / "box" / "sparse" / "0" / "images.bin").stat().st_mtime_ns
    assert main([*command, str(tmp_path / "one")]) == 0 and (tmp_path / "one" / "tower").exists()
    assert (tmp_path / "one" / "box" / "sparse" / "0" / "images.bin").stat().st_mtime_ns == kept
    assert main([*command, str(tmp_path / "two")]) == 0
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file() and path.suffix != ".json"]
    assert files and all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    assert main(["data", "viewpoint", str(tmp_path / "one"), "-o", str(tmp_path / "rows"), "workers=1", "examples=60"]) == 0
    built = json.loads((tmp_path / "rows" / "build.json").read_text())
    assert built["examples"]["train"] and built["examples"]["test"] and not built["rejected"]
