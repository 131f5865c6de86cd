"""Options and kinds read from questions: the paper's released rows, SAT in verl's and its own two forms."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actial_fast.data.captures.questions import QUESTIONS
from actial_fast.data.captures.settings import ViewpointConfig
from actial_fast.data.sources.asked import lettered, offered, viewpoint_kind
from actial_fast.data.sources.row import BadRow
from actial_fast.data.sources.source import SourceConfig, open_source
from actial_fast.evaluation.statistics import Record, accuracy_table

STAY = "Nothing moved but the camera between these two photos."
END = "Select the correct option, please output only the letter!"
RELEASED = {  # kind -> (question, options), after the paper's Figure A3
    "ego_translation": (
        "From the camera's perspective, did the position of the second photo's camera move relative to that of the first photo's?",
        ("Move to the left", "Move to the right", "No movement"),
    ),
    "object_translation": (
        "From the object's perspective, did the position of the second photo's camera move relative to that of the first photo's?",
        ("Move to the right", "No movement", "Move to the left"),
    ),
    "ego_rotation": (
        "From the camera's perspective, did the orientation of the second photo's camera rotate relative to that of the first photo's?",
        ("No rotation", "Rotate to the right", "Rotate to the left"),
    ),
}


def released(kind, between=" ", answer="B"):
    question, options = RELEASED[kind]
    offer = between.join(f"{letter}: {option}" for letter, option in zip("ABC", options, strict=True))
    return {
        "messages": [
            {"role": "user", "content": f"<image><image>{STAY} {question}{between}{offer}{between}{END}"},
            {"role": "assistant", "content": answer},
        ],
        "images": ["1.jpg", "2.jpg"],
    }


@pytest.mark.parametrize("between", [" ", "\n"])
@pytest.mark.parametrize("table", [False, True])
def test_the_released_rows_have_kinds_choices_and_a_chance(tmp_path, between, table):
    rows = [released(kind, between) for kind in RELEASED] + [
        released("ego_rotation", between, "<think>It turned.</think><answer>C</answer>")
    ]
    path = tmp_path / ("train.parquet" if table else "train.json")
    pq.write_table(pa.Table.from_pylist(rows), path) if table else path.write_text(json.dumps(rows))
    source = open_source(SourceConfig(str(path)))
    for n, kind in enumerate([*RELEASED, "ego_rotation"]):
        row = source[n]
        assert (row.kind, source.kind(n), row.choices, row.truth) == (kind, kind, RELEASED[kind][1], "C" if n == 3 else "B")
    only = open_source(SourceConfig(str(path), kinds=("ego_rotation",)))
    assert len(only) == 2
    table_ = accuracy_table([Record(row.kind, True, True, 1, row.truth, len(row.choices)) for row in source])
    assert table_["overall"]["chance"] == pytest.approx(1 / 3)


def test_a_kind_that_is_named_comes_first_and_others_are_none():
    assert viewpoint_kind("Which colour is the cup?") == viewpoint_kind("From the camera's perspective, which is nearer?") == ""
    for kind, (question, _) in RELEASED.items():
        assert viewpoint_kind(f"<image>\n<image>\n{question}") == kind
    for kind, wordings in QUESTIONS.items():  # our own rows name theirs; where a wording is understood, it is understood rightly
        assert {viewpoint_kind(wording) for wording in wordings} <= {kind, ""}


@pytest.mark.parametrize(
    ("question", "truth", "options"),
    [
        ("Which?\nA. left\nB. right", "A", ("left", "right")),
        ("Which?\n(A) left\n(B) right", "right", ("left", "right")),
        ("Which? A: left, B: right, C: up", "c", ("left", "right", "up")),
        ("Which?\nA. left\nB. right", "C", ()),
        ("How did it move? Choose between the following options: left or right.", "left", ("left", "right")),
        ('How? Choose between the following options: "moved left" or "moved right".', "moved right", ("moved left", "moved right")),
        ("How?\nAnswer with one of these options: left, right or it stayed", "it stayed", ("left", "right", "it stayed")),
        ("How? Options: left, right, or back", "up", ()),
        ("How many cups are there?", "3", ()),
    ],
)  # fmt: skip
def test_options_that_a_question_offers(question, truth, options):
    assert offered(question, [truth]) == options


def test_what_is_asked_behind_the_last_option_is_none_of_it():
    assert lettered("Q A: x B: y Please answer with the option letter.") == ("x", "y")
    assert lettered("Q A: select it B: choose it") == ("select it", "choose it")


def verl_row(question, **changes):
    return {
        "data_source": "sat",
        "ability": "",
        "prompt": [{"role": "user", "content": question}],
        "images": [],
        "reward_model": {"style": "rule", "ground_truth": "left"},
        "extra_info": {"index": 0, "split": "train"},
        **changes,
    }


def test_verl_rows_have_kinds_and_choices(tmp_path):
    rows = [
        verl_row("How did it move? Choose between the following options: left or right."),
        verl_row(
            "Where?", extra_info={"index": 1, "split": "train", "question_type": "ego_movement", "choices": ["left", "right", "back"]}
        ),
        verl_row("Where?"),
    ]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(SourceConfig(str(tmp_path / "v.jsonl")))
    assert [(row.kind, len(row.choices)) for row in source] == [("sat", 2), ("ego_movement", 3), ("sat", 0)]
    assert [source.kind(n) for n in range(3)] == ["sat", "ego_movement", "sat"]


def sat_row(index, **changes):
    return {
        "image_bytes": [b"x"],
        "question": "Where?",
        "answers": ["left", "right"],
        "correct_answer_idx": index,
        "question_type": "t",
        **changes,
    }


def test_sat_by_the_answers_number(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    rows = [
        sat_row(1, image_bytes=["a.png"]),
        sat_row(2, image_bytes=["a.png"]),
        sat_row(None, image_bytes=["a.png"]),
        sat_row(0.0, image_bytes=["a.png"]),
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(SourceConfig(str(tmp_path / "s.jsonl")))
    assert (source[0].truth, source[3].truth) == ("right", "left")
    for n, reason in ((1, "correct_answer_idx is 2; there are 2 choices, counted from 0"), (2, "empty answer")):
        with pytest.raises(BadRow, match=reason):
            source[n]


def test_our_questions_ask_for_the_letter_by_default():
    assert ViewpointConfig().ask_letter
