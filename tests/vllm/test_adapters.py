"""Low-rank adapters in vLLM: pushed as tensors, beside a base that is sent once."""

import itertools

import numpy as np
import pytest
import torch
from vllm import LLM

from actial_fast.rollout.protocol import Draw, awake
from actial_fast.settings.model import LoRAConfig
from tests.vllm.shared import furthest, log_probs, opened, policy_of, recipe_at, replied, train

CLOSE = 1e-5


@pytest.fixture(scope="module")
def policy(model):
    """Rank 4 is none that vLLM makes room for, and alpha / rank is not 1."""
    return policy_of(model, lora=LoRAConfig(rank=4, alpha=24))


@pytest.fixture(scope="module")
def engine(policy, processor):
    with opened(policy, processor) as engine:
        yield engine


def test_log_probs_are_the_adapted_trainers_after_every_step(engine, policy, processor, prompts, keys, monkeypatch):
    sent = []
    plain = LLM.collective_rpc
    monkeypatch.setattr(LLM, "collective_rpc", lambda self, method, *a, **k: sent.append(method) or plain(self, method, *a, **k))
    moved = []
    for step in range(3):
        ours = {name: p.detach().clone() for name, p in policy.named_parameters()}
        with awake(engine, step):
            groups = engine.generate(prompts, Draw(3, 1.0, 20), keys)
        assert furthest(policy, processor, prompts, groups) < CLOSE
        assert all(torch.equal(ours[name], p) for name, p in policy.named_parameters()), "the trainer's adapters were changed"
        if not step:
            fixed = [replied(prompt, group[0]) for prompt, group in zip(prompts, groups, strict=True)]
        moved.append(np.concatenate([each.numpy() for each in log_probs(policy, processor, fixed, recipe_at())]))
        train(policy, processor, fixed)
    assert all(np.abs(a - b).max() > 1e3 * CLOSE for a, b in itertools.pairwise(moved)), "the adapters do nothing"
    assert sent.count("reload_weights") == 1 and len(sent) == 4, "the base is sent once, the adapters for each step"


def test_a_base_that_was_lost_is_sent_again_under_the_adapters(engine, policy, processor, prompts, keys):
    """As after sleep on CUDA."""

    def spoil(model):
        for name, parameter in model.named_parameters():
            if "lora" not in name:
                parameter.data.fill_(float("nan"))

    engine._llm.apply_model(spoil)
    engine.version, engine._holds_base = -1, False
    with awake(engine, 9):
        assert furthest(policy, processor, prompts, engine.generate(prompts, Draw(3, 1.0, 20), keys)) < CLOSE


def test_ranks_beyond_vllms_are_named(model, processor):
    with pytest.raises(ValueError, match=r"model.lora.rank: vLLM takes ranks up to 512, got 600"):
        with opened(policy_of(model, lora=LoRAConfig(rank=600)), processor):
            pass


@pytest.mark.parametrize("lora", [LoRAConfig(rank=4, alpha=24), LoRAConfig(rank=4, rslora=True)], ids=["plain", "rslora"])
def test_vllm_scales_them_as_peft_does(lora):
    from vllm.lora.peft_helper import PEFTHelper

    told = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "target_modules": ["q_proj"]}
    assert PEFTHelper.from_dict(told).vllm_lora_scaling_factor == pytest.approx(lora.scale)


def test_adapters_and_weights_are_whole_and_named_as_in_files(policy, model):
    from safetensors.torch import load_file

    from actial_fast.rollout.handover import adapters, checkpoint_weights

    stored = load_file(model / "model.safetensors")
    sent = dict(checkpoint_weights(policy))
    assert sent.keys() == stored.keys() and all(torch.equal(sent[name], stored[name]) for name in sent)
    tensors, targets = adapters(policy)
    assert len(tensors) == 2 * 2 * 7 and set(targets) == set(policy.config.lora.targets)
    assert "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_B.weight" in tensors
