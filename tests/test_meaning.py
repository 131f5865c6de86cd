"""Numbers and words that mean what they say: each test is named after the fault of the review that it keeps away."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actial_fast import grpo, sft
from actial_fast.data.sources.source import SourceConfig
from actial_fast.model.policy import load_policy
from actial_fast.ops.spec import NAMED, AdvantageSpec, GRPOSpec
from actial_fast.packing.batch import Sequence
from actial_fast.rollout.choosing import advantages_of
from actial_fast.rollout.groups import Groups
from actial_fast.rollout.protocol import Reply
from actial_fast.settings.model import ModelConfig
from actial_fast.settings.running import OptimConfig, SaveConfig
from actial_fast.tasks.rewards import RewardConfig
from actial_fast.train import checkpoint, preflight
from actial_fast.train.optim import set_learning_rate
from actial_fast.train.preflight import Unready
from actial_fast.train.samples import Sample, figures
from tests.loops import ALONE
from tests.test_faults import case, run_cases, weights


@pytest.mark.parametrize(
    ("attention", "says"),
    [("eager", "packed attention has no eager form"), ("flash_attention_3", "flash_attention_3 needs CUDA, and this is cpu")],
)
def test_b16_attention_that_packed_passes_cannot_have_is_an_error(attention, says, lab):
    config = ModelConfig(path=str(lab.model), attention=attention)
    with pytest.raises(ValueError, match=f"model.attention: {says}"):
        load_policy(config, ALONE.device, 0, packed=True)
    if attention == "eager":
        assert load_policy(config, ALONE.device, 0).base.config._attn_implementation == "eager"


@pytest.mark.parametrize(("schedule", "total"), [("cosine", 7), ("linear", 7), ("linear", 1)])
def test_b15_no_step_has_a_learning_rate_of_nothing(schedule, total):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    config = OptimConfig(lr=1.0, warmup_steps=0, schedule=schedule)
    rates = [set_learning_rate(optimizer, config, step, total) for step in range(1, total + 1)]
    assert rates[0] == 1 and all(a > b > 0 for a, b in itertools.pairwise(rates))


def test_b12_one_reply_a_prompt_teaches_nothing(grpo_recipe):
    with pytest.raises(ValueError, match="n: must be at least 2, got 1"):
        replace(grpo_recipe.sampling, n=1)


def test_b10_steps_that_bfloat16_would_round_away_are_made(sft_recipe, tmp_path):
    """At a learning rate of which nearly nothing was left: weights move, and their mean displacement along float32's is float32's."""
    small = replace(sft_recipe, steps=3, optim=OptimConfig(lr=2e-5, warmup_steps=0), save=SaveConfig(every=0, tensorboard=False))
    low = replace(small, model=replace(small.model, dtype="bfloat16"))
    master = replace(low, optim=replace(low.optim, master=True))
    runs = {"float32": small, "rounded": low, "master": master}
    ends = {name: load_file(sft.train(replace(r, run=str(tmp_path / name))) / "model.safetensors") for name, r in runs.items()}
    assert {name: end["lm_head.weight"].dtype for name, end in ends.items()} == {
        "float32": torch.float32,
        "rounded": torch.bfloat16,
        "master": torch.float32,
    }
    start = load_file(Path(small.model.path) / "model.safetensors")
    along = {}
    for name, end in ends.items():
        begin = {key: value if name == "float32" else value.bfloat16().float() for key, value in start.items()}
        ways = [(end[key].float() - begin[key], (ends["float32"][key] - value).sign()) for key, value in start.items()]
        along[name] = float(torch.cat([(way * sign).flatten() for way, sign in ways]).mean())
    assert along["master"] == pytest.approx(along["float32"], rel=0.1) and along["rounded"] == pytest.approx(along["float32"], rel=0.2)


def test_b11_what_no_reward_could_score_is_told_and_is_not_zero(grpo_recipe):
    """Means are over what was scored; a group without a score is not one of equal rewards alone."""

    def sample(reward):
        rewards = np.array([reward], np.float32)
        return Sample(Sequence(*[np.zeros(3, np.int64)] * 2, np.zeros((3, 3), np.int64)), "", np.zeros(2), rewards, reward, 0.0, 0, True)

    recipe = replace(grpo_recipe, rewards=(RewardConfig("accuracy"),), sampling=replace(grpo_recipe.sampling, n=2))
    stats = np.zeros(len(grpo.ops.STATS))
    found = figures([sample(1.0), sample(np.nan), sample(0.5), sample(0.0)], stats, recipe, ALONE, 1.0)
    assert found["reward"] == found["reward/accuracy"] == 0.5 and found["unscored"] == 0.25 and found["zero_variance_groups"] == 0.5
    nothing = figures([sample(np.nan)] * 4, stats, recipe, ALONE, 1.0)
    assert np.isnan(nothing["reward"]) and nothing["unscored"] == 1 and nothing["zero_variance_groups"] == 1


def test_b13_a_preflight_names_everything_at_once(grpo_recipe, tmp_path, capsys):
    sources = (SourceConfig(str(tmp_path / "gone.jsonl")),)
    recipe = replace(
        grpo_recipe,
        data=replace(grpo_recipe.data, sources=(*sources, *grpo_recipe.data.sources)),
        eval=replace(grpo_recipe.eval, sources=sources),
        rewards=(RewardConfig("no.such.module:reward"), RewardConfig("format")),
        save=SaveConfig(wandb="project", tensorboard=False),
    )
    with pytest.raises(Unready) as found:
        grpo.train(recipe)
    told = found.value.problems
    assert [p.split(":")[0] for p in told] == ["data.sources", "eval.sources", "rewards", "save.wandb"], told
    assert not (Path(recipe.run) / "grpo" / "recipe.yaml").exists()
    with pytest.raises(Unready, match="has model_type internvl; trained here are Qwen2-VL"):
        other = tmp_path / "other"
        shutil.copytree(grpo_recipe.model.path, other)
        config = (other / "config.json").read_text()
        (other / "config.json").write_text(config.replace('"qwen2_5_vl"', '"internvl"'))
        grpo.train(replace(grpo_recipe, model=replace(grpo_recipe.model, path=str(other))))


def test_b13_too_little_disk_is_told_before_the_run(sft_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(Unready, match=r"room for 0.0 GB; 3 checkpoints .* name a run folder on a larger disk") as found:
        sft.train(replace(sft_recipe, data=replace(sft_recipe.data, image_cache=str(tmp_path / "images"))))
    assert any("image_cache" in p for p in found.value.problems)


def test_a_limit_that_a_step_does_not_fit_into_is_told_before_the_run(sft_recipe, tmp_path):
    data = replace(sft_recipe.data, image_cache=str(tmp_path / "images"), image_cache_gb=1e-5)
    with pytest.raises(Unready, match=r"data.image_cache_gb: the images of the rows under way need about .* GB, more than 1e-05; raise it"):
        sft.train(replace(sft_recipe, data=data))


def test_b18_nothing_but_rows_that_are_too_long_ends_the_run(sft_recipe):
    data = replace(sft_recipe.data, max_prompt_tokens=3, on_bad_row="skip")
    with pytest.raises(Unready, match="over max_prompt_tokens=3"):
        sft.train(replace(sft_recipe, data=data))


def test_a_stage_whose_last_moment_was_cut_off_is_finished_from_its_checkpoint(sft_recipe, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Saver, "finish", lambda self, step: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sft.train(replace(sft_recipe, steps=2))
    folder = Path(sft_recipe.run) / "sft"
    assert checkpoint.final(folder) is None and checkpoint.steps(folder)[-1] == 2
    assert sft.train(replace(sft_recipe, steps=2)) == checkpoint.final(folder)


def test_b8_one_rank_has_the_advantages_of_many(grpo_recipe):
    """Statistics of the whole batch do not depend on how it is spread over ranks."""
    generator = torch.Generator().manual_seed(0)
    grpo_tables = {g: torch.randn(4, 2, generator=generator).numpy() for g in range(6)}
    for scale, combine, baseline in itertools.product(
        ("std", "batch_std", "none"), ("sum_then_normalize", "normalize_then_sum"), ("mean", "leave_one_out")
    ):
        spec = AdvantageSpec(baseline=baseline, scale=scale, combine=combine)
        recipe = replace(grpo_recipe, advantages=spec, rewards=(RewardConfig("accuracy", 0.5), RewardConfig("format", 2.0)))
        whole = [s.advantage for s in _samples(grpo_tables, range(6), recipe)]
        parts = [_samples(grpo_tables, range(first, 6, 2), recipe) for first in (0, 1)]
        spread = [s.advantage for g in range(6) for s in parts[g % 2][g // 2 * 4 :][:4]]
        assert spread == whole and any(whole), spec


def _samples(tables, mine, recipe):
    """Those of a rank that drew `mine`, when all ranks together have the tables of rewards."""
    nothing = Sequence(*[np.zeros(0, np.int64)] * 2, np.zeros((3, 0), np.int64))
    begun = SimpleNamespace(
        tables=tables,
        replies={g: [Reply(np.ones(1, np.int64), np.zeros(1, np.float32), True)] * 4 for g in mine},
        examples={g: SimpleNamespace(encoded=nothing) for g in mine},
        texts={g: [""] * 4 for g in mine},
        race=None,
    )
    return Groups(None, None, None, recipe, ALONE, None)._samples(begun, sorted(tables))


@pytest.mark.ranks
def test_one_rank_equals_two_for_every_named_loss(grpo_recipe, tmp_path):
    """And for statistics of the whole batch: weights after two steps of two updates."""
    base = replace(
        grpo_recipe,
        data=replace(grpo_recipe.data, workers=0, max_prompt_tokens=220),
        optim=OptimConfig(lr=1e-3, eps=1e-4, warmup_steps=0),  # an epsilon that keeps rounding of tiny gradients small
        rewards=(RewardConfig("tests.faults:short", workers=0), RewardConfig("format", 0.5)),
        save=SaveConfig(every=0, tensorboard=False),
        pack_tokens=300,
        log_rollouts=0,
        steps=2,
    )
    recipes = {name: replace(base, loss=GRPOSpec.named(name)) for name in NAMED}
    whole = AdvantageSpec(scale="batch_std", combine="normalize_then_sum")
    recipes["whole batch"] = replace(base, advantages=whole)
    recipes["whole batch, leave one out"] = replace(base, advantages=replace(whole, baseline="leave_one_out"))
    found = run_cases(tmp_path, [case(tmp_path, name, recipe, "grpo") for name, recipe in recipes.items()])
    assert {each["outcome"] for each in found.values()} == {"finished"}, found
    for name, recipe in recipes.items():
        alone = load_file(grpo.train(replace(recipe, run=str(tmp_path / "one" / name))) / "model.safetensors")
        for key, value in weights(tmp_path / name, "grpo").items():
            assert torch.allclose(value, alone[key], rtol=0, atol=2e-6), (name, key, (value - alone[key]).abs().max())


def test_b7_normalize_then_sum_happens(grpo_recipe):
    """The example of the review: without it sample 0 has the other sign."""
    rewards = torch.tensor([[1, 0], [0, 0], [1, 3], [0, 9], [0, 1], [1, 1], [1, 8], [0, 2]], dtype=torch.float32).numpy()
    spec = replace(grpo_recipe.advantages, combine="normalize_then_sum")
    terms = (RewardConfig("accuracy", 0.5), RewardConfig("format", 0.5))
    found = advantages_of(rewards, replace(grpo_recipe, advantages=spec, rewards=terms))
    assert torch.allclose(found, torch.tensor([0.118, -1.171, 0.645, 0.408, -1.087, 0.202, 1.75, -0.866]), atol=1e-3)
