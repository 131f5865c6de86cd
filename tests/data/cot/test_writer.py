"""Chains of thought: true by the poses in every wording, checked before they are stored."""

import io
import random
import re
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from PIL import Image

from actial_fast.data.cot import poses as cot
from actial_fast.data.cot.checking import Rules, check_cot
from actial_fast.data.cot.poses import geometric_cot
from actial_fast.data.cot.writer import WriterError, one_by_one, write_cot
from actial_fast.data.sources.row import BadRow, Row, Turn
from actial_fast.data.sources.source import SourceConfig, open_source
from actial_fast.tasks.rewards import score
from tests.viewpoint_rows import KINDS, OPPOSITE, lines, pose, question, viewpoint_rows

FULL = one_by_one(geometric_cot)
SHORT = one_by_one(partial(geometric_cot, style="short"))
SWAP = {"left": "right", "right": "left", "clockwise": "counterclockwise", "counterclockwise": "clockwise"}


def reply(row: Row, thought: str = "Seen from the first camera, more of one side appears.") -> str:
    return f"<think>{thought}</think><answer>{row.truth}</answer>"


# --- from the poses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", ["short", "full"])
def test_the_mirrored_pair_swaps_every_side(kind, style):
    """Every left, right, clockwise and counterclockwise in the text depends on the poses, in every wording."""
    texts = set()
    for seed in range(200):
        ego, turn = random.Random(seed).choice([("right", "left"), ("left", "right"), ("right", "right"), ("left", "left")])
        row, mirrored = question(kind, pose(ego, turn)), question(kind, pose(OPPOSITE[ego], OPPOSITE[turn]))
        text = geometric_cot(row, random.Random(seed), style)
        swapped = re.sub(r"\b(left|right|clockwise|counterclockwise)\b", lambda m: SWAP[m.group()], text)
        letters = re.compile(r"\b(answer is|answer|option|is) [ABC]\b|<answer>[ABC]")
        other = geometric_cot(mirrored, random.Random(seed), style)
        assert letters.sub("#", swapped) == letters.sub("#", other)
        if seed < 50:  # the check reads every statement, which takes its time
            assert check_cot(text, row) is None and check_cot(other, mirrored) is None
        np.testing.assert_array_equal(score([text], [row]), [[1, 1]])
        texts.add(text)
    assert len(texts) <= 4 if style == "short" else len(texts) > 50


SIDE = r"(left|right)"
CLAIMS = (  # what a sentence says -> the key of the meta that must agree; "not x": the opposite of x
    (rf"camera moved to the {SIDE}", "ego_translation"),
    (rf"For the object that is the {SIDE}", "object_translation"),
    (rf"camera turned to the {SIDE}", "ego_rotation"),
    (rf"lay towards the {SIDE} in the first image faces the camera more", "ego_translation"),
    (rf"flank towards the {SIDE} turns away", "not ego_translation"),
    (rf"on the object's {SIDE}-hand edge in image 1 has come round", "ego_translation"),
    (rf"{SIDE}-hand edge has gone out of sight", "not ego_translation"),
    (rf"at the {SIDE} of the object in image 1 and less", "ego_translation"),
    (rf"less of the side at its {SIDE}", "not ego_translation"),
    (rf"position moved {SIDE}", "ego_translation"),
    (rf"takes a step to the {SIDE}", "ego_translation"),
    (rf"stepped to its own {SIDE}", "ego_translation"),
    (rf"this step goes to the {SIDE}", "object_translation"),
    (rf"moves to its {SIDE}", "ego_translation"),
    (rf"moves to the {SIDE} of an object that looks", "object_translation"),
    (rf"viewing direction is turned to the {SIDE}", "ego_rotation"),
    (rf"degrees to the {SIDE}\.", "ego_rotation"),
    (rf"Having moved to the {SIDE}", "ego_translation"),
    (rf"has to turn {SIDE} to keep", "ego_rotation"),
    (rf"looking more to the {SIDE}", "ego_rotation"),
    (rf"moved to its own {SIDE}", "ego_translation"),
    (rf"which is the object's {SIDE}", "object_translation"),
    (rf"and turned {SIDE}\.", "ego_rotation"),
    (rf"position to the {SIDE}", "ego_translation"),
    (rf"viewing direction to the {SIDE}", "ego_rotation"),
    (rf"for the object, a move to the {SIDE}", "object_translation"),
)


def test_statements_agree_with_the_poses():
    """Anchors the sides that the mirror test only ties to each other."""
    met = Counter()
    for seed in range(300):
        draw = random.Random(seed)
        meta = pose(draw.choice(["left", "right"]), draw.choice(["left", "right"]), draw.uniform(20, 100), draw.uniform(10, 100))
        row = question(draw.choice(KINDS), meta, seed)
        text = geometric_cot(row, draw, draw.choice(["short", "full", "full"]))
        for pattern, key in CLAIMS:
            for side in re.findall(pattern, text):
                met[pattern] += 1
                assert (side == meta[key.removeprefix("not ")]) != key.startswith("not "), (pattern, text)
        for degrees, sense in re.findall(r"about (\d+) degrees (clockwise|counterclockwise)", text):
            assert abs(int(degrees) - abs(meta["azimuth_change_deg"])) <= 0.5
            assert (sense == "counterclockwise") == (meta["azimuth_change_deg"] > 0)
        if row.kind == "ego_rotation" and "viewing direction" in text:
            assert f"about {round(abs(meta['yaw_deg']))} degrees" in text
        if meta["ego_rotation"] == meta["ego_translation"]:
            assert "keep the object" not in text and "is found by" not in text  # such a camera looks away
    assert not {pattern for pattern, _ in CLAIMS} - set(met)


def test_short_texts_are_the_published_phrases():
    row = question("object_translation", pose("right"))
    want = f"The camera moved to the right. For the object that is the left. So the answer is {row.truth}."
    assert geometric_cot(row, random.Random(0), "short") == f"<think>{want}</think><answer>{row.truth}</answer>"
    assert set(cot.SHORT) == set(KINDS)


def test_rows_that_the_poses_cannot_explain():
    row = question("ego_translation", pose("right"))
    wrong = "ABC"[(("ABC".index(row.truth)) + 1) % 3]
    for bad, reason in (
        (replace(row, truth=wrong), "the poses say 'right'"),
        (replace(row, meta={}), "no viewpoint row"),
        (replace(row, kind="counting"), "no viewpoint row"),
        (replace(row, choices=("up", "down")), "the poses say 'right'"),
    ):
        with pytest.raises(BadRow, match=reason):
            geometric_cot(bad, random.Random(0))


def test_rows_of_the_viewpoint_builder(tmp_path):
    viewpoint = pytest.importorskip("actial_fast.data.captures.questions")
    for seed in range(20):
        for meta in (pose("right", "left"), viewpoint.reverse(pose("right", "left"))):
            for row in viewpoint.rows(meta, tmp_path, seed):
                for style in ("short", "full"):
                    text = geometric_cot(row, random.Random(seed), style)
                    assert check_cot(text, row) is None
                    np.testing.assert_array_equal(score([text], [row]), [[1, 1]])


# --- the check

ROW = Row((Turn("user", "?"),), truth="B", choices=("left", "right", "no movement"))
OPEN = Row((Turn("user", "?"),), truth="two chairs")
TEXT = Row((Turn("user", "?"),), truth="right", choices=("left", "right"))


@pytest.mark.parametrize(
    "text, row, reason",
    [
        ("<think>It moved right, so the answer is B.</think><answer>B</answer>", ROW, None),
        ("<THINK>a. It is right.</THINK>\n<Answer> b </Answer>", ROW, None),
        ("<think>Option A says left, option B says right. It is the latter.</think><answer>B</answer>", ROW, None),
        ("<think>The camera moved right, and turned left.</think><answer>B</answer>", ROW, None),
        ("<think>\u0130\u0130\u0130 So option B.</think><answer>B</answer>", ROW, None),
        ("<think>I count two.</think><answer>Two chairs</answer>", OPEN, None),
        ("<think>So the second option, B.</think><answer>right</answer>", TEXT, None),
        ("<think>The answer is B.</think><answer>right</answer>", TEXT, None),
        ("<think>a</think><answer>A</answer>", ROW, "wrong answer"),
        ("<think>a</think><answer>B.</answer>", ROW, None),
        ("<think>a</think><answer>B or C</answer>", ROW, "wrong answer"),
        ("<think>a</think><answer></answer>", ROW, "wrong answer"),
        ("<think>a</think>B", ROW, "malformed tags"),
        ("<think>a</think><answer>B</answer> Hope this helps!", ROW, "malformed tags"),
        ("<think>a</think><answer>B</answer><answer>B</answer>", ROW, "malformed tags"),
        ("", ROW, "malformed tags"),
        ("<think> \n</think><answer>B</answer>", ROW, "no reasoning"),
        ("<think>As in <image> one.</think><answer>B</answer>", ROW, "image tag in the text"),
        ("<think>So the answer is A.</think><answer>B</answer>", ROW, "reasoning contradicts the answer"),
        ("<think>First B, but the answer must be: (C).</think><answer>B</answer>", ROW, "reasoning contradicts the answer"),
        ('<think>The answer is "left". Checked twice.</think><answer>B</answer>', ROW, "reasoning contradicts the answer"),
        ("<think>More of the right side shows.\nHence it moved left.</think><answer>B</answer>", ROW, "reasoning contradicts the answer"),
        ("<think>There was no movement.</think><answer>B</answer>", ROW, "reasoning contradicts the answer"),
        ("<think>The answer is A.</think><answer>right</answer>", TEXT, "reasoning contradicts the answer"),
        ("<think>The given answer is B.</think><answer>B</answer>", ROW, "talks of a given answer"),
        ("<think>I was told the answer.</think><answer>B</answer>", ROW, "talks of a given answer"),
        ("<think>a</think><answer>B</answer>", Row((), truth=""), "row has no truth"),
    ],
)
def test_check(text, row, reason):
    assert (check_cot(text, row) or "").partition(":")[0] == (reason or "")


def test_check_is_fast_on_long_text():
    start = time.perf_counter()
    for piece in ("answer is ", "the answer: ((((", "left right. ", '"' * 50):
        check_cot(reply(ROW, piece * (100_000 // len(piece))), ROW)
    assert time.perf_counter() - start < 2


# --- writing


@pytest.fixture
def captures(tmp_path) -> list[Row]:
    return viewpoint_rows(tmp_path)


def test_write_and_read_back(tmp_path, captures):
    out = tmp_path / "deep" / "cot.jsonl"
    summary = write_cot(captures, out, FULL, seed=1)
    assert (summary.written, summary.kept, summary.rejected) == (30, 0, {})
    source = open_source(SourceConfig(str(out)))
    for i, row in enumerate(captures):
        got = source[i]
        assert got.id == row.id and got.prompt == row.prompt and got.truth == row.truth and got.meta == row.meta
        assert got.turns[-1].role == "assistant" and check_cot(got.turns[-1].content, row) is None
        assert [image.resolve() for image in got.images] == list(row.images)
    again = tmp_path / "again.jsonl"
    write_cot(captures, again, FULL, seed=1)
    assert [line["messages"] for line in lines(again)] == [line["messages"] for line in lines(out)]
    write_cot(captures, tmp_path / "other.jsonl", FULL, seed=2)
    assert [line["messages"] for line in lines(tmp_path / "other.jsonl")] != [line["messages"] for line in lines(out)]


def test_count_draws_rows_by_seed(tmp_path, captures):
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert write_cot(captures, tmp_path / name, SHORT, seed=seed, count=12).written == 12
        drawn.append([line["id"] for line in lines(tmp_path / name)])
    order = [row.id for row in captures]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] == sorted(drawn[0], key=order.index) and len(set(drawn[0])) == 12
    with pytest.raises(ValueError, match="count is 31, but there are only 30"):
        write_cot(captures, tmp_path / "d", FULL, count=31)


def test_rejected_rows_are_counted_and_kept_apart(tmp_path, captures):
    def writer(row: Row, rng: random.Random) -> str:
        number = captures.index(row)
        if number == 3:
            raise WriterError("timed out")
        if number == 4:
            raise BadRow(row.where, "broken image")
        return {0: "B", 1: reply(row, "The answer is Z."), 2: "<think>a</think><answer>D</answer>"}.get(number, reply(row))

    seen = []
    summary = write_cot(captures, tmp_path / "c.jsonl", one_by_one(writer), progress=lambda done, total: seen.append((done, total)))
    reasons = {"malformed tags": 1, "reasoning contradicts the answer": 1, "wrong answer": 1, "no reply": 1, "bad row": 1}
    assert summary.written == 25 and summary.rejected == reasons and seen[-1] == (30, 30)
    kept, left = lines(tmp_path / "c.jsonl"), lines(tmp_path / "c.rejects.jsonl")
    assert [line["id"] for line in kept] == [row.id for row in captures[5:]]
    assert [line["id"] for line in left] == [row.id for row in captures[:5]]
    assert left[0]["text"] == "B" and "timed out" in left[3]["reason"] and "broken image" in left[4]["reason"]


def test_an_interrupted_run_goes_on(tmp_path, captures):
    out, calls = tmp_path / "c.jsonl", []

    def writer(row: Row, rng: random.Random) -> str:
        calls.append(row.id)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return "no tags" if row.id == captures[2].id and len(calls) < 11 else geometric_cot(row, rng)

    with pytest.raises(KeyboardInterrupt):
        write_cot(captures, out, one_by_one(writer), seed=5)
    done = len(lines(out))
    assert 0 < done < 11
    with open(out, "a") as file:
        file.write('{"id": "p9/ego_ro')  # what a kill in the middle of a write leaves
    calls.clear()
    calls.extend(["-"] * 20)
    summary = write_cot(captures, out, one_by_one(writer), seed=5)
    assert summary.kept == done and summary.written == 30 - done and summary.rejected == {}
    assert sorted(line["id"] for line in lines(out)) == sorted(row.id for row in captures)
    whole = tmp_path / "whole.jsonl"
    write_cot(captures, whole, FULL, seed=5)
    by_id = {line["id"]: line for line in lines(out)}
    assert all(by_id[line["id"]] == line for line in lines(whole))
    assert lines(tmp_path / "c.rejects.jsonl") == []


def test_a_file_of_something_else_is_not_continued(tmp_path, captures):
    (tmp_path / "notes.txt").write_text("my notes\nand more")
    with pytest.raises(ValueError, match=r"notes\.txt cannot be continued"):
        write_cot(captures, tmp_path / "notes.txt", FULL)
    assert (tmp_path / "notes.txt").read_text() == "my notes\nand more"


def test_a_repeated_id_is_an_error(tmp_path, captures):
    with pytest.raises(ValueError, match="occurs twice"):
        write_cot([*captures, captures[0]], tmp_path / "c.jsonl", FULL)


def test_bad_rows_of_the_source_and_embedded_images(tmp_path, captures):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (1, 2, 3)).save(buffer, "JPEG")

    class Source:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise BadRow("f.parquet:2", "empty answer")
            image = buffer.getvalue() if index == 0 else buffer.getvalue()[:30]
            return question("ego_rotation", pose(), index, images=(image, image), id="", where=f"f.parquet:{index + 1}")

    summary = write_cot(Source(), tmp_path / "c.jsonl", FULL)
    assert summary.written == 1 and summary.rejected == {"bad row": 2}
    got = open_source(SourceConfig(str(tmp_path / "c.jsonl")))[0]
    assert got.id == "f.parquet:1" and got.images[0].read_bytes() == buffer.getvalue() and got.images[0].suffix == ".jpeg"


@pytest.mark.parametrize(
    ("kind", "choices", "truth", "says"),
    [
        ("facing_side", ("back", "left side"), "B", "<think>We see the left side. So the answer is B.</think><answer>B</answer>"),
        (
            "turn_size",
            ("about 30 degrees", "about 60 degrees"),
            "A",
            "<think>The camera travelled about 30 degrees round the object. So the answer is A.</think><answer>A</answer>",
        ),
    ],
)
def test_short_chains_for_spatial_rows(kind, choices, truth, says):
    row = Row((Turn("user", "Which?"),), truth=truth, kind=kind, choices=choices)
    assert geometric_cot(row, random.Random(0), style="short") == says and check_cot(says, row) is None
    with pytest.raises(BadRow, match="no letter of 2 choices; open it with letters"):
        geometric_cot(replace(row, truth=choices[0]), random.Random(0), style="short")
    with pytest.raises(BadRow, match="is no viewpoint row"):
        geometric_cot(row, random.Random(0))


@pytest.mark.parametrize("style", ["short", "full"])
@pytest.mark.parametrize(("ego", "turn"), [(e, t) for e in ("left", "right", "no movement") for t in ("left", "right", "no rotation")])
def test_chains_from_poses_are_true_of_every_kind_of_pair(style, ego, turn):
    """Of cameras that stay, do not turn, or turn away too (the balanced composition of the viewpoint builder), in every wording."""
    moved, turned = ego != "no movement", turn != "no rotation"
    meta = {
        **pose(ego if moved else "right", turn if turned else "left", 25 if moved else 0.0, 20 if turned else 0.4),
        "ego_translation": ego,
        "object_translation": OPPOSITE.get(ego, ego),
        "ego_rotation": turn,
    }
    for seed in range(5 if style == "full" else 1):
        for kind in KINDS:
            row = question(kind, meta, seed)
            text = geometric_cot(row, random.Random(seed), style)
            assert check_cot(text, row) is None, text
            if style == "full":
                assert check_cot(text, row, Rules(states=True)) is None, text
