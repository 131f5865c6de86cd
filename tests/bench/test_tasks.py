"""bench.learning.tasks: recipes of the tasks name the commands that make what they read, and what was measured says they learn."""

import json

import pytest

from actial_fast.cli.main import make_parser
from actial_fast.settings.config import load_recipe
from bench.learning.tasks import ROOT, TASKS, merged, preparation, risen

RESULTS = sorted((ROOT / "bench/results/cpu-2core").glob("tasks-*.json"))


@pytest.mark.parametrize("task", TASKS)
def test_recipes_read_what_their_commands_make(task):
    recipes = {kind: load_recipe(ROOT / f"recipes/{task}-{kind}.yaml") for kind in ("sft", "grpo")}
    made, tiny = (make_parser().parse_known_args(command)[0] for command in preparation(ROOT / f"recipes/{task}-sft.yaml"))
    assert str(tiny.out) == recipes["sft"].model.path and recipes["grpo"].model.path == f"{recipes['sft'].run}/sft/final/model"
    for recipe in recipes.values():
        assert recipe.run == f"runs/{task}"
        for source in (*recipe.data.sources, *recipe.eval.sources):
            assert source.path.startswith(f"{made.out}/") and source.task
    assert str(tiny.source[0]) == recipes["sft"].data.sources[0].path
    assert {s.path for s in recipes["grpo"].data.sources}.isdisjoint(s.path for s in recipes["grpo"].eval.sources)


def test_a_curve_has_risen_when_its_end_is_above_its_beginning():
    assert risen([0.1, 0.5, 0.3]) and not risen([0.5, 0.9, 0.5]) and not risen([0.5, 0.4, 0.4, 0.4, 0.5, 0.4])


def test_a_file_of_results_keeps_the_other_tasks():
    one, other, again = {"task": "boxes", "reward": 1}, {"task": "jigsaw"}, {"task": "boxes", "reward": 2}
    assert merged(merged([], one), other) == [other, one] and merged([other, one], again) == [other, again]


def test_the_tasks_that_ship_are_learned():
    """The committed file is of all tasks, and each curve rises: the reward in training, and the score on rows of other pictures."""
    found = {each["task"]: each for each in json.loads(RESULTS[-1].read_text())["tasks"]}
    assert tuple(found) == TASKS
    for each in found.values():
        scores = [point["score"] for point in each["held_out"] if point["stage"] == "grpo"]
        assert risen(each["reward"]) and risen(scores) and each["reward_risen"] and each["held_out_risen"], each["task"]
