"""What the backward pass recomputes: the same gradients to the bit, for less that waits."""

import itertools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from actial_fast.model import activations, attention
from actial_fast.model.policy import load_policy
from actial_fast.model.processor import Processor
from actial_fast.settings.model import LoRAConfig, ModelConfig
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe
from actial_fast.train.rounds import Pass, passes
from tests.loops import ALONE, accumulate
from tests.train.test_rounds import recipe_of, samples_of

COMBINATIONS = [
    {"checkpointing": language, "tower_checkpointing": tower, "offload_activations": offload}
    for language, tower, offload in itertools.product(("none", "selective", "full"), ("none", "full"), (False, True))
    if (language, tower) != ("none", "none")
]
MODELS = {
    "whole": {},
    "frozen tower": {"freeze": ("model.visual",)},
    "adapters": {"lora": LoRAConfig(rank=4, dropout=0.3)},
}


@pytest.fixture(scope="module")
def processor(lab) -> Processor:
    return Processor.load(str(lab.model), min_pixels=28 * 28, max_pixels=28 * 28 * 40)


def gradients(lab, processor, packed: bool, **model):
    """Statistics and gradients of one mini-batch, whose dropout is drawn alike."""
    policy = load_policy(ModelConfig(path=str(lab.model), **model), ALONE.device, 0, packed=packed)
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    recipe = recipe_of(lab, packing="packed" if packed else "plain", pack_tokens=160, micro_batch=2)
    torch.manual_seed(3)
    stats = accumulate(policy, processor, samples_of(processor, [(2, 3), (0, 2), (1, 2)]), recipe)
    return stats, {name: p.grad for name, p in policy.trained().items() if p.grad is not None}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_to_the_bit(name, packed, lab, processor):
    stats, expected = gradients(lab, processor, packed, **MODELS[name])
    assert any(g.abs().max() > 0 for g in expected.values())
    for keys in COMBINATIONS:
        if not packed and keys["checkpointing"] == "selective" and keys["offload_activations"]:
            continue  # refused, below
        again, got = gradients(lab, processor, packed, **MODELS[name], **keys)
        assert torch.equal(stats, again) and got.keys() == expected.keys(), keys
        assert not (bad := [n for n in got if not torch.equal(got[n], expected[n])]), (keys, bad[:3])


def waiting(lab, processor, keys) -> tuple[float, int, int]:
    """MB that lie between forward and backward, and how often attention was computed, forward and in all."""
    calls = []
    policy = load_policy(ModelConfig(path=str(lab.model), **keys), ALONE.device, 0, packed=True)
    sequences = [s.sequence for s in samples_of(processor, [(0, 1)] * 12)]
    (rounds,) = passes([Pass(policy, sequences, trained=True)], recipe_of(lab), processor, ALONE)
    with pytest.MonkeyPatch.context() as patch:
        compute = attention._merged
        patch.setattr(attention, "_merged", lambda *args: calls.append(1) or compute(*args))
        for each in rounds:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                loss = policy(each.batch, lambda hidden, head: hidden.square().sum())
            forward = len(calls)
            held = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
            loss.backward()
    return held / 1e6, forward, len(calls)


def test_less_waits_and_attention_is_kept(lab, processor):
    none, selective, full = (waiting(lab, processor, {"checkpointing": name}) for name in ("none", "selective", "full"))
    assert none[0] > 3 * selective[0] and selective[0] > full[0] > 0, (none, selective, full)
    layers = none[1]
    assert (none[1:], selective[1:], full[1:]) == ((layers, layers), (layers, layers), (layers, 2 * layers))


def test_what_is_offloaded_is_what_checkpoints_keep(lab, processor, monkeypatch):
    moved, back = [], []

    class Noted(saved_tensors_hooks):
        """As on a device: what has moved can only be used once it is back."""

        def __init__(self, pin_memory: bool):
            assert pin_memory
            super().__init__(
                lambda x: moved.append(tuple(x.shape)) or (x.detach().clone(),), lambda x: back.append(tuple(x[0].shape)) or x[0]
            )

    monkeypatch.setattr(activations, "save_on_cpu", Noted)
    config = ModelConfig(path=str(lab.model), checkpointing="selective", offload_activations=True)
    policy = load_policy(config, ALONE.device, 0, packed=True)
    text = policy.base.config.get_text_config()
    sequences = [s.sequence for s in samples_of(processor, [(0, 1)] * 2)]
    (rounds,) = passes([Pass(policy, sequences, trained=True)], recipe_of(lab), processor, ALONE)
    for each in rounds:
        rows = len(each.batch.input_ids)
        policy(each.batch, lambda hidden, head: hidden.square().sum()).backward()
    heads, width = text.num_attention_heads, text.hidden_size // text.num_attention_heads
    layer = [(rows, heads, width), (heads, rows), (1, rows, text.hidden_size)]
    assert sorted(s for s in moved if s != (0,)) == sorted(layer * text.num_hidden_layers), "output, log-sum-exp and input of each layer"
    assert sorted(s for s in back if s != (0,)) == sorted(layer * text.num_hidden_layers)


def test_nothing_to_offload_is_refused():
    with pytest.raises(ValueError, match="offload_activations: moves what checkpoints keep, and there are none"):
        ModelConfig(offload_activations=True)


@pytest.mark.parametrize("kind", [SFTRecipe, GRPORecipe])
def test_plain_passes_say_what_they_cannot_keep(kind):
    with pytest.raises(ValueError, match=r"model.checkpointing: of eager attention selective cannot keep"):
        kind(packing="plain", model=ModelConfig(checkpointing="selective", attention="eager"))
    with pytest.raises(ValueError, match=r"model.offload_activations: packing: plain moves"):
        kind(packing="plain", model=ModelConfig(checkpointing="selective", offload_activations=True))
    kind(packing="plain", model=ModelConfig(checkpointing="full", attention="eager", offload_activations=True))
