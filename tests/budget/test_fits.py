"""The loops ask the budget before they load a model, and are refused by how much and with what to change."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from actial_fast import grpo, sft
from actial_fast.budget import fits, gpus, trace
from actial_fast.budget.fits import lacking
from actial_fast.settings.model import ModelConfig
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
    assert lacking(sft_recipe, Path(sft_recipe.run), ALONE, None) == []


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
    told = lacking(recipe, Path(recipe.run), GPU, None)[-1]  # before it there may be one of the disk
    assert "does not fit 1 x" in told and "too much" in told and " would (" in told
    assert "model.lora.rank=16" in told, "nothing else makes room for a 7B"


def test_several_ranks_share_the_host(sft_recipe):
    machine = [fits._here(World(0, n, torch.device("cpu"))) for n in (1, 4)]
    assert machine[0].usable == pytest.approx(4 * machine[1].usable, rel=0.2)


def test_a_hub_name_that_is_planned_needs_no_files():
    recipe = SFTRecipe(model=ModelConfig(path="Qwen/Qwen2.5-VL-3B-Instruct"))
    from actial_fast.budget.models import config_of

    assert config_of(recipe.model.path).text_config.num_hidden_layers == 36
