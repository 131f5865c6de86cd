"""Which groups make a step: what is fined, what teaches something, what is kept, given up and passed over."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from actial_fast.data.sources.source import SourceConfig
from actial_fast.ops.spec import AdvantageSpec
from actial_fast.rollout import choosing
from actial_fast.rollout.choosing import Gate, Race, advantages_of, chosen, differ, fines, next_size, totals_of, weights_of
from actial_fast.settings.recipe import GRPORecipe
from actial_fast.settings.sampling import GateConfig, OverlongConfig, SamplingConfig
from actial_fast.tasks.rewards import RewardConfig
from tests.loops import ALONE

RECIPE = GRPORecipe(prompts=3, minibatch=1, sampling=SamplingConfig(n=2, oversample=1.5, max_new_tokens=100))
SPLIT = replace(RECIPE, advantages=AdvantageSpec(combine="normalize_then_sum"))
FLAT, GOOD = np.ones((2, 2), np.float32), np.eye(2, 2, dtype=np.float32)[[0, 0]] * [[1], [0]]


def test_the_fine_falls_linearly_over_the_buffer_and_stops_at_its_ends():
    config = OverlongConfig(buffer=20, penalty=0.5)
    assert fines([1, 79, 80, 81, 90, 95, 100], config, 100).tolist() == pytest.approx([0, 0, 0, -0.05, -0.5, -0.75, -1])
    fined = replace(RECIPE, overlong=config)
    assert weights_of(fined).tolist() == [0.5, 0.5, 0.5] and weights_of(RECIPE).tolist() == [0.5, 0.5]
    table = np.column_stack([[[1, 1], [1, 1]], fines([70, 90], config, 100)]).astype(np.float32)
    assert totals_of(table, fined).tolist() == [1.0, 0.75] and differ(table, fined)
    # the whole buffer, as the paper has it, with the limit at its end
    assert fines(range(101), OverlongConfig(buffer=100), 100).tolist() == pytest.approx([-k / 100 for k in range(101)])


@pytest.mark.parametrize(
    ("rewards", "summed", "single"),
    [
        ([[1, 0], [1, 0]], False, False),
        ([[1, 0], [0, 0]], True, True),
        ([[1, 0], [0, 1]], False, True),  # the sums are equal
        ([[1, math.nan], [1, 0]], False, False),
        ([[math.nan, math.nan], [1, 0]], False, False),
        ([[1, math.nan], [0, 1]], True, True),  # who was not scored has the other's
    ],
)
def test_a_group_teaches_something_where_an_advantage_is_not_zero(rewards, summed, single):
    table = np.array(rewards, np.float32)
    assert differ(table, RECIPE) == summed and differ(table, SPLIT) == single
    assert bool(advantages_of(table, RECIPE).abs().max() > 1e-4) == summed
    with pytest.raises(ValueError, match="all weights are 0"):
        replace(SPLIT, rewards=(RewardConfig("format", 0.0), RewardConfig("accuracy", 0.0)))


@pytest.mark.parametrize(
    ("good", "kept", "differing"),
    [
        ([4, 5, 7, 9], [4, 5, 7], 3),
        ([9, 8, 3], [3, 8, 9], 3),
        ([6], [1, 2, 6], 1),  # the first of the others fill the step
        ([], [1, 2, 3], 0),
    ],
)
def test_the_first_groups_in_the_stream_that_differ_make_the_step(good, kept, differing):
    tables = {p: GOOD if p in good else FLAT for p in (9, 8, 7, 6, 5, 4, 3, 2, 1)}
    assert chosen(tables, RECIPE) == (kept, differing)
    everything = replace(RECIPE, sampling=replace(RECIPE.sampling, oversample=0.0))
    assert chosen(tables, everything) == (sorted(tables), len(good))


def test_the_next_draw_is_sized_by_what_the_last_ones_gave():
    assert next_size(0, 0, RECIPE) == next_size(5, 0, RECIPE) == 5  # 1.5 * 3, rounded up
    assert next_size(5, 2, RECIPE) == 4  # one is missing, and 2 in 5 differ: 1.5 * 1 * 5 / 2
    assert next_size(10, 1, RECIPE) == 5 and next_size(3, 0, replace(RECIPE, sampling=replace(RECIPE.sampling, oversample=0.0))) == 3


class Ranks:
    """Two ranks' boards, without processes."""

    def __init__(self):
        self.text, self.read = "", 0

    def show(self, board, text):
        self.text += text

    def shown(self, board):
        self.read += 1
        return self.text


def test_a_group_is_given_up_once_enough_in_front_of_it_qualify_on_any_rank(monkeypatch):
    monkeypatch.setattr(choosing, "LOOK", 0.0)
    ranks = Ranks()
    first, second = Race(3, "b", ranks), Race(3, "b", ranks)
    first.enter([0, 4])
    second.enter([7])
    assert not any(race.lost(p) for race in (first, second) for p in range(20)), "two or one are known"
    assert first.due() and [p for p in range(10) if first.lost(p)] == [8, 9]
    second.enter([3])
    assert second.due() and [p for p in range(10) if second.lost(p)] == [5, 6, 7, 8, 9]
    second.enter([3])
    assert ranks.text == "0 4 7 3 ", "what is known is told once"


def test_others_are_looked_at_now_and_then():
    ranks = Ranks()
    race = Race(1, "b", ranks)
    assert sum(race.due() for _ in range(1000)) < 20 and ranks.read < 20


# ---- gates


def stream(positions=None):
    """Sources 0 and 1 in turn."""
    return SimpleNamespace(turn=lambda p: (p % 2, p // 2))


def gate(**changes) -> Gate:
    config = GateConfig(**{"low": 0.25, "high": 0.75, "window": 4, "retry": 5, **changes})
    sources = (SourceConfig("x/easy.jsonl"), SourceConfig("y/easy.jsonl"))
    return Gate(config, replace(RECIPE, data=replace(RECIPE.data, sources=sources)), stream())


def table(accuracy: float) -> np.ndarray:
    return np.array([[0.0, accuracy], [1.0, accuracy]], np.float32)


def test_a_source_is_passed_over_while_it_is_too_easy_or_too_hard_but_for_a_try_now_and_then():
    each = gate()
    each.learn({p: table(1.0) for p in (0, 2, 4)})
    assert not each.closed, "three groups are too few to tell"
    each.learn({6: table(1.0), 1: table(0.0), 3: table(0.0), 5: table(0.5), 7: table(0.0)})
    assert each.closed == {0, 1}
    assert [p for p in range(40) if each.admits(p)] == [0, 1, 10, 11, 20, 21, 30, 31], "each source's every fifth position"
    each.learn({9: table(1.0), 11: table(1.0)})
    assert each.closed == {0} and [p for p in range(12) if each.admits(p)] == [0, 1, 3, 5, 7, 9, 10, 11]
    assert each.figures()["pass_rate/easy#1"] == 1.0 and each.figures()["sampling/closed_sources"] == 1


def test_a_pass_rate_is_a_plain_mean_and_then_forgets():
    each = gate()
    values = [1.0, 0.0, 1.0, 1.0]
    for k, value in enumerate(values):
        each.learn({2 * k: table(value)})
        assert each.figures()["pass_rate/easy#1"] == pytest.approx(np.mean(values[: k + 1]))
    each.learn({8: table(0.0), 10: np.full((2, 2), np.nan, np.float32)})  # what could not be scored does not count
    assert each.figures()["pass_rate/easy#1"] == pytest.approx(0.75 * 3 / 4) and "pass_rate/easy#2" not in each.figures()


def test_pass_rates_come_back_from_a_checkpoint_to_the_last_bit():
    one = gate()
    rng = np.random.default_rng(0)
    one.learn({p: table(float(rng.random())) for p in range(30)})
    state = json.loads(json.dumps(one.state))
    other = Gate(one._config, replace(RECIPE, data=replace(RECIPE.data, sources=(SourceConfig("a"), SourceConfig("b")))), stream(), state)
    for each in (one, other):
        each.learn({31: table(0.3)})
    assert other.state == one.state and other.state["rate"][0] not in (0.0, 1.0)


def test_nothing_is_shown_to_nobody():
    ALONE.show("b", "1 ")
    assert ALONE.shown("b") == ""
    ALONE.wipe("b")


# ---- what a recipe may say


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sampling": {"oversample": 0.5}}, r"sampling.oversample: must be 0 \(off\) or at least 1, got 0.5"),
        ({"sampling": {"max_draws": 0}}, "sampling.max_draws: must be at least 1, got 0"),
        ({"sampling": {"gate": {"low": 0.9, "high": 0.2}}}, "sampling.gate.low, high: expected 0 <= low < high <= 1, got 0.9 and 0.2"),
        ({"sampling": {"gate": {"low": 0.1, "high": 1.2}}}, "sampling.gate.low, high: .* got 0.1 and 1.2"),
        ({"sampling": {"gate": {"retry": 0}}}, "sampling.gate.retry: must be at least 1, got 0"),
        ({"sampling": {"gate": {"window": 0}}}, "sampling.gate.window: must be at least 1, got 0"),
        (
            {"sampling": {"gate": {"high": 0.9, "reward": "style"}}},
            "sampling.gate.reward: 'style' is not one of the rewards",
        ),
        ({"overlong": {"buffer": -1}}, "overlong.buffer: must be at least 0, got -1"),
        ({"overlong": {"penalty": -0.5}}, "overlong.penalty: must be at least 0, got -0.5"),
        ({"overlong": {"buffer": 5000}}, "overlong.buffer: must be at most sampling.max_new_tokens, 4096, got 5000"),
        ({"rollout": {"ahead": 2}}, "rollout.ahead: replies are drawn 0 steps ahead or 1, got 2"),
        ({"rollout": {"ahead": 1}, "importance_correction": "off"}, "importance_correction: off would take replies of older weights"),
        (
            {"rollout": {"ahead": 1, "engine": "vllm"}, "model": {"lora": {"dropout": 0.1}}},
            "model.lora.dropout: with rollout.ahead, vLLM would draw between the update's random numbers",
        ),
        ({"importance_correction": "maybe"}, "importance_correction: 'maybe' is not one of auto, on, off"),
    ],
)
def test_what_a_recipe_may_not_say(changes, says):
    from actial_fast.settings.config import from_dict

    with pytest.raises(ValueError, match=says):
        from_dict(GRPORecipe, changes)


def test_all_of_it_is_off_by_default_and_survives_yaml(tmp_path):
    from actial_fast.settings.config import from_dict, load_recipe, to_yaml

    plain = GRPORecipe()
    assert not plain.sampling.oversample and not plain.sampling.gate.on and plain.overlong == OverlongConfig() and not plain.rollout.ahead
    assert not plain.overlong.mask and not plain.overlong.buffer and plain.importance_correction == "auto"
    changed = {
        "sampling": {"oversample": 1.25, "max_draws": 3, "gate": {"low": 0.1, "high": 0.9, "reward": "format", "window": 8, "retry": 4}},
        "overlong": {"mask": True, "buffer": 64, "penalty": 0.25},
        "rollout": {"ahead": 1},
        "importance_correction": "on",
    }
    recipe = from_dict(GRPORecipe, changed)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    again = load_recipe(tmp_path / "recipe.yaml", [])
    assert again == recipe and again.sampling.gate == GateConfig(0.1, 0.9, "format", 8, 4)
