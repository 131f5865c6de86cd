"""The two recipes for Qwen2.5-VL-7B, run in sequence as they ship: only the model, the data, the folder and the sizes are swapped.

Stage 1 reads ShareGPT JSON (both spellings, images as files), stage 2 verl parquet (images as bytes and as files).
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from actial_fast import grpo, sft
from actial_fast.data.sources.own import JsonlSource
from actial_fast.data.sources.row import IMAGE_TAG, Row
from actial_fast.data.sources.source import SourceConfig, open_source
from actial_fast.report.metrics import read_events, read_metrics
from actial_fast.settings.config import describe, load_recipe
from actial_fast.settings.model import ModelConfig
from actial_fast.settings.recipe import DataConfig, SFTRecipe
from actial_fast.settings.running import OptimConfig, SaveConfig

RECIPES = Path(__file__).parents[1] / "recipes"
SWAPPED = ("model.path", "run", "dist.fsdp", "rollout.engine")
DATA = (".path", ".format")
SIZES = {
    *("steps", "batch_size", "prompts", "minibatch", "sampling.n", "sampling.max_new_tokens"),
    *("eval.every", "eval.limit", "eval.max_new_tokens", "save.every"),
}


def thought(letter: str) -> str:
    return f"<think>The camera moved to the left. </think><answer>{letter}</answer>"


def sharegpt(path: Path, rows: list[Row], *, spelling: str = "messages", tagged: bool = False) -> Path:
    """The rows as LLaMA-Factory keeps them, images by relative path."""
    list_key, role_key, text_key, user, assistant = {
        "messages": ("messages", "role", "content", "user", "assistant"),
        "conversations": ("conversations", "from", "value", "human", "gpt"),
    }[spelling]
    records = [
        {
            list_key: [
                {role_key: user, text_key: row.prompt[-1].content},
                {role_key: assistant, text_key: thought(row.truth) if tagged else row.truth},
            ],
            "images": [os.path.relpath(image, path.parent) for image in row.images],
            "question_type": row.kind,
        }
        for row in rows
    ]
    path.write_text(json.dumps(records))
    return path


def verl(path: Path, rows: list[Row]) -> Path:
    """The rows as verl's preprocessing writes them; every other row's images as bytes, the others' as paths."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "data_source": ["viewpoint"] * len(rows),
            "prompt": [[{"role": "user", "content": row.prompt[-1].content}] for row in rows],
            "images": pa.array(
                [
                    [
                        {"bytes": file.read_bytes(), "path": None} if i % 2 else {"bytes": None, "path": os.path.relpath(file, path.parent)}
                        for file in row.images
                    ]
                    for i, row in enumerate(rows)
                ],
                pa.list_(image),
            ),
            "ability": [row.kind for row in rows],
            "reward_model": [{"style": "rule", "ground_truth": row.truth} for row in rows],
            "extra_info": [{"index": i, "split": "train"} for i in range(len(rows))],
        }
    )
    pq.write_table(table, path)
    return path


def swapped(before, after) -> list[str]:
    """Keys whose values differ between two recipes."""
    before, after = ({key: value for key, value, _, _ in describe(recipe)} for recipe in (before, after))
    assert before.keys() == after.keys()
    return [key for key in before if before[key] != after[key]]


@pytest.fixture(scope="module")
def runs(lab, tmp_path_factory) -> SimpleNamespace:
    """Both stages, run once. The base stands in for a pretrained model: it has seen tagged replies, so that samples differ in reward."""
    root = tmp_path_factory.mktemp("recipe-7b")
    train, test = (JsonlSource(lab.questions / f"{split}.jsonl") for split in ("train", "test"))
    train, test = ([source[i] for i in range(len(source))] for source in (train, test))
    cot = sharegpt(root / "cot.json", train[36:40], spelling="conversations", tagged=True)
    base = sft.train(
        SFTRecipe(
            name="base",
            run=str(root / "base"),
            model=ModelConfig(path=str(lab.model)),
            data=DataConfig(sources=(SourceConfig(str(sharegpt(root / "base.json", train[40:80], tagged=True))),)),
            optim=OptimConfig(lr=1e-2, warmup_steps=2),
            save=SaveConfig(tensorboard=False),
            steps=60,
            batch_size=8,
            micro_batch=8,
        )
    )
    run = root / "run"
    common = [f"run={run}", "dist.fsdp=false", "eval.limit=6", "eval.max_new_tokens=8"]
    stage1 = load_recipe(
        RECIPES / "actial-7b-sft.yaml",
        [
            *common,
            f"model.path={base}",
            f"data.sources.0.path={sharegpt(root / 'answers.json', train[:36])}",
            "data.sources.0.format=sharegpt",
            f"data.sources.1.path={cot}",
            f"eval.sources.0.path={sharegpt(root / 'test.json', test)}",
            "batch_size=8",
            "eval.every=6",
            "save.every=6",
        ],
    )
    final1 = sft.train(stage1)
    stage2 = load_recipe(
        RECIPES / "actial-7b-grpo.yaml",
        [
            *common,
            "rollout.engine=embedded",
            f"model.path={final1}",
            f"data.sources.0.path={verl(root / 'train.parquet', train)}",
            "data.sources.0.format=verl",
            f"eval.sources.0.path={root / 'test.json'}",
            f"eval.sources.1.path={verl(root / 'val.parquet', test)}",
            "eval.sources.1.format=verl",
            "steps=3",
            "prompts=6",
            "minibatch=3",
            "sampling.n=4",
            "sampling.max_new_tokens=10",
            "eval.every=2",
            "save.every=2",
        ],
    )
    final2 = grpo.train(stage2)
    return SimpleNamespace(
        run=run, base=base, stage1=stage1, stage2=stage2, final1=final1, final2=final2, metrics=read_metrics(run), events=read_events(run)
    )


def steps_of(runs, stage: str) -> list[dict]:
    return [m for m in runs.metrics if m["stage"] == stage]


def evaluations(runs, stage: str) -> list[dict]:
    return [e for e in runs.events if e["kind"] == "eval" and e["stage"] == stage]


def test_only_model_data_folder_and_sizes_are_swapped(runs):
    for path, recipe in (("actial-7b-sft", runs.stage1), ("actial-7b-grpo", runs.stage2)):
        keys = swapped(load_recipe(RECIPES / f"{path}.yaml"), recipe)
        assert keys and [key for key in keys if not (key in SWAPPED or key in SIZES or (".sources." in key and key.endswith(DATA)))] == []


def test_sft_follows_the_recipe(runs):
    steps = steps_of(runs, "sft")
    # 36 answer rows at 0.9 and 4 chains of thought at 0.1: an epoch is 40 rows, two are 80, in batches of 8
    assert [m["step"] for m in steps] == list(range(1, 11))
    assert all(np.isfinite(m["loss"]) and m["loss"] > 0 and m["grad_norm"] > 0 for m in steps)
    assert [m["lr"] for m in steps] == pytest.approx([5e-6 * step / 50 for step in range(1, 11)]), "warm-up over 50 steps to 5e-6"
    tokenizer = AutoTokenizer.from_pretrained(runs.base)
    letter, tagged = (len(tokenizer(text)["input_ids"]) + 1 for text in ("B", thought("B")))  # and the token that ends the turn
    assert sum(m["answer_tokens"] for m in steps) == 72 * letter + 8 * tagged, "loss on the answers only, mixed 0.9 : 0.1"


def test_grpo_follows_the_recipe(runs):
    steps = steps_of(runs, "grpo")
    assert [m["step"] for m in steps] == [1, 2, 3]
    assert all(m["lr"] == 1e-6 for m in steps)
    for m in steps:
        assert all(np.isfinite(m[key]) for key in ("loss", "reward", "kl", "entropy", "ratio", "grad_norm", "clip_fraction"))
        assert m["reward"] == pytest.approx(0.5 * m["reward/format"] + 0.5 * m["reward/accuracy"], abs=1e-6)
        assert m["ratio"] == pytest.approx(1, abs=1e-3), "two mini-batches a step, barely apart at this learning rate"
        assert 0 <= m["kl"] < 1e-3 and m["entropy"] > 0 and 1 <= m["response_length"] <= 10
    assert any(m["reward/format"] > 0 for m in steps) and any(m["reward/accuracy"] > 0 for m in steps)
    assert any(m["zero_variance_groups"] < 1 for m in steps), "or nothing would be learnt from"


def test_verl_rows_come_under_the_recipes_system_prompt(runs):
    source = open_source(runs.stage2.data.sources[0])
    for i, kind in ((0, Path), (1, bytes)):
        row = source[i]
        assert row.turns[0].role == "system" and "<answer>" in row.turns[0].content and len(row.turns) == 2
        assert [type(image) is bytes for image in row.images] == [kind is bytes] * 2
        assert row.prompt[-1].content.count(IMAGE_TAG) == 2 and row.kind.startswith("viewpoint/")


def test_evaluations_are_recorded(runs):
    assert [e["step"] for e in evaluations(runs, "sft")] == [0, 6, 10]
    assert sorted({e["step"] for e in evaluations(runs, "grpo")}) == [0, 2, 3]
    assert {e["name"].rpartition("/")[2] for e in evaluations(runs, "grpo")} == {"test", "val"}
    for event in evaluations(runs, "sft") + evaluations(runs, "grpo"):
        assert event["result"]["overall"]["n"] == 6 == sum(f["n"] for f in event["result"]["kinds"].values())


def test_rollouts_are_kept_with_their_images(runs):
    shown = [e for e in runs.events if e["kind"] == "rollouts"]
    assert [e["step"] for e in shown] == [1, 2, 3]
    for rollout in shown[0]["rollouts"]:
        assert len(rollout["images"]) == 2 and rollout["truth"] in "ABC" and 0 <= rollout["reward"] <= 1


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_final_model_opens_with_plain_transformers(runs, stage):
    final, start = {"sft": (runs.final1, runs.base), "grpo": (runs.final2, runs.final1)}[stage]
    assert final == runs.run / stage / "final" / "model"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(final)
    assert len(AutoTokenizer.from_pretrained(final)) <= model.config.text_config.vocab_size
    before, after = load_file(start / "model.safetensors"), load_file(final / "model.safetensors")
    assert before.keys() == after.keys() and all(t.dtype == torch.float32 for t in after.values())
    moved = {name: (after[name] - before[name]).abs().max().item() for name in after}
    largest = {"sft": sum(5e-6 * step / 50 for step in range(1, 11)), "grpo": 6 * 1e-6}[stage]
    assert 0 < max(moved.values()) < 3 * largest, "trained, by steps of the recipe's learning rate"


def test_the_run_folder_holds_what_a_reader_needs(runs):
    assert list(runs.run.rglob("events.out.tfevents.*"))
    for stage, recipe in (("sft", runs.stage1), ("grpo", runs.stage2)):
        assert load_recipe(runs.run / stage / "recipe.yaml") == recipe
        assert not (runs.run / stage / "rejects.jsonl").exists()
    assert {path.name for path in (runs.run / "sft").glob("step-*")} == {"step-000006", "step-000010"}


def test_run_again_it_is_already_done(runs):
    assert sft.train(runs.stage1) == runs.final1 and grpo.train(runs.stage2) == runs.final2
    assert read_metrics(runs.run) == runs.metrics
