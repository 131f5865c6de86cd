"""Made rows: what they say is true of their pictures, none is in both splits, the same seed makes the same, and mistakes are told."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from actial_fast.data.made.boxes import BoxesConfig, write_boxes
from actial_fast.data.made.jigsaw import JigsawConfig, exchanged, shuffled, swapped, write_jigsaw
from actial_fast.data.made.sparkle import DIRECTIONS, SparkleConfig, write_sparkle
from actial_fast.data.sources.picture import decode
from actial_fast.data.sources.source import SourceConfig, open_source, scan
from actial_fast.data.sources.task import score_of
from actial_fast.settings.config import config_from
from actial_fast.tasks.jigsaw import parse_move


def rows_of(path, task):
    rows = open_source(SourceConfig(str(path), task=task))
    assert not scan(rows).bad
    return [rows[i] for i in range(len(rows))]


def pictures(folder, count: int, size=(40, 60)) -> None:
    """Gradients that differ everywhere."""
    folder.mkdir()
    for n in range(count):
        y, x = np.mgrid[0 : size[0], 0 : size[1]]
        Image.fromarray(np.stack([4 * x, 5 * y, np.full_like(x, 20 * n)], -1).astype(np.uint8)).save(folder / f"{n}.png")


@pytest.mark.parametrize("own", [False, True])
def test_jigsaws(own, tmp_path):
    if own:
        pictures(tmp_path / "pictures", 4)
    config = JigsawConfig(grid=(2, 3), train=6, test=3, turns=5, size=24, seed=1)
    done = write_jigsaw(tmp_path / "out", config, tmp_path / "pictures" if own else None)
    assert done == {"train": 6, "test": 3, "turns": 5}
    for split in ("train", "test"):
        for row in rows_of(tmp_path / f"out/{split}.jsonl", "jigsaw"):
            answer = row.turns[-1].content
            assert (
                score_of(answer, row) == 1 and answer.endswith(f"<answer>{row.truth}</answer>") and row.meta["order"] != [1, 2, 3, 4, 5, 6]
            )
            board = decode(row.images[0], row.where)
            assert board.shape == (24, 24, 3)
            if own:  # put right, the picture's colours run evenly
                back = shuffled(board, np.argsort(row.meta["order"]) + 1, 2, 3).astype(int)
                assert (np.diff(back[..., 0], axis=1)[2:-2, 2:-2] >= 0).all() and (np.diff(back[..., 1], axis=0)[2:-2, 2:-2] >= 0).all()


def test_played_boards_end_whole(tmp_path):
    write_jigsaw(tmp_path, JigsawConfig(train=8, test=1, turns=8, size=12))
    for row in rows_of(tmp_path / "turns.jsonl", "jigsaw_turns"):
        order, board = row.meta["order"], decode(row.images[0], row.where)
        replies = [turn.content for turn in row.turns if turn.role == "assistant"]
        assert len(row.images) == len(replies) and replies[-1] == "done"
        for reply, image in zip(replies, row.images[1:], strict=False):
            move = parse_move(reply, 4)
            order, board = exchanged(order, *move), swapped(board, *move, 2, 2)
            assert np.array_equal(board, decode(image, row.where)), "what is shown is the board after the swap"
        assert order == [1, 2, 3, 4]


@pytest.mark.parametrize("steps", [0, 5])
def test_sparkle(steps, tmp_path):
    assert write_sparkle(tmp_path, SparkleConfig(train=24, test=6, size=100, steps=steps)) == {"train": 24, "test": 6}
    rows = rows_of(tmp_path / "train.jsonl", "sparkle")
    assert {row.kind for row in rows} == {"direction", "distance", "place"}
    for row in rows:
        assert score_of(row.turns[-1].content, row) == 1
        pixels, marks = decode(row.images[0], row.where).astype(int), row.meta["marks"]
        for name, channel in (("red", 0), ("blue", 2)):
            x, y = marks[name]
            assert pixels[min(y, 99), min(x, 99), channel] > 60 + pixels[min(y, 99), min(x, 99), 2 - channel], (
                "the mark is where it is said"
            )
        first, second = ("red", "blue") if "the red mark" in row.turns[0].content.split("which direction is")[-1] else ("blue", "red")
        if row.kind == "direction":
            right, up = marks[first][0] - marks[second][0], marks[second][1] - marks[first][1]
            assert DIRECTIONS.index(row.truth) == round(math.degrees(math.atan2(up, right)) / 45) % 8
        elif row.kind == "distance":
            assert float(row.truth) == pytest.approx(math.dist(marks["red"], marks["blue"]), abs=0.5)


def test_boxes(tmp_path):
    assert write_boxes(tmp_path, BoxesConfig(train=20, test=5, size=80, most=3, cells=4)) == {"train": 20, "test": 5}
    for row in rows_of(tmp_path / "train.jsonl", "boxes"):
        assert score_of(row.turns[-1].content, row) == 1
        pixels = decode(row.images[0], row.where).astype(int)
        redness = (pixels[..., 0] - pixels[..., 1:].max(-1)).reshape(4, 20, 4, 20).mean((1, 3))
        red = {(round(x1 / 25), round(y1 / 25)) for x1, y1, *_ in row.meta["boxes"]}
        assert {(x, y) for y, x in np.argwhere(redness > 60).tolist()} == red


@pytest.mark.parametrize("write, config", [(write_jigsaw, JigsawConfig), (write_sparkle, SparkleConfig), (write_boxes, BoxesConfig)])
def test_a_seed_makes_the_same_and_splits_share_nothing(write, config, tmp_path):
    small = ["train=6", "test=4", "size=24"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(tmp_path / name, config_from(config, [*small, f"seed={seed}"]))
    text = {name: (tmp_path / name / "train.jsonl").read_text() for name in "abc"}
    bytes_of = {name: [p.read_bytes() for p in sorted((tmp_path / name).rglob("*.png"))] for name in "abc"}
    assert text["a"] == text["b"] != text["c"] and bytes_of["a"] == bytes_of["b"] != bytes_of["c"]
    shown = [{decode(row.images[0], "x").tobytes() for row in rows_of(tmp_path / f"a/{split}.jsonl", "")} for split in ("train", "test")]
    assert not shown[0] & shown[1]


def test_own_pictures_are_in_one_split(tmp_path):
    pictures(tmp_path / "pictures", 3)
    write_jigsaw(tmp_path / "out", JigsawConfig(train=12, test=6, turns=0, size=8), tmp_path / "pictures")
    blues = []
    for split in ("train", "test"):
        blues.append({int(decode(row.images[0], "x")[0, 0, 2]) for row in rows_of(tmp_path / f"out/{split}.jsonl", "jigsaw")})
    assert not blues[0] & blues[1] and not (tmp_path / "out/turns.jsonl").exists()


def test_mistakes(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures"):
        write_jigsaw(tmp_path, JigsawConfig(), tmp_path / "empty")
    pictures(tmp_path / "one", 1)
    with pytest.raises(ValueError, match="at least two pictures"):
        write_jigsaw(tmp_path, JigsawConfig(), tmp_path / "one")
    for cls, override, problem in (
        (JigsawConfig, "grid=[1,1]", "more than one piece"),
        (JigsawConfig, "size=3", "2 pixels a piece"),
        (SparkleConfig, "kinds=[colour]", "'colour' is not one of"),
        (SparkleConfig, "steps=1", "at least 2 places"),
        (BoxesConfig, "most=9", "to half of the 16 cells"),
        (BoxesConfig, "cells=30", "from 2 to 20 cells"),
    ):
        with pytest.raises(ValueError, match=problem):
            config_from(cls, [override])


def test_rows_are_json_that_others_read(tmp_path):
    write_boxes(tmp_path, BoxesConfig(train=2, test=1))
    record = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    assert record["images"] == ["train/00000.png"] and record["meta"]["boxes"]
