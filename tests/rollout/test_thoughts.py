"""Chains of thought from a model: what it is asked, when it is asked again, and that none is lost on the way from a server."""

import base64
import io
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openai")
from actial_fast.cli.main import main
from actial_fast.data.cot import writer as cot
from actial_fast.data.cot.asking import TEMPLATE
from actial_fast.data.cot.checking import check_cot
from actial_fast.data.cot.writer import write_cot
from actial_fast.data.sources.row import Row
from actial_fast.rollout import client
from actial_fast.rollout.client import Client
from actial_fast.rollout.protocol import Draw, Reply
from actial_fast.rollout.server import Rows, Server
from actial_fast.rollout.thoughts import EngineWriter
from tests.endpoint import server
from tests.viewpoint_rows import lines, viewpoint_rows


@pytest.fixture
def captures(tmp_path) -> list[Row]:
    return viewpoint_rows(tmp_path)


SOON = {"retry-after-ms": "5"}


def told(body: dict) -> str:
    """The true answer as the request tells it to the model."""
    return body["messages"][1]["content"][-1]["text"].rpartition("The right answer is: ")[2]


def good(body: dict) -> tuple:
    return 200, {}, f"<think>More of one flank shows.</think>\n<answer>{told(body)}</answer>"


def ask(url: str, *, timeout: float = 5.0, retries: int = 3, temperature: float = 1.0, workers: int = 4, **options) -> EngineWriter:
    engine = Server(Client(url, "m", timeout=timeout, retries=retries), workers)
    return EngineWriter(engine, Rows(), Draw(temperature=temperature, max_new_tokens=0), **options)


def write_one(writer: EngineWriter, row: Row) -> str:
    written: dict = {}
    writer([row], [random.Random(0)], written.__setitem__)
    return written.pop(0)


def test_endpoint_request(tmp_path, captures):
    with server(lambda body, n: good(body)) as (url, requests):
        summary = write_cot(captures[:6], tmp_path / "c.jsonl", ask(url, temperature=0.5))
    assert summary.written == 6 and len(requests) == 6
    body = next(body for body in requests if captures[0].prompt[0].content.splitlines()[1] in json.dumps(body["messages"]))
    assert body["model"] == "m" and body["temperature"] == 0.5
    system, user = body["messages"]
    assert system["content"].endswith(TEMPLATE)
    assert [part["type"] for part in user["content"]] == ["image_url", "image_url", "text"]
    for part, path in zip(user["content"], captures[0].images, strict=False):
        head, data = part["image_url"]["url"].split(",")
        assert head == "data:image/png;base64" and base64.b64decode(data) == path.read_bytes()
    assert user["content"][2]["text"].startswith("Which way?\nA. ")
    assert {line["truth"] for line in lines(tmp_path / "c.jsonl")} == {row.truth for row in captures[:6]}


def test_endpoint_template_of_the_user(captures):
    mine = "<think>Mine.</think><answer>C</answer>"
    with server(lambda body, n: good(body)) as (url, requests):
        write_one(ask(url, template=mine), captures[0])
        assert requests[0]["messages"][0]["content"].endswith(mine)
        with pytest.raises(ValueError, match="template"):
            ask(url, template="Think step by step.")


def test_other_image_formats_are_re_encoded():
    pixels = np.random.default_rng(0).integers(0, 255, (5, 6, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    head, data = client.data_url(buffer.getvalue(), "").split(",")
    assert head == "data:image/png;base64"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), pixels)


@pytest.mark.parametrize(
    "first, times, asked",
    [((429, SOON, "slow down"), 2, 3), ((500, SOON, "oops"), 3, 4), ((503, SOON, "later"), 1, 2), (1.0, 1, 2)],
    ids=["429", "500", "503", "hang"],
)
def test_endpoint_retries(captures, first, times, asked):
    with server(lambda body, n: first if n <= times else good(body)) as (url, requests):
        text = write_one(ask(url, timeout=0.3), captures[0])
        assert check_cot(text, captures[0]) is None and len(requests) == asked


@pytest.mark.parametrize(
    "answer, reason, asked",
    [
        (lambda body, n: (500, SOON, "oops"), "InternalServerError", 2),
        (lambda body, n: (429, SOON, "slow"), "RateLimitError", 2),
        (lambda body, n: 1.0, "APITimeoutError", 2),
        (lambda body, n: (400, SOON, "image too large"), "image too large", 1),
        (lambda body, n: (200, None, "not a completion"), "no chat completion", 2),
    ],
    ids=["500", "429", "hang", "400", "nonsense"],
)
def test_endpoint_failures_become_rejects(tmp_path, captures, answer, reason, asked):
    with server(answer) as (url, requests):
        summary = write_cot(captures[:1], tmp_path / "c.jsonl", ask(url, timeout=0.2, retries=1))
    assert summary.written == 0 and summary.rejected == {"no reply": 1} and len(requests) == asked
    assert reason in lines(tmp_path / "c.rejects.jsonl")[0]["reason"]


def test_endpoint_asks_again_after_a_rejected_reply(tmp_path, captures):
    def answer(body, n):
        kind = len(body["messages"])
        if kind == 2:
            return 200, {}, "<think>a</think><answer>Z</answer>"
        assert body["messages"][-2]["content"] == "<think>a</think><answer>Z</answer>" if kind == 4 else "bare"
        assert "wrong answer" in body["messages"][-1]["content"] and told(body) in body["messages"][-1]["content"]
        return good(body)

    with server(answer) as (url, requests):
        assert write_cot(captures[:2], tmp_path / "c.jsonl", ask(url)).written == 2
        assert len(requests) == 4


@pytest.mark.parametrize(
    "text, reason",
    [
        ("<think>a</think><answer>Z</answer>", "wrong answer"),
        ("B", "malformed tags"),
        (None, "malformed tags"),
        ("<think>a", "malformed tags"),
    ],
)
def test_endpoint_gives_up_on_bad_replies(tmp_path, captures, text, reason):
    with server(lambda body, n: (200, {}, text)) as (url, requests):
        summary = write_cot(captures[:2], tmp_path / "c.jsonl", ask(url, reasks=1))
    assert summary.rejected == {reason: 2} and len(requests) == 4
    assert [line["text"] for line in lines(tmp_path / "c.rejects.jsonl")] == [text or ""] * 2


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"message": {"content": None, "refusal": "I cannot."}}, "refused"),
        ({"message": {"content": None, "tool_calls": [{"id": "1", "function": {"name": "zoom"}}]}}, "a tool call instead of text"),
        ({"message": {"content": ""}, "finish_reason": "content_filter"}, "stopped by a content filter"),
        ({"message": {"content": "<think>It went"}, "finish_reason": "length"}, "cut off"),
    ],
)
def test_what_is_no_chain_is_told_apart_asked_again_and_costs_its_row_only(tmp_path, captures, choice, reason):
    rows = captures[:25]
    bad = rows[3].prompt[0].content.splitlines()[1]

    def answer(body, n):
        mine = bad in json.dumps(body) and told(body) == rows[3].truth
        return (200, {}, choice) if mine else good(body)

    with server(answer) as (url, requests):
        summary = write_cot(rows, tmp_path / "c.jsonl", ask(url, reasks=1))
    assert set(summary.rejected) == {reason} and summary.written == 25 - sum(summary.rejected.values())
    assert len(requests) == 25 + sum(summary.rejected.values()), "each was asked once more"


def test_a_page_in_place_of_a_completion_costs_its_row_only(tmp_path, captures, monkeypatch):
    monkeypatch.setattr(client, "PAUSE", 0.0)
    with server(lambda body, n: (200, {}, b"<html>busy</html>") if n == 5 else good(body)) as (url, _):
        summary = write_cot(captures, tmp_path / "c.jsonl", ask(url, retries=0))
    assert (summary.written, summary.rejected) == (29, {"no reply": 1})


@pytest.mark.parametrize("status", [401, 403, 404])
def test_endpoint_refusal_ends_the_run(tmp_path, captures, status):
    with server(lambda body, n: (status, {}, "no")) as (url, _), pytest.raises(ValueError, match="refuses model 'm'"):
        write_cot(captures, tmp_path / "c.jsonl", ask(url))


def test_a_dead_endpoint_ends_the_run_and_a_later_one_finishes_it(tmp_path, captures, monkeypatch):
    monkeypatch.setattr(cot, "MAX_FAILURES", 4)
    out = tmp_path / "c.jsonl"
    with server(lambda body, n: good(body) if n <= 10 else (500, SOON, "down")) as (url, _):
        with pytest.raises(ValueError, match=r"last 4 rows got no reply.*run it again"):
            write_cot(captures, out, ask(url, retries=0, workers=1))
        assert len(lines(out)) == 10
    with server(lambda body, n: good(body)) as (url, requests):
        summary = write_cot(captures, out, ask(url))
        assert (summary.kept, summary.written, len(requests)) == (10, 20, 20)
    assert [line["id"] for line in lines(out)] == [row.id for row in captures]


def test_a_row_that_cannot_be_shown_is_its_own_misfortune(tmp_path, captures):
    broken = replace(captures[1], images=(b"no image", b"none"))
    with server(lambda body, n: good(body)) as (url, requests):
        summary = write_cot([captures[0], broken, captures[2]], tmp_path / "c.jsonl", ask(url))
    assert (summary.written, summary.rejected, len(requests)) == (2, {"bad row": 1}, 2)


class Script:
    """An engine that replies what it is told to, prompt after prompt, as rows."""

    own, version = False, 0

    def __init__(self, say):
        self.say, self.asked, self.awake = say, [], False

    def wake(self):
        self.awake = True

    def sleep(self):
        self.awake = False

    def sync(self, version):
        assert self.awake

    def generate(self, prompts, draw, keys, watch):
        assert self.awake
        self.asked.append([prompt.row for prompt in prompts])
        for i in reversed(range(len(prompts))):  # not in order
            text = self.say(prompts[i].row, len(self.asked))
            watch.drawn({i: [Reply(np.full(1, -1), np.full(1, np.nan, np.float32), True, text)]})
        return [[]] * len(prompts)


def test_only_what_is_rejected_is_asked_again_with_other_random_numbers(tmp_path, captures):
    wrong = {captures[i].id for i in (1, 4)}
    fine = "<think>So <image>.</think><answer>{}</answer>"

    def say(row, turn):
        return fine.format(row.truth) if row.id in wrong and turn == 1 else f"<think>So.</think><answer>{row.truth}</answer>"

    engine, seen = Script(say), []
    writer = EngineWriter(engine, Rows(), Draw())
    assert write_cot(captures[:6], tmp_path / "c.jsonl", writer, progress=lambda done, total: seen.append(done)).written == 6
    assert [len(rows) for rows in engine.asked] == [6, 2] and not engine.awake and seen == list(range(1, 7))
    assert [line["id"] for line in lines(tmp_path / "c.jsonl")] == [row.id for row in captures[:6]]
    for again in engine.asked[1]:
        *_, rejected, retry = again.prompt
        assert rejected.content == f"<think>So image.</think><answer>{again.truth}</answer>", "no third image is asked for"
        assert retry.content.startswith("This cannot be used: image tag in the text.") and len(again.images) == 2
    written = [write_cot(captures, tmp_path / name, EngineWriter(Script(say), Rows(), Draw(), reasks=0)).rejected for name in ("x", "y")]
    assert written == [{"image tag in the text": 2}] * 2


def test_what_was_written_before_a_kill_is_kept(tmp_path, captures):
    def say(row, turn):
        if row.id == captures[3].id:
            raise KeyboardInterrupt
        return f"<think>So.</think><answer>{row.truth}</answer>"

    class Ordered(Script):
        def generate(self, prompts, draw, keys, watch):
            for i, prompt in enumerate(prompts):
                watch.drawn({i: [Reply(np.full(1, -1), np.full(1, np.nan, np.float32), True, self.say(prompt.row, 1))]})

    with pytest.raises(KeyboardInterrupt):
        write_cot(captures, tmp_path / "c.jsonl", EngineWriter(Ordered(say), Rows(), Draw()))
    assert [line["id"] for line in lines(tmp_path / "c.jsonl")] == [row.id for row in captures[:3]]


def test_the_command_line_has_a_checkpoint_write(lab, tiny, tmp_path, capsys):
    """The tiny model knows no tags: every text is refused, with what it wrote."""
    out = tmp_path / "c.jsonl"
    asked = ["data", "cot", str(lab.questions / "train.jsonl"), "-o", str(out), "--count", "3", "--model", str(tiny)]
    assert main([*asked, "--max-new-tokens", "5"]) == 0
    printed = capsys.readouterr().out
    assert "0 pairs written, 3 rejected" in printed and "cut off" in printed
    texts = [line["text"] for line in lines(tmp_path / "c.rejects.jsonl")]
    assert len(texts) == 3 and all(0 < len(text) < 200 for text in texts)
    assert main(["data", "cot", str(lab.questions / "train.jsonl"), "-o", str(out), "--model", "no/such/folder"]) == 2
    assert "model no/such/folder: no such folder" in capsys.readouterr().err
    assert main([*asked[:-3], "100000", "--model", "no/such/folder"]) == 2
    assert "count is 100000, but there are only" in capsys.readouterr().err, "told before a model is looked for"


def test_the_command_line_writes_chains_by_pair_from_an_endpoint(lab, tmp_path, capsys):
    """One false chain in three: it is sent back with the sentence at fault."""
    again = []

    def answer(body, n):
        text = body["messages"][1]["content"][-1]["text"]
        ego = "right" if "camera moved to the right between" in text else "left"
        turn = "right" if "rotated to the right" in text else "left"
        other = {"right": "left", "left": "right"}[ego]
        again.extend(message["content"] for message in body["messages"][3:])
        false = n % 3 == 0 and len(body["messages"]) == 2
        letters = " ".join("abcdefghij"[int(d)] * 3 for d in f"{n:04d}") * 9  # so that none is another's copy
        thought = (
            f"{letters} {letters}. The camera moved to the {other if false else ego}. For the object the camera moved to the {other}. "
        )
        message = {
            "content": f"<answer>{ego}, {other}, {turn}</answer>",
            "reasoning_content": f"{thought}The camera rotated to the {turn}.",
        }
        return 200, {}, {"message": message, "usage": {"prompt_tokens": 50, "completion_tokens": 5}}

    out = tmp_path / "c.jsonl"
    with server(answer) as (url, requests):
        command = ["data", "cot", str(lab.questions / "train.jsonl"), "-o", str(out), "--model", "m", "--endpoint", url, "--workers", "1"]
        assert main([*command, "--image-pixels", "900", "--temperature", "0.3", "--max-new-tokens", "77", "--min-words", "20"]) == 0
    printed = capsys.readouterr().out
    pairs = len({line["id"].rsplit("/", 1)[0] for line in lines(lab.questions / "train.jsonl")})
    assert f"{pairs} pairs written, 0 rejected" in printed and f"{len(requests)} answers: {50 * len(requests):,} tokens read" in printed
    assert len(lines(out)) == pairs and again and all("This cannot be used: false statement: the camera's move" in text for text in again)
    assert {(body["temperature"], body["max_tokens"]) for body in requests} == {(0.3, 77)}
    with Image.open(io.BytesIO(base64.b64decode(requests[0]["messages"][1]["content"][0]["image_url"]["url"].split(",")[1]))) as image:
        assert image.width * image.height <= 900

    template = tmp_path / "t.txt"
    with server(answer) as (url, _):
        ask_for = ["data", "template", str(lab.questions / "train.jsonl"), "-o", str(template)]
        assert main(ask_for) == 2 and "--model: a model drafts the text" in capsys.readouterr().err
        assert main([*ask_for, "--model", "m", "--endpoint", url]) == 0
        assert "it passes; use it with" in capsys.readouterr().out and template.with_suffix(".html").exists()
    template.write_text(template.read_text().replace("The camera moved to the", "The camera never moved to the"))
    assert main(ask_for) == 1 and "it cannot be used yet: false statement" in capsys.readouterr().out
    assert main([*command, "--template", str(template)]) == 2 and "false statement" in capsys.readouterr().err
