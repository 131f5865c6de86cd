"""The viewpoint builder on synthetic captures: what it reads, refuses, asks and answers.

The captures are written with pycolmap in random world frames; their true poses, z-up, are kept beside and are the oracle."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
import pycolmap
import pytest
from PIL import Image, ImageDraw

from actial_fast.data.captures import photos as module
from actial_fast.data.captures import viewpoint
from actial_fast.data.captures.capture import find_captures, read_capture
from actial_fast.data.captures.moves import pairs
from actial_fast.data.captures.photos import BadCapture
from actial_fast.data.captures.questions import KINDS, LETTERS, OPPOSITE, OPTIONS, QUESTIONS, REQUEST
from actial_fast.data.captures.settings import ViewpointConfig
from actial_fast.data.captures.sheet import FIRST, SECOND, contact_sheet
from actial_fast.data.captures.split import balance
from actial_fast.data.captures.viewpoint import build
from actial_fast.data.sources.own import from_json
from actial_fast.data.sources.row import BadRow, Row, Turn

Z = np.array([0.0, 0.0, 1.0])
REPOSITORY = Path(__file__).parents[3]


def look_at(eye, target, roll=0.0):
    """cam_from_world (R, t) of a camera at `eye` aimed at `target` in a world whose up is +z; roll in radians about the viewing axis."""
    forward = (np.asarray(target, float) - eye) / np.linalg.norm(np.asarray(target) - eye)
    right = np.cross(forward, Z)
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    rotation = np.stack([c * right + s * down, c * down - s * right, forward])
    return rotation, -rotation @ eye


def eye(pose):
    return -pose[0].T @ pose[1]


def around(rng, azimuths_deg, elevation_deg=20.0, distance=4.0, aim=0.1, roll_deg=1.0):
    """Poses of hand-held cameras at the azimuths (degrees, counterclockwise from +x), aimed at the origin."""
    poses = []
    for azimuth in np.radians(azimuths_deg):
        elevation = np.radians(elevation_deg) + rng.normal() * 0.03
        outward = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
        poses.append(look_at(distance * rng.uniform(0.9, 1.1) * outward, rng.normal(size=3) * aim, rng.normal() * np.radians(roll_deg)))
    return poses


def random_rotation(rng):
    q, upper = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(upper))
    return q * np.sign(np.linalg.det(q))


def write_capture(folder, rng, poses, *, size=64, focal=70.0, mirror="", tracks=True, draw=None):
    """A capture of a cloud of points about the origin from `poses`, in a random world frame; keypoints with a little noise.

    mirror: how the model differs from what the pictures show. "x": the world and every camera flipped left to right; "z": near and far
    swapped about the origin (both are self-consistent worlds with proper rotations); "points": the points alone flipped.
    draw(camera, r, t, canvas): paints the picture. Returns the poses."""
    (folder / "images").mkdir(parents=True)
    (folder / "sparse" / "0").mkdir(parents=True)
    camera = pycolmap.Camera(model="SIMPLE_PINHOLE", width=size, height=size, params=[focal, size / 2, size / 2], camera_id=1)
    model = pycolmap.Reconstruction()
    model.add_camera_with_trivial_rig(camera)
    points = rng.normal(size=(100, 3)) * [0.5, 0.3, 0.3]
    flip = np.diag({"x": [-1.0, 1, 1], "z": [1.0, 1, -1], "points": [1.0, -1, 1]}.get(mirror, [1.0, 1, 1]))
    turn, shift, scale = random_rotation(rng), rng.normal(size=3) * 10, rng.uniform(0.2, 5)
    seen = []
    for n, (r, t) in enumerate(poses):
        picture = Image.new("RGB", (size, size), (90, 120, n))
        if draw:
            draw(camera, r, t, ImageDraw.Draw(picture))
        picture.save(folder / "images" / f"{n:03d}.png")
        pixels = camera.img_from_cam(points @ r.T + t, False) + rng.normal(size=(len(points), 2)) * size * 3e-4
        seen.append(np.nonzero((pixels >= 0).all(1) & (pixels < size).all(1) & ((points @ r.T + t)[:, 2] > 0))[0])
        image = pycolmap.Image(name=f"{n:03d}.png", keypoints=pixels[seen[-1]], camera_id=1, image_id=n + 1)
        if mirror in ("x", "z"):
            r, t = flip @ r @ flip, (flip @ t if mirror == "x" else t)
        moved = r @ turn.T  # the same camera in the world x' = scale * turn @ x + shift
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pycolmap.Rotation3d(moved), scale * t - moved @ shift))
    for p, xyz in enumerate(points @ flip):
        track = pycolmap.Track()
        for n, visible in enumerate(seen):
            if tracks and p in visible:
                track.add_element(n + 1, int(np.searchsorted(visible, p)))
        model.add_point3D(scale * turn @ xyz + shift, track, np.zeros(3, np.uint8))
    model.write_binary(str(folder / "sparse" / "0"))
    return poses


def read_rows(file):
    return [from_json(json.loads(line), file.parent, f"{file.name}:{n}") for n, line in enumerate(file.open())]


CAPTURES = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """24 captures, every third a partial arc, and two bad ones; (root, {object: true poses})."""
    root = tmp_path_factory.mktemp("captures")
    rng = np.random.default_rng(7)
    truth = {}
    for k in range(CAPTURES):
        azimuths = rng.uniform(-180, 180) + np.sort(rng.uniform(0, 130 if k % 3 == 0 else 360, 12))
        name = f"{('car', 'pot')[k % 2]}/{k:04d}"
        truth[name] = write_capture(root / name, rng, around(rng, azimuths, rng.uniform(5, 45), rng.uniform(3, 6)))
    write_capture(root / "bad/mirrored", rng, around(rng, np.arange(0, 360, 40)), mirror="x")
    write_capture(root / "bad/untracked", rng, around(rng, np.arange(0, 360, 40)), tracks=False)
    return root, truth


@pytest.fixture(scope="module")
def built(world, tmp_path_factory):
    """A build with every pair the config allows; (folder, summary, {split: rows})."""
    out = tmp_path_factory.mktemp("built")
    summary = build(world[0], out, ViewpointConfig(workers=1, pairs_per_object=15), progress=False)
    return out, summary, {split: read_rows(out / f"{split}.jsonl") for split in ("train", "test")}


# ---- answers


def seen_from(pose, point):
    """Horizontal image coordinate of a point, negative in the left half; infinite behind."""
    x, _, z = pose[0] @ point + pose[1]
    return x / z if z > 0 else np.inf


def true_sides(one, two):
    """Each kind's answer from the true poses, by projecting landmarks."""
    toward = -eye(one) * [1, 1, 0] / np.linalg.norm(eye(one)[:2])
    ahead = one[0][2] * [1, 1, 0] / np.linalg.norm(one[0][2, :2])
    sides = {
        # Someone in the object's place who looks at camera 1 sees camera 2 on this side.
        "object_translation": (look_at(np.zeros(3), -toward)[0] @ eye(two))[0],
        # Of two posts on the line camera 1 looks along, camera 2 (turned to face them) sees the near one shifted the other way.
        "ego_translation": -np.subtract(*(seen_from(look_at(eye(two), eye(one) + 50 * ahead), eye(one) + d * ahead) for d in (49, 51))),
        "ego_rotation": np.cross(two[0][2], one[0][2])[2],  # clockwise seen from above is right
    }
    return {kind: "right" if side > 0 else "left" for kind, side in sides.items()}


def test_answers_are_what_the_true_cameras_see(world, built):
    """Every row against the true poses: projections of landmarks for the sides, plain atan2 for the angles."""
    angles = {"azimuth_change_deg": [], "yaw_deg": []}
    for row in built[2]["train"] + built[2]["test"]:
        meta = row.meta
        one, two = (world[1][meta["object"]][int(name[:3])] for name in meta["pair"])
        assert {kind: meta[kind] for kind in KINDS} == true_sides(one, two), row.id
        assert row.choices[LETTERS.index(row.truth)] == meta[row.kind]
        bearing = [np.arctan2(*(eye(pose)[[1, 0]])) for pose in (one, two)]
        heading = [np.arctan2(*(pose[0][2, [1, 0]])) for pose in (one, two)]
        for key, (a, b) in {"azimuth_change_deg": bearing, "yaw_deg": heading}.items():
            expected = (np.degrees(b - a) + 180) % 360 - 180
            angles[key].append(abs((meta[key] - expected + 180) % 360 - 180))
        left_over = meta["azimuth_deg"][1] - meta["azimuth_deg"][0] - meta["azimuth_change_deg"]
        assert left_over / 360 == pytest.approx(round(left_over / 360), abs=1e-6)
    # What is left is the estimate of up and centre from a dozen hand-held cameras.
    assert np.mean(angles["azimuth_change_deg"]) < 2 and np.max(angles["azimuth_change_deg"]) < 10
    assert np.mean(angles["yaw_deg"]) < 1 and np.max(angles["yaw_deg"]) < 5


def test_cameras_that_aim_badly_get_true_and_balanced_answers(tmp_path):
    """Aimed up to 35 degrees past the object, a camera may turn with its move, not against it: the answers are not one another's."""
    rng = np.random.default_rng(13)
    truth = {}
    for k in range(8):
        poses = around(rng, np.arange(0, 360, 15), aim=0.0, roll_deg=0.0)
        turns = [np.array([[np.cos(a), 0, -np.sin(a)], [0, 1, 0], [np.sin(a), 0, np.cos(a)]]) for a in rng.uniform(-0.6, 0.6, len(poses))]
        truth[str(k)] = write_capture(
            tmp_path / f"c/{k}", rng, [(a @ r, a @ t) for a, (r, t) in zip(turns, poses, strict=True)], focal=40.0
        )
    config = ViewpointConfig(workers=1, test_examples=0, pairs_per_object=200, max_angle=150)
    summary = build(tmp_path / "c", tmp_path / "o", config, progress=False)
    usual = Counter()
    for row in read_rows(tmp_path / "o/train.jsonl"):
        one, two = (truth[row.meta["object"]][int(name[:3])] for name in row.meta["pair"])
        assert row.meta[row.kind] == true_sides(one, two)[row.kind]
        assert row.meta["ego_translation"] != row.meta["object_translation"]
        usual[row.meta["ego_translation"] != row.meta["ego_rotation"]] += 1
    assert usual[True] > 1000 and usual[False] > 50
    assert all(abs(count["left"] - count["right"]) <= 2 for count in summary["balance"]["train"].values())


@pytest.mark.parametrize("seed", range(5))
def test_sides_balance_though_turn_and_move_disagree_in_many_pairs(seed):
    draw = random.Random(seed)
    chosen = []
    for n in range(301):
        move, turn = draw.choice(("left", "right")), draw.choice(("left", "right"))
        answers = {"ego_translation": move, "object_translation": OPPOSITE[move], "ego_rotation": turn}
        chosen.append({"pair": [f"{n}", "b"], "azimuth_deg": [0, 1], "poses": [0, 1], "azimuth_change_deg": 1, "yaw_deg": 1, **answers})
    ordered = balance(chosen, draw)
    assert sorted(max(pair["pair"], pair["pair"][::-1]) for pair in ordered) == sorted(["b", pair["pair"][0]] for pair in chosen)
    for kind, most in zip(KINDS, (1, 1, 2), strict=True):
        sides = Counter(pair[kind] for pair in ordered)
        assert abs(sides["left"] - sides["right"]) <= most


POSTS, BEACONS = 60, 120


def paint(camera, r, t, canvas):
    """A fence of 60 posts round the object, numbered counterclockwise in red on (., 200, 0), and 120 far beacons on (., 0, 200)."""

    def line(bottom, top, color):
        ends = np.array([bottom, top]) @ r.T + t
        if (ends[:, 2] > 0).all():
            canvas.line([tuple(p) for p in camera.img_from_cam(ends).round()], fill=color, width=1)

    for k in range(BEACONS):
        a = 2 * np.pi * k / BEACONS
        line(*(1e5 * np.array([np.cos(a), np.sin(a), h]) for h in (0.06, 0.12)), (k + 1, 0, 200))
    order = sorted(range(POSTS), key=lambda k: -(r @ post(k) + t)[2])
    for k in order:  # the near ones last, over the far ones
        line(post(k), [*post(k)[:2], 0.25], (k + 1, 200, 0))


def post(k):
    a = 2 * np.pi * k / POSTS
    return np.array([np.cos(a), np.sin(a), -0.25])


@cache
def numbers(path):
    """From the pixels alone: the number of the post that faces the camera, and of the beacon it looks at."""
    pixels = np.asarray(Image.open(path)).astype(int)
    ys, xs = np.nonzero((pixels[..., 1] == 200) & (pixels[..., 2] == 0))
    number = pixels[ys, xs, 0]
    # Seen from above the horizon, the nearest posts stand lowest in the picture; the facing one is amid them.
    posts = {k: (ys[number == k].max(), xs[number == k].mean()) for k in np.unique(number)}
    near = {k: x for k, (y, x) in posts.items() if y >= ys.max() - 3}
    facing = min(near, key=lambda k: abs(near[k] - np.mean(list(near.values()))))
    ys, xs = np.nonzero((pixels[..., 1] == 0) & (pixels[..., 2] == 200))
    ahead = np.argmin(abs(xs - pixels.shape[1] / 2))
    return int(facing), int(pixels[ys[ahead], xs[ahead], 0])


def test_the_answer_is_visible_in_the_pictures(tmp_path):
    """Counting the posts of a fence and the beacons on the horizon in the written image files gives each row's answer and angle."""
    rng = np.random.default_rng(3)
    for k in range(4):
        poses = around(rng, rng.uniform(0, 360) + np.arange(12) * (30, 13)[k % 2], 10, 4.0, 0.02, 0.0)
        write_capture(tmp_path / f"c/fence/{k}", rng, poses, size=256, focal=280.0, draw=paint)
    build(tmp_path / "c", tmp_path / "o", ViewpointConfig(workers=1, test_examples=0), progress=False)
    rows = read_rows(tmp_path / "o/train.jsonl")
    assert len(rows) == 4 * 10 * 3
    for row in rows:
        (post_1, beacon_1), (post_2, beacon_2) = map(numbers, row.images)
        walked = ((post_2 - post_1) * 360 / POSTS + 180) % 360 - 180  # counterclockwise, as the fence is numbered
        turned = ((beacon_2 - beacon_1) * 360 / BEACONS + 180) % 360 - 180
        expected = {
            "ego_translation": "right" if walked > 0 else "left",
            "object_translation": "left" if walked > 0 else "right",
            "ego_rotation": "left" if turned > 0 else "right",
        }
        assert row.choices[LETTERS.index(row.truth)] == expected[row.kind], row.id
        assert row.meta["azimuth_change_deg"] == pytest.approx(walked, abs=16)  # the facing post is read to +- one, twice
        assert row.meta["yaw_deg"] == pytest.approx(turned, abs=5)


# ---- rows and splits


def test_rows_have_the_promised_form(built):
    out, _, splits = built
    for rows in splits.values():
        for trio in (rows[i : i + 3] for i in range(0, len(rows), 3)):
            assert [row.kind for row in trio] == list(KINDS)
            assert len({row.images for row in trio}) == 1 and len(trio[0].images) == 2
            assert all(image.is_file() for image in trio[0].images)
        for row in rows:
            asked, answer = row.turns
            assert (asked.role, answer.role, answer.content) == ("user", "assistant", row.truth)
            question, *options = asked.content.removeprefix("<image><image>").split("\n")
            assert question in QUESTIONS[row.kind]
            assert options == [*(f"{letter}. {text}" for letter, text in zip("ABC", row.choices, strict=True)), REQUEST]
            assert sorted(row.choices) == sorted(OPTIONS[row.kind])
            first, second = (Path(name).stem for name in row.meta["pair"])
            assert row.id == f"{row.meta['object']}/{first}-{second}/{row.kind}"
    line = (out / "train.jsonl").open().readline()
    assert not os.path.isabs(json.loads(line)["images"][0]) and len(line) < 2000


def test_questions_are_several_and_distinct():
    for kind in KINDS:
        assert len(set(QUESTIONS[kind])) >= 4
    assert len({question for kind in KINDS for question in QUESTIONS[kind]}) == sum(len(QUESTIONS[kind]) for kind in KINDS)


def test_options_are_shuffled_evenly(built):
    rows = built[2]["train"]
    letters = Counter(row.truth for row in rows)
    for letter in LETTERS:
        assert letters[letter] / len(rows) == pytest.approx(1 / 3, abs=0.06)
    for kind in KINDS:
        orders = Counter(row.choices for row in rows if row.kind == kind)
        assert set(orders) == set(permutations(OPTIONS[kind]))
        wordings = Counter(row.turns[0].content.split("\n")[0] for row in rows if row.kind == kind)
        assert len(wordings) == len(QUESTIONS[kind])


def test_splits_share_no_object_pairs_repeat_nowhere_and_sides_balance(built):
    _, summary, splits = built
    objects = {name: {row.meta["object"] for row in rows} for name, rows in splits.items()}
    assert not objects["train"] & objects["test"] and len(objects["train"] | objects["test"]) == CAPTURES
    assert len(objects["test"]) == 2  # a tenth of 24: too few captures for 1,000 test rows
    seen = Counter((row.meta["object"], frozenset(row.meta["pair"]), row.kind) for rows in splits.values() for row in rows)
    assert set(seen.values()) == {1}
    for name, rows in splits.items():
        sides = {kind: Counter(row.meta[kind] for row in rows if row.kind == kind) for kind in KINDS}
        assert abs(sides["ego_translation"]["left"] - sides["ego_translation"]["right"]) <= 1
        assert all(abs(count["left"] - count["right"]) <= 2 for count in sides.values())
        assert summary["balance"][name] == {kind: dict(count) for kind, count in sides.items()}
        assert all(20 <= abs(row.meta["azimuth_change_deg"]) <= 100 for row in rows)
        assert Counter(row.meta["object"] for row in rows).most_common(1)[0][1] <= 3 * 15
    assert summary["examples"] == {name: len(rows) for name, rows in splits.items()}
    assert summary["rejected"] == {module.MIRRORED_X: 1, module.UNVERIFIED: 1}
    assert "0.0" in summary["rejected_captures"]["bad/mirrored"] and summary["captures"] == CAPTURES + 2


def test_asked_numbers_of_rows_are_met_evenly_over_objects(world, tmp_path):
    config = ViewpointConfig(workers=1, examples=100, test_examples=20, max_test_fraction=0.3)
    summary = build(world[0], tmp_path, config, progress=False)
    assert summary["examples"] == {"train": 100, "test": 20}
    per_object = Counter(row.meta["object"] for row in read_rows(tmp_path / "train.jsonl") if row.kind == "ego_translation")
    assert max(per_object.values()) - min(per_object.values()) <= 1 and sum(per_object.values()) == 34
    assert summary["objects"]["test"] == 3  # 7 pairs, 3 an object


def test_validation_has_objects_of_its_own(world, tmp_path):
    config = ViewpointConfig(workers=1, test_examples=20, validation_examples=30, max_test_fraction=0.2)
    summary = build(world[0], tmp_path, config, progress=False)
    objects = {split: {row.meta["object"] for row in read_rows(tmp_path / f"{split}.jsonl")} for split in ("train", "validation", "test")}
    assert summary["examples"]["validation"] == summary["examples_asked"]["validation"] == 30 and summary["examples"]["test"] == 20
    assert summary["objects"] == {split: len(names) for split, names in objects.items()}
    assert len(set().union(*objects.values())) == sum(map(len, objects.values())), "an object is in two splits"

    # the other two are what they would be without, but for the objects that left train; and a stale file goes
    before = content(tmp_path)
    build(world[0], tmp_path, replace(config, validation_examples=0), progress=False)
    assert not (tmp_path / "validation.jsonl").exists() and content(tmp_path)["test.jsonl"] == before["test.jsonl"]
    assert {row.meta["object"] for row in read_rows(tmp_path / "train.jsonl")} == objects["train"] | objects["validation"]
    greedy = replace(config, max_test_fraction=0.99, test_examples=900, validation_examples=900)
    assert build(world[0], tmp_path, greedy, progress=False)["objects"]["train"] >= 1


def test_thresholds_are_obeyed(world):
    capture = read_capture(world[0] / "car/0002", world[0])
    every = ViewpointConfig(pairs_per_object=1000, min_angle=1, max_angle=179, min_translation=0, min_yaw=0)
    narrow = ViewpointConfig(pairs_per_object=1000, min_angle=40, max_angle=60)
    assert all(40 <= abs(pair["azimuth_change_deg"]) <= 60 for pair in pairs(capture, narrow))
    found = {tuple(pair["pair"]) for pair in pairs(capture, every)}
    assert {tuple(pair["pair"]) for pair in pairs(capture, narrow)} < found and len(found) <= 12 * 11 // 2
    assert not pairs(capture, ViewpointConfig(min_translation=1.5))
    turns = [abs(pair["yaw_deg"]) for pair in pairs(capture, ViewpointConfig(pairs_per_object=1000, max_angle=179, min_yaw=55))]
    assert turns and 55 <= min(turns) and max(turns) <= 125  # near half a turn, left and right are one


# ---- determinism and resuming


def content(out):
    return {name: (out / name).read_bytes() for name in ("train.jsonl", "test.jsonl")}


def test_same_bytes_for_any_number_of_workers_other_bytes_for_another_seed(world, tmp_path):
    outs = {}
    for name, workers, seed in (("one", 1, 0), ("two", 2, 0), ("other", 1, 1)):
        build(world[0], tmp_path / name, ViewpointConfig(workers=workers, seed=seed), progress=False)
        outs[name] = content(tmp_path / name)
    assert outs["one"] == outs["two"]
    assert all(outs["one"][file] != outs["other"][file] for file in outs["one"])


KILLED = """
import os, signal, sys
from pathlib import Path
from actial_fast.data.captures import viewpoint
read, count = viewpoint._read_one, 0
def read_and_die(job):
    global count
    count += 1
    if count > 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(job)
viewpoint._read_one = read_and_die
viewpoint.build(Path(sys.argv[1]), Path(sys.argv[2]), viewpoint.ViewpointConfig(workers=1), progress=False)
"""


def test_a_killed_build_continues_and_changes_are_noticed(world, tmp_path):
    root, out = tmp_path / "captures", tmp_path / "out"
    shutil.copytree(world[0], root)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", KILLED, root, out], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [file.name for file in out.iterdir()] == [".captures.jsonl"], "nothing appears under its final name before it is complete"
    with (out / ".captures.jsonl").open("a") as file:
        file.write('{"object": "car/00')  # the line a kill cuts off
    config = ViewpointConfig(workers=1)
    assert build(root, out, config, progress=False)["captures_reused"] == 9
    build(root, tmp_path / "fresh", config, progress=False)
    assert content(out) == content(tmp_path / "fresh")

    fewer = build(root, out, ViewpointConfig(workers=1, examples=30), progress=False)
    assert (fewer["captures_reused"], fewer["examples"]["train"]) == (CAPTURES + 2, 30)
    os.utime(root / "car/0000/sparse/0/images.bin")
    assert build(root, out, config, progress=False)["captures_reused"] == CAPTURES + 1
    bare = build(root, out, ViewpointConfig(workers=1, ask_letter=False), progress=False)
    assert bare["captures_reused"] == CAPTURES + 2 and all(row.turns[0].content.count("\n") == 3 for row in read_rows(out / "train.jsonl"))
    narrower = ViewpointConfig(workers=1, min_angle=50)
    assert build(root, out, narrower, progress=False)["captures_reused"] == 0
    assert all(abs(row.meta["azimuth_change_deg"]) >= 50 for row in read_rows(out / "train.jsonl"))


def test_a_build_that_fails_while_writing_leaves_the_old_files(world, tmp_path, monkeypatch):
    build(world[0], tmp_path, ViewpointConfig(workers=1), progress=False)
    before = content(tmp_path)

    def fail(pair, *arguments, rows=viewpoint.rows):
        if int(pair["pair"][0][:3]) == 5:
            raise OSError("disk full")
        return rows(pair, *arguments)

    monkeypatch.setattr(viewpoint, "rows", fail)
    with pytest.raises(OSError, match="disk full"):
        build(world[0], tmp_path, ViewpointConfig(workers=1, examples=500), progress=False)
    assert content(tmp_path) == before


# ---- what is refused


def refuse(folder, **options):
    with pytest.raises(BadCapture) as caught:
        read_capture(folder, **options)
    assert str(folder) in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("arc", [360, 100])
@pytest.mark.parametrize("mirror", ["", "x", "z", "points"])
def test_mirrored_worlds_are_told_from_their_originals(tmp_path, mirror, arc):
    rng = np.random.default_rng(5)
    write_capture(tmp_path / "o", rng, around(rng, np.linspace(0, arc, 12, endpoint=False)), mirror=mirror)
    expected = {"x": module.MIRRORED_X, "z": module.MIRRORED_Z, "points": module.BROKEN}
    if not mirror:
        assert len(read_capture(tmp_path / "o").names) == 12
        return
    assert refuse(tmp_path / "o") == expected[mirror]
    if mirror in "xz":  # without the tracks nothing gives it away, and its cameras walk the wrong way round
        capture = read_capture(tmp_path / "o", verify="off")
        assert capture.azimuth[1] < 0


@pytest.mark.parametrize("mirror", ["", "z"])
def test_near_and_far_swapped_is_seen_in_weak_perspective_too(tmp_path, mirror):
    rng = np.random.default_rng(6)
    write_capture(tmp_path / "o", rng, around(rng, np.arange(0, 360, 30), distance=40.0, aim=0.2), focal=700.0, mirror=mirror)
    if mirror:
        assert refuse(tmp_path / "o") == module.MIRRORED_Z
    else:
        assert read_capture(tmp_path / "o").azimuth[1] > 0


def test_points_behind_the_cameras(tmp_path):
    rng = np.random.default_rng(8)
    poses = around(rng, np.arange(0, 360, 30))
    write_capture(tmp_path / "o", rng, poses)
    model = pycolmap.Reconstruction(str(tmp_path / "o/sparse/0"))
    for frame in model.frames.values():  # every camera turned to look the other way
        pose = frame.rig_from_world
        turn = np.diag([-1.0, 1.0, -1.0])
        frame.rig_from_world = pycolmap.Rigid3d(pycolmap.Rotation3d(turn @ pose.rotation.matrix()), turn @ pose.translation)
    model.write_binary(str(tmp_path / "o/sparse/0"))
    assert refuse(tmp_path / "o") == module.BEHIND


@pytest.mark.parametrize("arc", [360, 120, 20])
@pytest.mark.parametrize("elevation", [75, -80])
def test_near_vertical_views_are_refused(tmp_path, elevation, arc):
    rng = np.random.default_rng(9)
    write_capture(tmp_path / "o", rng, around(rng, np.linspace(0, arc, 12), elevation))
    # A short arc seen from above might be a frontal view of a wall for all the cameras tell; then there is no pair either.
    try:
        capture = read_capture(tmp_path / "o")
    except BadCapture as error:
        assert error.reason == module.NEAR_VERTICAL
    else:
        assert arc == 20 and not pairs(capture, ViewpointConfig())


def test_cameras_held_sideways_give_no_pair(tmp_path):
    rng = np.random.default_rng(10)
    for k, arc in enumerate((360, 100)):
        poses = [
            (np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1.0]]) @ r, np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1.0]]) @ t)
            for r, t in around(rng, np.linspace(0, arc, 12, endpoint=False))
        ]
        write_capture(tmp_path / f"{k}", rng, poses)
        try:
            assert not pairs(read_capture(tmp_path / f"{k}"), ViewpointConfig())
        except BadCapture as error:
            assert error.reason in (module.NEAR_VERTICAL, module.SIDEWAYS, module.OFF_AXIS)


def drop_model(folder):
    shutil.rmtree(folder / "sparse")


def truncate(name, share):
    def damage(folder):
        file = folder / "sparse" / "0" / name
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return damage


def drop_images(folder):
    for file in sorted((folder / "images").iterdir())[:9]:
        file.unlink()


def turn_images(folder):
    for file in (folder / "images").iterdir():
        Image.new("RGB", (48, 64)).save(file)


def spoil_images(folder):
    for file in (folder / "images").iterdir():
        file.write_bytes(b"not a picture")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (drop_model, module.NO_MODEL),
        (lambda folder: shutil.rmtree(folder / "images"), module.NO_MODEL),
        (truncate("images.bin", 0.5), module.UNREADABLE),
        (truncate("images.bin", 0.001), module.UNREADABLE),
        (truncate("points3D.bin", 0.5), module.UNREADABLE),
        (truncate("cameras.bin", 0.0), module.UNREADABLE),
        (drop_images, module.MISSING),
        (turn_images, module.SHAPE),
        (spoil_images, module.DAMAGED),
    ],
)
def test_damaged_captures_are_refused_with_the_reason(world, tmp_path, damage, reason):
    folder = tmp_path / "pot" / "0001"
    shutil.copytree(world[0] / "pot" / "0001", folder)
    damage(folder)
    assert refuse(folder) == reason
    assert find_captures(tmp_path) == [folder], "a damaged capture is still found, so that it is counted"


def test_too_few_images_and_no_tracks(world, tmp_path):
    rng = np.random.default_rng(11)
    write_capture(tmp_path / "few", rng, around(rng, [0, 40, 80]))
    assert refuse(tmp_path / "few") == module.TOO_FEW
    assert len(read_capture(tmp_path / "few", min_images=3).names) == 3
    assert refuse(world[0] / "bad/untracked") == module.UNVERIFIED
    assert len(read_capture(world[0] / "bad/untracked", verify="off").names) == 9
    with pytest.raises(ValueError, match="expected 'tracks' or 'off'"):
        read_capture(world[0] / "car/0000", verify="on")


def test_single_bad_images_are_left_out_and_counted(tmp_path):
    rng = np.random.default_rng(12)
    poses = around(rng, np.arange(0, 360, 30))
    poses[2] = look_at(eye(poses[2]), 3 * eye(poses[2]))  # sees nothing of the object: no tracks
    poses[5] = look_at(np.array([0.1, 0, 4.0]), (0, 0, 0))  # from above
    write_capture(tmp_path / "o", rng, poses)
    model = pycolmap.Reconstruction(str(tmp_path / "o/sparse/0"))
    wrong = model.images[9].cam_from_world()
    model.frames[8].rig_from_world = wrong  # 007 has the pose of 008
    model.write_binary(str(tmp_path / "o/sparse/0"))
    (tmp_path / "o/images/010.png").unlink()
    capture = read_capture(tmp_path / "o")
    assert capture.left_out == {module.MISSING: 1, module.UNVERIFIED: 1, module.BROKEN: 1, module.NEAR_VERTICAL: 1}
    assert [int(name[:3]) for name in capture.names] == [0, 1, 3, 4, 6, 8, 9, 11]
    assert capture.image(4) == tmp_path / "o/images/006.png"


def test_the_users_mistakes_are_named(world, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        build(tmp_path / "nowhere", tmp_path / "out", ViewpointConfig())
    with pytest.raises(ValueError, match="no capture below"):
        build(tmp_path, tmp_path / "out", ViewpointConfig())
    with pytest.raises(ValueError, match=r"none of the 1 captures .* is usable.*mirrored"):
        build(world[0] / "bad" / "mirrored", tmp_path / "out", ViewpointConfig(workers=1), progress=False)
    with pytest.raises(ValueError, match="one usable object"):
        build(world[0] / "car" / "0000", tmp_path / "out", ViewpointConfig(workers=1), progress=False)
    for wrong in (
        {"min_angle": 120},
        {"max_test_fraction": 1.0},
        {"pairs_per_object": 0},
        {"examples": 0},
        {"min_yaw": 90},
        {"verify": "x"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ViewpointConfig(**wrong)


def test_captures_are_found_at_any_depth_and_through_links(tmp_path):
    for name in ("b/2/images", "b/2/sparse/0", "a/x/y/images", "a/x/y/sparse/0", "c/notes"):
        (tmp_path / "real" / name).mkdir(parents=True)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path / "real")
    (tmp_path / "real/a/loop").symlink_to(tmp_path / "real")
    assert find_captures(tmp_path / "root") == [tmp_path / "root/link/a/x/y", tmp_path / "root/link/b/2"]


# ---- rendered captures, and the sheet


def test_rendered_captures_go_through(tmp_path):
    """The renderer writes where its cameras really stand about the object's front; the builder must find the same from the COLMAP model."""
    from actial_fast.data.captures.render import RenderConfig, render

    render(tmp_path / "c", RenderConfig(objects=3, views=16, workers=1, supersampling=1), progress=False)
    summary = build(tmp_path / "c", tmp_path / "o", ViewpointConfig(workers=1, test_examples=30, max_test_fraction=0.3), progress=False)
    assert summary["rejected"] == {} and summary["captures"] == 12 and summary["examples"]["test"] == 30
    errors = []
    for row in read_rows(tmp_path / "o/train.jsonl"):
        scene = json.loads((tmp_path / "c" / row.meta["object"] / "scene.json").read_text())
        a, b = (scene["azimuth_deg"][int(Path(name).stem)] for name in row.meta["pair"])
        true = (b - a + 180) % 360 - 180
        assert row.meta["ego_translation"] == ("right" if true > 0 else "left")
        tilt = np.degrees(np.arccos(min(1.0, np.dot(scene["up"], row.meta["up"]))))
        errors.append((abs(true - row.meta["azimuth_change_deg"]), tilt))
    assert len(errors) > 100 and np.all(np.mean(errors, axis=0) < 2)


def test_contact_sheet_shows_the_move_on_the_side_of_the_answer(built, tmp_path):
    for side in ("left", "right"):
        row = next(row for row in built[2]["train"] if row.meta["ego_translation"] == side)
        path = contact_sheet([row], tmp_path / "sheets" / f"{side}.png", title="one row")
        pixels = np.asarray(Image.open(path).convert("RGB"))
        sketch = pixels[:, int(0.78 * pixels.shape[1]) :]

        def middle(color, sketch=sketch):
            rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
            return np.nonzero((sketch == rgb).all(-1))[1].mean()

        assert np.sign(middle(SECOND) - middle(FIRST)) == {"left": -1, "right": 1}[side]
    three = contact_sheet(built[2]["train"][:3], tmp_path / "three.png")
    assert Image.open(three).height > 2 * Image.open(path).height
    with pytest.raises(ValueError, match="no rows"):
        contact_sheet([], tmp_path / "none.png")


def test_contact_sheet_takes_rows_of_other_sources(built, tmp_path):
    path = built[2]["train"][0].images[0]

    row = Row(
        (Turn("user", "<image>What is it? " + "word " * 200), Turn("assistant", "a pot")), (path.read_bytes(),), truth="a pot", where="x:1"
    )
    assert Image.open(contact_sheet([row, built[2]["train"][0]], tmp_path / "mixed.png")).width > 500
    heights = []
    for said in ("a pot", "<think>It has a lid for $5 and $6.\n" + "So it goes on. " * 40 + "</think><answer>a pot</answer>", "x " * 9000):
        told = Row((Turn("user", "<image>What is it?"), Turn("assistant", said)), (path.read_bytes(),), truth="a pot", where="x:3")
        pixels = np.asarray(Image.open(contact_sheet([told], tmp_path / "told.png")).convert("RGB")).astype(int)
        blue = np.abs(pixels[:, pixels.shape[1] // 4 :] - [int(FIRST[i : i + 2], 16) for i in (1, 3, 5)]).sum(-1) < 60
        heights.append((len(pixels), blue.any(1).sum()))
    assert heights[0][0] < heights[1][0] < heights[2][0] < 2000, "a chain has its own lines, up to a page of them"
    assert heights[0][1] == 0 < 50 < heights[1][1], "and is told in a colour of its own; what says no more than the truth is not repeated"
    missing = Row(row.turns, (tmp_path / "gone.png",), where="x:2")
    with pytest.raises(BadRow, match="x:2"):
        contact_sheet([missing], tmp_path / "bad.png")
