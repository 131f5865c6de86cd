"""Leak probes: a shortcut that is planted is found and named, and nothing is found where there is none."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from actial_fast.data.captures import probes
from actial_fast.data.captures.probes import leak_report
from actial_fast.data.captures.questions import KINDS, OPTIONS
from actial_fast.data.captures.settings import ViewpointConfig

OBJECTS, PAIRS = 50, 5
MOVE, TURN = "ego_translation", "ego_rotation"
CONFIG = ViewpointConfig(seed=1)


def built(out: Path, planted: str = "") -> Path:
    """Rows of 50 objects whose answers are drawn; what is planted tells the move: of the pair, or of the text the letter."""
    rng, draw = np.random.default_rng(0), random.Random(0)
    lines: dict[str, list[dict]] = {"train": [], "test": []}
    for number in range(OBJECTS * PAIRS):
        name = f"car/{number % OBJECTS:02d}"
        move, turn = draw.choice(OPTIONS[MOVE]), draw.choice(OPTIONS[TURN])
        if planted == "order":
            move = OPTIONS[MOVE][number % 3]
        images = []
        for place in (1, 2):
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            if planted == f"image {place}":
                pixels[:, :, OPTIONS[MOVE].index(move)] //= 4
            key = draw.random() if planted != "names" else {"left": 0.2, "no movement": 0.5, "right": 0.8}[move] if place == 2 else 0.5
            images.append(f"{key:.3f}-{number:04d}-{place}.png")
            Image.fromarray(pixels).save(out / images[-1])
        answers = {MOVE: move, "object_translation": move, TURN: turn}
        for kind in KINDS:
            choices = draw.sample(OPTIONS[kind], 3)
            if planted == "text":
                choices = sorted(choices, key=lambda choice: choice != answers[kind])
            letter = "ABC"[choices.index(answers[kind])]
            text = "<image><image>Which?\n" + "\n".join(f"{a}. {choice}" for a, choice in zip("ABC", choices, strict=True))
            asked = [{"role": "user", "content": text}, {"role": "assistant", "content": letter}]
            row = {"messages": asked, "images": images, "truth": letter, "kind": kind, "meta": {"object": name, **answers}}
            lines["test" if number % OBJECTS < 6 else "train"].append(row)
    for split, rows in lines.items():
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("planted", ["", "text", "image 1", "image 2", "order", "names"])
def test_a_planted_shortcut_is_found_and_no_other(tmp_path, planted):
    pytest.importorskip("sklearn")
    report, warnings = leak_report(built(tmp_path, planted), CONFIG)
    assert (report["pairs"], report["objects"]) == (OBJECTS * PAIRS, OBJECTS)
    for name in ("text", "image 1", "image 2", "order", "names"):
        for kind, found in report[name].items():
            told = name == planted and (name == "text" or kind == MOVE)
            if told:
                assert found["accuracy"] > 75, (name, kind, found)
            else:
                assert abs(found["accuracy"] - found["chance"]) < 12, (name, kind, found)
    told = {"text": 3, "image 1": 1, "image 2": 1, "order": 1}.get(planted, 0)
    assert len(warnings) == told and all(warning.startswith(f"{planted} alone: ") for warning in warnings)
    if planted == "image 1":
        assert report[planted][MOVE]["side"] > 85 and 45 < report[planted][MOVE]["side_chance"] < 60
        assert not leak_report(tmp_path, ViewpointConfig(seed=1, max_leak=90))[1], "the bound is the config's"


def test_sets_with_rare_answers_and_with_one_alone_are_looked_at(tmp_path):
    pytest.importorskip("sklearn")
    pairs = probes._pairs(built(tmp_path))
    for cells in ({("left", "right")}, {("left", "right"), ("right", "left")}):
        some = [pair for pair in pairs if pair.answers in cells] + [pair for pair in pairs if pair.answers not in cells][:2]
        found = probes._answers(some, np.zeros((len(some), 2)), probes._network, 0)
        assert found[MOVE]["accuracy"] <= found[MOVE]["chance"] < 100


def test_too_few_objects_are_said_to_be_too_few(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(probes, "FEWEST_OBJECTS", OBJECTS + 1)
    report, warnings = leak_report(built(tmp_path), CONFIG)
    assert report == {"skipped": "250 pairs of 50 objects say nothing for sure; 200 of 51 are needed"} and not warnings


def test_without_scikit_learn_the_report_says_how_to_get_it(tmp_path, monkeypatch):
    find = probes.importlib.util.find_spec
    monkeypatch.setattr(probes.importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    assert leak_report(tmp_path, CONFIG) == ({"skipped": "scikit-learn is not installed: pip install 'actial-fast[probes]'"}, [])
    assert leak_report(tmp_path, ViewpointConfig(probes=False)) == ({"skipped": "probes=false"}, [])
