"""bench.step.scaling: how even ranks are, what they send, and what that makes of a step."""

from pathlib import Path

import pytest

from actial_fast.settings.config import load_recipe
from bench.step import scaling

RECIPE = load_recipe(Path(__file__).parents[2] / "recipes/actial-7b-grpo.yaml")


def test_one_rank_is_even_and_eight_are_nearly():
    assert scaling.balance(RECIPE, 1, 1) == (1, 1)
    update, sample = scaling.balance(RECIPE, 8, 1)
    assert 1 <= update < 1.01, "the planner balances the update"
    assert 1 < sample < 1.2, "and nobody the replies"


def test_what_ranks_send_is_a_line_in_micro_batches_and_a_ring_in_ranks(monkeypatch):
    def row(shape, lora, config, ranks, passes, *, update=True):
        assert ranks == 8
        return {"sent_gb": {"within": 7 * (2 + 10 * passes) if update else 7.0, "between": 0.0}}

    monkeypatch.setattr(scaling, "row", row)
    sent = scaling.counted(RECIPE)
    updates = RECIPE.prompts // RECIPE.minibatch
    looks = updates + updates - 1  # the reference's, and old log-probs of all but the first mini-batch
    assert sent(8, 1) == pytest.approx(1e9 * (updates * 84 + looks * 7))
    assert sent(8, 3) == pytest.approx(1e9 * (updates * 224 + looks * 21))
    assert sent(2, 3) == pytest.approx(sent(8, 3) * (1 / 2) / (7 / 8)) and sent(1, 3) == 0


def test_the_table_is_of_every_number_of_gpus(monkeypatch, capsys):
    monkeypatch.setattr(scaling, "row", lambda *_, **__: {"sent_gb": {"within": 1.0}})
    assert scaling.main(["--steps", "1"]) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [line.split("|")[1].strip() for line in lines] == ["1", "2", "4", "8"]
    assert "100% to 100%" in lines[0] and "not measured on this GPU" in text
