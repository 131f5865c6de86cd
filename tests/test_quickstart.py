"""The main job: a shortened run here, killed again and again; the real one for three seeds under `make test-slow`."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from actial_fast import quickstart, sft
from actial_fast.data.sources.source import SourceConfig, open_source
from actial_fast.quickstart import QuickstartRecipe
from actial_fast.report.metrics import read_events
from actial_fast.settings.config import load_recipe

ROOT = Path(__file__).parent.parent
SHORT = [
    "render.objects=5",
    "render.views=10",
    "render.workers=1",
    "viewpoint.workers=1",
    "viewpoint.test_examples=12",
    "viewpoint.validation_examples=12",
    "viewpoint.max_test_fraction=0.2",
    "spatial.train_per_kind=12",
    "spatial.test_per_kind=12",
    "spatial.validation_per_kind=12",
    "spatial.turn_tolerance_deg=14",
    "cot_rows=20",
    "spatial_cot_rows=10",
    *("model.heads=2", "model.hidden=32", "model.vision_depth=1", "model.image_size=28", "render.image_size=28"),
    "model.vision_hidden=32",
    "model.layers=2",
    *(f"{stage}.{key}" for stage in ("front", "ring", "sft") for key in ("steps=5", "batch_size=8", "eval.every=3", "save.every=2")),
    *("grpo.steps=4", "grpo.prompts=2", "grpo.minibatch=2", "grpo.sampling.n=2", "grpo.eval.every=2", "grpo.save.every=1"),
    *("grpo.sampling.max_new_tokens=8", "grpo.eval.max_new_tokens=8", "test.max_new_tokens=8", "sampled.max_new_tokens=8"),
]


def launch(run: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "actial_fast.cli", "quickstart", f"run={run}", *SHORT]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(run: Path) -> dict:
    process = launch(run)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-3000:]
    return json.loads((run / "summary.json").read_text())


def test_short_run_killed_anywhere_continues_to_the_same_end(tmp_path):
    whole = finish(tmp_path / "whole")
    assert set(whole) >= {
        "seed",
        "accuracy_after_sft",
        "accuracy_after_grpo",
        "well_formed_and_correct_before_grpo",
        "well_formed_and_correct_after_grpo",
        "images_per_second",
        "examples_per_second",
        "seconds",
        "total_seconds",
    }
    assert {"ego_translation", "object_translation", "ego_rotation", "turn_size"} <= set(whole["accuracy_after_sft"])
    assert_splits_share_no_object(tmp_path / "whole")

    run = tmp_path / "killed"
    kills = 0
    # kill -9 as soon as each of these exists: in the data, in SFT between two checkpoints, in GRPO
    for sign in ("captures/vehicle/0002", "viewpoint", "front/step-000002", "sft/step-000004", "grpo/step-000002"):
        process = launch(run)
        deadline = time.time() + 300
        while process.poll() is None and not (run / sign).exists() and time.time() < deadline:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 4
    again = finish(run)
    for key in whole.keys() - {"seconds", "total_seconds", "images_per_second", "examples_per_second"}:
        assert again[key] == whole[key], key
    ours, theirs = (load_file(path / "grpo/final/model/model.safetensors") for path in (run, tmp_path / "whole"))
    assert all((ours[name] == theirs[name]).all() for name in theirs)

    page = (run / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "data:image/png;base64," in page
    model = run / "grpo/final/model"
    assert Qwen2_5_VLForConditionalGeneration.from_pretrained(model) and AutoTokenizer.from_pretrained(model)


def assert_splits_share_no_object(run: Path) -> None:
    """Neither the viewpoint rows, nor what pretraining stands on, nor the parquet files, whose pictures are told apart by their bytes."""
    read = {
        split: [row for name in names for row in rows_of(run / name)]
        for split, names in {
            "train": (
                "viewpoint/train.jsonl",
                "front-train.jsonl",
                "ring-train.jsonl",
                "cot.jsonl",
                "spatial-cot.jsonl",
                "spatial/train.parquet",
            ),
            "validation": ("viewpoint/validation.jsonl", "front-validation.jsonl", "ring-validation.jsonl", "spatial/validation.parquet"),
            "test": ("viewpoint/test.jsonl", "spatial/test.parquet"),
        }.items()
    }
    objects = {path.read_bytes(): path.parts[-4:-2] for path in (run / "captures").glob("*/*/images/*")}
    seen = {}
    for split, rows in read.items():
        pictures = [image if isinstance(image, bytes) else Path(image).read_bytes() for row in rows for image in row.images]
        seen[split] = {objects[picture] for picture in pictures}
        assert len(seen[split]) >= 2, split
    assert not seen["train"] & seen["validation"] and not seen["train"] & seen["test"] and not seen["validation"] & seen["test"]


def rows_of(path: Path) -> list:
    source = open_source(SourceConfig(str(path)))
    return [source[i] for i in range(len(source))]


def test_no_stage_trains_or_stops_on_a_test_row():
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml")
    for stage in (recipe.front, recipe.ring, recipe.sft, recipe.grpo):
        assert all("train" in source.path or "cot" in source.path for source in stage.data.sources), stage.name
        assert stage.eval.sources and all("validation" in source.path for source in stage.eval.sources), stage.name
    for tables in (recipe.test, recipe.sampled):
        assert all("test" in source.path and not source.limit for source in tables.sources)


def test_stages_share_the_run_folder_the_seed_and_each_other_s_weights():
    recipe = quickstart._resolved(load_recipe(ROOT / "recipes/quickstart.yaml", ["run=somewhere", "seed=7"]))
    assert recipe.front.model.path == "somewhere/model" and recipe.grpo.model.path == "somewhere/sft/final/model"
    assert {
        part.seed for part in (recipe.render, recipe.viewpoint, recipe.spatial, recipe.front, recipe.ring, recipe.sft, recipe.grpo)
    } == {7}
    paths = [s.path for stage in (recipe.front, recipe.ring, recipe.sft, recipe.grpo) for s in stage.data.sources]
    assert all(path.startswith("somewhere/") for path in paths)
    kinds = {Path(path).suffix for path in (s.path for s in recipe.grpo.data.sources)}
    assert kinds == {".jsonl", ".parquet"}, "stage 2 trains on viewpoint rows and on SAT's format"


def test_no_object_is_in_both_train_and_test(lab):
    rows = {split: open_source(SourceConfig(str(lab.questions / f"{split}.jsonl"))) for split in ("train", "test")}
    objects = {split: {source[i].meta["object"] for i in range(len(source))} for split, source in rows.items()}
    assert objects["train"] and objects["test"] and not objects["train"] & objects["test"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_quickstart_reaches_what_it_promises(seed, tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "actial_fast.cli", "quickstart", f"run={tmp_path}/run", f"seed={seed}"], cwd=ROOT, text=True, check=True
    )
    assert process.returncode == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    for kind in ("ego_translation", "object_translation", "ego_rotation"):
        assert summary["accuracy_after_sft"][kind] >= 0.9, summary
        assert summary["accuracy_after_grpo"][kind] >= summary["accuracy_after_sft"][kind] - 0.02, summary
    assert summary["accuracy_after_grpo"]["facing_side"] >= 0.85, summary
    assert summary["accuracy_after_grpo"]["turn_size"] >= 1 / 3 + 0.15, summary
    assert summary["well_formed_and_correct_before_grpo"]["viewpoint/test"] < 0.25, summary
    assert summary["well_formed_and_correct_after_grpo"]["viewpoint/test"] >= 0.8, summary
    assert summary["total_seconds"] <= 800, summary


@pytest.fixture(scope="module")
def before_sft(tmp_path_factory) -> QuickstartRecipe:
    """The quickstart's run up to the stage before SFT."""

    class Enough(Exception):
        pass

    def stop(*_):
        raise Enough

    recipe = quickstart._resolved(load_recipe(ROOT / "recipes/quickstart.yaml", [f"run={tmp_path_factory.mktemp('quickstart')}"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "_test", stop)  # the first of them comes after `ring`
        with pytest.raises(Enough):
            quickstart.run(recipe)
    return recipe


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("dtype", "keys"),
    [
        ("float32", {}),
        ("float32", {"kind": "adamw8bit"}),
        ("bfloat16", {}),
        ("bfloat16", {"kind": "adamw8bit"}),
        ("bfloat16", {"master": True}),
    ],
    ids=["float32", "8 bits", "rounded", "rounded, 8 bits", "master"],
)
def test_sft_reaches_the_same_accuracy_however_the_optimizer_is_held(dtype, keys, before_sft, tmp_path):
    """The band of the quickstart, 0.9 for each type of question."""
    stage = before_sft.sft
    stage = replace(stage, run=str(tmp_path), model=replace(stage.model, dtype=dtype), optim=replace(stage.optim, **keys))
    sft.train(stage)
    evals = [e["result"] for e in read_events(tmp_path) if e["kind"] == "eval"]
    assert all(found["accuracy"] >= 0.9 for found in evals[-1]["kinds"].values()), evals[-1]
