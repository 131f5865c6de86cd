"""examples/judge_reward.py against a server on this machine, as a recipe would use it."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from actial_fast.data.sources.row import Row, Turn
from actial_fast.tasks import calls
from actial_fast.tasks.rewards import RewardConfig, Scorer, probe
from tests.endpoint import server

pytest.importorskip("openai")
ROOT = Path(__file__).parents[2]
ROW = Row((Turn("system", "Be brief."), Turn("user", "Which way?"), Turn("assistant", "B")), truth="B", where="file.jsonl:7")
JUDGE = RewardConfig("judge_reward:judge", workers=32, timeout=10.0, on_error="nan", max_failures=0.3)


@pytest.fixture(autouse=True)
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(calls, "FIRST_PAUSE", 0.002)
    monkeypatch.setenv("JUDGE_MODEL", "m")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    yield
    sys.modules.pop("judge_reward", None)


def test_the_judge_is_asked_side_by_side_and_its_marks_are_rewards(monkeypatch):
    """After a preflight whose connections are still open, and with a server that answers only when all 16 replies have come."""
    together = threading.Barrier(16, timeout=9.0)

    def answer(body, number):
        text = body["messages"][0]["content"]
        if "dashes" in text and "reply " in text:
            if number <= 2 + 16:
                together.wait()
            return 200, {}, f" {text.split('reply ')[-1].split()[0]}\n"
        return 200, {}, "10"

    with server(answer) as (url, requests):
        monkeypatch.setenv("JUDGE_URL", url)
        assert probe([JUDGE], ROW) == [] and len(requests) == 2
        with Scorer([JUDGE]) as scorer:
            scorer.submit("x", [f"reply {i % 11} ." for i in range(16)], ROW)
            scores = scorer.results()
    np.testing.assert_allclose(scores.groups["x"][:, 0], [i % 11 / 10 for i in range(16)], rtol=1e-6)
    assert sys.modules["judge_reward"].client.cache_info().misses == 1, "one client, and so its connections, for preflight and run"
    text = requests[0]["messages"][0]["content"]
    assert "Which way?" in text and "Right answer: B" in text and "Be brief." not in text
    assert requests[0]["model"] == "m" and requests[0]["temperature"] == 0


def test_busy_servers_and_replies_that_are_no_mark_are_tried_again_and_then_counted(monkeypatch):
    tries = {}

    def answer(body, number):
        text = body["messages"][0]["content"]
        reply = text.split("reply ")[-1].split()[0]
        tries[reply] = tries.get(reply, 0) + 1
        if reply == "never":
            return 200, {}, "11"
        return [(500, {}, "busy"), (200, {}, "seven"), (200, {}, "7")][tries[reply] - 1]

    with server(answer) as (url, _):
        monkeypatch.setenv("JUDGE_URL", url)
        with Scorer([JUDGE]) as scorer:
            scorer.submit("x", ["reply a .", "reply b .", "reply c .", "reply never ."], ROW)
            scores = scorer.results()
    np.testing.assert_allclose(scores.groups["x"][:, 0], [0.7, 0.7, 0.7, np.nan], rtol=1e-6)
    assert scores.failed == (1,) and "row 'file.jsonl:7': ValueError: no mark from 0 to 10: '11' (3 tries)" in scores.causes[0]


def test_the_preflight_tells_that_no_judge_is_there(monkeypatch):
    monkeypatch.delenv("JUDGE_URL", raising=False)
    assert "KeyError: 'JUDGE_URL'" in probe([JUDGE], ROW)[0]
    monkeypatch.setenv("JUDGE_URL", "http://127.0.0.1:9/v1")
    assert "APIConnectionError" in probe([JUDGE], ROW)[0]
