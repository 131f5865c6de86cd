"""The loops ask the budget before they load a model, and are refused by how much and with what to change."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from actial_fast import grpo, sft
from actial_fast.budget import fits, gpus, trace
from actial_fast.budget.fits import Budget
from actial_fast.budget.models import config_of, shapes_of
from actial_fast.budget.phases import Case, phases_of
from actial_fast.budget.plan import Plan
from actial_fast.budget.rates import rates_of
from actial_fast.budget.said import gb, opening, spoken
from actial_fast.budget.seconds import Range
from actial_fast.budget.workload import assumed
from actial_fast.data.sources.source import open_source
from actial_fast.model.policy import load_policy
from actial_fast.report.metrics import MetricLog
from actial_fast.settings.config import load_recipe
from actial_fast.settings.model import LoRAConfig, ModelConfig
from actial_fast.settings.recipe import SFTRecipe
from actial_fast.train.checkpoint import final
from actial_fast.train.dist import World
from actial_fast.train.preflight import Unready

ALONE = World(0, 1, torch.device("cpu"))
GPU = World(0, 1, torch.device("cuda", 0))


@pytest.fixture
def no_trace(monkeypatch):
    """Whatever traces fails."""
    monkeypatch.setattr(trace, "_of_language", lambda *_: pytest.fail("traced, where bounds would do"))


def test_a_tiny_run_is_let_through_without_a_trace(sft_recipe, no_trace):
    assert Budget().lacking(sft_recipe, Path(sft_recipe.run), ALONE, None) == []


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_the_first_lines_say_what_a_run_is(kind, sft_recipe, grpo_recipe, no_trace, capsys):
    """From the plan that let it through; nothing is said of time where nothing is known. A run that goes on says from where."""
    recipe, loop = (sft_recipe, sft) if kind == "sft" else (grpo_recipe, grpo)
    recipe = replace(recipe, model=replace(recipe.model, lora=LoRAConfig(rank=2)), steps=1)
    loop.train(recipe)
    policy = load_policy(recipe.model, ALONE.device, 0)
    numel, trained = (sum(p.numel() for p in policy.parameters() if p.requires_grad or every) for every in (True, False))
    first, second, third, *rest = capsys.readouterr().out.splitlines()
    assert first == f"{kind}: {numel:,} parameters, {trained:,} of them trained ({100 * trained / numel:.3g}%), on CPU"
    rows = sum(len(open_source(source)) for source in recipe.data.sources)
    counts = (f"{rows} rows", "8 rows") if kind == "sft" else (f"{rows} rows of 2 sources", "4 prompts x 4 replies")
    assert second == f"{kind}: {counts[0]}; 1 steps of {counts[1]}"
    held = r"at most [\d.]+ [GM]B a rank for the model and its passes, in \w+, of [\d.]+ GB free"
    assert re.fullmatch(rf"{kind}: expected: {held}; no time before the first steps, since nothing is known of this machine's speed", third)
    assert not any(line.startswith(f"{kind}: ") for line in rest)
    loop.train(replace(recipe, steps=2))
    assert f"{kind}: {counts[0]}; 2 steps of {counts[1]}; 1 are left, from step 1\n" in capsys.readouterr().out


def test_a_quiet_run_says_nothing_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACTIAL_QUIET", "1")
    with MetricLog(tmp_path, stage="sft", total=1, tensorboard=False) as log:
        log.opening(["9 rows"])
        log.say("a result")
    assert capsys.readouterr().out == "a result\n"


def test_on_a_gpu_the_first_lines_have_the_plans_memory_and_time():
    recipe = load_recipe("recipes/actial-1x24.yaml")
    machine = gpus.parse("1xRTX4090")
    case = Case(recipe, shapes_of(config_of(recipe.model.path), recipe.model), machine, assumed(recipe))
    made = Plan(case, rates_of(machine), tuple(phases_of(case, held=trace.roughly(case.shapes.config))))
    first, second, third = opening(made, (1000, 20), "NVIDIA GeForce RTX 4090", 50, 150, bounds=False)
    assert first == "3.78e9 parameters, 29.9e6 of them trained (0.791%), on NVIDIA GeForce RTX 4090"
    assert second == "1,020 rows of 2 sources; 150 steps of 64 prompts x 8 replies; 100 are left, from step 50"
    fullest = max(made.phases, key=lambda phase: phase.held)
    assert third.startswith(
        f"expected: {gb(fullest.held)} a rank for the model and its passes, in {fullest.name}, of {gb(machine.usable)} usable; a step "
    )
    each = made.seconds["step"]
    assert (
        f"a step {spoken(each)}, 100 of them {spoken(Range(100 * each.low, 100 * each.high))}, checkpoints and evaluations aside" in third
    )
    assert third.endswith(f"({made.rates.about})") and "not measured on this GPU" in third
    *_, unknown = opening(replace(made, rates=None), (8,), "a GPU", 0, 5, bounds=True)
    assert "at most" in unknown and "no time before the first steps" in unknown and " to " not in unknown.partition("usable")[2]


@pytest.mark.parametrize("loop", ["sft", pytest.param("grpo", marks=pytest.mark.slow)])
def test_too_little_memory_ends_a_run_before_its_model_is_loaded(loop, sft_recipe, grpo_recipe, monkeypatch):
    monkeypatch.setattr(fits, "available_memory", lambda: 2e6)
    with pytest.raises(Unready, match=r"the recipe does not fit 1 rank on the CPU, 2 MB free: .* too much") as found:
        sft.train(sft_recipe) if loop == "sft" else grpo.train(grpo_recipe)
    assert "dist.fit=warn goes on all the same" in str(found.value) and "`actial plan`" in str(found.value)


def test_warned_it_goes_on(sft_recipe, monkeypatch, capsys):
    monkeypatch.setattr(fits, "available_memory", lambda: 2e6)
    recipe = replace(sft_recipe, steps=1, dist=replace(sft_recipe.dist, fit="warn"))
    sft.train(recipe)
    assert final(Path(recipe.run) / "sft") is not None
    assert "actial: the recipe does not fit 1 rank on the CPU" in capsys.readouterr().err


@pytest.mark.slow  # a plan for every key that might do
def test_a_device_that_is_too_small_is_told_with_what_would_do(sft_recipe, monkeypatch, tmp_path):
    """A 7B on a GPU of 24 GB, as the loop meets it there."""
    from actial_fast.budget.models import config_of

    config_of("", "7b").save_pretrained(tmp_path)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24 * 2**30, name="NVIDIA RTX 4090")
    )
    monkeypatch.setattr(gpus, "found", lambda: None)
    monkeypatch.setattr(fits, "available_memory", lambda: 256e9)
    recipe = replace(sft_recipe, model=ModelConfig(path=str(tmp_path), frozen_dtype="bfloat16"), pack_tokens=4096)
    recipe = replace(recipe, data=replace(recipe.data, max_prompt_tokens=2048))
    told = Budget().lacking(recipe, Path(recipe.run), GPU, None)[-1]  # before it there may be one of the disk
    assert "does not fit 1 x" in told and "too much" in told and " would (" in told
    assert "model.lora.rank=16" in told, "nothing else makes room for a 7B"


def test_several_ranks_share_the_host(sft_recipe):
    machine = [fits._here(World(0, n, torch.device("cpu"))) for n in (1, 4)]
    assert machine[0].usable == pytest.approx(4 * machine[1].usable, rel=0.2)


def test_a_hub_name_that_is_planned_needs_no_files():
    recipe = SFTRecipe(model=ModelConfig(path="Qwen/Qwen2.5-VL-3B-Instruct"))
    from actial_fast.budget.models import config_of

    assert config_of(recipe.model.path).text_config.num_hidden_layers == 36
