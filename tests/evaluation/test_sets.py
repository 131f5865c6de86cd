"""Each benchmark from files with its owner's own columns, made here: what is asked, what is right, and the figures counted by hand."""

import base64
import csv
import io
import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from actial_fast.data.sources.row import BadRow
from actial_fast.evaluation.catalogue import all_sets, find, open_set
from actial_fast.evaluation.records import letter_of, unlettered

PIXELS = [(n, 40, 90) for n in range(8)]


def png(n: int = 0) -> bytes:
    Image.new("RGB", (8, 8), PIXELS[n]).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


PNG = png()
B64 = base64.b64encode(PNG).decode()


@pytest.fixture(autouse=True)
def nothing_is_here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LMUData", str(tmp_path / "lmu"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def tsv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def figures(opened, scores):
    return {figure.name: figure for figure in opened.set.figures(list(opened.items), scores)}


def right(opened):
    """The scores of a model that always gives the answer as it is written."""
    return [opened.set.judge(item, item.answer).score for item in opened.items]


def blink_row(task, n, answer="(A)"):
    return {
        "idx": f"val_{task}_{n}",
        "question": "Which way?",
        "sub_task": task,
        "image_1": {"bytes": PNG, "path": None},
        "image_2": {"bytes": png(1), "path": None},
        "image_3": None,
        "image_4": None,
        "choices": ["left", "right"],
        "answer": answer,
        "prompt": "Is the camera moving clockwise?\nSelect from the following choices.\n(A) left\n(B) right",
    }


def test_blink_and_the_papers_average(tmp_path):
    tasks = ("Multi-view_Reasoning", "Relative_Depth", "Spatial_Relation", "Counting")
    for task in tasks:
        parquet(tmp_path / "blink" / task / "val-00000-of-00001.parquet", [blink_row(task, n, "(A)" if n else "(B)") for n in range(4)])
        parquet(tmp_path / "blink" / task / "test-00000-of-00001.parquet", [blink_row(task, 9, "hidden")])
    opened = open_set(f"blink={tmp_path / 'blink'}")
    assert len(opened.items) == 16, "the hidden answers of test are not read"
    item = opened.items[4]
    assert item.prompt == "<image><image>" + blink_row("", 0)["prompt"]
    assert (item.options, item.images) == (("left", "right"), (PNG, png(1)))
    assert [each.category for each in opened.items][::4] == sorted(tasks)
    by_task = {"Multi-view_Reasoning": (1, 1, 1, 1), "Relative_Depth": (1, 1, 0, 0), "Spatial_Relation": (1, 0, 0, 0)}
    found = figures(opened, [score for task in sorted(tasks) for score in by_task.get(task, (0, 0, 0, 0))])
    assert found["BLINK avg (three tasks)"].value == pytest.approx((1 + 0.5 + 0.25) / 3)
    assert found["mean of tasks"].value == found["accuracy"].value == pytest.approx(7 / 16)
    assert found["BLINK avg (three tasks)"].n == 12
    without = [item for item in opened.items if item.category != "Relative_Depth"]
    assert "BLINK avg (three tasks)" not in {each.name for each in opened.set.figures(without, [1.0] * 12)}, "a part is missing"


def cv_row(task, source, kind, answer="(B)", n=0):
    return {
        "idx": n,
        "type": kind,
        "task": task,
        "image": {"bytes": PNG, "path": None},
        "question": "How many?",
        "choices": ["1", "2", "3"],
        "answer": answer,
        "prompt": "How many?\n(A) 1\n(B) 2\n(C) 3",
        "filename": "x",
        "source": source,
        "source_dataset": "",
        "source_filename": "",
        "target_class": "",
        "target_size": 0,
        "bbox": [[0.0]],
    }


def test_cv_bench_of_two_files_and_both_averages(tmp_path):
    parquet(
        tmp_path / "cv" / "test_2d.parquet",
        [cv_row("Count", "ADE20K", "2D"), cv_row("Relation", "COCO", "2D", n=1), cv_row("Count", "COCO", "2D", n=2)],
    )
    parquet(tmp_path / "cv" / "test_3d.parquet", [cv_row("Depth", "Omni3D", "3D"), cv_row("Distance", "Omni3D", "3D", n=1)])
    opened = open_set(f"cv-bench={tmp_path / 'cv'}")
    assert [item.id for item in opened.items] == ["2D/0", "2D/1", "2D/2", "3D/0", "3D/1"]
    assert opened.items[0].answer == "B" and right(opened) == [1.0] * 5
    found = figures(opened, [1, 0, 0, 1, 1])  # Count 1/2, Relation 0, Depth 1, Distance 1; ADE20K 1, COCO 0, Omni3D 1
    assert found["CV-Bench avg (four tasks)"].value == pytest.approx((0.5 + 0 + 1 + 1) / 4)
    assert found["Cambrian's average"].value == pytest.approx(((1 + 0) / 2 + 1) / 2)
    assert found["accuracy"].value == pytest.approx(3 / 5)
    row = {"index": 0, "question": "Q", "prompt": "How many? (A) 1 (B) 2", "A": "1", "B": "2", "answer": "B", "task": "Count", "image": B64}
    for split in ("2D", "3D"):
        tsv(tmp_path / "lmu" / f"CV-Bench-{split}.tsv", [{**row, "split": split}])
    items = open_set("cv-bench").items
    assert [(each.id, each.prompt) for each in items] == [(f"{split}/0", "<image>How many? (A) 1 (B) 2") for split in ("2D", "3D")]


def test_the_papers_averages_from_their_parts():
    """Table 1: 87.6 and 73.4 from three tasks, 83.5 and 71.2 from four. The item of a task is as right as the paper's share."""
    for name, average, models in (
        ("blink", "BLINK avg (three tasks)", ("Actial-7B", "Qwen2.5-VL-7B")),
        ("cv-bench", "CV-Bench avg (four tasks)", ("Actial-7B", "Qwen2.5-VL-7B")),
    ):
        of = find(name)
        for model in models:
            row = dict(of.published[model])
            printed = row.pop(average)
            items = [item(category) for category in row]
            found = {figure.name: figure.value for figure in of.figures(items, [value / 100 for value in row.values()])}
            assert round(100 * found[average] + 1e-9, 1) == printed, (name, model)
    assert find("blink").published["Actial-7B"]["BLINK avg (three tasks)"] == 87.6
    assert find("cv-bench").published["Actial-7B"]["CV-Bench avg (four tasks)"] == 83.5
    assert find("mmsi").published["Actial-7B"]["accuracy"] == 28.9


def item(category="", **changes):
    from actial_fast.evaluation.items import Item

    return Item(**{**dict(id="1", prompt="?", images=(), answer="A", options=("x", "y"), category=category), **changes})


def dsr(qid, category="location_above", answer="A", **options):
    return {
        "index": qid,
        "qid": qid,
        "question": "Is the cup above the plate?",
        **{"A": "yes", "B": "no", "C": "", "D": "nan", **options},
        "answer": answer,
        "category": category,
        "image": B64,
        "image_url": "",
    }


def test_3dsrbench_counts_flips_and_rotations_by_group(tmp_path):
    first, second = "VIN6MS3J", "Q0000002"
    rows = [
        dsr(f"{qid}{flip}{turn}", category)
        for qid, category in ((first, "height_higher"), (second, "multi_object_facing"))
        for flip in ("", "-flip")
        for turn in ("", "-1")
    ]
    opened = open_set(f"3dsrbench={tsv(tmp_path / 'x.tsv', rows)}")
    assert opened.items[0].prompt == (
        "<image>Question: Is the cup above the plate?\nOptions:\nA. yes\nB. no\nPlease select the correct answer from the options above. \n"
    )
    assert opened.items[0].images == (PNG,) and {each.group for each in opened.items} == {first, second}
    #               first: "", -1, -flip, -flip-1; second the same
    found = figures(opened, [1, 1, 1, 0, 0, 1, 0, 1])
    assert found["accuracy"].value == 5 / 8
    assert (found["flip"].value, found["flip"].groups) == (2 / 4, 4)  # {"", -flip}: 1*1; {-1, -flip-1}: 1*0; second 0*0, 1*1
    assert (found["circular"].value, found["circular"].groups) == (1 / 4, 4)  # {"", -1}: 1; {-flip, -flip-1}: 0; second: 0, 0
    assert (found["flip and circular"].value, found["flip and circular"].groups) == (0, 2)
    assert found["circular: height"].value == 1 / 2 and found["circular: multi_object"].value == 0
    assert found["class height"].value == 3 / 4 and found["height_higher"].n == 4


def mmsi_row(**changes):
    return {
        "id": 7,
        "images": [PNG, png(1)],
        "question_type": "Positional Relationship (Cam.\u2013Cam.)",
        "question": "Which way did the camera move?\nOptions: A: Left, B: Right, C: Up, D: Down",
        "answer": "B",
        "thought": "...",
        **changes,
    }


def test_mmsi_plain(tmp_path):
    rows = [
        mmsi_row(),
        mmsi_row(id=8, question_type="Attribute (Meas.)"),
        mmsi_row(id=9, question_type="MSR"),
        mmsi_row(id=10, question_type="Motion (Cam.)", answer="D"),
    ]
    opened = open_set(f"mmsi={parquet(tmp_path / 'MMSI_Bench.parquet', rows)}")
    first = opened.items[0]
    assert first.options == ("Left", "Right", "Up", "Down") and first.id == "7" and first.images == (PNG, png(1))
    assert first.prompt == (
        "<image><image>Which way did the camera move?\nOptions: A: Left, B: Right, C: Up, D: Down\n"
        "Answer with the option's letter from the given choices directly. Enclose the option's letter within ``."
    )
    assert [each.category for each in opened.items] == ["Cam.-Cam.", "Meas.", "MSR", "Motion-Cam."]
    assert set(find("mmsi").published["Actial-7B"]) >= {each.category for each in opened.items}
    assert opened.set.judge(first, "``B``").score == opened.set.judge(first, "So it is `B`.", opened.set.owner).score == 1
    assert figures(opened, [1, 0, 0, 1])["accuracy"].value == 0.5


def test_mmsi_circular_by_g_index(tmp_path):
    turned = ["Left", "Right", "Up", "Down"]
    rows = []
    for g in (0, 1):
        for k in range(4):
            options = turned[k:] + turned[:k]
            rows.append(
                {
                    "index": g + k * 1_000_000,
                    "g_index": g,
                    "question": "Which way?",
                    **dict(zip("ABCD", options, strict=True)),
                    "answer": "ABCD"[options.index("Right")],
                    "category": "Pos-Cam-Cam",
                    "image": str([B64, B64]),
                }
            )
    opened = open_set(f"mmsi-circular={tsv(tmp_path / 'c.tsv', rows)}")
    assert opened.items[1].prompt.startswith("<image><image>Which way?\nOptions: A: Right, B: Up, C: Down, D: Left\nAnswer with")
    replies = ["B", "A", "D", "C", "B", "B", "D", "C"]
    scores = [opened.set.judge(each, reply).score for each, reply in zip(opened.items, replies, strict=True)]
    assert scores == [1, 1, 1, 1, 1, 0, 1, 1]
    found = figures(opened, scores)
    assert (found["circular"].value, found["circular"].groups, found["accuracy"].value) == (0.5, 2, 7 / 8)
    for row in rows:
        del row["g_index"]
    assert figures(open_set(f"mmsi-circular={tsv(tmp_path / 'd.tsv', rows)}"), scores)["circular"].groups == 2


def test_viewspatial(tmp_path):
    (tmp_path / "ViewSpatial-Bench" / "a").mkdir(parents=True)
    (tmp_path / "ViewSpatial-Bench" / "a" / "1.png").write_bytes(PNG)
    (tmp_path / "eval").mkdir()
    row = {
        "question_type": "Camera perspective - Relative Direction",
        "image_path": ["ViewSpatial-Bench/a/1.png"],
        "question": "Where is the counter?",
        "answer": "B. front-up",
        "choices": "A. up\nB. front-up\nC. back-left\nD. front",
    }
    (tmp_path / "eval" / "ViewSpatial-Bench.json").write_text(
        json.dumps([row, {**row, "choices": "A. left\nB. right", "answer": "A. left"}])
    )
    opened = open_set(f"viewspatial={tmp_path}")
    assert (
        opened.items[0].prompt == "<image>Question: Where is the counter?\nChoices: A. up\nB. front-up\nC. back-left\nD. front\n"
        "Reply only to the corresponding option.\nAnswer:"
    )
    assert opened.items[0].images[0].exists(), "the paths begin above the file's folder"
    assert opened.items[1].options == ("left", "right") and right(opened) == [1, 1]
    assert opened.set.judge(opened.items[0], "It is front-up.").score == 1
    assert opened.set.judge(opened.items[0], "Thinking about A.\nB. front-up", opened.set.owner).extracted == "B"


def score_row(kind, source, question, answer, n=0):
    return {
        "id": n,
        "category": "Object Localization",
        "subcategory": "x",
        "input_modality": "image",
        "question_type": kind,
        "source": source,
        "question": question,
        "answer": answer,
        "img_paths": ["a.png"],
    }


def test_spatialscore_of_all_four_kinds(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    rows = [
        score_row("multi-choice", "BLINK", "Which is closer?\n(A) cup\n(B) plate", "(B)"),
        score_row("judgment", "VSR-ZeroShot", "Is the cup on the table?", "Yes", 1),
        score_row("open-ended", "QSpatialBench-Plus", "How wide is it?", "2 meters", 2),
        score_row("open-ended", "VSI-Bench_8", "How many chairs are in the room?", "4", 3),
        score_row("open-ended", "spatialbench", "How many cups?", "3", 4),
        score_row("open-ended", "RealWorldQA", "Which colour is it?", "Red", 5),
    ]
    (tmp_path / "SpatialScore.json").write_text(json.dumps(rows))
    opened = open_set(f"spatialscore={tmp_path}")
    assert [each.form for each in opened.items] == ["letter", "yes-no", "number", "number", "number", "text"]
    assert opened.items[0].prompt.startswith("<image>**Please select") and opened.items[2].prompt.startswith("<image>You will be provided")

    def scores(*replies):
        return [opened.set.judge(each, reply).score for each, reply in zip(opened.items, replies, strict=True)]

    assert scores("(B)", "Yes, it is.", "About 120 cm", "4", "There are three cups.", "red") == [1] * 6
    assert scores("(A)", "no", "90 cm", "3", "4", "blue") == [0, 0, 0, 0.6, 0, 0]
    assert scores("plate", "true", "\\scalar{12} \\distance_unit{feet}", "9", "3.0", "Red.") == [1, 1, 1, 0, 1, 1]
    found = figures(opened, [1, 1, 0, 0.6, 0, 0])
    assert found["accuracy"].value == pytest.approx(2.6 / 6) and found["from VSI-Bench_8"].value == 0.6


def vsi_row(kind, answer, options=None, n=0):
    return {
        "id": n,
        "dataset": "arkitscenes",
        "scene_name": "41069025",
        "question_type": kind,
        "question": "How many tables?",
        "options": options,
        "ground_truth": answer,
    }


def test_vsi_frames_numbers_and_the_mean_of_eight_tasks(tmp_path):
    folder = tmp_path / "frames" / "arkitscenes" / "41069025"
    folder.mkdir(parents=True)
    for n in range(63):
        (folder / f"{n:05d}.png").write_bytes(PNG)
    kinds = [
        "object_abs_distance",
        "object_counting",
        "object_size_estimation",
        "room_size_estimation",
        "object_rel_distance",
        "route_planning",
        "obj_appearance_order",
    ]
    hard = [f"object_rel_direction_{each}" for each in ("easy", "medium", "hard")]
    options = ["A. left", "B. right", "C. back"]
    rows = [
        vsi_row(kind, "4" if kind in kinds[:4] else "B", None if kind in kinds[:4] else options, n) for n, kind in enumerate(kinds + hard)
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = open_set(f"vsi-bench={tmp_path}")
    first, choice = opened.items[1], opened.items[4]
    assert len(first.images) == 32 and [first.images[n].name for n in (0, 1, 31)] == ["00000.png", "00002.png", "00062.png"]
    assert (
        first.prompt
        == "<image>" * 32 + "These are frames of a video.\nHow many tables?\nPlease answer the question using a single word or phrase."
    )
    assert choice.prompt.endswith(
        "How many tables?\nOptions:\nA. left\nB. right\nC. back\nAnswer with the option's letter from the given choices directly."
    )
    assert [opened.set.judge(first, reply).score for reply in ("4", "4 tables.", "four", "3", "5", "8", "no idea")] == [
        1,
        1,
        1,
        0.6,
        0.6,
        0,
        0,
    ]
    scores = [1, 0.5, 0, 0.5, 1, 0, 1, 1, 0, 0]  # the last three are one task, 1/3
    assert figures(opened, scores)["overall"].value == pytest.approx((1 + 0.5 + 0 + 0.5 + 1 + 0 + 1 + 1 / 3) / 8)
    (tmp_path / "far.jsonl").write_text(json.dumps({**rows[1], "scene_name": "none"}) + "\n")
    with pytest.raises(
        BadRow,
        match=r"no frames of the video arkitscenes/none: give them in a column `frames`, or as pictures in .*frames/arkitscenes/none",
    ):
        open_set(f"vsi-bench={tmp_path / 'far.jsonl'}").items[0]


def cube_row(name, **changes):
    question = "Based on these images, what is to the right of image 1? A. TV B. Wooden table C. Sofa D. Door"
    return {
        "id": name,
        "category": ["x"],
        "type": "self",
        "meta_info": [],
        "question": question,
        "images": ["other_all_image/1.png", "other_all_image/2.png"],
        "gt_answer": "B",
        **changes,
    }


def test_mindcube_leaves_translation_out_and_keeps_the_places(tmp_path):
    (tmp_path / "data" / "other_all_image").mkdir(parents=True)
    for n in (1, 2):
        (tmp_path / "data" / "other_all_image" / f"{n}.png").write_bytes(png(n))
    asked = "[Images]\nImage 1: <image>\nImage 2: <image>\n\n[Question]\nWhat?"
    rows = [cube_row("rotation_1"), cube_row("among_2", input_prompt=asked), cube_row("aroundnew_3"), cube_row("translation_4")]
    (tmp_path / "data" / "raw").mkdir()
    (tmp_path / "data" / "raw" / "MindCube_tinybench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = open_set(f"mindcube={tmp_path}")
    assert opened.items[0].options == ("TV", "Wooden table", "Sofa", "Door") and all(path.exists() for path in opened.items[0].images)
    assert opened.items[1].prompt == asked and opened.items[0].prompt.startswith("<image><image>Based on")
    assert opened.set.judge(opened.items[0], "<answer>B. Wooden table</answer>").score == 1
    assert opened.set.judge(opened.items[0], "A. no. The answer is B.", opened.set.owner).extracted == "B"
    found = figures(opened, [1, 0, 1, 1])
    assert (found["overall"].value, found["overall"].n, found["translation"].value) == (2 / 3, 3, 1)


def test_all_angles_from_its_json_and_its_table(tmp_path):
    (tmp_path / "v1.png").write_bytes(PNG)
    row = {
        "index": 0,
        "folder": "s1",
        "category": "counting",
        "image_path": ["v1.png", "v1.png"],
        "question": "How many?",
        "A": "1",
        "B": "2",
        "C": "3",
        "answer": "C",
        "sourced_dataset": "EgoHumans",
        "pair_idx": 5,
    }
    (tmp_path / "data.json").write_text(json.dumps([row, {**row, "index": 1, "category": "manipulation", "answer": "A"}]))
    opened = open_set(f"all-angles={tmp_path}")
    assert opened.items[0].cluster == "s1" and opened.items[0].prompt.count("<image>") == 2 and right(opened) == [1, 1]
    table = tsv(tmp_path / "t.tsv", [{key: str(value) for key, value in row.items()}])
    again = open_set(f"all-angles={table}")
    assert again.items[0].prompt == opened.items[0].prompt and again.items[0].images == opened.items[0].images
    assert figures(opened, [1, 0])["mean of categories"].value == 0.5


def sat_rows(**changes):
    row = {
        "image_bytes": [{"bytes": PNG, "path": None}],
        "question": "Did the camera turn left or right?",
        "answers": ["left", "right"],
        "question_type": "ego_movement",
    }
    return [{**row, "question": f"{row['question']} {n}", **changes} for n in range(6)]


@pytest.mark.parametrize("truth", [{"correct_answer": "right"}, {"correct_answer_idx": 1}])
def test_sat_of_both_owners(tmp_path, truth):
    opened = open_set(f"sat={parquet(tmp_path / 'SAT_test.parquet', sat_rows(**truth))}")
    assert {each.answer for each in opened.items} == {"A", "B"}, "the place of the right option is drawn"
    for each in opened.items:
        assert each.options[each.letters.index(each.answer)] == "right" and each.category == "ego_movement"
        assert f"\n{each.answer}. right" in each.prompt and each.prompt.endswith(
            "Only output the letter of the correct option and nothing else."
        )
    assert right(opened) == [1] * 6 and [opened.set.judge(each, "right").score for each in opened.items] == [1] * 6


def test_our_viewpoint_test_clusters_by_object(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    rows = [
        {
            "id": f"car/1/{kind}",
            "messages": [
                {"role": "user", "content": "<image><image>Which way?\nA. left\nB. right\nC. no movement"},
                {"role": "assistant", "content": "B"},
            ],
            "images": ["a.png", "a.png"],
            "truth": "B",
            "kind": kind,
            "choices": ["left", "right", "no movement"],
            "meta": {"object": "car/1"},
        }
        for kind in ("ego_translation", "ego_rotation")
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = open_set(f"viewpoint={tmp_path}")
    assert [(each.id, each.cluster, each.category, each.answer) for each in opened.items] == [
        ("car/1/ego_translation", "car/1", "ego_translation", "B"),
        ("car/1/ego_rotation", "car/1", "ego_rotation", "B"),
    ]
    assert opened.items[0].row("Think.").turns[0].content == "Think."
    generic = open_set(str(tmp_path / "test.jsonl"))
    assert generic.set.name.endswith("/test") and right(generic) == [1, 1] and generic.items[0] == opened.items[0]


def test_viewpoint_figures_are_told_by_move_angle_and_class(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    moves = [
        ("walk", 95.0, "left", "car/1"),
        ("walk", -27.0, "right", "car/2"),
        ("strafe", 8.0, "left", "pot/1"),
        ("pan", 0.0, "no movement", "pot/1"),
    ]
    rows = [
        {
            "id": str(n),
            "messages": [{"role": "user", "content": "<image><image>Which way?"}, {"role": "assistant", "content": "A"}],
            "images": ["a.png", "a.png"],
            "truth": "A",
            "kind": "ego_translation",
            "choices": ["left", "right", "no movement"],
            "meta": {"object": of, "move": move, "azimuth_change_deg": angle, "ego_translation": side},
        }
        for n, (move, angle, side, of) in enumerate(moves)
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in (f"viewpoint={tmp_path}", str(tmp_path / "test.jsonl")):
        opened = open_set(name)
        found = {figure.name: (figure.value, figure.n) for figure in opened.set.figures(list(opened.items), [1, 0, 1, 0])}
        told = {key: value for key, value in found.items() if ":" in key}
        assert told == {
            "move: walk": (0.5, 2),
            "move: strafe": (1, 1),
            "move: pan": (0, 1),
            "angle: 0 to 20 degrees": (1, 1),
            "angle: 20 to 40 degrees": (0, 1),
            "angle: 80 to 100 degrees": (1, 1),
            "class: car": (0.5, 2),
            "class: pot": (0.5, 2),
        }
        same = [opened.items[0]] * 2
        assert not [figure for figure in opened.set.figures(same, [1, 0]) if ":" in figure.name], "one value of each is the whole"


def test_any_vlmevalkit_table_is_a_set(tmp_path):
    plain = {"hint": "", "A": "x", "B": "y", "category": "d", "split": "val"}
    rows = [
        {"index": 1, "question": 'Two lines,\n"quoted"\tand a tab', **plain, "hint": "look", "answer": "B", "category": "c", "image": B64},
        {"index": 2, "question": "The image stands in row 1", **plain, "answer": "A", "image": "1"},
        {"index": 3, "question": "Is it?", **plain, "A": "", "B": "", "answer": "Yes", "image": f"['{B64}', '{B64}']"},
    ]
    opened = open_set(str(tsv(tmp_path / "mine.tsv", rows)))
    assert (
        opened.items[0].prompt == '<image>Hint: look\nQuestion: Two lines,\n"quoted"\tand a tab\nOptions:\nA. x\nB. y\n'
        "Please select the correct answer from the options above. \n"
    )
    assert opened.items[1].images == (PNG,) and len(opened.items[2].images) == 2 and opened.items[2].form == "yes-no"
    assert right(opened) == [1, 1, 1]
    found = figures(opened, [1, 1, 0])
    assert "circular" not in found and found["mean of categories"].value == 0.75
    assert [each.id for each in opened.items[1:]] == ["2", "3"] and opened.items[-1].id == "3"


def test_bad_rows_are_told_with_their_place_and_the_others_stay(tmp_path):
    good = {"index": 1, "question": "Q", "A": "x", "B": "y", "answer": "B", "image": B64}
    bad = [{"answer": "C"}, {"answer": ""}, {"question": ""}, {"image": ""}]
    opened = open_set(str(tsv(tmp_path / "x.tsv", [good, *({**good, **each} for each in bad), {**good, "index": 9}])))
    assert opened.items[0].id == "1" and opened.items[5].id == "9"
    for n, reason in ((1, "'C' is none of the options"), (2, "no `answer`"), (3, "no `question`"), (4, "no image")):
        with pytest.raises(BadRow, match=rf"x\.tsv:{n + 1}: .*{reason}"):
            opened.items[n]


def test_a_set_that_is_not_here_says_where_its_owner_publishes_it(tmp_path):
    for of in all_sets():
        with pytest.raises(ValueError, match="its owner publishes it at https://"):
            of.open(None)
    with pytest.raises(
        ValueError, match=r"blink.*has none of.*its owner publishes it at https://huggingface.co/datasets/BLINK-Benchmark/BLINK"
    ):
        (tmp_path / "blink").mkdir()
        open_set(f"blink={tmp_path / 'blink'}")
    with pytest.raises(ValueError, match=r"no benchmark 'blonk'; there are viewpoint, .*blink.* any file is one; blonk is none either"):
        open_set("blonk")
    with pytest.raises(ValueError, match="does not exist"):
        open_set(f"blink={tmp_path / 'nowhere'}")
    with pytest.raises(
        ValueError, match=r"has the columns \['a'\]; expected \(idx, prompt, choices, answer, image_1\) or \(index, question, answer\)"
    ):
        open_set(f"blink={parquet(tmp_path / 'a.parquet', [{'a': 1}])}")


def test_a_copy_on_this_machine_is_found(tmp_path):
    row = {"index": 1, "question": "Q", "A": "x", "B": "y", "answer": "B", "image": B64, "category": "Counting"}
    tsv(tmp_path / "lmu" / "BLINK.tsv", [row])
    assert open_set("BLINK").items[0].category == "Counting"
    assert find("cv_bench") is find("CV-Bench") is find("cvbench")
    hub = tmp_path / "hub" / "datasets--nyu-visionx--CV-Bench"
    parquet(hub / "snapshots" / "abc" / "test_2d.parquet", [cv_row("Count", "COCO", "2D")])
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    assert len(open_set("cv-bench").items) == 1


def test_the_example_in_the_docs_is_a_set(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    names: dict = {}
    for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["last_letter"]("So b", None) == "B" and names["last_letter"](" ", None) is None
    (tmp_path / "a.png").write_bytes(PNG)
    rooms = ["kitchen", "bath", "hall"]
    row = {"id": 1, "question": "Where?", "options": ["left", "right"], "answer": "right", "views": ["a.png"], "house": "h"}
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({**row, "id": n, "room": room}) + "\n" for n, room in enumerate(rooms)))
    items = list(names["ROOMS"].open(tmp_path))
    assert items[0].prompt == "<image>Where?\nAnswer with a letter." and items[0].answer == "B" and items[0].cluster == "h"
    assert {figure.name: figure.value for figure in names["ROOMS"].figures(items, [1, 0, 1])}["indoors"] == 0.75
    assert names["ROOMS"].judge(items[0], "It is on the right.").score == 1


def test_letters_and_texts_of_answers():
    assert (
        unlettered(["(A) left", "(B) right"]) == unlettered(["A. left", "B. right"]) == unlettered(["left", "right"]) == ("left", "right")
    )
    assert unlettered(["A", "B"]) == ("A", "B") and unlettered(["B. x", "A. y"]) == ("B. x", "A. y")
    for answer in ("B", "b", "(B)", "B. right", "B: whatever", "Right", " right "):
        assert letter_of(answer, ("left", "right"), "") == "B"
    assert letter_of("B", ("B", "A"), "") == "B", "a letter comes first"
    for answer in ("C", "1", "A, B", "left or right"):
        with pytest.raises(BadRow, match="is none of the options"):
            letter_of(answer, ("left", "right"), "f:1")


JUNK = [
    None,
    float("nan"),
    "",
    0,
    -5,
    3.5,
    True,
    [],
    {},
    [None],
    ["x"],
    [1, 2],
    {"bytes": None},
    {"path": 3},
    "A",
    "[",
    "['a'",
    "<image>",
    "\0",
]
JUNK += ["\ud800", [[]], "<|im_end|>", "9" * 5000, ["A", "A"], "nan", "2 m", "(Z)", 10**30]


def test_whatever_stands_in_a_row_it_is_an_item_or_a_bad_row(tmp_path):
    url, draw = f"data:image/png;base64,{B64}", random.Random(0)
    (tmp_path / "a.png").write_bytes(PNG)
    goods = {
        "blink": {**blink_row("Counting", 1), "image_1": url, "image_2": url},
        "cv-bench": {**cv_row("Count", "COCO", "2D"), "image": url},
        "3dsrbench": dsr("VIN6MS3J-flip-1"),
        "mmsi": mmsi_row(images=[url, url]),
        "spatialscore": score_row("open-ended", "QSpatialBench-Plus", "How wide?", "2 m"),
        "vsi-bench": {**vsi_row("route_planning", "B", ["A. x", "B. y"]), "frames": [url]},
        "mindcube": cube_row("among_1", images=[url]),
        "sat": {"image_bytes": [url], "question": "Which?", "answers": ["l", "r"], "question_type": "t", "correct_answer_idx": 1},
    }
    usable = 0
    for name, good in goods.items():
        rows = [good]
        for _ in range(25):
            rows.append({**good, **{key: draw.choice(JUNK) for key in draw.sample(list(good), 2)}})
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        opened = open_set(f"{name}={tmp_path / 'x.jsonl'}")
        assert opened.set.judge(opened.items[0], opened.items[0].answer).score == 1
        for n in range(1, len(rows)):
            try:
                found = opened.items[n]
            except BadRow:
                continue
            usable += 1
            for reply in (found.answer, "A", "three", ""):
                opened.set.judge(found, reply)
                opened.set.judge(found, reply, opened.set.owner)
            opened.set.figures([found], [0.5])
    assert 10 < usable < 190
