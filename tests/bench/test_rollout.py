"""The bench of sampling: what it checks before it times, and what it writes."""

import json

import pytest

from bench.step import rollout


def test_both_sides_reply_and_are_timed(tmp_path, capsys):
    made = rollout.main(["--prompts", "3", "--n", "2", "--mean", "4", "--limit", "6", "--rounds", "1", "--json", str(tmp_path / "r.json")])
    assert json.loads((tmp_path / "r.json").read_text())["sides"] == made["sides"]
    assert set(made["sides"]) == {"ours", "transformers"} and made["greedy_equal"] >= 0.99
    for one in made["sides"].values():
        assert one["seconds"] > 0 and 6 <= one["tokens"] <= 36
    assert capsys.readouterr().out.count("tokens/s") == 2


def test_sides_that_compute_something_else_are_not_timed(monkeypatch):
    monkeypatch.setattr(rollout, "theirs", lambda policy, processor, prompts, draw: [[[1]]] * len(prompts))
    with pytest.raises(AssertionError, match="the sides do not compute the same"):
        rollout.main(["--prompts", "3", "--n", "2", "--limit", "6"])


def test_rounds_that_are_cut_off_leave_what_was_measured(monkeypatch, tmp_path):
    plain, calls = rollout.ours, iter(range(3))  # the greedy one, the one that is not counted, the first round's
    monkeypatch.setattr(rollout, "ours", lambda *arguments: next(calls) * 0 or plain(*arguments))
    words = "--prompts 3 --n 2 --mean 4 --limit 6 --rounds 3 --json".split()
    with pytest.raises(StopIteration):
        rollout.main([*words, str(tmp_path / "r.json")])
    sides = json.loads((tmp_path / "r.json").read_text())["sides"]
    assert set(sides) == {"ours", "transformers"} and all(0 < one["seconds"] < 600 for one in sides.values())
