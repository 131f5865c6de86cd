"""GRPO from end to end with replies from vLLM."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from actial_fast import grpo
from actial_fast.data.sources.own import JsonlSource
from actial_fast.evaluation.evaluate import evaluate
from actial_fast.model.processor import Processor
from actial_fast.model.tiny import create
from actial_fast.rollout import vllm
from actial_fast.rollout.embedded import Embedded
from actial_fast.settings.config import to_yaml
from actial_fast.settings.model import ModelConfig
from actial_fast.settings.recipe import EvalConfig, RolloutConfig
from tests.loops import ALONE
from tests.vllm.shared import SHAPE, opened, policy_of

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from actial_fast import grpo
from actial_fast.rollout import vllm
from actial_fast.settings.config import load_recipe

plain = grpo.Kept.add
def add(self, groups):
    plain(self, groups)
    if "step-000002" in str(self.folder):
        os.kill(os.getpid(), signal.SIGKILL)

grpo.Kept.add = add
vllm.SEQUENCES = 2  # one group after the other
grpo.train(load_recipe(sys.argv[1]))
"""


@pytest.fixture
def recipe(grpo_recipe, lab, tmp_path):
    """The tests' own GRPO recipe, with a model that vLLM's CPU kernels take and the lab's words."""
    rows = JsonlSource(lab.questions / "train.jsonl")
    texts = [turn.content.replace("<image>", "") for i in range(len(rows)) for turn in rows[i].turns]
    create(tmp_path / "model", texts, SHAPE, seed=0)
    held_out = EvalConfig(
        sources=(replace(grpo_recipe.data.sources[0], path=str(lab.questions / "test.jsonl")),), limit=6, max_new_tokens=8
    )
    return replace(grpo_recipe, model=ModelConfig(path=str(tmp_path / "model")), eval=held_out, rollout=RolloutConfig(engine="vllm"))


def metrics(run: str) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def test_grpo_from_end_to_end_and_killed_while_it_samples(recipe, tmp_path, monkeypatch):
    """Three steps with evaluations; the sampler's log-probs are the trainer's. A second run is killed (-9) in step 2 with some groups drawn
    and goes on: the same replies are trained on."""
    final = grpo.train(recipe)
    lines = metrics(recipe.run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["mismatch/mean_abs"] < 1e-5 and line["mismatch/max_ratio"] < 1.001 for line in lines)
    assert all(line["seconds/sync"] > 0 and line["seconds/sample"] > 0 for line in lines)
    assert len({line["grad_norm"] for line in lines}) == 3 and all(line["grad_norm"] > 0 for line in lines)
    assert Processor.load(str(final))

    again = replace(recipe, run=str(tmp_path / "killed"))
    (tmp_path / "recipe.yaml").write_text(to_yaml(again))
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "recipe.yaml"], cwd=ROOT, text=True, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr[-3000:]
    assert [line["step"] for line in metrics(again.run)] == [1]
    kept = sum(len(load_file(path)) // 4 for path in (tmp_path / "killed").glob("*/replies/step-000002-*/*.safetensors"))
    drawn: list[int] = []
    plain = grpo.Kept.add
    monkeypatch.setattr(vllm, "SEQUENCES", 2)
    monkeypatch.setattr(grpo.Kept, "add", lambda self, groups: drawn.extend(groups) or plain(self, groups))
    grpo.train(again)
    assert 0 < kept < recipe.prompts and len(drawn) == 2 * recipe.prompts - kept, "what was kept was drawn again"
    for whole, other in zip(lines, metrics(again.run), strict=True):
        for name in ("reward", "response_length", "loss", "grad_norm"):
            assert np.isclose(whole[name], other[name], rtol=1e-3, atol=1e-5), (whole["step"], name)


def test_evaluation_is_the_embedded_engines(recipe, lab, model, processor):
    policy = policy_of(model)  # whose greedy replies are ids that the tokenizer knows
    with opened(policy, processor) as engine:
        ours = evaluate(engine, processor, recipe.eval, ALONE)
    assert ours == evaluate(Embedded(policy, processor), processor, recipe.eval, ALONE)
    assert next(iter(ours.values()))["overall"]["n"] == 6


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_quickstart_reaches_what_it_promises(tmp_path):
    """Its GRPO stage with vLLM."""
    command = [sys.executable, "-m", "actial_fast.cli", "quickstart", f"run={tmp_path}/run", "grpo.rollout.engine=vllm"]
    subprocess.run(command, cwd=ROOT, text=True, check=True)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    for kind in ("ego_translation", "object_translation", "ego_rotation"):
        assert summary["accuracy_after_sft"][kind] >= 0.9, summary
    assert summary["well_formed_and_correct_before_grpo"]["viewpoint/test"] < 0.25, summary
    assert summary["well_formed_and_correct_after_grpo"]["viewpoint/test"] >= 0.8, summary
