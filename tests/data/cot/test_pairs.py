"""Chains by pair: how questions become pairs, and how a pair's chain becomes rows again."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from actial_fast.data.captures.questions import rows as questions_of
from actial_fast.data.cot.checking import reasoning
from actial_fast.data.cot.pairs import PAIR, Pairs, viewpoints_only
from actial_fast.data.cot.template import draft, page
from actial_fast.data.cot.writer import one_by_one, rejected_before, unwritten, write_cot
from actial_fast.data.sources.row import BadRow
from actial_fast.data.sources.source import SourceConfig, open_source
from actial_fast.data.sources.tags import tagged_answer
from tests.viewpoint_rows import KINDS, OPPOSITE, lines, pose, viewpoint_rows


@pytest.fixture
def questions(tmp_path):
    """30 questions about ten pairs of one object."""
    rows = viewpoint_rows(tmp_path)
    return [replace(row, meta={**row.meta, "pair": [f"{i // 3}.png", "x.png"]}) for i, row in enumerate(rows)]


def write(row, rng):
    """A true chain."""
    ego, turn = row.meta["ego_translation"], row.meta["ego_rotation"]
    return (
        f"<think>The camera moved to the {ego}. For the object it moved to the {OPPOSITE[ego]}. It rotated to the {turn}.</think>"
        f"<answer>{row.truth}</answer>"
    )


def test_pairs_of_questions(questions):
    pairs = Pairs(questions)
    assert len(pairs) == 10 and viewpoints_only(questions)
    first = pairs[0]
    assert (first.id, first.kind, first.truth, first.images) == ("p0", PAIR, "right, left, left", questions[0].images)
    with pytest.raises(ValueError, match="is no viewpoint row; write chains by question"):
        Pairs([replace(questions[0], meta={})])
    assert not viewpoints_only([replace(questions[0], kind="counting")]) and not viewpoints_only([])


@pytest.mark.parametrize("every", [False, True])
def test_a_chain_is_stored_under_the_questions_of_its_pair(tmp_path, questions, every):
    out = tmp_path / "c.jsonl"
    summary = write_cot(Pairs(questions, seed=3, every=every), out, one_by_one(write), seed=3)
    assert (summary.written, summary.rejected) == (10, {})
    stored = open_source(SourceConfig(str(out)))
    by_id = {row.id: row for row in questions}
    assert len(stored) == (30 if every else 10)
    kinds = Counter()
    for i in range(len(stored)):
        row, asked = stored[i], by_id[stored[i].id]
        kinds[row.kind] += 1
        text = row.turns[-1].content
        assert row.prompt == asked.prompt and row.choices == asked.choices and tagged_answer(text) == asked.truth == row.truth
        said = reasoning(text).splitlines()
        assert said[0].startswith("The camera moved to the") and f'"{asked.meta[asked.kind]}", so the answer is {asked.truth}.' in said[-1]
    assert set(kinds) == set(KINDS)


def test_a_run_by_pair_goes_on(tmp_path, questions):
    out, asked = tmp_path / "c.jsonl", []

    def some(row, rng):
        asked.append(row.id)
        return write(row, rng) if row.id != "p4" else "<think>no</think><answer>left, left, left</answer>"

    pairs = Pairs(questions, seed=1)
    assert write_cot(pairs, out, one_by_one(some), seed=1).rejected == {"wrong answer": 1}
    assert rejected_before(out) == {"p4": ("<think>no</think><answer>left, left, left</answer>", "wrong answer")}
    assert [row.id for row in unwritten(pairs, out, 1)] == ["p4"]
    asked.clear()
    summary = write_cot(pairs, out, one_by_one(write), seed=1)
    assert (summary.kept, summary.written) == (9, 1) and rejected_before(out) == {} and not asked
    ids = [line["id"] for line in lines(out)]
    assert sorted(name.split("/")[0] for name in ids) == sorted(f"p{i}" for i in range(10))


def test_count_draws_pairs(tmp_path, questions):
    assert write_cot(Pairs(questions), tmp_path / "c.jsonl", one_by_one(write), count=4).written == 4
    with pytest.raises(ValueError, match="count is 11, but there are only 10"):
        write_cot(Pairs(questions), tmp_path / "d.jsonl", one_by_one(write), count=11)


def test_a_question_that_contradicts_its_poses_is_rejected(tmp_path, questions):
    wrong = "ABC"[("ABC".index(questions[0].truth) + 1) % 3]
    broken = [replace(row, truth=wrong) if i == 0 else row for i, row in enumerate(questions[:3])]
    summary = write_cot(Pairs(broken, every=True), tmp_path / "c.jsonl", one_by_one(write))
    assert summary.rejected == {"bad row": 1} and lines(tmp_path / "c.jsonl") == []


def test_pairs_where_nothing_moves_and_rows_that_cannot_be_read(tmp_path, questions):
    meta = {
        **pose(),
        "ego_translation": "no movement",
        "object_translation": "no movement",
        "ego_rotation": "no rotation",
        "azimuth_change_deg": 0,
    }
    rows = [replace(row, images=questions[0].images) for row in questions_of({**meta, "yaw_deg": 0.0}, tmp_path, 0)]

    class Source:
        def __len__(self):
            return 4

        def __getitem__(self, i):
            if i == 3:
                raise BadRow("x.jsonl:4", "cut off")
            return rows[i]

    def still(row, rng):
        assert row.truth == "no movement, no movement, no rotation"
        thought = "The camera did not move. From the object's perspective there is no movement. The camera did not rotate."
        return f"<think>{thought}</think><answer>{row.truth}</answer>"

    summary = write_cot(Pairs(Source(), every=True), tmp_path / "c.jsonl", one_by_one(still))
    assert (summary.written, summary.rejected) == (1, {"bad row": 1})
    assert ['"no movement"' in line["messages"][-1]["content"] for line in lines(tmp_path / "c.jsonl")] == [True, True, False]


def test_the_template_of_a_pair_is_drafted_shown_and_checked(tmp_path, questions):
    path, row = tmp_path / "deep" / "t.txt", Pairs(questions)[0]
    draft(path, row, write(row, random.Random(0)).replace("rotated to the left", "rotated to the right"))
    shown, reason = page(path, row)
    html = shown.read_text()
    assert reason.startswith("false statement: the camera's turn is left") and shown == path.with_suffix(".html")
    assert (
        html.count("data:image/png;base64,") == 2
        and '<tr class="false"><td>false</td><td>the camera&#x27;s turn</td><td>right</td>' in html
    )
    assert "http" not in html, "it needs no network"
    path.write_text(path.read_text().replace("rotated to the right", "rotated to the left"))
    shown, reason = page(path, row)
    assert reason is None and "Passes the check" in shown.read_text() and 'class="false"' not in shown.read_text()
    with pytest.raises(ValueError, match="is there already, and may hold corrections"):
        draft(path, row, "x")
    with pytest.raises(ValueError, match="is not about p1"):
        page(path, Pairs(questions)[1])
    path.write_text("<think>a")
    with pytest.raises(ValueError, match="is not about p0"):
        page(path, row)
