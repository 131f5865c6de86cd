"""From planning to the optimizer, a packed step never makes the host wait: on a fake GPU, and on a real one where there is."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actial_fast import grpo, sft
from actial_fast.model.policy import Policy, load_policy
from actial_fast.model.processor import Processor
from actial_fast.model.tiny import TinyConfig, create
from actial_fast.ops.spec import GRPOSpec
from actial_fast.rollout.decoder import Decoder, Rows, serving, tensors_of
from actial_fast.rollout.graphs import rows_of_graph
from actial_fast.settings.model import LoRAConfig, ModelConfig
from actial_fast.settings.recipe import SFTRecipe
from actial_fast.train.account import Account
from actial_fast.train.dist import World, clip_gradients
from actial_fast.train.guard import Guard
from actial_fast.train.mismatch import Mismatch
from actial_fast.train.optim import parameters_of
from actial_fast.train.phases import Phases
from actial_fast.train.rounds import Pass
from tests.no_sync import HostSync, fake_cuda, put
from tests.train.test_rounds import recipe_of, samples_of

FULL = {"full": {}, "checkpointing": {"checkpointing": "full", "tower_checkpointing": "full"}}
MODELS = {**FULL, "frozen tower": {"freeze": ("model.visual",)}, "adapters": {"lora": LoRAConfig(rank=4)}}


@pytest.fixture(scope="module")
def processor(lab) -> Processor:
    return Processor.load(str(lab.model), min_pixels=28 * 28, max_pixels=28 * 28 * 40)


def policy_on(lab, move, *, changes=None) -> Policy:
    """In bf16 where it computes, packed; move: puts a module on the device."""
    policy = load_policy(ModelConfig(path=str(lab.model), **(changes or {})), torch.device("cpu"), 0, packed=True)
    policy.compute_dtype = torch.bfloat16
    move(policy)
    return policy


def grpo_step(lab, processor, where: World, move, changes) -> Policy:
    """Two mini-batches: old log-probs for the second, reference ones for both, two optimizer steps."""
    policy = policy_on(lab, move, changes=changes)
    reference = None if policy.adapted else policy_on(lab, move).requires_grad_(False)
    guard = Guard(torch.optim.AdamW(parameters_of(policy), fused=True), 5)
    recipe = recipe_of(lab, prompts=2, minibatch=1, pack_tokens=90, importance_correction="on", loss=GRPOSpec(beta=0.05))
    samples = [replace(s, old=None, ref=None) for s in samples_of(processor, [(2, 5), (0, 2), (1, 3)])]
    minibatches = [samples[:5], samples[5:]]
    phases, mismatch = Phases(where), Mismatch(where, replace(recipe.loss, importance="sequence_mask"))
    ahead = grpo._passes(policy, reference, processor, minibatches, recipe, where)
    ready = grpo._log_probs(policy, reference, minibatches, ahead, recipe, phase=phases)
    stats = torch.zeros(len(grpo.ops.STATS), device=where.device)
    with phases("update"):
        for each, rounds in zip(ready, ahead.updates, strict=True):
            found = grpo._accumulate(policy, each, (sum(map(len, each)), len(each)), rounds, recipe, where, mismatch=mismatch)
            norm = clip_gradients(parameters_of(policy), 1.0)
            assert all(p.grad is not None for p in parameters_of(policy))
            stats += torch.where(guard.step(found[0], norm), found, 0)
    with phases("plan"):
        Account(phases).passes(ahead.wanted)
    assert mismatch.total().device == where.device and len(phases._marks) == 8
    return policy


def sft_step(lab, processor, where: World, move, changes) -> Policy:
    policy = policy_on(lab, move, changes=changes)
    guard = Guard(torch.optim.AdamW(parameters_of(policy), fused=True), 5)
    sequences = [s.sequence for s in samples_of(processor, [(2, 3), (0, 2), (1, 1)])]
    phases = Phases(where)
    with phases("update"):
        loss, _ = sft._accumulate(policy, processor, sequences, SFTRecipe(pack_tokens=150), where)
        assert all(p.grad is not None for p in parameters_of(policy))
        guard.step(loss, clip_gradients(parameters_of(policy), 1.0))
    Account(phases).passes([Pass(policy, sequences, trained=True)])
    return policy


STEPS = {"sft": sft_step, "grpo": grpo_step}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_never_waits(step, model, lab, processor):
    with fake_cuda() as device:
        policy = STEPS[step](lab, processor, World(0, 1, device), lambda module: put(module, device), MODELS[model])
    assert all(p.is_cuda for p in policy.parameters())


def decoding(lab, processor, where: World, move, changes) -> tuple[torch.Tensor, ...]:
    """A prompt is read, and a step of five rows decoded, filled up as a graph would have it."""
    policy = policy_on(lab, move, changes=changes)
    policy.compute_dtype = torch.bfloat16
    prompt = samples_of(processor, [(2, 3)])[0].sequence
    with serving(policy):
        decoder = Decoder(policy, processor, blocks=64, size=16, temperature=0.7, most=(4, 2, 8), positions=99)
        slots = torch.arange(16, 16 + len(prompt)).numpy()
        decoder.read([prompt], slots, [])
        five, two = np.arange(5), np.arange(2)
        table = np.arange(1, 11).reshape(5, 2)
        members, place = np.array([[0, 1, 2], [3, 4, -1]]), np.array([0, 1, 2, 3, 4])
        rows = Rows(five, five, five, 16 * five, five / 5, table, five + 1, members, place, table[:2], 16 * (two + 1))
        given = tensors_of(rows.filled(rows_of_graph(5), 4, 2, 8))
        return decoder._step(*(x.to(where.device, non_blocking=True) for x in given))


@pytest.mark.parametrize("model", MODELS)
def test_a_decoding_step_never_waits(model, lab, processor):
    """So that it can be recorded as a graph; and its shapes and dtypes are those that CUDA's operators take."""
    with fake_cuda() as device:
        made = decoding(lab, processor, World(0, 1, device), lambda module: put(module, device), MODELS[model])
    assert [(x.shape, x.dtype) for x in made] == [((8,), torch.int64), ((8,), torch.float32), ((8,), torch.bool)]
    assert all(x.is_cuda for x in made)


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> SimpleNamespace:
    """A Qwen3-VL, whose tower gives features for the first layers too, and its processor."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    shape = TinyConfig(family="qwen3_vl", hidden=32, vision_hidden=32, layers=3, vision_depth=2, heads=4, image_size=28)
    create(folder, ["Which way?", "<answer>A</answer>"], shape, seed=0)
    return SimpleNamespace(model=folder, processor=Processor.load(str(folder), min_pixels=32 * 32, max_pixels=32 * 32 * 20))


@pytest.mark.parametrize("model", ["full", "checkpointing"])
def test_a_step_with_features_for_several_layers_never_waits(model, deep):
    with fake_cuda() as device:
        grpo_step(deep, deep.processor, World(0, 1, device), lambda module: put(module, device), MODELS[model])
        made = decoding(deep, deep.processor, World(0, 1, device), lambda module: put(module, device), {})
    assert [(x.shape, x.is_cuda) for x in made] == [((8,), True)] * 3


def test_a_step_that_reads_its_loss_is_caught(lab, processor, monkeypatch):
    plain = sft.ops.linear_cross_entropy
    monkeypatch.setattr(sft.ops, "linear_cross_entropy", lambda *a: plain(*a) * float(plain(*a)))
    with pytest.raises(HostSync), fake_cuda() as device:
        sft_step(lab, processor, World(0, 1, device), lambda module: put(module, device), {})


def test_the_clock_is_read_where_the_host_has_waited_and_nowhere_else():
    with pytest.raises(HostSync), fake_cuda() as device:
        phases = Phases(World(0, 1, device))
        with phases("update"):
            pass
        phases.metrics()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_never_waits_on_a_real_gpu(step, model, lab, processor):
    device = torch.device("cuda", 0)

    def run() -> None:
        STEPS[step](lab, processor, World(0, 1, device), move, MODELS[model])

    def move(module: torch.nn.Module) -> None:
        torch.cuda.set_sync_debug_mode("default")  # weights come from the disk: that is no part of a step
        module.to(device)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    try:
        run()  # kernels are compiled in the first one
    finally:
        torch.cuda.set_sync_debug_mode("default")
