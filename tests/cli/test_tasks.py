"""Tasks on the command line: rows are made, checked and evaluated under them, and a tiny model is made that reads them."""

import json
from pathlib import Path

import pytest

from actial_fast.cli.main import main
from actial_fast.data.sources.source import SourceConfig, open_source
from actial_fast.data.sources.stream import Example
from actial_fast.model.processor import Processor

SMALL = ["train=6", "test=4"]


@pytest.fixture
def actial(capsys):
    """actial("data", ..., status=0) -> what it printed, to stdout and stderr."""

    def run(*args, status: int = 0) -> str:
        got = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert got == status, out + err
        return out + err

    return run


@pytest.mark.parametrize("task", ["jigsaw", "sparkle", "boxes"])
def test_rows_are_made_checked_and_seen(task, actial, tmp_path):
    more = ["turns=4"] if task == "jigsaw" else []
    told = actial("data", task, "-o", tmp_path / "data", *SMALL, *more)
    assert f"{tmp_path / 'data' / 'train'}.jsonl: 6 rows" in told and "test.jsonl: 4 rows" in told
    assert "4 rows, 0 bad" in actial("data", "check", tmp_path / "data/test.jsonl", "--task", task)
    assert actial("data", "inspect", tmp_path / "data/test.jsonl", "--task", task, "-o", tmp_path / "sheet.png")
    other = "boxes" if task == "sparkle" else "sparkle"
    assert "4 bad" in actial("data", "check", tmp_path / "data/test.jsonl", "--task", other, status=1)


def test_a_tiny_model_of_ones_rows(actial, tmp_path):
    actial("data", "jigsaw", "-o", tmp_path / "data", *SMALL, "turns=4")
    train = tmp_path / "data/train.jsonl"
    told = actial("tiny", train, tmp_path / "data/turns.jsonl", "image_size=56", "-o", tmp_path / "model", "hidden=48", "layers=1")
    assert "MB of weights" in told
    processor = Processor.load(str(tmp_path / "model"))
    rows = open_source(SourceConfig(str(train), task="jigsaw"))
    prompt = processor.encode_prompt(Example(rows[0], 0))
    assert (prompt.ids == processor.image_token).sum() == 4, "a piece is a token"
    assert len(prompt) < 30, "a sentence is a token"
    result = tmp_path / "eval.json"
    told = actial("eval", tmp_path / "model", train, "--task", "jigsaw_turns", "--max-new-tokens", 3, "--limit", 2, "--json", result)
    (table,) = json.loads(result.read_text()).values()
    assert table["overall"]["n"] == 2 and 0 <= table["overall"]["score"] <= 1 and "jigsaw" in told


@pytest.mark.parametrize(
    "args, problem",
    [
        (("data", "jigsaw", "-o", "out", "--pictures", "nowhere"), "--pictures nowhere: no such folder"),
        (("data", "boxes", "-o", "out", "mots=3"), "did you mean 'most'"),
        (("data", "check", "rows.jsonl", "--task", "jigsow"), "unknown task 'jigsow'"),
        (("tiny", "hidden=3", "-o", "out"), "no source"),
        (("tiny", "rows.jsonl", "-o", "."), "is not empty"),
        (("tiny", "rows.jsonl", "-o", "out", "hiden=3"), "did you mean 'hidden'"),
        (("tiny", "rows.jsonl", "-o", "out", "hidden=30"), "hidden=30 is no multiple of heads=4"),
    ],
)
def test_mistakes(args, problem, actial, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}], "truth": "a"}\n')
    assert problem in actial(*args, status=2)
