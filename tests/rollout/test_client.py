"""What servers call a reply: told apart, joined, counted."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openai")
from actial_fast.rollout import client
from actial_fast.rollout.client import Answer, Client, NoCompletion, Unanswered, Used, answer_of, data_url, parts
from tests.conftest import png
from tests.endpoint import server

CHAIN, ANSWER = "It went to the right.", "<answer>B</answer>"
WHOLE = f"<think>{CHAIN}</think>\n{ANSWER}"


def ask(url: str, **options) -> Answer:
    return Client(url, "m", timeout=2.0, **{"retries": 0, **options}).ask([{"role": "user", "content": "?"}], temperature=1.0, seed=0)


def message(**fields) -> dict:
    return {"message": {"role": "assistant", **fields}}


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (message(content=WHOLE), WHOLE),
        (message(content=ANSWER, reasoning_content=CHAIN), WHOLE),
        (message(content=f"\n{ANSWER} ", reasoning=f"{CHAIN}\n"), WHOLE),
        (message(content=ANSWER, reasoning_content="", reasoning=CHAIN), WHOLE),
        (message(content=WHOLE, reasoning_content="They told me: B."), WHOLE),
        (message(content=f"{CHAIN}</think>\n{ANSWER}"), WHOLE),
        (message(content=[{"type": "text", "text": WHOLE[:9]}, {"type": "text", "text": WHOLE[9:]}]), WHOLE),
        (message(content=[{"type": "thinking", "thinking": [{"type": "text", "text": CHAIN}]}, {"type": "text", "text": ANSWER}]), WHOLE),
        (message(content=[WHOLE]), WHOLE),
        (message(content=None), ""),
        (message(content=None, reasoning_content=CHAIN), f"<think>{CHAIN}</think>\n"),
        (message(content=WHOLE, tool_calls=[]), WHOLE),
    ],
)
def test_reasoning_and_parts_are_joined(choice, text):
    with server(lambda body, n: (200, {}, choice)) as (url, _):
        answer = ask(url)
    assert (answer.text, answer.finished, answer.why) == (text, True, "")


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        (message(content=None, refusal="I cannot help with that."), "refused: I cannot help with that."),
        (message(content=[{"type": "refusal", "refusal": "No."}]), "refused: No."),
        ({**message(content=""), "finish_reason": "content_filter"}, "stopped by a content filter"),
        (
            {**message(content=None, tool_calls=[{"id": "1", "type": "function", "function": {"name": "zoom", "arguments": "{}"}}])},
            'a tool call instead of text: [{"function": {"arguments": "{}", "name": "zoom"}, "id": "1", "type": "function"}]',
        ),
        (
            message(content=None, function_call={"name": "zoom", "arguments": "{}"}),
            'a tool call instead of text: [{"arguments": "{}", "name": "zoom"}]',
        ),
    ],
)
def test_what_is_no_text_says_why(choice, why):
    with server(lambda body, n: (200, {}, choice)) as (url, _):
        answer = ask(url)
    assert answer.text == "" and answer.why.startswith(why)


@pytest.mark.parametrize(("reason", "finished"), [("length", False), ("stop", True), (None, True)])
def test_a_limit_is_told(reason, finished):
    with server(lambda body, n: (200, {}, {**message(content="<think>It"), "finish_reason": reason})) as (url, _):
        assert ask(url).finished is finished


@pytest.mark.parametrize(
    ("headers", "body", "says"),
    [
        ({}, b"<html>busy</html>", "JSONDecodeError"),
        ({"Content-Type": "text/html"}, b"<html>busy</html>", "no chat completion: '<html>busy"),
        ({}, b'{"id": "x", "choices": [{"ind', "JSONDecodeError"),
        ({}, b"", "JSONDecodeError"),
        ({}, b"[]", "no chat completion"),
        ({}, b'{"choices": []}', "no chat completion"),
        ({}, b'{"error": {"message": "overloaded"}}', 'no chat completion: {"message": "overloaded"}'),
    ],
)
def test_what_is_no_completion_costs_its_question_only_and_is_tried_again(monkeypatch, headers, body, says):
    monkeypatch.setattr(client, "PAUSE", 0.0)
    with server(lambda asked, n: (200, headers, body)) as (url, requests), pytest.raises(Unanswered, match=says):
        ask(url, retries=2)
    assert len(requests) == 3
    with server(lambda asked, n: (200, headers, body) if n == 1 else (200, {}, WHOLE)) as (url, requests):
        assert ask(url, retries=1).text == WHOLE


def test_a_model_that_wants_the_limit_by_its_new_name_gets_it():
    def answer(body, n):
        return (400, {}, "use 'max_completion_tokens' instead") if "max_tokens" in body else (200, {}, WHOLE)

    with server(answer) as (url, requests):
        one = Client(url, "m", retries=0)
        for _ in range(2):
            assert one.ask([], temperature=1.0, seed=0, max_tokens=9).text == WHOLE
    assert [body.get("max_completion_tokens") for body in requests] == [None, 9, 9]


def test_blanks_between_images_are_sent_unless_the_server_wants_none():
    images = (png(np.zeros((2, 2, 3), np.uint8)),) * 2
    asked = [{"role": "system", "content": " "}, {"role": "user", "content": parts("<image>\n<image>  Which?\n", images, "row")}]

    def answer(body, n):
        blank = any(not part.get("text", "x").strip() for part in body["messages"][1]["content"])
        return (400, {}, "text blocks must contain non-whitespace text") if blank and picky else (200, {}, WHOLE)

    for picky in (False, True):
        with server(answer) as (url, requests):
            one = Client(url, "m", retries=0)
            assert all(one.ask(asked, temperature=1.0, seed=0).text == WHOLE for _ in range(2))
        sent = [[part.get("text") for part in body["messages"][1]["content"]] for body in requests]
        whole, bare = [None, "\n", None, "  Which?\n"], [None, None, "  Which?\n"]
        assert sent == ([whole, bare, bare] if picky else [whole, whole])
        assert all(body["messages"][0]["content"] == " " for body in requests)


def test_what_is_used_is_counted():
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    with server(lambda body, n: (200, {}, {**message(content="B"), "usage": usage if n < 3 else None})) as (url, _):
        one = Client(url, "m")
        for _ in range(3):
            one.ask([], temperature=1.0, seed=0)
    assert one.used == Used(3, 200, 14)


def test_a_completion_out_of_a_file():
    body = {
        "choices": [{"message": {"content": ANSWER, "reasoning_content": CHAIN}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3},
    }
    assert answer_of(body) == Answer(WHOLE, 0, True, read=3)
    with pytest.raises(NoCompletion):
        answer_of(None)


def test_large_images_are_scaled_down_and_small_ones_sent_as_they_are():
    Image.fromarray(np.full((30, 60, 3), 90, np.uint8)).save(buffer := io.BytesIO(), "PNG")
    assert data_url(buffer.getvalue(), "", 1800) == data_url(buffer.getvalue(), "")
    head, data = data_url(buffer.getvalue(), "", 1799).split(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/jpeg;base64" and picture.size == (59, 29)
