"""Chains of thought by files: requests out, results in, in OpenAI's batch format."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("openai")
from actial_fast.cli.main import main
from actial_fast.data.cot.checking import check_cot
from actial_fast.data.cot.writer import write_cot
from actial_fast.rollout import batches
from actial_fast.rollout.batches import Results, custom_id, write_requests
from actial_fast.rollout.client import Used
from actial_fast.rollout.protocol import Draw
from tests.viewpoint_rows import lines, viewpoint_rows

USAGE = {"prompt_tokens": 100, "completion_tokens": 10}


def result(row, text: str | None = None, **choice) -> dict:
    """A line of results."""
    text = f"<think>More of one flank shows.</think><answer>{row.truth}</answer>" if text is None else text
    body = {"choices": [{"message": {"content": text}, "finish_reason": "stop", **choice}], "usage": USAGE}
    return {"id": "b", "custom_id": custom_id(row), "response": {"status_code": 200, "request_id": "r", "body": body}, "error": None}


def stored(path: Path, results: list) -> Path:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in results))
    return path


def test_requests_hold_what_an_endpoint_would_be_asked(tmp_path):
    rows = viewpoint_rows(tmp_path)
    count, (path,) = write_requests(rows, tmp_path / "c.jsonl", tmp_path / "deep" / "r.jsonl", Draw(1, 0.7, 99), model="m", count=5, seed=2)
    found = lines(path)
    assert count == len(found) == 5 and len({line["custom_id"] for line in found}) == 5
    assert {(line["method"], line["url"]) for line in found} == {("POST", "/v1/chat/completions")}
    assert all((b["model"], b["temperature"], b["max_tokens"]) == ("m", 0.7, 99) for b in (line["body"] for line in found))
    system, user = found[0]["body"]["messages"]
    assert [part["type"] for part in user["content"]] == ["image_url", "image_url", "text"] and "worked solutions" in system["content"]
    assert len({line["body"]["seed"] for line in found}) == 5


def test_results_become_rows_and_every_fault_costs_its_row(tmp_path):
    rows = viewpoint_rows(tmp_path)[:9]
    results = [
        result(rows[0]),
        {**result(rows[1]), "response": None, "error": {"code": "batch_expired", "message": "late"}},
        {**result(rows[2]), "response": {"status_code": 429, "body": {"error": {"message": "slow down"}}}},
        {**result(rows[3]), "response": {"status_code": 200, "body": "<html>"}},
        result(rows[4], finish_reason="content_filter"),
        result(rows[5], text="<think>It went", finish_reason="length"),
        result(rows[6], text="B"),
        "not json",
        '{"no": "custom_id"}',
        result(replace(rows[0], id="other")),
    ]
    one, two = stored(tmp_path / "a", [*results[::-1], ""]), stored(tmp_path / "b", [result(rows[7])])
    writer = Results([one, two], check_cot)
    summary = write_cot(rows, tmp_path / "c.jsonl", writer)
    assert [line["id"] for line in lines(tmp_path / "c.jsonl")] == [rows[0].id, rows[7].id]
    assert summary.rejected == {
        "failed in the batch": 3,
        "stopped by a content filter": 1,
        "cut off": 1,
        "malformed tags": 1,
        "not in the results": 1,
    }
    reasons = [line["reason"] for line in lines(tmp_path / "c.rejects.jsonl")]
    assert "batch_expired" in reasons[0] and "slow down" in reasons[1] and "no chat completion" in reasons[2]
    assert lines(tmp_path / "c.rejects.jsonl")[4]["text"] == "<think>It went", "what there is of it is kept"
    assert writer.unread == 2 and writer.used == Used(6, 600, 60)

    again = write_requests(rows, tmp_path / "c.jsonl", tmp_path / "r.jsonl", Draw(), model="m")[1][0]
    asked = {line["custom_id"]: line["body"]["messages"] for line in lines(again)}
    assert set(asked) == {row.id for row in (*rows[1:7], rows[8])}
    assert {name: len(messages) for name, messages in asked.items() if len(messages) > 2} == {rows[5].id: 4, rows[6].id: 4}
    assert "This cannot be used: malformed tags" in asked[rows[6].id][3]["content"]


def test_what_is_no_file_of_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no line is the result of a batch"):
        Results([stored(tmp_path / "a", ["{}", "x"])], check_cot)


def test_full_files_are_followed_by_others_and_long_ids_are_hashed(tmp_path, monkeypatch):
    rows = [replace(row, id="x" * 70 + row.id) for row in viewpoint_rows(tmp_path)[:5]]
    monkeypatch.setattr(batches, "MOST_REQUESTS", 2)
    count, paths = write_requests(rows, tmp_path / "c.jsonl", tmp_path / "r.jsonl", Draw(), model="m")
    assert count == 5 and [path.name for path in paths] == ["r.jsonl", "r-2.jsonl", "r-3.jsonl"]
    names = [line["custom_id"] for path in paths for line in lines(path)]
    assert [len(lines(path)) for path in paths] == [2, 2, 1] and {len(name) for name in names} == {64} and len(set(names)) == 5
    monkeypatch.setattr(batches, "MOST_BYTES", 1)
    assert len(write_requests(rows, tmp_path / "c.jsonl", tmp_path / "s.jsonl", Draw(), model="m")[1]) == 5


def test_the_command_line_writes_requests_and_takes_their_results(lab, tmp_path, capsys):
    source, out = lab.questions / "train.jsonl", tmp_path / "c.jsonl"
    command = ["data", "cot", str(source), "-o", str(out), "--count", "3"]
    assert main([*command, "--model", "m", "--batch-out", str(tmp_path / "r.jsonl"), "--max-new-tokens", "7"]) == 0
    assert "3 requests" in capsys.readouterr().out
    requests = lines(tmp_path / "r.jsonl")
    told = [request["body"]["messages"][1]["content"][-1]["text"] for request in requests]
    assert all("What is known of this pair: " in text for text in told) and requests[0]["body"]["max_tokens"] == 7
    results = []
    for number, (request, text) in enumerate(zip(requests, told, strict=True)):
        ego = "right" if "camera moved to the right between" in text else "left"
        turn = "right" if "rotated to the right" in text else "left"
        other = {"right": "left", "left": "right"}[ego]
        thought = f"Words {'abc'[number] * 3} first. " * (1 + 20 * (number < 2)) + (
            f"The camera moved to the {ego}. Seen from the object the camera moved to the {other}. The camera rotated to the {turn}."
        )
        body = {"choices": [{"message": {"content": f"<answer>{ego}, {other}, {turn}</answer>", "reasoning": thought}}], "usage": USAGE}
        results.append({"custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}})
    done = stored(tmp_path / "results.jsonl", [*results, "?"])
    assert main([*command, "--batch-in", str(done), "--price", "2", "30", "--questions", "all"]) == 0
    printed = capsys.readouterr().out
    assert "no result of a batch: 1 line\n" in printed and "3 answers: 300 tokens read, 30 written" in printed
    assert "0.00 by the price given" in printed and "2 pairs written, 1 rejected" in printed and "1  too short" in printed
    assert len(lines(out)) == 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--batch-out", "r", "--batch-in", "s"], "give one of them"),
        (["--batch-out", "r"], "--model: the name of the model"),
        (["--batch-out", "r", "--model", "m", "--endpoint", "http://x/v1"], "--endpoint asks at once"),
        (["--per", "pair"], "--per pair needs a model"),
        (["--batch-in", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--model", "m", "--endpoint", "http://x/v1", "--min-words", "9", "--max-words", "3"], "need 0 <= shortest <= longest"),
    ],
)
def test_the_command_line_refuses_what_does_not_go_together(lab, tmp_path, capsys, options, says):
    assert main(["data", "cot", str(lab.questions / "train.jsonl"), "-o", str(tmp_path / "c.jsonl"), *options]) == 2
    assert says in capsys.readouterr().err
