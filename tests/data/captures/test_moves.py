"""The balanced composition: nines of pairs whose answers the true cameras give, of which one photograph tells nothing."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from actial_fast.data.captures.capture import read_capture
from actial_fast.data.captures.moves import CELLS, MIRROR, NINE, name_of, pairs
from actial_fast.data.captures.questions import KINDS, OPTIONS, PRESUMING, reverse, rows
from actial_fast.data.captures.settings import ViewpointConfig
from actial_fast.data.captures.viewpoint import NO_PAIR, build
from tests.data.captures.test_viewpoint import around, eye, read_rows, true_sides, write_capture

BALANCED = {"composition": "balanced", "workers": 1, "probes": False}
SIDE = {"left": -1, "right": 1, "no movement": 0, "no rotation": 0}


def panned(pose, degrees):
    """The camera turned about the true vertical (+z) on the spot, counterclockwise."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = pose[0] @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    return turn, -turn @ eye(pose)


def shots(rng, places, pans=(0, 0, 12, -12, 24, -24), step=12.0, scatter=0.4):
    """From each place (degrees) photographs in directions that are the same, in steps, all along the walk, give or take the scatter."""
    out = []
    for pose in around(rng, places, aim=0.02):
        heading = np.degrees(np.arctan2(pose[0][2, 1], pose[0][2, 0]))
        to_lattice = round(heading / step) * step - heading
        out += [panned(pose, to_lattice + pan + rng.uniform(-scatter, scatter)) for pan in pans]
    return out


def truths(one, two):
    """The answers of two true cameras; AssertionError where one of them is not clear."""
    step = np.linalg.norm(eye(two) - eye(one)) / np.linalg.norm(eye(one))
    turn = (np.degrees(np.subtract(*(np.arctan2(pose[0][2, 1], pose[0][2, 0]) for pose in (two, one)))) + 180) % 360 - 180
    assert step < 0.03 or step > 0.09, step
    assert abs(turn) < 3 or abs(turn) > 9, turn
    sides = true_sides(one, two)
    moved, turned = step > 0.05, abs(turn) > 5
    none = {"ego_translation": moved, "object_translation": moved, "ego_rotation": turned}
    return {kind: sides[kind] if none[kind] else OPTIONS[kind][2] for kind in KINDS}


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """A ring and two arcs in which every place has six shots, and an ordinary walk; (root, {object: true poses})."""
    root, rng, truth = tmp_path_factory.mktemp("walks"), np.random.default_rng(3), {}
    for name, arc, count in (("a/ring", 360, 30), ("a/arc", 180, 18), ("b/arc", 120, 12)):
        places = rng.uniform(0, 360) + (np.arange(count) + rng.uniform(0, 0.5, count)) * arc / count
        truth[name] = write_capture(root / name, rng, shots(rng, places), focal=55.0)
    truth["b/walk"] = write_capture(root / "b/walk", rng, around(rng, np.arange(0, 360, 15)))
    return root, truth


@pytest.mark.parametrize("name", ["a/ring", "a/arc", "b/arc"])
@pytest.mark.parametrize("anchor", ["first", "either"])
def test_nines_have_every_answer_once_and_all_are_true(walks, name, anchor):
    capture = read_capture(walks[0] / name, walks[0])
    found = pairs(capture, ViewpointConfig(pairs_per_object=100, anchor=anchor, **BALANCED))
    assert len(found) >= 2 * NINE and len(found) % NINE == 0
    assert len({frozenset(pair["pair"]) for pair in found}) == len(found), "no pair twice"
    shared = Counter()
    for nine in (found[i : i + NINE] for i in range(0, len(found), NINE)):
        place = 0 if len({pair["pair"][0] for pair in nine}) == 1 else 1
        shared[place] += 1
        assert len({pair["pair"][place] for pair in nine}) == 1 and len({pair["pair"][1 - place] for pair in nine}) == NINE
        cells = {(SIDE[pair["ego_translation"]], SIDE[pair["ego_rotation"]]): pair for pair in nine}
        assert sorted(cells) == sorted(CELLS)
        for (move, turn), pair in cells.items():
            one, two = (walks[1][name][int(image[:3])] for image in pair["pair"])
            assert {kind: pair[kind] for kind in KINDS} == truths(one, two)
            assert pair["move"] == name_of(move, turn)
            angle = abs(pair["azimuth_change_deg"] if move else pair["yaw_deg"])
            partner = abs(cells[-move, -turn]["azimuth_change_deg" if move else "yaw_deg"])
            assert abs(angle - partner) <= MIRROR
            if pair["move"] == "walk":
                assert 20 <= angle <= 100
            assert pair["centre"][place]
    assert bool(shared[1]) == (anchor == "either") and shared[0]


def test_the_other_order_of_a_pair_is_true_too(walks):
    for pair in pairs(read_capture(walks[0] / "a/arc", walks[0]), ViewpointConfig(pairs_per_object=36, **BALANCED)):
        back = reverse(pair)
        one, two = (walks[1]["a/arc"][int(image[:3])] for image in back["pair"])
        assert {kind: back[kind] for kind in KINDS} == truths(one, two) and reverse(back) == pair


def test_thresholds_of_none_are_obeyed(walks):
    capture = read_capture(walks[0] / "a/ring", walks[0])
    for pair in pairs(capture, ViewpointConfig(pairs_per_object=45, max_still_yaw=0.5, min_yaw=20, **BALANCED)):
        assert abs(pair["yaw_deg"]) <= 0.5 if pair["ego_rotation"] == "no rotation" else abs(pair["yaw_deg"]) >= 20


def test_the_centre_is_where_both_ways_are_open(walks):
    """On an arc, from the true places: a camera near its end cannot have gone that far beyond it, and from amid it there is nearly always
    another pair that did."""
    name, poses = "a/arc", walks[1]["a/arc"]
    bearing = np.unwrap([np.arctan2(*eye(pose)[[1, 0]]) for pose in poses[::6]])
    low, high = np.degrees([bearing.min(), bearing.max()])
    found = pairs(read_capture(walks[0] / name, walks[0]), ViewpointConfig(pairs_per_object=500, max_angle=90, probes=False))
    counted = Counter()
    for pair in found:
        for place, sign in ((0, 1), (1, -1)):
            here = np.degrees(bearing[int(pair["pair"][place][:3]) // 6])
            beyond = here - sign * pair["azimuth_change_deg"]
            inside = min(beyond - low, high - beyond)
            if abs(inside) > MIRROR + 12:  # further from the ends than partners may be off and places are apart
                assert inside > 0 or not pair["centre"][place], (pair["pair"], here, beyond)
                counted[inside > 0, pair["centre"][place]] += 1
    assert counted[False, False] > 50 and counted[True, True] > 50 and counted[True, True] > 9 * counted[True, False], counted


def test_a_build_is_even_and_says_what_is_in_it(walks, tmp_path):
    config = ViewpointConfig(pairs_per_object=27, test_examples=40, max_test_fraction=0.4, **BALANCED)
    summary = build(walks[0], tmp_path, config, progress=False)
    assert {name: part.split("(")[0].split(": ")[1].strip() for name, part in summary["rejected_captures"].items()} == {"b/walk": NO_PAIR}
    train, test, centre = (read_rows(tmp_path / f"{name}.jsonl") for name in ("train", "test", "test-centre"))
    assert len(train) == 3 * 54 and len(test) == 40 and len(centre) == summary["centre_examples"] == 40
    for kind in KINDS:
        counts = Counter(row.meta[kind] for row in train if row.kind == kind)
        assert set(counts.values()) == {18} and set(counts) == set(OPTIONS[kind])
        assert summary["balance"]["train"][kind] == counts
    strata = summary["strata"]["train"]
    assert strata["turn_follows_move"] == 0.5 and strata["move"] == {"away": 12, "pan": 12, "static": 6, "strafe": 12, "walk": 12}
    assert sum(strata["angle_deg"].values()) == 36 and sum(strata["class"].values()) == 54
    assert not {row.meta["object"] for row in train} & {row.meta["object"] for row in test}
    asked = [row.turns[0].content for row in train]
    assert not any(text in question for text in PRESUMING for question in asked), "no question takes a move for granted"
    assert summary["probes"] == {"skipped": "probes=false"} and not summary["warnings"]
    before = (tmp_path / "train.jsonl").read_bytes()
    assert build(walks[0], tmp_path, config, progress=False)["captures_reused"] == 4
    assert (tmp_path / "train.jsonl").read_bytes() == before


def test_classes_are_in_both_splits_by_their_shares(tmp_path):
    from actial_fast.data.captures.split import split

    good = {
        f"{kind}/{n}": [{"object": f"{kind}/{n}"}] * NINE for kind, count in (("car", 60), ("pot", 20), ("chair", 20)) for n in range(count)
    }
    taken = split(good, ViewpointConfig(max_test_fraction=0.1, **BALANCED), tmp_path)
    assert Counter(name.split("/")[0] for name in {pair["object"] for pair in taken["test"]}) == {"car": 6, "pot": 2, "chair": 2}


def test_rows_of_a_pair_that_stays(walks, tmp_path):
    pair = next(p for p in pairs(read_capture(walks[0] / "a/arc", walks[0]), ViewpointConfig(**BALANCED)) if p["move"] == "static")
    for row in rows(pair, tmp_path, 0, presuming=False):
        assert row.choices["ABC".index(row.truth)] == OPTIONS[row.kind][2]
        assert json.loads(json.dumps(row.to_json(tmp_path)))["meta"]["move"] == "static"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"composition": "v3"}, "composition='v3'; expected 'paper' or 'balanced'"),
        ({"anchor": "second"}, "anchor='second'"),
        ({"crops": 0.5}, "crops=0.5: .* composition=balanced only"),
        ({"anchor": "either"}, "anchor=either: .* composition=balanced only"),
        ({"max_still_yaw": 1.0}, "max_still_yaw=1.0: .* composition=balanced only"),
        ({"max_leak": 9.0, "probes": False}, "max_leak=9.0: .* probes=true only"),
        ({"crops": 1.0, "composition": "balanced"}, "crops=1.0"),
        ({"max_still_yaw": 10.0, "composition": "balanced"}, "max_still_yaw"),
        ({"max_still_translation": 0.2, "composition": "balanced"}, "max_still_translation"),
        ({"max_leak": -1.0}, "max_leak"),
    ],
)
def test_mistakes_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        ViewpointConfig(**wrong)
