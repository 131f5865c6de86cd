"""Small parts of benchmark runs: questions without their options, tables, names of models, pictures for a server."""

import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from actial_fast.data.sources.content import content
from actial_fast.data.sources.picture import smaller
from actial_fast.evaluation.export import stem
from actial_fast.evaluation.identity import identity, label
from actial_fast.evaluation.items import Item
from actial_fast.evaluation.replies import Folder, append
from actial_fast.evaluation.run import Progress, duration, slug
from actial_fast.evaluation.scoring import guess, majority
from actial_fast.evaluation.tables import Table, as_latex, as_markdown, as_text
from tests.conftest import png


def item(prompt: str, options: tuple[str, ...] = ("left", "right"), **changes: object) -> Item:
    return Item("1", prompt, (), "A", options, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("<image><image>Where?\nA. left\nB. right", "Where?"),
        ("<image>\nQuestion: Where?\nOptions:\nA. left\nB. right\nPlease select the correct answer.", "Where?"),
        ("Where? (A) left (B) right Answer with the letter.", "Where?"),
        ("Where? A: left B: right Select the correct option!", "Where?"),
        ("Where?\nOptions: A: left, B: right", "Where?"),
        ("Where? Select from the following choices.\n(A) left\n(B) right", "Where?"),
        ("Where? Choose between the following options: left or right.", "Where?"),
        ("Is it A. or B.? <image> or <image>\n(A) left\n(B) right", "Is it A. or B.? image 1 or image 2"),
        ("<image>\nCompare with <image>.\nA. left\nB. right", "Compare with image 2."),
        ("Which way? <image><image>\nA. left\nB. right", "Which way?"),
        ("Where is left?", "Where is left?"),
    ],
)
def test_a_question_without_its_options(prompt, question):
    assert stem(item(prompt)) == question


def test_a_table_in_three_forms():
    table = Table("T & t", ("figure_a", "50%"), (("a|b", "1.0"), ("longer", "–")), ("note #1",))
    lines = as_text(table).splitlines()
    assert lines[0] == "T & t" and lines[-1] == "note #1" and lines[1].split() == ["figure_a", "50%"]
    assert "| a\\|b | 1.0 |" in as_markdown(table) and "| --- | ---: |" in as_markdown(table)
    latex = as_latex(table)
    assert r"figure\_a & 50\% \\" in latex and r"\caption{T \& t}" in latex and r"longer & -- \\" in latex and r"note \#1" in latex


def test_guessing_and_the_usual_answer():
    items = [item("q", options, category="c") for options in (("left", "right"), ("right", "left"), ("left", "right", "no"))]
    assert [guess(i) for i in items] == [1 / 2, 1 / 2, 1 / 3] and majority(items) == [1, 0, 1], "by text, not by letter"
    assert guess(Item("1", "q", (), "yes", form="yes-no")) == 0.5 and guess(Item("1", "q", (), "3", form="number")) == 0


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/actial-7b/grpo/final/model", "actial-7b/grpo"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("/models/mine", "models/mine"),
        ("model", "model"),
    ],
)
def test_what_a_model_is_called(path, name):
    assert label(path) == name and "/" not in slug(name)


def test_a_copy_is_the_same_model_and_a_changed_weight_another(tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "run" / "stage" / "final" / "model")
    (tmp_path / "run" / "stage" / "step-000070").mkdir()
    (tmp_path / "run" / "stage" / "step-000070" / "state.json").write_text("{}")
    before = identity(str(tiny))
    assert identity(str(copy)) == {"path": str(copy), "content": before["content"], "step": 70} and before["step"] is None
    weights = next(copy.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert identity(str(copy))["content"] != before["content"]


def test_a_large_file_is_told_by_its_content_alone_where_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("actial_fast.data.sources.content.SMALL", 1 << 10)
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(os.urandom(1 << 17))
    shutil.copyfile(one, other)
    assert content(one) != content(other) and content(one, here=False) == content(other, here=False)


def test_a_picture_for_a_server_keeps_its_shape_below_the_cap():
    data = png(np.zeros((40, 90, 3), np.uint8))
    assert smaller(data, "row", 3600) is None
    made = smaller(data, "row", 900)
    assert made is not None and Image.open(io.BytesIO(made)).size == (45, 20)


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (720, "12 min"), (12600, "3.5 h")])
def test_time_left(seconds, text):
    assert duration(seconds) == text


def test_progress_tells_what_is_done_how_fast_and_how_long_it_takes(tmp_path, monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr("actial_fast.evaluation.run.time.monotonic", lambda: clock[0])
    folder = Folder(tmp_path)
    append(tmp_path / "replies.jsonl", [{"id": str(k)} for k in range(10)])
    progress = Progress("Set, model", 100, folder, enabled=True)
    progress.look(50)
    assert capsys.readouterr().err == "", "not before ten seconds"
    append(tmp_path / "replies.rank1.jsonl", [{"id": str(k)} for k in range(10, 30)])
    clock[0] += 10
    progress.look(150)
    told = "Set, model: 30 of 100 replies, 2.0 a second, 20 tokens a second on this rank, 35 s left\n"
    assert capsys.readouterr().err == told
    Progress("Set, model", 100, folder, enabled=False).look(1)
    assert capsys.readouterr().err == ""
