"""Rewards: the tag grammar, exact answers, unscorable rows, errors that name the row, and no backtracking on hostile text."""

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actial_fast.data.sources.row import Row, Turn
from actial_fast.data.sources.tags import extract_answer, tagged_answer
from actial_fast.tasks.named import accuracy_reward, find_reward, format_reward
from actial_fast.tasks.rewards import DEFAULT_REWARDS, RewardConfig, score

ROW = Row((Turn("user", "which?"), Turn("assistant", "B")), truth="B", where="file.jsonl:7")
OPEN = Row((Turn("user", "describe"),), where="file.jsonl:8")
plain = st.text(alphabet=st.characters(exclude_characters="<>"), max_size=60)
space = st.text(alphabet=" \t\r\n", max_size=4)


@pytest.mark.parametrize(
    "response, formed",
    [
        ("<think>a</think><answer>B</answer>", 1),
        (" \n<THINK>\na\n</Think>\n\n<Answer> B </ANSWER>\n", 1),
        ("<think></think><answer></answer>", 1),
        ("<think>2 < 3 and <b>bold</b></think><answer>B</answer>", 1),
        ("B", 0),
        ("", 0),
        ("<answer>B</answer>", 0),
        ("<think>a</think>", 0),
        ("<think>a</think>B", 0),
        ("so <think>a</think><answer>B</answer>", 0),
        ("<think>a</think> thus <answer>B</answer>", 0),
        ("<think>a</think><answer>B</answer>.", 0),
        ("<think><think>a</think></think><answer>B</answer>", 0),
        ("<think>a</think><think>a</think><answer>B</answer>", 0),
        ("<think>a</think><answer>B</answer><answer>B</answer>", 0),
        ("<think>a<answer>B</answer></think>", 0),
        ("<think>a<answer></think>B</answer>", 0),
        ("<answer>B</answer><think>a</think>", 0),
        ("<thin\u212a>a</thin\u212a><answer>B</answer>", 0),  # the Kelvin sign lower-cases to k
        ("< think>a</think><answer>B</answer>", 0),
    ],
)
def test_format(response, formed):
    assert format_reward(response, ROW) == formed


@given(plain, plain, space, space, space)
def test_format_is_the_grammar(thought, answer, before, between, after):
    response = f"{before}<think>{thought}</think>{between}<answer>{answer}</answer>{after}"
    assert format_reward(response, ROW) == 1
    assert tagged_answer(response) == answer.strip()
    for broken in (response.rstrip()[:-1], "x" + response, response + "x", response.replace("</think>", "</think>x"), response * 2):
        assert format_reward(broken, ROW) == 0


@given(st.text(alphabet="<>/think answer AB", max_size=200))
def test_any_text_scores_0_or_1(response):
    assert {format_reward(response, ROW), accuracy_reward(response, ROW)} <= {0.0, 1.0}
    assert isinstance(extract_answer(response), str)


@pytest.mark.parametrize(
    "response, truth, right",
    [
        ("<think>a</think><answer> b\n</answer>", "B", 1),
        ("no thought <answer>B</answer>", "B", 1),
        ("<answer>Left of the chair</answer>", "left of the chair", 1),
        ("<answer>B.</answer>", "B", 0),
        ("<answer>(B)</answer>", "B", 0),
        ("<answer>A or B</answer>", "B", 0),
        ("B", "B", 0),
        ("<answer>A</answer><answer>B</answer>", "B", 0),
        ("<answer>B</answer><answer>B</answer>", "B", 0),
        ("<answer><answer>B</answer></answer>", "B", 0),
        ("<answer>B", "B", 0),
        ("</answer>B<answer>", "B", 0),
    ],
)
def test_strict_accuracy(response, truth, right):
    assert accuracy_reward(response, Row(ROW.turns, truth=truth), strict=True) == right


@pytest.mark.parametrize(
    "response, answer",
    [
        (" B\n", "B"),
        ("<think>A</think> <answer> B </answer>", "B"),
        ("<answer>A</answer><answer>B</answer>", "<answer>A</answer><answer>B</answer>"),
    ],
)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


def test_score_keeps_unscorable_apart():
    good, bare = "<think>a</think><answer>b</answer>", "B"
    table = score([good, bare, good], [ROW, ROW, OPEN], DEFAULT_REWARDS)
    assert table.dtype == np.float32 and table.shape == (3, 2)
    np.testing.assert_array_equal(table, np.array([[1, 1], [0, 1], [1, math.nan]], np.float32))
    assert [(r.name, r.weight) for r in DEFAULT_REWARDS] == [("format", 0.5), ("accuracy", 0.5)]


def test_own_reward(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_module.py").write_text(
        "def length(response, row): return len(response)\n"
        "def none(response, row): return None\n"
        "def broken(response, row): return response[99]\n"
        "def endless(response, row): return float('inf')\n"
        "def word(response, row): return 'good'\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    table = score(["abc", "abcd"], [ROW, OPEN], [RewardConfig("my_rewards_module:length", 0.1), RewardConfig("my_rewards_module:none")])
    np.testing.assert_array_equal(table, np.array([[3, math.nan], [4, math.nan]], np.float32))
    for name, problem in (("broken", "string index"), ("endless", "inf"), ("word", "good")):
        with pytest.raises(
            ValueError, match=f"my_rewards_module:{name}.*file.jsonl:7.*{problem}|my_rewards_module:{name}.*{problem}.*file.jsonl:7"
        ):
            score(["abc"], [ROW], [RewardConfig(f"my_rewards_module:{name}")])
    for name, problem in (
        ("acuracy", "unknown reward"),
        ("my_rewards_module:lenght", "cannot be imported"),
        ("no_such_module_here:f", "PYTHONPATH"),
        ("my_rewards_module:number", "not a function"),
    ):
        with pytest.raises(ValueError, match=problem):
            find_reward(name)


@pytest.mark.parametrize("piece", ["<think>", "<", "<think>a</think>", " ", "<answer>", "</answer", "<think>\n<answer>"])
def test_hostile_text_takes_linear_time(piece):
    response = "<think>" + piece * (400_000 // len(piece))
    start = time.process_time()
    assert score([response], [ROW]).sum() == 0
    assert time.process_time() - start < 4  # takes a twentieth of it; in quadratic time half a minute and more
