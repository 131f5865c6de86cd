"""Tasks as plug-ins: found by name, by module:object and in packages; what of a row reaches them, in every format; what they decide."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actial_fast.data.sources.row import BadRow, Row, Turn
from actial_fast.data.sources.source import SourceConfig, open_source
from actial_fast.data.sources.task import SHIPPED, Observation, Task, Transcript, find_task, replies_of, score_of, task_of
from actial_fast.evaluation.evaluate import evaluate_checkpoint
from actial_fast.evaluation.statistics import render_table
from actial_fast.report.metrics import MetricLog
from actial_fast.report.page import write_report
from actial_fast.settings.idle import idle
from actial_fast.settings.recipe import EvalConfig, SFTRecipe
from actial_fast.tasks.rewards import RewardConfig, score
from actial_fast.train.preflight import problems_of
from tests.loops import ALONE

MODULE = """
from dataclasses import replace
from actial_fast.data.sources.reader import Reader
from actial_fast.data.sources.row import Row, Turn
from actial_fast.data.sources.task import Task

class Lines(Reader):
    kind_keys = ("sort",)
    def row(self, record, where, index):
        return Row((Turn("user", record["ask"]),), kind=record["sort"], where=where, meta={"count": record["count"]}).check()

def share(response, row):
    return min(1, response.count("x") / row.meta["count"])

def louder(row):
    return replace(row, turns=(Turn("user", row.turns[0].content.upper() + " Answer with so many x."),))

def unusable(row):
    raise KeyError("count")

COUNTING = Task(metric=share, reward=lambda response, row: 10 * share(response, row), formed=lambda response, row: set(response) == {"x"},
                prompt=louder, format=__name__ + ":Lines")
SILENT = Task(metric=lambda response, row: None)
PERCENT = Task(metric=lambda response, row: 50)
BROKEN = Task(metric=share, prompt=unusable)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of a user's, and rows in a format that it reads."""
    (tmp_path / "counting_task.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"ask": f"how many {n}?", "sort": "n", "count": n}) + "\n" for n in (1, 2, 4)))
    find_task.cache_clear()
    return path


def test_a_task_of_ones_own(own):
    rows = open_source(SourceConfig(str(own), task="counting_task:COUNTING", system="Count."))
    row = rows[1]
    assert [turn.content for turn in row.turns] == ["Count.", "HOW MANY 2? Answer with so many x."]
    assert row.task == "counting_task:COUNTING" and task_of(row).reward is not None and rows.kind(1) == "n"
    table = score(["x", "xx", "ox"], [row] * 3, [RewardConfig("task"), RewardConfig("format"), RewardConfig("accuracy")])
    np.testing.assert_array_equal(table, [[5, 1, 0], [10, 1, 1], [5, 0, 0]])
    assert [score_of(said, row) for said in ("", "x", "xxx")] == [0, 0.5, 1]


def test_a_row_without_a_task_is_a_question_with_an_answer():
    row = Row((Turn("user", "which? A. left B. right"),), truth="B")
    table = score(["<think>x</think><answer>B</answer>", "(b)"], [row] * 2, [RewardConfig("task"), RewardConfig("format")])
    np.testing.assert_array_equal(table, [[1, 1], [1, 0]])
    assert score_of("B", replace(row, truth="")) is None


@pytest.mark.parametrize(
    "task, problem",
    [
        ("jigsow", "unknown task 'jigsow'; use jigsaw, jigsaw_turns"),
        ("counting_task:NOBODY", "cannot be imported.*PYTHONPATH"),
        ("no_such_module_here:T", "cannot be imported"),
        ("counting_task:share", "is a function, not a Task"),
        (":x", "expected module:object"),
    ],
)
def test_tasks_that_are_none(own, task, problem):
    with pytest.raises(ValueError, match=problem) as error:
        open_source(SourceConfig(str(own), task=task))
    assert "data source" in str(error.value)


@pytest.mark.parametrize("form, problem", [("counting_task:share", "is no Reader"), ("jsnl", "unknown format 'jsnl'; use jsonl, sharegpt")])
def test_formats_that_are_none(own, form, problem):
    with pytest.raises(ValueError, match=problem):
        open_source(SourceConfig(str(own), format=form))


def test_what_a_task_does_wrong_names_the_row(own):
    row = open_source(SourceConfig(str(own), format="counting_task:Lines", task="counting_task:PERCENT"))[0]
    with pytest.raises(ValueError, match=r"lines.jsonl:1: the metric of task 'counting_task:PERCENT' gave 50"):
        score_of("x", row)
    with pytest.raises(BadRow, match=r"lines.jsonl:2: task counting_task:BROKEN: KeyError"):
        _ = open_source(SourceConfig(str(own), format="counting_task:Lines", task="counting_task:BROKEN"))[1]


def test_tasks_rewards_and_formats_of_packages(own, tmp_path):
    info = tmp_path / "counting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[actial_fast.tasks]\ncounting = counting_task:COUNTING\n[actial_fast.rewards]\nmany = counting_task:share\n"
        "[actial_fast.formats]\nlines = counting_task:Lines\n"
    )
    row = open_source(SourceConfig(str(own), format="lines", task="counting"))[2]
    assert score(["xx"], [row], [RewardConfig("many"), RewardConfig("task")]).tolist() == [[0.5, 5.0]]


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
META = {"boxes": [[0, 0, 10, 10], [20, 20, 30, 40]], "note": "two", "level": 3, "none": []}
RECORDS = {
    "jsonl": {"messages": MESSAGES, "meta": META},
    "sharegpt": {"messages": MESSAGES, **META},
    "sharegpt, in one key": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "meta": json.dumps(META)},
    "verl": {"prompt": MESSAGES[:1], "reward_model": {"ground_truth": "a"}, "extra_info": META},
    "verl, beside extra_info": {
        "prompt": MESSAGES[:1],
        "reward_model": {"ground_truth": "a"},
        **META,
        "level": 9,
        "extra_info": {"level": 3, "index": 4},
    },
    "easyr1": {"problem": "q", "answer": "a", **META},
    "sat": {"question": "q", "correct_answer": "a", "answers": ["a", "b"], **META},
}


CONTAINERS = [(name, container) for name in RECORDS for container in ("json", "parquet") if (name, container) != ("jsonl", "parquet")]


@pytest.mark.parametrize("name, container", CONTAINERS)
def test_meta_reaches_tasks_from_every_format(name, container, tmp_path):
    form, record = name.split(",")[0], RECORDS[name]
    path = tmp_path / f"rows.{container}{'l' * (form == 'jsonl' and container == 'json')}"
    if container == "json":
        path.write_text(json.dumps(record if form == "jsonl" else [record]) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([record]), path)
    meta = open_source(SourceConfig(str(path), format=form))[0].meta
    assert {key: meta.get(key) for key in META} == META, meta
    row = open_source(SourceConfig(str(path), format=form, task="boxes"))[0]
    answer = "<think>-</think><look>[0, 0, 10, 10]</look><answer>[0, 0, 10, 10]\n[20, 20, 30, 40]</answer>"
    assert score_of(answer, row) == 1 and task_of(row).formed(answer, row)


def test_columns_beside_extra_info_are_no_options_and_no_ids(tmp_path):
    path = tmp_path / "rows.json"
    record = {**RECORDS["verl"], "extra_info": {"index": 4}, "answers": ["a", "b"], "index": 7.5}
    path.write_text(json.dumps([record]))
    row = open_source(SourceConfig(str(path), format="verl"))[0]
    assert (row.choices, row.id, row.meta["answers"]) == ((), "4", ["a", "b"])
    path.write_text(json.dumps([{**RECORDS["verl"], "extra_info": float("nan")}]))
    assert open_source(SourceConfig(str(path), format="verl"))[0].meta == {}


def test_what_changes_the_meaning_is_still_refused(tmp_path):
    path = tmp_path / "rows.json"
    for record, problem in (
        ({"messages": MESSAGES, "weight": 0.5}, "row has weight"),
        ({"messages": MESSAGES, "extra_info": "x"}, "extra_info is not an object"),
    ):
        path.write_text(json.dumps([record]))
        with pytest.raises(BadRow, match=problem):
            _ = open_source(SourceConfig(str(path), format="sharegpt"))[0]


def test_transcripts_and_observations():
    said = Transcript(("swap 1 2", "done"))
    assert said == "done" and replies_of(said) == ("swap 1 2", "done") and replies_of("x") == ("x",)
    with pytest.raises(ValueError, match="1 <image> tags but 0 images"):
        Observation("<image> look")
    with pytest.raises(ValueError, match="only with an environment"):
        Task(metric=lambda response, row: 1.0, turns=2)
    assert {type(find_task(name)) for name in SHIPPED} == {Task}


def test_an_evaluation_counts_what_the_task_counts(own, tiny, tmp_path):
    """Random replies: what they say is read back from the metric, which gives a share, full marks and None in turn."""
    (tmp_path / "length_task.py").write_text(
        "from actial_fast.data.sources.task import Task\n"
        "MARKS = {'n': 0.25, 'm': 1.0, 'o': None}\n"
        "LENGTH = Task(metric=lambda response, row: MARKS[row.kind], formed=lambda response, row: row.kind == 'n', "
        "format='counting_task:Lines')\n"
    )
    path = tmp_path / "marks.jsonl"
    path.write_text("".join(json.dumps({"ask": f"{n}?", "sort": "nmo"[n % 3], "count": 1}) + "\n" for n in range(6)))
    config = EvalConfig((SourceConfig(str(path), task="length_task:LENGTH"),), max_new_tokens=3)
    (table,) = evaluate_checkpoint(tiny, config).values()
    assert {kind: (f["n"], f["score"], f["accuracy"], f["format_rate"]) for kind, f in table["kinds"].items()} == {
        "n": (2, 0.25, 0, 1),
        "m": (2, 1, 1, 0),
    }
    low, high = table["overall"]["score_interval"]
    assert table["overall"]["score"] == 0.625 and low < 0.625 < high
    assert table["overall"]["partial"] and table["overall"]["majority"] == 0, "rows without a truth have no most frequent one"
    assert "score" in render_table(table) and "62.5" in render_table(table)
    with MetricLog(tmp_path / "run", stage="grpo", total=4, tensorboard=False) as log:
        for step in (0, 4):
            log.event("eval", {"marks": table}, step)
        log.step(4, {"reward": 1.0})
    page = write_report(tmp_path / "run").read_text()
    assert "score</th>" in page and "<b>62.5</b>" in page
    nothing = replace(config, sources=(SourceConfig(str(path), task="counting_task:SILENT", format="counting_task:Lines"),))
    with pytest.raises(ValueError, match="no row has a truth to compare with, or a task that scores it"):
        evaluate_checkpoint(tiny, nothing)


def test_a_recipe_is_checked_with_its_task(own, grpo_recipe, tmp_path):
    source = SourceConfig(str(own), task="counting_task:COUNTING")
    fine = replace(
        grpo_recipe,
        data=replace(grpo_recipe.data, sources=(source,)),
        eval=EvalConfig((source,)),
        rewards=(RewardConfig("task"), RewardConfig("accuracy")),
    )

    def problems(recipe):
        from actial_fast.model.processor import Processor

        return problems_of(recipe, Processor.encode_prompt, lambda *_: (), tmp_path, ALONE)

    assert problems(fine) == []
    wrong = replace(fine, data=replace(fine.data, sources=(replace(source, format="counting_task:Lines", task="counting_task:BROKEN"),)))
    assert any("KeyError" in problem for problem in problems(wrong))


def test_strict_says_nothing_of_tasks():
    sources = (SourceConfig("a.jsonl", task="boxes"), SourceConfig("b.jsonl", task="jigsaw"))
    (line,) = idle(SFTRecipe(eval=EvalConfig(sources, strict=True)))
    assert line.startswith("eval.strict = True has no effect: every source of it has a task")
    assert not list(idle(SFTRecipe(eval=EvalConfig((*sources, SourceConfig("c.jsonl")), strict=True))))
