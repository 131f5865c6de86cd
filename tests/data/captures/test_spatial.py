"""Spatial questions: every answer is computed again from the renderer's own record and the COLMAP poses, not from captures.py."""

import hashlib
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pycolmap
import pytest
from PIL import Image

from actial_fast.data.captures.render import RenderConfig, render
from actial_fast.data.captures.settings import ViewpointConfig
from actial_fast.data.captures.spatial import KINDS, OPTIONS, QUESTIONS, SpatialConfig, spatial_questions, viewpoint_objects
from actial_fast.data.captures.viewpoint import build
from actial_fast.data.sources.sat import SatSource

TEST_OBJECTS = {"vehicle/0002", "chair/0001", "pot/0005"}
CONFIG = SpatialConfig(train_per_kind=240, test_per_kind=60, seed=1)
SLACK_DEG, SLACK = 3.0, 0.05  # captures.py estimates up and centre


@pytest.fixture(scope="module")
def captures(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("spatial") / "captures"
    render(out, RenderConfig(families=("vehicle", "chair", "pot"), objects=5, views=16, image_size=24, workers=1, seed=2), progress=False)
    return out


@pytest.fixture(scope="module")
def built(captures, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("built")
    return out, spatial_questions(captures, out, CONFIG, TEST_OBJECTS, progress=False)


@pytest.fixture(scope="module")
def cameras(captures) -> dict[str, dict]:
    """What is true of every photograph, by its content's hash."""
    known = {}
    for file in captures.glob("*/*/scene.json"):
        facts, model = json.loads(file.read_text()), pycolmap.Reconstruction(file.parent / "sparse" / "0")
        for image in model.images.values():
            offset = image.projection_center() - np.array(facts["center"])
            key = hashlib.sha256((file.parent / "images" / image.name).read_bytes()).hexdigest()
            assert key not in known
            known[key] = {
                "object": file.parent.relative_to(captures).as_posix(),
                "name": image.name,
                "azimuth": facts["azimuth_deg"][int(image.name[:3])],
                "distance": np.linalg.norm(offset),
                "height": offset @ np.array(facts["up"]),
            }
    return known


def read(folder: Path, split: str) -> list[dict]:
    return pq.read_table(folder / f"{split}.parquet").to_pylist()


def seen(row: dict, cameras: dict) -> list[dict]:
    return [cameras[hashlib.sha256(image).hexdigest()] for image in row["image_bytes"]]


def apart(a: float, b: float) -> float:
    return abs((a - b + 180) % 360 - 180)


def test_answers_are_true_and_clear(built, cameras):
    asked = Counter()
    for row in read(built[0], "train") + read(built[0], "test"):
        views, answer, kind = seen(row, cameras), row["correct_answer"], row["question_type"]
        asked[kind] += 1
        if kind == "facing_side":
            (view,) = views
            middle = {"front": 0, "left side": 90, "back": 180, "right side": 270}[answer]
            assert apart(view["azimuth"], middle) <= CONFIG.facing_margin_deg + SLACK_DEG
            continue
        one, two = views
        turn = apart(one["azimuth"], two["azimuth"])
        assert one["object"] == two["object"] and one["name"] != two["name"]
        if kind == "turn_size":
            assert apart(turn, int(answer.split()[1])) <= CONFIG.turn_tolerance_deg + SLACK_DEG
            continue
        assert turn <= CONFIG.max_turn_deg + SLACK_DEG
        if kind == "closer":
            near, far = (one, two) if answer == "first" else (two, one)
            assert far["distance"] / near["distance"] >= CONFIG.min_distance_ratio - SLACK
        else:
            high, low = (one, two) if answer == "first" else (two, one)
            assert 2 * (high["height"] - low["height"]) / (one["distance"] + two["distance"]) >= CONFIG.min_height - SLACK
    assert set(asked) == set(KINDS) and min(asked.values()) >= 60


def test_rows_are_sats(built):
    for split in ("train", "test"):
        table = pq.read_table(built[0] / f"{split}.parquet")
        assert {f.name: str(f.type).replace("element", "item") for f in table.schema} == {
            "image_bytes": "list<item: binary>",
            "question": "string",
            "answers": "list<item: string>",
            "question_type": "string",
            "correct_answer": "string",
        }
        for row in table.to_pylist():
            kind = row["question_type"]
            assert row["question"] in QUESTIONS[kind] and sorted(row["answers"]) == sorted(OPTIONS[kind])
            assert row["correct_answer"] in row["answers"] and len(row["image_bytes"]) == (1 if kind == "facing_side" else 2)
            for image in row["image_bytes"]:
                assert Image.open(io.BytesIO(image)).size == (24, 24)


def test_the_sat_source_reads_them(built, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source, rows = SatSource(built[0] / "test.parquet"), read(built[0], "test")
    assert len(source) == len(rows) > 200
    for i in (0, len(rows) // 2, len(rows) - 1):
        row = source[i]
        assert row.truth == rows[i]["correct_answer"] and row.kind == rows[i]["question_type"]
        assert list(row.images) == rows[i]["image_bytes"] and rows[i]["question"] in row.turns[0].content


def test_balanced_and_varied(built):
    out, summary = built
    for split in ("train", "test"):
        rows = read(out, split)
        assert summary[split] == Counter(row["question_type"] for row in rows)
        for kind in KINDS:
            some = [row for row in rows if row["question_type"] == kind]
            assert set(Counter(row["correct_answer"] for row in some).values()) == {len(some) // len(OPTIONS[kind])}
    train = read(out, "train")
    for kind in KINDS:
        some = [row for row in train if row["question_type"] == kind]
        assert len(QUESTIONS[kind]) >= 3 and {row["question"] for row in some} == set(QUESTIONS[kind])
        for answer in OPTIONS[kind]:  # the right answer stands everywhere in the list
            places = {row["answers"].index(answer) for row in some if row["correct_answer"] == answer}
            assert places == set(range(len(OPTIONS[kind])))
    kinds = [row["question_type"] for row in train[:100]]
    assert len(set(kinds)) == len(KINDS)  # not one kind after the other


def test_no_question_twice_and_no_object_in_both(built, cameras):
    objects = {}
    for split in ("train", "test"):
        rows = [(row["question_type"], seen(row, cameras)) for row in read(built[0], split)]
        keys = [(kind, frozenset((v["object"], v["name"]) for v in views)) for kind, views in rows]
        assert len(set(keys)) == len(keys)
        objects[split] = {view["object"] for _, views in rows for view in views}
    assert objects["test"] == TEST_OBJECTS and not objects["train"] & TEST_OBJECTS and len(objects["train"]) == 12
    assert built[1]["objects"] == {"train": 12, "test": 3}


def test_thresholds_leave_out_the_unclear(captures, cameras, tmp_path):
    strict = replace(CONFIG, min_distance_ratio=1.28, min_height=0.3, facing_margin_deg=12.0, turn_tolerance_deg=3.0, max_turn_deg=50.0)
    summary = spatial_questions(captures, tmp_path, strict, TEST_OBJECTS, progress=False)
    assert all(0 < summary["train"][kind] < CONFIG.train_per_kind for kind in ("closer", "higher", "facing_side"))
    for row in read(tmp_path, "train"):
        views = seen(row, cameras)
        if row["question_type"] == "facing_side":
            assert min(apart(views[0]["azimuth"], side) for side in (0, 90, 180, 270)) <= 12 + SLACK_DEG
        elif row["question_type"] == "closer":
            assert max(v["distance"] for v in views) / min(v["distance"] for v in views) >= 1.28 - SLACK
            assert apart(views[0]["azimuth"], views[1]["azimuth"]) <= 50 + SLACK_DEG


def test_deterministic_by_seed(captures, built, tmp_path):
    spatial_questions(captures, tmp_path / "again", CONFIG, set(TEST_OBJECTS), progress=False)
    spatial_questions(captures, tmp_path / "other", replace(CONFIG, seed=2), TEST_OBJECTS, progress=False)
    for name in ("train.parquet", "test.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (built[0] / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (built[0] / name).read_bytes()


def test_the_viewpoint_builds_test_objects(captures, cameras, tmp_path):
    build(captures, tmp_path / "viewpoint", ViewpointConfig(test_examples=30, workers=1), progress=False)
    objects = viewpoint_objects(tmp_path / "viewpoint" / "test.jsonl")
    assert objects and objects < {camera["object"] for camera in cameras.values()}
    spatial_questions(captures, tmp_path, CONFIG, objects, progress=False)
    assert {view["object"] for row in read(tmp_path, "test") for view in seen(row, cameras)} == objects
    assert not {view["object"] for row in read(tmp_path, "train") for view in seen(row, cameras)} & objects


def test_validation_questions_are_about_objects_of_their_own(captures, cameras, tmp_path):
    names = sorted({camera["object"] for camera in cameras.values()})
    test, validation = {names[0]}, {names[1]}
    summary = spatial_questions(captures, tmp_path, replace(CONFIG, validation_per_kind=6), test, validation, progress=False)
    seen_in = {split: {view["object"] for row in read(tmp_path, split) for view in seen(row, cameras)} for split in summary["objects"]}
    assert seen_in["test"] == test and seen_in["validation"] == validation and seen_in["train"] == set(names[2:])
    assert any(summary["validation"].values()) and summary["objects"]["validation"] == 1
    spatial_questions(captures, tmp_path, CONFIG, test, progress=False)
    assert not (tmp_path / "validation.parquet").exists(), "its object is trained on now"


def test_without_a_front_the_side_is_not_asked(tmp_path):
    root = tmp_path / "captures"
    render(root, RenderConfig(families=("pot",), objects=2, views=12, image_size=12, workers=1), progress=False)
    for i, text in enumerate(("front", "file")):
        file = root / "pot" / f"{i + 1:04d}" / "scene.json"
        file.unlink() if text == "file" else file.write_text(json.dumps({**json.loads(file.read_text()), "front": None}))
    summary = spatial_questions(root, tmp_path / "out", CONFIG, set(), progress=False)
    assert summary["train"]["facing_side"] == 0 and summary["train"]["closer"] > 0 and len(read(tmp_path / "out", "test")) == 0
    assert summary["rejected"] == {"no front in scene.json": 2}


def test_an_unusable_capture_is_counted(tmp_path):
    root = tmp_path / "captures"
    render(root, RenderConfig(families=("pot",), objects=2, views=8, image_size=12, workers=1), progress=False)
    (root / "pot" / "0002" / "sparse" / "0" / "images.bin").write_bytes(b"\0" * 7)
    summary = spatial_questions(root, tmp_path / "out", replace(CONFIG, kinds=("higher",)), set(), progress=False)
    assert summary["objects"] == {"train": 1, "test": 0} and sum(summary["rejected"].values()) == 1
    (root / "pot" / "0001" / "scene.json").write_text("{")
    with pytest.raises(ValueError, match=r"scene\.json is not a JSON object"):
        spatial_questions(root, tmp_path / "out", CONFIG, set(), progress=False)


@pytest.mark.parametrize(
    ("change", "objects", "message"),
    [
        ({"kinds": ("closer", "wider")}, set(), "kinds: 'wider' is not known; choose from facing_side"),
        ({"facing_margin_deg": 50.0}, set(), "facing_margin_deg is 50.0"),
        ({"turn_tolerance_deg": 15.0}, set(), "two of .* are right"),
        ({"min_distance_ratio": 1.0}, set(), "min_distance_ratio 1.0 must be over 1"),
        ({}, {"0002"}, "none of the 1 test objects .*'0002'"),
    ],
)
def test_mistakes(captures, tmp_path, change, objects, message):
    with pytest.raises(ValueError, match=message):
        spatial_questions(captures, tmp_path, replace(CONFIG, **change), objects, progress=False)


def test_mistakes_about_validation(captures, tmp_path):
    with pytest.raises(ValueError, match=r"validation_per_kind is 3: name the objects"):
        spatial_questions(captures, tmp_path, replace(CONFIG, validation_per_kind=3), set(), progress=False)
    with pytest.raises(ValueError, match=r"'a/1' is a test object and a validation object"):
        spatial_questions(captures, tmp_path, CONFIG, {"a/1", "a/2"}, {"a/1"}, progress=False)
    with pytest.raises(ValueError, match=r"none of the 1 validation objects \(such as '0002'\)"):
        spatial_questions(captures, tmp_path, replace(CONFIG, validation_per_kind=3), set(), {"0002"}, progress=False)
