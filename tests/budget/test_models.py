"""Widths by name and by folder, and what parameters there are."""

import pytest
import torch

from actial_fast.budget.models import config_of, shapes_of
from actial_fast.model.families.known import family_of
from actial_fast.model.policy import load_policy
from actial_fast.settings.model import LoRAConfig, ModelConfig


@pytest.mark.parametrize(("size", "billions", "kv"), [("3b", 3.7546, 36864), ("7b", 8.2922, 57344), ("32b", 33.4527, 262144)])
def test_published_sizes_have_their_parameters(size, billions, kv):
    shapes = shapes_of(config_of(f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct"), ModelConfig())
    assert shapes.numel / 1e9 == pytest.approx(billions, abs=1e-4) and shapes.trained == shapes.numel
    assert 2 * shapes.kv_elements == kv, "bytes of a token's keys and values in 16 bits"
    assert config_of("", size).to_dict() == config_of(f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct").to_dict()


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(),
        ModelConfig(freeze=("model.visual",), frozen_dtype="bfloat16"),
        ModelConfig(lora=LoRAConfig(rank=3)),
        ModelConfig(lora=LoRAConfig(rank=2, merger=True, dora=True), frozen_dtype="bfloat16"),
    ],
    ids=["full", "frozen tower", "LoRA", "DoRA and merger"],
)
def test_the_parameters_are_those_of_the_policy_that_is_loaded(lab, model):
    from dataclasses import replace

    model = replace(model, path=str(lab.model))
    policy = load_policy(model, torch.device("cpu"), 0)
    shapes = shapes_of(config_of(model.path), model)
    assert shapes.numel == sum(p.numel() for p in policy.parameters())
    assert shapes.trained == sum(p.numel() for p in policy.trained().values())
    assert sum(w.numel * w.bytes for w in shapes.weights) == sum(p.nbytes for p in policy.parameters())
    assert shapes.trains_tower == policy.trains_tower


@pytest.mark.parametrize("path", ["", "runs/nowhere/final/model", "Qwen/Qwen9-VL-7B-Instruct"])
def test_unknown_widths_are_asked_for(path):
    with pytest.raises(ValueError, match=r"model\.path: .*widths are not known; say which with --model 7b"):
        config_of(path)
    assert config_of(path, "7b").text_config.hidden_size == 3584
    with pytest.raises(ValueError, match=r"--model: known are qwen2-vl-2b, .*qwen3-vl-8b, .*, 7b"):
        config_of(path, "8b")


def test_a_shallow_model_has_the_same_widths():
    whole = config_of("", "3b")
    cut = family_of(whole).shallow(whole, 2, 1)
    assert (cut.text_config.num_hidden_layers, cut.vision_config.depth, cut.vision_config.fullatt_block_indexes) == (2, 1, [0])
    for part in ("text_config", "vision_config"):
        assert getattr(cut, part).hidden_size == getattr(whole, part).hidden_size
