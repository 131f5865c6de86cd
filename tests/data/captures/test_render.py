"""Rendered captures: the photographs, the COLMAP model and scene.json agree, checked with arithmetic of this file's own."""

import colorsys
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import trimesh
from PIL import Image

from actial_fast.data.captures.capture import read_capture
from actial_fast.data.captures.render import RenderConfig, render
from actial_fast.data.captures.shapes import FAMILIES, load_mesh

CONFIG = RenderConfig(objects=2, views=16, image_size=64, points=128, workers=1, seed=3)
SIDE_HUES = {"front": 0, "left": 90, "back": 180, "right": 270}  # degrees; azimuth of the side, too


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("render") / "captures"
    summary = render(out, CONFIG, progress=False)
    assert summary["captures"] == summary["rendered"] == 8 and summary["images"] == 128 and summary["skipped"] == 0
    return out


def captures(root: Path) -> list[Path]:
    return sorted(p.parent for p in root.glob("*/*/scene.json"))


def scene(path: Path) -> dict:
    return json.loads((path / "scene.json").read_text())


def pixels(path: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(path / "images" / name).convert("RGB"))


def hue_saturation(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    hsv = np.array([colorsys.rgb_to_hsv(*(c / 255)) for c in rgb.reshape(-1, 3)])
    return (hsv[:, 0] * 360).reshape(rgb.shape[:-1]), hsv[:, 1].reshape(rgb.shape[:-1])


def apart(a, b) -> np.ndarray:
    return np.abs((np.asarray(a) - b + 180) % 360 - 180)


def digest(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}


def test_layout(root):
    assert sorted(p.name for p in root.iterdir() if p.is_dir()) == sorted(FAMILIES)
    for path in captures(root):
        assert sorted(p.name for p in (path / "images").iterdir()) == [f"{i:03d}.png" for i in range(16)]
        assert {"cameras.bin", "images.bin", "points3D.bin"} <= {p.name for p in (path / "sparse" / "0").iterdir()}
        assert pixels(path, "000.png").shape == (64, 64, 3)


def test_model_reprojects_exactly(root):
    for path in captures(root):
        model = pycolmap.Reconstruction(path / "sparse" / "0")
        assert len(model.images) == 16 and len(model.points3D) >= 30 and len(model.cameras) == 1
        (camera,) = model.cameras.values()
        assert camera.model.name == "PINHOLE" and (camera.width, camera.height) == (64, 64)
        fx, fy, cx, cy = camera.params
        observations = 0
        for image in model.images.values():
            pose = image.cam_from_world().matrix()
            for observation in image.points2D:
                assert observation.has_point3D()
                x, y, z = pose @ np.append(model.points3D[observation.point3D_id].xyz, 1)
                assert z > 0
                np.testing.assert_allclose(observation.xy, [fx * x / z + cx, fy * y / z + cy], atol=1e-6)
                observations += 1
        assert observations == sum(point.track.length() for point in model.points3D.values())
        assert all(point.track.length() >= 2 for point in model.points3D.values())


def test_points_are_where_the_photographs_show_them(root):
    """A point's hue is the hue of the pixels it was observed at; one pixel further or in the mirrored photograph it is so less often."""
    seen = []  # (hues and saturations of a photograph, pixel, the point's hue)
    for path in captures(root):
        model = pycolmap.Reconstruction(path / "sparse" / "0")
        for image in model.images.values():
            looks = hue_saturation(pixels(path, image.name))
            for observation in image.points2D:
                hue, saturation = hue_saturation(model.points3D[observation.point3D_id].color[None].astype(float))
                if saturation[0] > 0.5:
                    seen.append((looks, observation.xy.astype(int), hue[0]))  # the first pixel spans 0 to 1
    assert len(seen) > 1000

    def agreement(where) -> float:
        at = [np.clip(where(xy), 0, 63) for _, xy, _ in seen]
        return float(np.mean([apart(h[y, x], hue) < 12 and s[y, x] > 0.35 for ((h, s), _, hue), (x, y) in zip(seen, at, strict=True)]))

    right = agreement(lambda xy: xy)
    assert right > 0.75  # the rest lies on edges, where a pixel mixes two colours: 0.94 at 256 pixels
    for shift in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        assert agreement(lambda xy, shift=shift: xy + shift) < right - 0.02
    assert agreement(lambda xy: (63 - xy[0], xy[1])) < 0.5


def test_azimuths_agree_with_the_poses(root):
    for path in captures(root):
        facts, model = scene(path), pycolmap.Reconstruction(path / "sparse" / "0")
        front, up, center = (np.array(facts[k]) for k in ("front", "up", "center"))
        assert abs(front @ up) < 1e-9
        for image in model.images.values():
            offset = image.projection_center() - center
            azimuth = np.degrees(np.arctan2(np.cross(up, front) @ offset, front @ offset))
            assert apart(azimuth, facts["azimuth_deg"][int(image.name[:3])]) < 1e-3
            distance = np.linalg.norm(offset) / facts["radius"]
            assert CONFIG.distance[0] - 1e-6 <= distance <= CONFIG.distance[1] + 1e-6
            elevation = np.degrees(np.arcsin(offset @ up / np.linalg.norm(offset)))
            assert CONFIG.elevation_deg[0] - 1e-4 <= elevation <= CONFIG.elevation_deg[1] + 1e-4


def test_worlds_are_not_upright(root):
    ups = np.array([scene(path)["up"] for path in captures(root)])
    assert np.abs(ups @ ups.T - np.eye(len(ups))).max() < 1 - 1e-6 and np.linalg.norm(ups.mean(0)) < 0.9


def test_the_builders_reader_takes_the_captures(root):
    for path in captures(root):
        capture, facts = read_capture(path, root), scene(path)
        assert capture.object == path.relative_to(root).as_posix() and not capture.left_out
        true = np.array(facts["azimuth_deg"])
        assert apart(np.degrees(capture.azimuth), true - true[0]).max() < 4  # up and centre are estimated there


def test_the_front_is_red_and_every_side_has_its_hue(root):
    seen = set()
    for path in captures(root):
        for i, azimuth in enumerate(scene(path)["azimuth_deg"]):
            for side, hue in SIDE_HUES.items():
                if apart(azimuth, hue) < 14:
                    hues, saturations = hue_saturation(pixels(path, f"{i:03d}.png"))
                    painted = hues[saturations > 0.5]
                    assert len(painted) > 60
                    this, opposite = (np.mean(apart(painted, h) < 40) for h in (hue, hue + 180))
                    assert this > 0.35 and opposite < 0.1, (path, i, azimuth, this, opposite)  # a chair's side is thin beside its back
                    seen.add((path.parent.name, side))
    assert len(seen) >= len(FAMILIES) * 3 and {side for _, side in seen} == set(SIDE_HUES)


def test_the_picture_is_not_mirrored(root):
    """From the front left the front is on the picture's left: the camera walks counterclockwise, so what it passed goes left."""
    checked = 0
    for path in captures(root):
        for i, azimuth in enumerate(scene(path)["azimuth_deg"]):
            if apart(azimuth, 45) < 20 and path.parent.name in ("vehicle", "animal", "pot"):
                hues, saturations = hue_saturation(pixels(path, f"{i:03d}.png"))
                columns = np.broadcast_to(np.arange(64), hues.shape)
                front = columns[(saturations > 0.5) & (apart(hues, 0) < 40)]
                left = columns[(saturations > 0.5) & (apart(hues, 90) < 40)]
                assert front.mean() < left.mean(), (path, i)
                checked += 1
    assert checked >= 6


def test_the_object_fills_the_frame_and_is_not_clipped(tmp_path):
    render(tmp_path, replace(CONFIG, objects=6, background="plain", seed=11), progress=False)
    sizes = []
    for path in captures(tmp_path):
        for name in sorted(p.name for p in (path / "images").iterdir()):
            picture = pixels(path, name).astype(int)
            rows, columns = np.nonzero(np.abs(picture - picture[0, 0]).max(-1) > 12)
            low, high = min(rows.min(), columns.min()), max(rows.max(), columns.max())
            assert low >= 1 and high <= 62, (path, name)
            sizes.append((max(np.ptp(rows), np.ptp(columns)) + 1) / 64)
    assert 0.5 < np.median(sizes) < 0.85 and min(sizes) > 0.3


def test_azimuths_ring_front_random(tmp_path):
    for kind in ("ring", "front", "random"):
        render(tmp_path / kind, replace(CONFIG, families=("pot",), azimuths=kind, image_size=8), progress=False)
    ring, front, random = ([scene(p)["azimuth_deg"] for p in captures(tmp_path / kind)] for kind in ("ring", "front", "random"))
    for azimuths in ring:
        gaps = np.diff(np.sort(np.array(azimuths) % 360), append=np.min(np.array(azimuths) % 360) + 360)
        assert gaps.max() <= 2 * 360 / 16 + 1e-3
    assert np.abs(front).max() <= 90 and np.min(front) < -60 and np.max(front) > 60
    assert np.max(random) > 100 and np.min(random) < -100


def test_an_arc_is_as_long_as_asked_for(tmp_path):
    render(tmp_path, replace(CONFIG, families=("pot",), azimuths="front", arc_deg=80.0, image_size=8), progress=False)
    azimuths = np.array([scene(p)["azimuth_deg"] for p in captures(tmp_path)])
    assert np.abs(azimuths).max() <= 40 and azimuths.min() < -30 and azimuths.max() > 30


def test_shots_share_places_and_directions(tmp_path):
    """Six from each place: two that look at the object, and one and two steps to either side, in the same directions from every place."""
    config = replace(CONFIG, families=("chair",), views=48, shots=6, fov_deg=60.0, image_size=16)
    render(tmp_path, config, progress=False)
    for path in captures(tmp_path):
        model, facts = pycolmap.Reconstruction(path / "sparse" / "0"), scene(path)
        up, front = np.array(facts["up"]), np.array(facts["front"])
        images = sorted(model.images.values(), key=lambda image: image.name)
        centers = np.stack([image.projection_center() for image in images]).reshape(8, 6, 3)
        ahead = np.stack([image.cam_from_world().rotation.matrix()[2] for image in images])
        heading = np.degrees(np.arctan2(ahead @ np.cross(up, front), ahead @ front)).reshape(8, 6)
        assert np.ptp(centers, axis=1).max() < 1e-6 and np.linalg.norm(centers[:-1, 0] - centers[1:, 0], axis=1).min() > 0.01
        to_object = np.array(facts["center"]) - centers[:, 0]
        bearing = np.degrees(np.arctan2(to_object @ np.cross(up, front), to_object @ front))
        assert np.abs(heading / 12 - np.round(heading / 12)).max() <= 0.8 / 12 + 1e-6, "multiples of pan_deg, but for the jitter"
        off = apart(heading, bearing[:, None])
        assert off[:, :2].max() <= 6.81 and off.max() <= 30.81
        steps = np.sort(np.round(apart(heading, heading[:, :1]) / 12), axis=1)
        assert (steps == [0, 0, 1, 1, 2, 2]).all()
        assert np.ptp((heading - bearing[:, None] + 180) % 360 - 180, axis=1).min() > 46, "two steps to either side"
        azimuth = np.array(facts["azimuth_deg"]).reshape(8, 6)
        assert np.ptp(azimuth, axis=1).max() == 0


def test_a_folder_from_before_a_field_was_there_can_be_continued(tmp_path):
    small = replace(CONFIG, image_size=16, views=4, families=("pot",), objects=1)
    render(tmp_path, small, progress=False)
    record = json.loads((tmp_path / "render.json").read_text())
    (tmp_path / "render.json").write_text(json.dumps({key: value for key, value in record.items() if key not in ("shots", "arc_deg")}))
    assert render(tmp_path, small, progress=False)["skipped"] == 1
    with pytest.raises(ValueError, match=r"other settings \(shots was 1, now 2\)"):
        render(tmp_path, replace(small, shots=2), progress=False)


def test_same_for_any_number_of_workers_and_any_selection(tmp_path):
    small = replace(CONFIG, image_size=20, views=4, families=("vehicle", "pot"))
    render(tmp_path / "one", small, progress=False)
    render(tmp_path / "two", replace(small, workers=2), progress=False)
    render(tmp_path / "pots", replace(small, families=("pot",)), progress=False)
    one = digest(tmp_path / "one")
    assert one == digest(tmp_path / "two") and len(one) >= 2 * 2 * 8
    assert digest(tmp_path / "pots" / "pot") == digest(tmp_path / "one" / "pot")
    render(tmp_path / "other", replace(small, seed=4), progress=False)
    assert digest(tmp_path / "other" / "pot") != digest(tmp_path / "one" / "pot")


def test_a_killed_run_is_continued(tmp_path):
    small = replace(CONFIG, image_size=16, views=4, families=("vehicle",), objects=400)
    code = (
        "from pathlib import Path\nfrom actial_fast.data.captures.render import RenderConfig, render\n"
        f"render(Path({str(tmp_path / 'killed')!r}), RenderConfig(**{asdict(small)!r}), False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 60
    while len(captures(tmp_path / "killed")) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(captures(tmp_path / "killed"))
    assert 5 <= done < 400
    for path in captures(tmp_path / "killed"):
        assert len(list((path / "images").iterdir())) == 4 and len(pycolmap.Reconstruction(path / "sparse" / "0").images) == 4

    summary = render(tmp_path / "killed", replace(small, objects=done + 2), progress=False)
    assert summary["skipped"] == done and summary["rendered"] == 2
    render(tmp_path / "whole", replace(small, objects=done + 2), progress=False)
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")  # nothing left over either


def test_other_settings_do_not_mix(tmp_path):
    small = replace(CONFIG, image_size=16, views=4, families=("pot",), objects=1)
    render(tmp_path, small, progress=False)
    with pytest.raises(ValueError, match=r"other settings \(views was 4, now 5\)"):
        render(tmp_path, replace(small, views=5), progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"families": ("pot", "house")}, "families: 'house' is not known; choose from vehicle"),
        ({"azimuths": "back"}, "azimuths: 'back' is not known"),
        ({"views": 1}, "views is 1: it must be at least 2"),
        ({"views": 25, "shots": 6}, "views has to be a multiple of shots"),
        ({"views": 6, "shots": 6}, "two places at least"),
        ({"views": 40, "shots": 10}, "panned by 54 degrees do not see the object"),
        ({"arc_deg": 90.0}, "arc_deg is 90.0: .* with azimuths=front"),
        ({"azimuths": "front", "arc_deg": 360.0}, "arc_deg is 360.0"),
        ({"pan_deg": 0.5, "shots": 2}, "pan_deg is 0.5"),
        ({"pan_deg": 9.0}, "pan_deg is 9.0: .* with several shots"),
        ({"elevation_deg": (-5.0, 20.0)}, "elevation_deg"),
        ({"distance": (0.5, 2.0)}, "distance is .* no camera is inside"),
        ({"mesh_up": "w"}, "axis 'w'"),
        ({"mesh_up": "y", "mesh_front": "-y"}, "same axis"),
    ],
)
def test_senseless_settings(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        render(tmp_path / "out", replace(CONFIG, **change), progress=False)
    assert not (tmp_path / "out").exists()


def test_jpeg(tmp_path):
    render(tmp_path, replace(CONFIG, families=("pot",), objects=1, format="jpg"), progress=False)
    (path,) = captures(tmp_path)
    with Image.open(path / "images" / "003.jpg") as image:
        assert image.format == "JPEG" and image.size == (64, 64)


# Users' meshes: a z-up wedge with a red nose towards +x and a green box on its left, so that any axis or colour can be wrong.


def wedge() -> trimesh.Trimesh:
    body = trimesh.creation.box(extents=(2, 1, 0.5))
    nose = trimesh.creation.box(extents=(0.2, 1, 1.2), transform=trimesh.transformations.translation_matrix((1.1, 0, 0.35)))
    left = trimesh.creation.box(extents=(0.6, 0.3, 0.3), transform=trimesh.transformations.translation_matrix((0, 0.65, 0)))
    body.visual.vertex_colors = (60, 60, 200, 255)
    nose.visual.vertex_colors = (220, 30, 30, 255)
    left.visual.vertex_colors = (30, 200, 30, 255)
    return trimesh.util.concatenate([body, nose, left])


@pytest.mark.parametrize("suffix", ["obj", "ply", "glb", "gltf"])
def test_mesh_files(tmp_path, suffix):
    folder = tmp_path / "assets" / "wedge"
    folder.mkdir(parents=True)
    wedge().export(folder / f"a.{suffix}")
    config = replace(CONFIG, meshes=str(tmp_path / "assets"), mesh_up="z", mesh_front="x")
    assert render(tmp_path / "out", config, progress=False)["captures"] == 1
    before = digest(tmp_path / "out")
    (path,) = captures(tmp_path / "out")
    assert path.relative_to(tmp_path / "out").as_posix() == "wedge/a" and scene(path)["mesh"] == f"wedge/a.{suffix}"

    def shares(azimuth: float) -> list[float]:
        """Red, green and blue in the photograph from nearest to the azimuth."""
        i = int(np.argmin(apart(scene(path)["azimuth_deg"], azimuth)))
        hues, saturations = hue_saturation(pixels(path, f"{i:03d}.png"))
        painted = hues[saturations > 0.5]
        return [float(np.mean(apart(painted, hue) < 20)) for hue in (0, 120, 240)]

    assert shares(0)[0] > 0.6 > 0.35 > shares(180)[0]  # from in front the nose hides most of the body
    assert shares(90)[1] > 0.08 and shares(90)[2] > 0.4
    assert shares(-90)[1] < 0.02 and shares(-90)[2] > 0.4

    wedge().export(folder / "0.ply")  # sorts before the other
    assert render(tmp_path / "out", config, progress=False)["rendered"] == 1
    assert before.items() <= digest(tmp_path / "out").items()
    assert digest(tmp_path / "out" / "wedge" / "0")["images/000.png"] != digest(path)["images/000.png"]  # other cameras


def test_axes_turn_the_mesh(tmp_path):
    """The same object written y-up with its front along -z is the same picture."""
    z_up, y_up = wedge(), wedge()
    y_up.apply_transform([[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])  # x -> z, y -> x, z -> y
    y_up.apply_transform([[-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]])  # half a turn about y: the front is -z
    z_up.export(tmp_path / "z.ply")
    y_up.export(tmp_path / "y.ply")
    a, b = load_mesh(tmp_path / "z.ply", "z", "x"), load_mesh(tmp_path / "y.ply", "y", "-z")
    np.testing.assert_allclose(a.triangles, b.triangles, atol=1e-6)
    assert a.triangles[..., 2].min() == pytest.approx(0, abs=1e-9)
    assert np.linalg.norm(a.triangles - a.center, axis=-1).max() == pytest.approx(1)


def test_texture_and_no_colour(tmp_path):
    box = trimesh.creation.box()
    box.export(tmp_path / "plain.stl")  # another format, ignored
    trimesh.Trimesh(box.vertices, box.faces).export(tmp_path / "grey.obj")
    texture = Image.new("RGB", (8, 8), (20, 200, 40))
    box.visual = trimesh.visual.TextureVisuals(uv=np.random.default_rng(0).uniform(0.2, 0.8, (8, 2)), image=texture)
    box.export(tmp_path / "green.glb")
    assert np.ptp(load_mesh(tmp_path / "grey.obj").colours) < 0.01
    np.testing.assert_allclose(load_mesh(tmp_path / "green.glb").colours.reshape(-1, 3).mean(0) * 255, (20, 200, 40), atol=3)
    assert render(tmp_path / "out", replace(CONFIG, meshes=str(tmp_path), views=3), progress=False)["captures"] == 2
    facts = [scene(path) for path in captures(tmp_path / "out")]
    assert all(f["front"] is None and f["azimuth_deg"] is None for f in facts)  # nobody said where the front is


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_mesh_is_named(tmp_path, workers):
    for name in ("good", "good2"):
        wedge().export(tmp_path / f"{name}.glb")
    (tmp_path / "broken.glb").write_bytes((tmp_path / "good.glb").read_bytes()[:150])
    with pytest.raises(ValueError, match=r"broken\.glb cannot be read"):
        render(tmp_path / "out", replace(CONFIG, meshes=str(tmp_path), views=3, workers=workers), progress=False)
    assert not (tmp_path / "out" / ".partial").exists()
    (tmp_path / "broken.glb").unlink()
    wedge().export(tmp_path / "good.ply")
    with pytest.raises(ValueError, match=r"good\.glb and .*good\.ply would both become"):
        render(tmp_path / "out", replace(CONFIG, meshes=str(tmp_path), views=3), progress=False)


def test_a_mesh_without_surface_is_named(tmp_path):
    (tmp_path / "points.ply").write_bytes(trimesh.PointCloud(np.eye(3)).export(file_type="ply"))
    with pytest.raises(ValueError, match=r"points\.ply"):
        render(tmp_path / "out", replace(CONFIG, meshes=str(tmp_path)), progress=False)
    with pytest.raises(ValueError, match=r"no \.obj, \.gltf, \.glb, \.ply file"):
        render(tmp_path / "out2", replace(CONFIG, meshes=str(tmp_path / "nowhere")), progress=False)


def test_speed(tmp_path):
    """A bound that a busy machine keeps too; the real figure is above 600 images per CPU second."""
    render(tmp_path / "warm", replace(CONFIG, families=("pot",), objects=1, image_size=28), progress=False)
    started = time.process_time()
    summary = render(tmp_path / "timed", RenderConfig(objects=5, workers=1), progress=False)
    assert summary["images"] / (time.process_time() - started) > 150
