"""A benchmark put to the tiny model: what is kept, what goes on after a kill, what is refused."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from actial_fast.data.sources.row import BadRow
from actial_fast.evaluation import bench as bench_module
from actial_fast.evaluation import run
from actial_fast.evaluation.bench import Scoring, bench, scored_again
from actial_fast.evaluation.items import Items, Opened
from actial_fast.evaluation.replies import Folder, runs_below
from actial_fast.evaluation.run import Asking, choose
from actial_fast.train.lock import locked
from tests.endpoint import server
from tests.evaluation.kit import pairs
from tests.ranks import ROOT, on_ranks

QUIET = Scoring(errors=0)


def asking(lab, **changes: object) -> Asking:
    return Asking(**{"model": str(lab.model), "name": "tiny", "max_new_tokens": 6, **changes})  # type: ignore[arg-type]


def replies_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "replies.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(lab, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    bench({"pairs": pairs(lab)}, [asking(lab)], out, Scoring())
    return out / "pairs" / "tiny"


def test_every_reply_is_kept_with_what_was_made_of_it(lab, whole):
    replies = replies_in(whole)
    assert [r["id"] for r in replies] == [item.id for item in pairs(lab).items], "each once, in the set's order"
    assert all(set(r) == {"id", "text", "extracted", "score", "rule", "tokens", "finish"} for r in replies)
    assert all(
        0 < r["tokens"] <= 6 and r["finish"] == ("length" if r["tokens"] == 6 else "stop") for r in replies if r["finish"] == "length"
    )
    header = Folder(whole).header()
    assert (
        header.settings["model.path"] == str(lab.model) and header.settings["max_new_tokens"] == 6 and header.settings["dtype"] == "float32"
    )
    assert len(header.settings["model.content"]) == 24 and header.versions[0]["torch"]
    result = json.loads((whole / "result.json").read_text())
    assert result["n"] == 12 and result["missing"] == 0 and result["clusters"] == 4
    overall = result["figures"][-1]
    assert overall["value"] == pytest.approx(sum(r["score"] for r in replies) / 12) and overall["chance"] == pytest.approx(1 / 3)
    assert (whole / "errors.html").exists()


def test_a_run_that_is_there_loads_no_model(lab, whole, monkeypatch):
    monkeypatch.setattr(bench_module, "open_model", lambda *a, **k: pytest.fail("loaded"))
    (result,) = bench({"pairs": pairs(lab)}, [asking(lab)], whole.parents[1], QUIET)
    assert result["n"] == 12


def test_a_killed_run_goes_on_to_the_same_replies_once_each(lab, whole, tmp_path):
    """kill -9 behind the fifth reply, and the line that was being written is cut."""
    code = (
        "import os, signal, sys\nfrom types import SimpleNamespace\nfrom pathlib import Path\n"
        "from actial_fast.evaluation import run\nfrom actial_fast.evaluation.bench import Scoring, bench\n"
        "from tests.evaluation.kit import pairs\nfrom tests.evaluation.test_run import asking\n"
        "run.CHUNK = 2\nappend, seen = run.append, []\n"
        "def dying(file, records):\n    records = list(records); append(file, records); seen.extend(records)\n"
        "    if len(seen) >= 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run.append = dying\nlab = SimpleNamespace(model=Path(sys.argv[1]), questions=Path(sys.argv[2]))\n"
        "bench({'pairs': pairs(lab)}, [asking(lab)], Path(sys.argv[3]), Scoring(errors=0))\n"
    )
    command = [sys.executable, "-c", code, str(lab.model), str(lab.questions), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    file = tmp_path / "pairs" / "tiny" / "replies.jsonl"
    assert 5 <= file.read_text().count("\n") < 12
    file.write_bytes(file.read_bytes()[:-5])
    bench({"pairs": pairs(lab)}, [asking(lab)], tmp_path, QUIET)
    assert replies_in(file.parent) == replies_in(whole)


@pytest.mark.slow
def test_ranks_share_the_work_and_end_with_one_file(lab, whole, tmp_path):
    """A second rank's file from a run that was killed is put in too."""
    folder = tmp_path / "pairs" / "tiny"
    bench({"pairs": pairs(lab)}, [asking(lab)], tmp_path, QUIET)
    lines = (folder / "replies.jsonl").read_text().splitlines(keepends=True)
    (folder / "replies.jsonl").write_text("".join(lines[:3]))
    (folder / "replies.rank1.jsonl").write_text("".join(lines[2:5]) + lines[5][:20])
    told = on_ranks("tests.evaluation.ranks", lab.model, lab.questions, tmp_path)
    assert told == {"results": 1, "drawn": [4, 3]}
    assert replies_in(folder) == replies_in(whole) and not list(folder.glob("replies.rank*"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"max_new_tokens": 7}, r"max_new_tokens \(6 before, 7 now\)"),
        ({"system": "Answer."}, r"system \('' before, 'Answer.' now\)"),
        ({"max_pixels": 3000}, r"max_pixels \(0 before, 3000 now\)"),
        ({"temperature": 1.0}, r"temperature \(0.0 before, 1.0 now\)"),
        ({"limit": 6}, r"set.limit \(0 before, 6 now\)"),
    ],
)
def test_other_settings_do_not_go_on_with_it(lab, whole, changes, match):
    with pytest.raises(ValueError, match=match):
        bench({"pairs": pairs(lab)}, [asking(lab, **changes)], whole.parents[1], QUIET)
    assert len(replies_in(whole)) == 12


def test_a_changed_set_or_model_does_not_either(lab, whole, tiny):
    with pytest.raises(ValueError, match=r"model.path .* model.content "):
        bench({"pairs": pairs(lab)}, [asking(lab, model=str(tiny))], whole.parents[1], QUIET)
    with pytest.raises(ValueError, match=r"set.content "):
        bench({"pairs": pairs(lab, 9)}, [asking(lab)], whole.parents[1], QUIET)


def test_a_subset_is_drawn_by_the_seed_groups_whole(lab):
    opened = pairs(lab, 18)
    grouped = Items(opened.items.path, 18, lambda i: replace(opened.items[i], group=f"g{i // 3}"))
    first, again, other = (choose(grouped, 7, seed, "error") for seed in (0, 0, 1))
    assert first.records == again.records != other.records and first.digest == other.digest
    groups = [record["group"] for record in first.records]
    assert len(groups) == 9 and all(groups.count(g) == 3 for g in groups), "whole groups, until there are seven"
    assert [r["index"] for r in first.records] == sorted(r["index"] for r in first.records)
    assert len(choose(opened.items, 7, 0, "error").records) == 7


def test_replies_of_a_subset_are_those_of_the_whole(lab, whole, tmp_path):
    bench({"pairs": pairs(lab)}, [asking(lab, limit=4, seed=0, temperature=0.0)], tmp_path, QUIET)
    kept = {r["id"]: r for r in replies_in(whole)}
    mine = replies_in(tmp_path / "pairs" / "tiny")
    assert len(mine) == 4 and all(kept[r["id"]] == r for r in mine)


def test_files_of_ranks_are_put_together_once_each(whole, tmp_path):
    folder = Folder(tmp_path / "run")
    folder.path.mkdir()
    lines = (whole / "replies.jsonl").read_text().splitlines(keepends=True)
    (folder.path / "replies.jsonl").write_text("".join(lines[:3]))
    (folder.path / "replies.rank0.jsonl").write_text("".join(lines[7:9]))
    (folder.path / "replies.rank1.jsonl").write_text("".join(lines[2:5]) + lines[5][:20])
    assert folder.split() and folder.drawn() == 8
    order = [item.id for item in Folder(whole).items()]
    for _ in range(2):  # a kill between the two leaves files whose replies are known
        assert list(folder.settle(order)) == [order[k] for k in (0, 1, 2, 3, 4, 7, 8)]
    assert (folder.path / "replies.jsonl").read_text() == "".join([*lines[:5], *lines[7:9]]) and not folder.split()


def test_bad_questions_end_it_before_a_model_loads_or_are_left_out(lab, tmp_path, monkeypatch):
    opened = pairs(lab, 6)
    damaged = opened.items[5].images[0].read_bytes()[:-40]  # its beginning is a picture's

    def get(index):
        if index == 2:
            raise BadRow("rows:3", "no answer")
        item = opened.items[index]
        first = {4: tmp_path / "gone.png", 5: damaged}.get(index, item.images[0])
        return replace(item, images=(first, *item.images[1:]))

    def some(*places):
        return {"pairs": Opened(opened.set, Items(opened.items.path, len(places), lambda k: get(places[k])))}

    (result,) = bench(some(*range(6)), [asking(lab, on_bad_row="skip")], tmp_path, QUIET)
    assert result["n"] == 4 and result["missing"] == 1 and "cannot be decoded" in next(iter(result["why_missing"]))
    rejected = [json.loads(line)["reason"] for line in (tmp_path / "pairs" / "tiny" / "rejects.jsonl").read_text().splitlines()]
    assert [reason.split()[-1] for reason in rejected[:2]] == ["answer", "exist"] and len(rejected) == 3
    with pytest.raises(BadRow, match="cannot be decoded"):
        bench(some(0, 1, 5), [asking(lab)], tmp_path / "damaged", QUIET)
    monkeypatch.setattr(bench_module, "open_model", lambda *a, **k: pytest.fail("loaded"))
    for place, match in ((2, "rows:3: no answer"), (4, r"gone.png does not exist")):
        with pytest.raises(ValueError, match=match):
            bench(some(0, place), [asking(lab)], tmp_path / f"bad{place}", QUIET)


def test_the_same_id_twice_is_two_questions(lab):
    opened = pairs(lab, 3)
    same = Items(opened.items.path, 3, lambda i: replace(opened.items[i], id="x"))
    assert [record["id"] for record in choose(same, 0, 0, "error").records] == ["x", "x #2", "x #3"]


def test_a_server_answers_is_asked_again_and_its_refusals_count_as_wrong(lab, tmp_path):
    refused = []

    def answer(body, number):
        content = body["messages"][-1]["content"]
        text = next(part["text"] for part in content if part["type"] == "text")
        assert [part["type"] for part in content] == ["image_url", "image_url", "text"] and body["max_tokens"] == 6
        if "not asked" not in refused and len(refused) < 1:
            refused.append(text)
        if text == refused[0]:
            return 400, None, "no"
        return 200, {}, "The answer is B."

    with server(answer) as (url, requests):
        served = asking(lab, model="m", name="served", engine="server", url=url, workers=1)
        (result,) = bench({"pairs": pairs(lab, 4)}, [served], tmp_path, QUIET)
        assert 1 <= result["missing"] <= 4 and result["rules"] == {"answer": 4 - result["missing"]}
        before = len(requests)
        refused[:] = ["not asked"]
        (result,) = bench({"pairs": pairs(lab, 4)}, [served], tmp_path, QUIET)
        assert result["missing"] == 0 and len(requests) - before < 4, "only what had no reply"
    assert {r["text"] for r in replies_in(tmp_path / "pairs" / "served")} == {"The answer is B."}


def test_a_server_is_sent_pictures_of_the_size_that_is_asked_for(lab, tmp_path):
    def sizes(**keys):
        sent = []

        def answer(body, number):
            urls = [part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
            sent.extend(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size for url in urls)
            return 200, {}, "A"

        with server(answer) as (url, _):
            served = asking(lab, model="m", name="-".join(["m", *keys]), engine="server", url=url, workers=1, **keys)
            bench({"pairs": pairs(lab, 2)}, [served], tmp_path, QUIET)
        return set(sent)

    assert sizes() == {(28, 28)} and sizes(max_pixels=200) == {(14, 14)}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"engine": "server", "dtype": "float32"}, "dtype: is for the engine embedded or vllm, and this is server"),
        ({"engine": "server", "min_pixels": 3}, "min_pixels: is for the engine"),
        ({"engine": "vllm", "kv_tokens": 3}, "kv_tokens: is for the engine embedded"),
        ({"engine": "embedded", "tensor_parallel": 2}, "tensor_parallel: is for the engine vllm"),
        ({"engine": "embedded", "limit": -1}, "limit: must be at least 0"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        Asking(model="m", name="m", url="http://localhost:1/v1", **changes)


def test_a_server_that_is_gone_ends_the_run_and_keeps_its_replies(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "GONE", 3)
    with server(lambda body, number: (200, {}, "A") if number <= 4 else (400, None, "no")) as (url, requests):
        served = asking(lab, model="m", name="served", engine="server", url=url, workers=1)
        with pytest.raises(ValueError, match=r"the last 3 questions got no reply .* the same command goes on"):
            bench({"pairs": pairs(lab)}, [served], tmp_path, QUIET)
    assert len(replies_in(tmp_path / "pairs" / "served")) == 4 and len(requests) < 12


def test_asked_to_stop_it_ends_with_what_it_has_and_goes_on(lab, whole, tmp_path, monkeypatch):
    append, seen = run.append, []

    def asked(file, records):
        records = list(records)
        append(file, records)
        seen.extend(records)
        if len(seen) == len(records):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run, "append", asked)
    monkeypatch.setattr(run, "CHUNK", 3)
    with pytest.raises(SystemExit, match="of 12 replies to pairs; the same command goes on"):
        bench({"pairs": pairs(lab)}, [asking(lab)], tmp_path, QUIET)
    assert 0 < len(replies_in(tmp_path / "pairs" / "tiny")) < 12
    bench({"pairs": pairs(lab)}, [asking(lab)], tmp_path, QUIET)
    assert replies_in(tmp_path / "pairs" / "tiny") == replies_in(whole)


def test_runs_are_found_wherever_they_lie(whole, tmp_path):
    assert [folder.path for folder in runs_below([whole.parents[1], whole])] == [whole]
    with pytest.raises(ValueError, match="no benchmark run in it"):
        runs_below([tmp_path])


def test_a_run_that_draws_cannot_be_scored_meanwhile(lab, whole, tmp_path):
    with locked(whole), pytest.raises(ValueError, match="is in use by process"):
        scored_again(Folder(whole), QUIET)


def test_a_file_that_holds_no_replies_is_named(tmp_path):
    (tmp_path / "replies.jsonl").write_text('{"id": "1", "answer": "A"}\n')
    with pytest.raises(ValueError, match=r"replies.jsonl: a line of it is no reply"):
        Folder(tmp_path).replies()
