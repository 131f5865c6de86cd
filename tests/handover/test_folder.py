"""What is handed over: rows that open again, the reward, the script, and everything that verl cannot do or does otherwise."""

import ast
import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from actial_fast.cli.main import main
from actial_fast.data.sources.row import BadRow
from actial_fast.data.sources.source import SourceConfig, open_source
from actial_fast.handover.overrides import hydra, place_of
from actial_fast.handover.rows import copies, named, shares
from actial_fast.rollout.choosing import totals_of
from actial_fast.settings.config import to_yaml
from actial_fast.settings.recipe import SFTRecipe
from actial_fast.tasks.rewards import RewardConfig, score
from actial_fast.tasks.verl import score_function
from tests.handover.exported import handed, overrides_of, parquet, recipe_of, words_of, write_rows

REPLIES = (
    "<think>-</think><answer>A</answer>",
    "<think>-</think><answer>none of them</answer>",
    "<think>-</think> <answer>c. up</answer>",
    "B",
    "The answer is (D).",
    "<answer>A</answer><answer>B</answer>",
    "",
    "<think>A",
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


def compute_score_of(folder: Path):
    """The reward as verl loads it: from the file, by name."""
    spec = importlib.util.spec_from_file_location("reward", folder / "reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compute_score


def test_the_rows_open_again(rows, tmp_path):
    """In this project's own reader of verl's format, with the same words, pictures, answers and options."""
    recipe = recipe_of(
        rows, data={"sources": [{"path": str(rows), "system": "Look, and think."}]}, eval={"sources": [{"path": str(rows)}], "limit": 5}
    )
    done = handed(recipe, tmp_path / "out")
    assert (
        {path.name for path in (tmp_path / "out").iterdir()} == {"train.parquet", "val.parquet", "reward.py", "run.sh"} == set(done.files)
    )
    before, after = open_source(recipe.data.sources[0]), open_source(SourceConfig(str(tmp_path / "out/train.parquet")))
    assert len(before) == len(after) == 12 and len(open_source(SourceConfig(str(tmp_path / "out/val.parquet")))) == 5
    for a, b in zip(before, after, strict=True):
        assert (a.prompt, a.truth, a.choices, a.kind) == (b.turns, b.truth, b.choices, b.kind)
        assert [image.read_bytes() for image in a.images] == list(b.images)
    record = parquet(tmp_path / "out/train.parquet")[3]
    assert (
        record["data_source"] == "rows" and record["ability"] == "way" and record["reward_model"] == {"style": "rule", "ground_truth": "D"}
    )
    assert [turn["role"] for turn in record["prompt"]] == ["system", "user"]
    assert {(image["min_pixels"], image["max_pixels"]) for image in record["images"]} == {(784, 1568)}
    assert record["extra_info"]["split"] == "train" and record["extra_info"]["index"] == 3


@pytest.mark.parametrize(
    "rewards",
    [
        [{"name": "format", "weight": 0.5}, {"name": "accuracy", "weight": 0.5}],
        [{"name": "format", "weight": 0.3}, {"name": "accuracy", "weight": 0.7, "strict": True}],
        [{"name": "tests.helpers:short", "weight": 0.1}, {"name": "tests.handover.test_folder:seen", "call": "batch", "workers": 0}],
        [{"name": "accuracy", "weight": -2.0}, {"name": "tests.handover.test_folder:later", "workers": 2}],
    ],
    ids=["shipped", "strict", "own", "awaited"],
)
def test_the_reward_is_the_loops(rewards, rows, tmp_path):
    """For every reply to every row, by the file that verl loads and what verl hands it, to the last bit."""
    recipe = recipe_of(rows, rewards=rewards)
    handed(recipe, tmp_path / "out")
    compute_score, source = compute_score_of(tmp_path / "out"), open_source(recipe.data.sources[0])
    for row, record in zip(source, parquet(tmp_path / "out/train.parquet"), strict=True):
        want = totals_of(score(REPLIES, [row] * len(REPLIES), recipe.rewards), dataclasses.replace(recipe, sampling=recipe.sampling))
        truth, extra = record["reward_model"]["ground_truth"], record["extra_info"] | {"num_turns": 2, "rollout_reward_scores": {}}
        got = [compute_score(data_source="rows", solution_str=reply, ground_truth=truth, extra_info=extra)["score"] for reply in REPLIES]
        assert got == [float(value) for value in want], row.id
    assert len(set(got)) > 1


def seen(responses, rows):
    """A reward of lists, which looks at what a row carries beside its answer."""
    return [row.meta["turn"] + len(row.meta["seen"]) + len(response) / 7 for response, row in zip(responses, rows, strict=True)]


async def later(response, row):
    """A reward that is awaited, and cannot score rows of one kind."""
    return None if row.kind == "way" else len(response) / 3 + len(row.choices or row.prompt[-1].content)


def test_what_an_evaluation_counts(rows, tmp_path):
    """acc: with eval.strict as the paper, else as people judge; a task's metric; not a number for a row without a truth."""
    for strict, want in ((False, 1.0), (True, 0.0)):
        recipe = recipe_of(rows, eval={"sources": [{"path": str(rows)}], "strict": strict})
        handed(recipe, tmp_path / str(strict))
        record = parquet(tmp_path / str(strict) / "val.parquet")[3]
        given = {"ground_truth": record["reward_model"]["ground_truth"], "extra_info": record["extra_info"]}
        assert compute_score_of(tmp_path / str(strict))("rows", "The answer is (D).", **given)["acc"] == want
    assert compute_score_of(tmp_path / "True")("rows", "D", **given | {"ground_truth": "C"})["acc"] == 0.0  # the truth is verl's own
    assert math.isnan(compute_score_of(tmp_path / "True")("rows", "D", **given | {"ground_truth": ""})["acc"])
    boxes = json.dumps(
        json.loads(record["extra_info"]["row"]) | {"task": "boxes", "meta": {"boxes": [[0, 0, 10, 10]], "unit": "pixels", "size": [20, 20]}}
    )
    found = score_function([RewardConfig("task")])("boxes", "<answer>[[0, 0, 10, 10]]</answer>", "", {"row": boxes})
    assert 0 <= found["acc"] <= 1 and found["score"] >= 0


def test_the_reward_says_what_is_wrong():
    with pytest.raises(ValueError, match="extra_info of a row of 'gsm8k' has no `row`; write the rows by `actial export verl`"):
        score_function([RewardConfig("accuracy")])("gsm8k", "4", "4", {"split": "train"})
    with pytest.raises(ValueError, match="unknown reward 'accurate'"):
        score_function([RewardConfig("accurate")])
    row = json.dumps(
        {"messages": [["user", "?"]], "accepted": [], "kind": "", "choices": [], "id": "", "where": "rows:3", "meta": {}, "task": ""}
    )
    with pytest.raises(ValueError, match=r"reward 'tests.handover.test_folder:seen' failed on row 'rows:3': KeyError: 'turn'"):
        score_function([RewardConfig("tests.handover.test_folder:seen", call="batch", retries=0)])("mine", "4", "4", {"row": row})


def test_the_reward_needs_neither_torch_nor_transformers(rows, tmp_path):
    """verl's environment has another transformers than ours."""
    handed(recipe_of(rows), tmp_path / "out")
    others = ("torch", "transformers", "PIL", "pyarrow")
    code = f"import sys, runpy; runpy.run_path({str(tmp_path / 'out/reward.py')!r}); print([m for m in {others} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_script(rows, tmp_path):
    """A folder with a space and a quote in its name; verl's words, each beside the key that it says; further overrides come last."""
    recipe = recipe_of(
        rows, loss={"beta": 0.0, "clip_high": 0.28}, optim={"lr": 2e-6, "clip_norm": 0}, eval={"sources": [{"path": str(rows)}]}
    )
    folder = tmp_path / "for verl's use"
    done = handed(recipe, folder)
    found = overrides_of(folder)
    assert found["data.train_files"] == f"['{str(folder).replace(chr(39), chr(92) + chr(39))}/train.parquet']"
    assert found["actor_rollout_ref.actor.clip_ratio_high"] == "0.28" and found["actor_rollout_ref.actor.optim.lr"] == "2e-06"
    assert found["actor_rollout_ref.actor.optim.clip_grad"] == found["actor_rollout_ref.actor.clip_ratio_c"] == "1000000000.0"
    assert found["actor_rollout_ref.actor.use_kl_loss"] == "false" and found["actor_rollout_ref.actor.optim.weight_decay"] == "0.0"
    assert found["actor_rollout_ref.actor.optim.betas"] == "[0.9,0.95]" and found["data.train_batch_size"] == "4"
    assert found["trainer.nnodes"] == "1" and found["trainer.val_before_train"] == "true"
    words = words_of(folder, "trainer.save_freq=7", NODES="4", GPUS="2")
    assert words[-3:] == ["trainer.nnodes=4", "trainer.n_gpus_per_node=2", "trainer.save_freq=7"]
    text = (folder / "run.sh").read_text()
    assert all(f"#   - {line}\n" in text for line in done.told) and "loss.clip_high" in text
    ast.parse((folder / "reward.py").read_text())


def test_values_in_hydras_grammar():
    assert hydra({"eps": 1e-8, "on": True}) == "{eps:1e-08,on:true}" and hydra([1, "a/b", None]) == "[1,a/b,null]"
    assert [hydra(word) for word in ("true", "it's", "1e3", "a b", "")] == ["'true'", "'it\\'s'", "'1e3'", "'a b'", "''"]


def test_a_models_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert place_of("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert place_of("runs/grpo/sft/final/model") == str(tmp_path / "runs/grpo/sft/final/model")
    assert place_of("runs/model") == str(tmp_path / "runs/model")


# ---- mixtures and bad rows


def test_shares_by_naming_files_several_times(tmp_path):
    assert copies([100], [1.0]) == [1] and copies([100, 100], [0.5, 0.5]) == [1, 1] and copies([100, 300], [0.5, 0.5]) == [3, 1]
    for sizes, weights in (([9720, 2000, 1998], [0.4, 0.3, 0.3]), ([7, 100], [0.2, 0.8]), ([50, 60, 70], [5, 1, 1])):
        assert np.allclose(shares(sizes, copies(sizes, weights)), np.array(weights) / sum(weights), rtol=0.04)
    assert copies([10**6, 10], [0.5, 0.5]) == [1, 32]  # the nearest there is
    few, many = write_rows(tmp_path / "a", 4), write_rows(tmp_path / "b", 12)
    done = handed(recipe_of([few, many]), tmp_path / "out")
    found = overrides_of(tmp_path / "out")["data.train_files"]
    assert [found.count(f"train-{i}.parquet") for i in (1, 2)] == [3, 1]
    assert "data.sources.weight: a file stands in data.train_files as often as gives shares of 0.500, 0.500 for 0.500, 0.500" in done.told
    assert [parquet(tmp_path / f"out/train-{i}.parquet")[0]["data_source"] for i in (1, 2)] == ["a-rows", "b-rows"]
    same = SourceConfig(str(few))
    assert named([same, same]) == ["a-rows-1", "a-rows-2"] and named([SourceConfig("x/train.jsonl"), SourceConfig("y/sat.json")]) == [
        "train",
        "sat",
    ]


def test_bad_rows(tmp_path):
    rows = write_rows(tmp_path / "rows")
    with open(rows, "a") as file:
        file.write('{"id": "lost", "messages": [{"role": "user", "content": "<image>?"}], "images": ["lost.png"], "truth": "A"}\nno JSON\n')
    with pytest.raises(BadRow, match=r"rows.jsonl:13: image .*lost.png does not exist"):
        handed(recipe_of(rows), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"rows"}  # whole or absent
    done = handed(recipe_of(rows, data={"sources": [{"path": str(rows)}], "on_bad_row": "skip"}), tmp_path / "out")
    assert len(parquet(tmp_path / "out/train.parquet")) == 12 and len(done.bad) == 2
    rejects = (tmp_path / "out/rejects.txt").read_text().splitlines()
    assert "lost.png does not exist" in rejects[0] and ":14: " in rejects[1] and any("2 rows were left out" in line for line in done.told)
    (tmp_path / "rows/none.jsonl").write_text("no JSON\n")
    bad = recipe_of(rows, data={"sources": [{"path": str(tmp_path / "rows/none.jsonl"), "format": "jsonl"}], "on_bad_row": "skip"})
    with pytest.raises(ValueError, match="data source none has no row that can be handed over"):
        handed(bad, tmp_path / "none")


def test_what_is_refused_before_anything_is_written(rows, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    with pytest.raises(ValueError, match=r"--out .*full: there is something already; name a folder that is new or empty"):
        handed(recipe_of(rows), tmp_path / "full")
    with pytest.raises(ValueError, match="there are 12 rows for steps of 16"):
        handed(recipe_of(rows, prompts=16), tmp_path / "out")
    with pytest.raises(ValueError, match=r"model.max_pixels: .*nowhere cannot be read \(there is no such folder\); set both"):
        handed(recipe_of(rows, model={"path": str(tmp_path / "nowhere"), "min_pixels": 0}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_limits_of_images_are_the_checkpoints(rows, tiny, tmp_path):
    handed(recipe_of(rows, model={"path": str(tiny), "min_pixels": 0, "max_pixels": 5000}), tmp_path / "out")
    size = json.loads((tiny / "preprocessor_config.json").read_text())["size"]
    found = overrides_of(tmp_path / "out")
    assert (
        found["+data.mm_processor_kwargs.min_pixels"] == str(size["shortest_edge"])
        and found["+data.mm_processor_kwargs.max_pixels"] == "5000"
    )
    assert parquet(tmp_path / "out/train.parquet")[0]["images"][0]["min_pixels"] == size["shortest_edge"]


# ---- the command


def test_the_command(rows, tmp_path, capsys):
    recipe = tmp_path / 'mine "one"\n\\x.yaml'
    recipe.write_text(to_yaml(recipe_of(rows)))
    assert main(["-q", "export", "verl", str(recipe), "-o", str(tmp_path / "out"), "optim.lr=3e-6", "optim.schedule=cosine"]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'out/train.parquet'}: 12 rows of rows with 24 images" in out and "verl does otherwise than `actial grpo`:" in out
    assert overrides_of(tmp_path / "out")["actor_rollout_ref.actor.optim.lr"] == "3e-06"
    assert "mine 'one' /x.yaml" in (tmp_path / "out/run.sh").read_text() and callable(compute_score_of(tmp_path / "out"))
    assert main(["export", "verl", str(recipe), "-o", str(tmp_path / "no"), "optim.schedule=linear", "overlong.mask=true"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("actial: verl 0.9.1 cannot do this: ") for line in lines)
    recipe.write_text(to_yaml(SFTRecipe()))
    assert main(["export", "verl", str(recipe), "-o", str(tmp_path / "no")]) == 2
    assert "a recipe of kind grpo is handed over, and this is sft; SFT stays with `actial sft`" in capsys.readouterr().err
    assert main(["export", "verl", "recipes/quickstart.yaml", "-o", str(tmp_path / "no")]) == 2
    assert "RUN/grpo/recipe.yaml" in capsys.readouterr().err and not (tmp_path / "no").exists()
    with pytest.raises(SystemExit) as ended:
        main(["export", "verl", "--help"])
    assert ended.value.code == 0 and "verl 0.9.1" in capsys.readouterr().out
