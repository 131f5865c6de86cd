"""Evaluation of what a server serves: its replies by rows, against a server in this process."""

import json
from collections import Counter

import numpy as np
import pytest

from actial_fast.cli.main import main
from actial_fast.data.sources.row import BadRow, Row, Turn
from actial_fast.data.sources.stream import Example
from actial_fast.rollout.client import Client
from actial_fast.rollout.protocol import Draw, Watch, awake
from actial_fast.rollout.server import Rows, Server
from actial_fast.settings.recipe import GRPORecipe, RolloutConfig, SFTRecipe
from tests.conftest import png
from tests.endpoint import server

GREEN = png(np.full((28, 28, 3), 40, np.uint8))


def prompt(question: str = "<image>Which way?", images=(GREEN,)):
    return Rows().encode_prompt(Example(Row((Turn("system", "Be brief."), Turn("user", question)), images), 0))


def config(url: str, **changes) -> RolloutConfig:
    return RolloutConfig(engine="server", url=url, model="m", **changes)


def asking(url: str) -> Server:
    return Server(Client(url, "m"), workers=8)


def test_rows_are_asked_as_messages_and_answered_as_text():
    with server(lambda body, number: (200, {}, f"<answer>{number}</answer>")) as (url, requests), awake(asking(url), 0) as engine:
        told = []
        groups = engine.generate([prompt(), prompt("Left?", ())], Draw(2, 0.5, 33), [(1, 2), (3, 4)], Watch(drawn=told.append))
    assert sorted(reply.text for group in groups for reply in group) == [f"<answer>{i}</answer>" for i in range(1, 5)]
    assert all(reply.finished and (reply.ids == -1).all() and np.isnan(reply.logprobs).all() for group in groups for reply in group)
    assert sorted(i for groups in told for i in groups) == [0, 1]
    assert len({body["seed"] for body in requests}) == 4
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in requests} == {("m", 0.5, 33)}
    kinds = Counter(json.dumps(body["messages"][1]["content"])[:40] for body in requests)
    assert set(kinds.values()) == {2}
    shown = next(body["messages"] for body in requests if not isinstance(body["messages"][1]["content"], str))
    assert shown[0] == {"role": "system", "content": "Be brief."}
    image, text = shown[1]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,") and text == {"type": "text", "text": "Which way?"}


def test_what_was_drawn_before_is_not_asked_and_what_is_not_wanted_is_empty():
    with server(lambda body, number: (200, {}, "A")) as (url, requests), awake(asking(url), 0) as engine:
        have = engine.generate([prompt("Left?", ())], Draw(), [])[0]
        asked = len(requests)
        found = engine.generate([prompt("Left?", ())] * 2, Draw(), [], Watch(have={0: have}))
        assert len(requests) == asked + 1 and found[0] is have and found[1][0].text == "A"
        assert engine.generate([prompt("Left?", ())], Draw(), [], Watch(asked=lambda: True)) == [[]]
        assert engine.generate([prompt("Left?", ())], Draw(), [], Watch(dropped=lambda i: True)) == [[]]


def test_a_server_that_refuses_ends_it_with_its_address():
    with server(lambda body, number: (404, None, "no such model")) as (url, _), awake(asking(url), 0) as engine:
        with pytest.raises(ValueError, match=r"the endpoint http://127.0.0.1:\d+/v1/ refuses model 'm': .*no such model"):
            engine.generate([prompt("Left?", ())], Draw(), [])


def test_an_image_that_cannot_be_read_is_a_bad_row():
    with pytest.raises(BadRow):
        prompt(images=(b"no image",))


def test_the_command_line_evaluates_a_server(lab, tmp_path, capsys):
    """Half of the rows are answered rightly."""
    rows = [json.loads(line) for line in (lab.questions / "test.jsonl").read_text().splitlines()]
    truths = {row["messages"][0]["content"].replace("<image>", "").strip(): row["truth"] for row in rows}
    right: Counter = Counter()

    def answer(body, number):
        text = "".join(part["text"] for part in body["messages"][0]["content"] if part["type"] == "text")
        truth = truths[text]
        right[number % 2] += 1
        return 200, {}, f"<think>so</think><answer>{truth if number % 2 else 'Z'}</answer>"

    questions = lab.questions / "some.jsonl"
    assert len(truths) > 1
    unique = {row["messages"][0]["content"]: row for row in rows}
    questions.write_text("".join(json.dumps(row) + "\n" for row in unique.values()))
    with server(answer) as (url, requests):
        assert main(["eval", "m", str(questions), "--server", url, "--json", str(tmp_path / "out.json")]) == 0
    overall = next(iter(json.loads((tmp_path / "out.json").read_text()).values()))["overall"]
    assert overall["n"] == len(unique) == len(requests) and overall["accuracy"] == pytest.approx(right[1] / len(unique))
    assert "questions/some" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", [SFTRecipe, GRPORecipe])
def test_no_loop_takes_its_replies_from_a_server(recipe):
    with pytest.raises(ValueError, match=r"rollout.engine: a server keeps the weights that it was started with.*embedded or vllm here"):
        recipe(rollout=config("http://localhost:8000/v1"))


def test_a_server_without_address_is_refused():
    with pytest.raises(ValueError, match="server needs url and model"):
        RolloutConfig(engine="server")
