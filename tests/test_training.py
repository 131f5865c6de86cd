"""Both loops: what the gradient is, that nothing changes it that should not, and that a killed run goes on as if it had not been."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from actial_fast import grpo, sft
from actial_fast.data.sources.row import BadRow, Row, Turn
from actial_fast.data.sources.source import SourceConfig
from actial_fast.data.sources.stream import Stream
from actial_fast.model.policy import load_policy
from actial_fast.model.processor import Processor
from actial_fast.ops.spec import GRPOSpec
from actial_fast.packing.packed_ops import collect, patchify
from actial_fast.report.metrics import read_events, read_metrics
from actial_fast.report.paired import paired
from actial_fast.rollout.embedded import Embedded
from actial_fast.settings.config import to_yaml
from actial_fast.settings.model import LoRAConfig
from actial_fast.settings.recipe import DataConfig, EvalConfig, GRPORecipe, SFTRecipe
from actial_fast.settings.running import DistConfig, SaveConfig
from actial_fast.train import checkpoint, offload
from actial_fast.train.optim import build_optimizer
from actial_fast.train.preflight import FIRST
from actial_fast.train.samples import figures
from actial_fast.train.stage import Stage
from tests.loops import ALONE, accumulate, log_probs, sampled


def losses(run: str, stage: str) -> list[float]:
    return [m["loss"] for m in read_metrics(Path(run)) if m["stage"] == stage and "loss" in m]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=atol), f"{name}: {(a[name] - b[name]).abs().max():.2e}"


# ---- what the gradient is


def test_sft_gradient_is_that_of_transformers_own_loss(sft_recipe, lab):
    """One global batch, cut into micro-batches, against the mean over answer tokens of Hugging Face's loss, row by row."""
    policy = load_policy(sft_recipe.model, ALONE.device, 0, packed=True)
    processor = Processor.load(str(lab.model))
    sequences = [processor.encode(e) for e in Stream(sft_recipe.data.sources, seed=0).next_batch(5)]
    loss, tokens = sft._accumulate(policy, processor, sequences, sft_recipe, ALONE)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(lab.model)
    total = 0.0
    for s in sequences:
        ids = torch.from_numpy(s.ids)[None]
        out = theirs(
            input_ids=ids,
            labels=torch.where(torch.from_numpy(s.trained)[None], ids, -100),
            mm_token_type_ids=(ids == processor.image_token).int(),
            pixel_values=patchify(collect(processor.store, s.images)),
            image_grid_thw=torch.tensor(s.grids),
        )
        part = out.loss * int(s.trained.sum()) / tokens
        part.backward()
        total += part.item()
    assert loss.item() == pytest.approx(total, rel=1e-5)
    for name, parameter in theirs.named_parameters():
        ours = policy.model.get_parameter(name).grad
        assert torch.allclose(ours, parameter.grad, atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize("weighting", ["token", "row"])
def test_sft_gradient_does_not_depend_on_micro_batches(sft_recipe, lab, weighting, example):
    processor = Processor.load(str(lab.model))
    sequences = [processor.encode(example("q" * (3 + i), "A" * (1 + 5 * i), seed=i)) for i in range(4)]
    found = []
    for size in (1, 3, 4):
        policy = load_policy(sft_recipe.model, ALONE.device, 0, packed=True)
        recipe = replace(sft_recipe, micro_batch=size, loss_weighting=weighting)
        loss, _ = sft._accumulate(policy, processor, sequences, recipe, ALONE)
        found.append((loss.item(), {n: p.grad.clone() for n, p in policy.trained().items() if p.grad is not None}))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert_same(grads, found[0][1], atol=1e-6)


def test_row_weighting_counts_answers_not_tokens(sft_recipe, lab, example):
    processor = Processor.load(str(lab.model))
    members = [processor.encode(example("q", "A")), processor.encode(example("q", "A" * 9))]
    by_token = sft._token_weights(members, "token", [12, 2])
    by_row = sft._token_weights(members, "row", [12, 2])
    assert by_token.sum() == pytest.approx(1) and by_row.sum() == pytest.approx(1)
    assert np.allclose(by_token, 1 / 12)
    assert by_row[:2].sum() == pytest.approx(0.5) == pytest.approx(by_row[2:].sum())


@pytest.mark.parametrize(
    ("spec", "correct"),
    [
        (GRPOSpec(beta=0.0), False),
        (GRPOSpec(beta=0.05, aggregation="sequence"), False),
        (GRPOSpec(beta=0.0, aggregation="constant"), True),
        (GRPOSpec(beta=0.05, aggregation="sequence_sum", importance="sequence_truncate"), True),
        (GRPOSpec.named("gspo"), False),
        (GRPOSpec(beta=0.0, entropy_coef=0.05), False),
    ],
    ids=["token", "sequence", "constant", "sequence sum", "gspo", "entropy bonus"],
)
def test_grpo_gradient_does_not_depend_on_micro_batches_nor_on_skipping(grpo_recipe, lab, spec, correct):
    recipe = replace(grpo_recipe, loss=spec, importance_correction="on" if correct else "off")
    policy, processor, samples = _moved(recipe, lab)
    found = [_gradients(policy, processor, samples, recipe, size, skip) for size, skip in ((1, False), (7, True), (16, False))]
    assert max(g.abs().max() for g in found[0].values()) > 1e-5
    assert_same(found[1], found[0], atol=1e-6)
    assert_same(found[2], found[0], atol=1e-6)


def test_flat_groups_are_not_skipped_where_they_move_the_entropy_threshold(grpo_recipe, lab):
    recipe = replace(grpo_recipe, loss=GRPOSpec(beta=0.0, top_entropy=0.3))
    policy, processor, samples = _moved(recipe, lab)
    kept, asked = (_gradients(policy, processor, samples, recipe, 16, skip) for skip in (False, True))
    assert_same(asked, kept, atol=1e-6)
    dropped = _gradients(policy, processor, [s for s in samples if s.advantage], recipe, 16, False)
    assert any(not torch.allclose(dropped[name], kept[name], atol=1e-5) for name in kept), "the threshold did not move"


def test_importance_correction_weighs_by_the_samplers_probability(grpo_recipe, lab):
    recipe = replace(grpo_recipe, loss=GRPOSpec(beta=0.0, importance_max=10.0), importance_correction="on")
    policy, processor, samples = _moved(recipe, lab)
    twice = [
        replace(s, old=None, sampled=old.numpy() - np.log(2).astype(np.float32))
        for s, old in zip(samples, _now(policy, processor, samples, recipe), strict=True)
    ]
    corrected = _gradients(policy, processor, twice, recipe, 16, True)
    plain = _gradients(policy, processor, twice, replace(recipe, importance_correction="off"), 16, True)
    assert_same(corrected, {name: 2 * g for name, g in plain.items()}, atol=1e-5)
    stats = accumulate(policy, processor, twice, recipe).double().numpy()
    named = dict(zip(grpo.ops.STATS, stats, strict=True))
    metrics = figures(twice, stats, recipe, ALONE, 1.0)
    assert metrics["importance"] == pytest.approx(2, rel=1e-4) and metrics["ratio"] == 1 and metrics["loss"] == named["loss"]
    empty = figures(twice, 0 * stats, recipe, ALONE, 1.0)
    assert metrics.keys() - empty.keys() == {"kl", "entropy", "ratio", "importance", "clip_fraction"}, "means of nothing"


def _moved(recipe, lab):
    """A policy away from its reference, so that the KL has a gradient, and samples of one mini-batch with a group of advantage 0."""
    processor = Processor.load(str(lab.model))
    policy = load_policy(recipe.model, ALONE.device, 0, packed=True)
    reference = load_policy(recipe.model, ALONE.device, 0, packed=True).eval()
    examples = Stream(recipe.data.sources, seed=0, encode=processor.encode_prompt).next_batch(4)
    samples = sampled(policy, processor, examples, recipe)
    samples = [replace(s, minibatch=0, advantage=0.0 if i < 4 else s.advantage) for i, s in enumerate(samples)]
    ahead = grpo._passes(policy, reference, processor, [samples], recipe, ALONE)
    (samples,) = grpo._log_probs(policy, reference, [samples], ahead, recipe)
    assert any(s.advantage for s in samples)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.01 * torch.randn(p.shape, generator=g)
    return policy, processor, [replace(s, old=torch.from_numpy(s.sampled)) for s in samples]


def _now(policy, processor, samples, recipe):
    return log_probs(policy, processor, [s.sequence for s in samples], recipe)


def _gradients(policy, processor, samples, recipe, size, skip):
    policy.zero_grad(set_to_none=True)
    accumulate(policy, processor, samples, replace(recipe, micro_batch=size, skip_zero_variance=skip))
    return {name: p.grad.clone() for name, p in policy.trained().items()}


def test_old_logprobs_only_after_the_first_minibatch_and_equal_the_samplers(grpo_recipe, lab):
    policy, processor = load_policy(grpo_recipe.model, ALONE.device, 0, packed=True), Processor.load(str(lab.model))
    reference = load_policy(grpo_recipe.model, ALONE.device, 0, packed=True).eval()
    examples = Stream(grpo_recipe.data.sources, seed=0, encode=processor.encode_prompt).next_batch(4)
    samples = sampled(policy, processor, examples, grpo_recipe)
    minibatches = [[s for s in samples if s.minibatch == m] for m in range(2)]
    ahead = grpo._passes(policy, reference, processor, minibatches, grpo_recipe, ALONE)
    samples = [s for each in grpo._log_probs(policy, reference, minibatches, ahead, grpo_recipe) for s in each]
    assert {s.minibatch: s.old is not None for s in samples} == {0: False, 1: True}
    for s in samples:
        np.testing.assert_allclose(s.ref, s.sampled, atol=2e-5)
        if s.old is not None:
            np.testing.assert_allclose(s.old, s.sampled, atol=2e-5)


@pytest.mark.parametrize("minibatch", [1, 2, 4])
def test_a_steps_metrics_are_means_over_its_minibatches(minibatch, grpo_recipe, monkeypatch):
    stats = torch.arange(1.0, len(grpo.ops.STATS) + 1)
    monkeypatch.setattr(grpo, "_accumulate", lambda *a: stats.clone())
    recipe = replace(grpo_recipe, minibatch=minibatch, steps=1, loss=GRPOSpec(beta=0.0), save=SaveConfig(every=0, tensorboard=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "clip_gradients", lambda parameters, limit: torch.tensor(2.0))
        grpo.train(recipe)
    (step,) = [m for m in read_metrics(Path(recipe.run)) if m["stage"] == "grpo"]
    named = dict(zip(grpo.ops.STATS, stats.tolist(), strict=True))
    assert step["loss"] == named["loss"] and step["grad_norm"] == 2 and step["kl"] == named["kl"] / named["tokens"]


@pytest.mark.parametrize("switch", ["skip_old_logp", "skip_reference"])
def test_what_is_skipped_does_not_change_the_update(switch, grpo_recipe, lab):
    policy, processor = load_policy(grpo_recipe.model, ALONE.device, 0, packed=True), Processor.load(str(lab.model))
    reference = load_policy(grpo_recipe.model, ALONE.device, 0, packed=True).eval()
    with torch.no_grad():
        reference.base.lm_head.weight.mul_(1.1)
    examples = Stream(grpo_recipe.data.sources, seed=0, encode=processor.encode_prompt).next_batch(4)
    samples = sampled(policy, processor, examples, grpo_recipe)
    found = []
    for value in (True, False):
        recipe = replace(grpo_recipe, loss=GRPOSpec(beta=0.0), skip_zero_variance=False, **{switch: value})
        ahead = grpo._passes(policy, reference, processor, [samples], recipe, ALONE)
        (ready,) = grpo._log_probs(policy, reference, [samples], ahead, recipe)
        assert all((s.old if switch == "skip_old_logp" else s.ref) is None for s in ready) == value
        policy.zero_grad(set_to_none=True)
        stats = grpo._accumulate(policy, ready, (sum(map(len, samples)), len(samples)), ahead.updates[0], recipe, ALONE)
        found.append(
            ({name: p.grad.clone() for name, p in policy.trained().items()}, dict(zip(grpo.ops.STATS, stats.tolist(), strict=True)))
        )
    assert_same(found[0][0], found[1][0], atol=1e-6)
    assert max(g.abs().max() for g in found[0][0].values()) > 1e-4
    assert found[0][1]["kl"] == 0 and (found[1][1]["kl"] != 0) == (switch == "skip_reference"), "the KL is logged where it is asked for"


# ---- the loops learn, stop, resume


def test_sft_learns_and_its_checkpoint_opens_in_plain_transformers(sft_recipe, lab):
    recipe = replace(
        sft_recipe,
        steps=40,
        eval=EvalConfig(sources=(SourceConfig(str(lab.questions / "test.jsonl")),), every=20, before=True, max_new_tokens=4),
        save=SaveConfig(every=15, keep=2, tensorboard=True),
    )
    final = sft.train(recipe)
    curve = losses(recipe.run, "sft")
    assert len(curve) == 40 and np.mean(curve[-5:]) < 0.5 * curve[0]
    assert checkpoint.steps(Path(recipe.run) / "sft") == [30, 40]
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(final)
    assert AutoTokenizer.from_pretrained(final)("left")["input_ids"]
    before = weights(lab.model)
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    evals = [e for e in read_events(Path(recipe.run)) if e["kind"] == "eval"]
    assert [e["step"] for e in evals] == [0, 20, 40]
    assert set(evals[0]["result"]["kinds"]) == {"ego_translation", "object_translation", "ego_rotation"}
    assert paired(evals[0]["result"], evals[-1]["result"]).n == evals[0]["result"]["overall"]["n"], "the same rows, from first to last"
    assert list((Path(recipe.run) / "tensorboard").rglob("events*"))
    assert sft.train(recipe) == final and len(losses(recipe.run, "sft")) == 40, "a finished stage ran again"


def test_grpo_raises_the_reward(grpo_recipe):
    recipe = replace(grpo_recipe, steps=25, prompts=8, minibatch=8, micro_batch=32, save=SaveConfig(every=0, tensorboard=False))
    grpo.train(recipe)
    metrics = read_metrics(Path(recipe.run))
    rewards = [m["reward/tests.helpers:short"] for m in metrics]
    assert np.mean(rewards[-5:]) > 1.2 * np.mean(rewards[:5])
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[-1]["kl"] > 1e-3
    assert metrics[0]["ratio"] == pytest.approx(1, abs=1e-6)
    rollouts = [e for e in read_events(Path(recipe.run)) if e["kind"] == "rollouts"]
    assert [e["step"] for e in rollouts] == [1, 13, 25]
    assert rollouts[0]["rollouts"][0]["images"][0].startswith("data:image/png;base64,") and rollouts[0]["rollouts"][0]["kind"]


def with_optimizer(recipe: SFTRecipe | GRPORecipe, dtype: str = "float32", **keys: object) -> SFTRecipe | GRPORecipe:
    """The recipe with weights of another dtype and with other keys of its optimizer."""
    return replace(recipe, model=replace(recipe.model, dtype=dtype), optim=replace(recipe.optim, **keys))


@pytest.mark.parametrize("moves", ["sampling", "always"])
def test_states_that_are_on_the_host_change_nothing(moves, grpo_recipe, lab, tmp_path, monkeypatch):
    """And they are not on the device while replies are drawn, in training and in evaluations."""
    evaluation = EvalConfig(sources=(SourceConfig(str(lab.questions / "test.jsonl"), limit=3),), every=1, max_new_tokens=2)
    recipe = replace(grpo_recipe, steps=2, eval=evaluation)
    monkeypatch.setattr(offload, "SMALL", 1 << 10)  # the tiny model's are no larger
    generate, seen, finals = Embedded.generate, [], []

    def watched(engine, *args):
        optimizer = engine._offload._optimizer
        states = [v for state in (optimizer.state.values() if optimizer else ()) for v in state.values() if v.nbytes >= offload.SMALL]
        seen.append((len(states), sum(v.untyped_storage().nbytes() for v in states)))
        return generate(engine, *args)

    monkeypatch.setattr(Embedded, "generate", watched)
    for when in ("none", moves):
        finals.append(weights(grpo.train(replace(with_optimizer(recipe, offload=when), run=str(tmp_path / when)))))
    assert_same(*finals)
    assert not any(left for _, left in seen) and len(seen) == 2 * 5, "each step and three evaluations"
    assert (seen[-1][0] > 0) == (moves == "sampling") and seen[5][0] == 0, "there are none before the first step"


@pytest.fixture
def one_thread():
    """As many as the processes that `launch` starts, since sums depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("kind", "lean"),
    [
        ("sft", {}),
        ("grpo", {}),
        ("sft", {"dtype": "bfloat16", "kind": "adamw8bit", "offload": "always"}),
        pytest.param("grpo", {"dtype": "bfloat16", "master": True, "offload": "sampling"}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_resume_is_bit_for_bit(kind, lean, sft_recipe, grpo_recipe, tmp_path):
    """kill -9 in the middle of a step, run again: the same losses and weights as a run that was left alone."""
    recipe = with_optimizer(sft_recipe if kind == "sft" else grpo_recipe, **lean)
    loop = sft if kind == "sft" else grpo
    whole = loop.train(replace(recipe, run=str(tmp_path / "whole")))
    broken = replace(recipe, run=str(tmp_path / "broken"))
    (tmp_path / "recipe.yaml").write_text(to_yaml(broken))
    at = 3 if kind == "sft" else 2  # sft saves every second step: the third is lost and done again
    process = launch(kind, tmp_path / "recipe.yaml", env={"ACTIAL_TEST_KILL_AT": str(at)})
    assert process.wait(timeout=240) == -signal.SIGKILL
    before = checkpoint.steps(tmp_path / "broken" / kind)
    assert before and max(before) < recipe.steps
    final = loop.train(broken)
    assert losses(broken.run, kind) == losses(str(tmp_path / "whole"), kind)
    assert_same(weights(final), weights(whole))


def test_sigterm_saves_and_the_next_run_goes_on(sft_recipe, tmp_path):
    recipe = replace(sft_recipe, steps=4000, save=SaveConfig(every=0, tensorboard=False))
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    process = launch("sft", tmp_path / "recipe.yaml")
    metrics = Path(recipe.run) / "metrics.jsonl"
    deadline = time.time() + 200
    while time.time() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143 and "goes on from here" in errors
    (saved,) = checkpoint.steps(Path(recipe.run) / "sft")
    assert len(losses(recipe.run, "sft")) == saved


def test_another_recipe_in_the_same_folder_is_refused(sft_recipe):
    sft.train(replace(sft_recipe, steps=2))
    with pytest.raises(ValueError, match=r"differs in optim.lr \(0.001 before, 0.01 now\); "):
        sft.train(replace(sft_recipe, optim=replace(sft_recipe.optim, lr=1e-2)))
    with pytest.raises(ValueError, match=r"differs in steps \(2 before, 1 now\); "):
        sft.train(replace(sft_recipe, steps=1))


@pytest.mark.parametrize("kind", ["sft", "grpo"])
@pytest.mark.usefixtures("one_thread")
def test_a_finished_run_goes_on_where_more_steps_are_asked_for(kind, sft_recipe, grpo_recipe, tmp_path, caplog, monkeypatch):
    """As if it had had them from the start, where the learning rate is constant. Broken off, it is not taken for finished."""
    recipe, loop = (sft_recipe, sft) if kind == "sft" else (grpo_recipe, grpo)
    recipe = replace(recipe, optim=replace(recipe.optim, schedule="constant"))
    whole = loop.train(replace(recipe, run=str(tmp_path / "whole")))
    few = replace(recipe, run=str(tmp_path / "few"), steps=recipe.steps - 1)
    first = loop.train(few)
    assert loop.train(few) == first and not caplog.messages, "it is finished"
    longer = replace(few, steps=recipe.steps)
    with monkeypatch.context() as broken:
        broken.delattr(Stage, "finish")
        with pytest.raises(AttributeError, match="finish"):
            loop.train(longer)
    assert_same(weights(loop.train(longer)), weights(whole))
    assert losses(few.run, kind) == losses(str(tmp_path / "whole"), kind)
    assert [m for m in caplog.messages if "goes on beyond the end" in m] == [
        f"{tmp_path / 'few' / kind} goes on beyond the end it had, from step {few.steps}: steps {few.steps} -> {recipe.steps}"
    ]
    decaying = replace(longer, steps=recipe.steps + 1, optim=replace(recipe.optim, schedule="cosine"))
    with pytest.raises(ValueError, match=r"differs in optim.schedule \(constant before, cosine now\); "):
        loop.train(decaying)


def test_a_checkpoint_is_whole_or_absent(sft_recipe, monkeypatch):
    """A save that dies before its last act leaves the older checkpoint in force, and its debris is cleared."""

    def die(*_):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.os, "replace", die)
    with pytest.raises(OSError, match="disk full"):
        sft.train(sft_recipe)
    folder = Path(sft_recipe.run) / "sft"
    assert checkpoint.steps(folder) == [] and not list(folder.glob(".tmp-*"))
    monkeypatch.undo()
    (folder / ".tmp-000002").mkdir()  # as a kill would have left it
    sft.train(sft_recipe)
    assert checkpoint.final(folder) and not list(folder.glob(".tmp-*"))


# ---- adapters, frozen parts, 7B recipes


def test_lora_trains_adapters_only_and_merges_into_plain_weights(sft_recipe, lab, tmp_path):
    lora = replace(sft_recipe, model=replace(sft_recipe.model, lora=LoRAConfig(rank=4, dropout=0.1)), steps=4)
    final = sft.train(lora)
    before, after = weights(lab.model), weights(final)
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and all(n.startswith("model.layers.") and "_proj" in n for n in changed)
    # the merged weights compute what the adapted model computed
    policy = load_policy(lora.model, ALONE.device, lora.seed)
    checkpoint.restore(Path(lora.run) / "sft", 4, policy, build_optimizer(policy, lora.optim), ALONE)
    merged = Qwen2_5_VLForConditionalGeneration.from_pretrained(final)
    ids = torch.arange(20)[None] + 5
    policy.eval()
    hidden = policy({"input_ids": ids}, lambda out, head: out.last_hidden_state)
    assert torch.allclose(hidden, merged.model(input_ids=ids).last_hidden_state, atol=1e-5)
    # and a stopped run with dropout goes on bit for bit
    again = replace(lora, run=str(tmp_path / "again"))
    sft.train(again)
    shutil.rmtree(tmp_path / "again" / "sft" / "final")
    shutil.rmtree(checkpoint.path_of(tmp_path / "again" / "sft", 4))
    assert_same(weights(sft.train(again)), after)


def test_grpo_with_adapters_uses_the_base_as_reference(grpo_recipe, lab):
    recipe = replace(grpo_recipe, model=replace(grpo_recipe.model, lora=LoRAConfig(rank=4)), steps=2)
    grpo.train(recipe)
    kl = [m["kl"] for m in read_metrics(Path(recipe.run))]
    assert kl[1] > 0


def test_frozen_parts_stay(sft_recipe, lab):
    recipe = replace(sft_recipe, model=replace(sft_recipe.model, freeze=("model.visual", "lm_head")), steps=2)
    after, before = weights(sft.train(recipe)), weights(lab.model)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and not any(n.startswith(("visual", "lm_head")) for n in changed)
    assert any(n.startswith("visual") for n in before)


@pytest.mark.parametrize("lora", [0, 4], ids=["frozen", "adapters"])
def test_checkpointing_sends_no_gradient_into_a_frozen_tower(lora, sft_recipe):
    model = replace(
        sft_recipe.model,
        checkpointing="full",
        tower_checkpointing="full",
        lora=LoRAConfig(rank=lora),
        freeze=() if lora else ("model.visual",),
    )
    policy = load_policy(model, ALONE.device, 0)
    features = []
    policy.base.model.visual.register_forward_hook(lambda module, args, out: features.append(out.pooler_output))
    processor = Processor.load(model.path)
    sequences = [processor.encode(e) for e in Stream(sft_recipe.data.sources, seed=0).next_batch(2)]
    sft._accumulate(policy, processor, sequences, replace(sft_recipe, packing="plain"), ALONE)
    assert features and not any(x.requires_grad for x in features)
    assert all(p.grad is not None for p in policy.trained().values())


def test_ligers_layers_are_used_on_cuda_where_they_are_installed(sft_recipe, monkeypatch):
    with pytest.raises(ValueError, match=r"model.liger: on needs CUDA and liger-kernel, and this is cpu"):
        load_policy(replace(sft_recipe.model, liger="on"), ALONE.device, 0)
    monkeypatch.setattr("actial_fast.model.policy.fill", lambda *_: None)  # no GPU is needed to see which layers change
    monkeypatch.setattr("actial_fast.model.policy.draw_adapters", lambda *_: None)
    for choice, installed, expected in (("auto", True, True), ("on", True, True), ("off", True, False), ("auto", False, False)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, installed=installed: True if installed else None)
        policy = load_policy(replace(sft_recipe.model, liger=choice), torch.device("cuda"), 0)
        assert ("forward" in vars(policy.base.model.language_model.norm)) == expected, "an instance's own forward"
    with pytest.raises(ValueError, match="liger-kernel is not installed"):
        load_policy(replace(sft_recipe.model, liger="on"), torch.device("cuda"), 0)


def test_freezing_what_is_not_there_is_an_error(sft_recipe):
    with pytest.raises(ValueError, match=r"model.freeze: no parameter starts with 'visual'; the model has lm_head"):
        sft.train(replace(sft_recipe, model=replace(sft_recipe.model, freeze=("visual",))))


# ---- ranks


def launch(kind: str, recipe: Path, *, ranks: int = 1, env: dict[str, str] | None = None) -> subprocess.Popen:
    """`actial KIND RECIPE` in its own process, or under torchrun."""
    script = str(Path(__file__).parent / "helpers.py")
    run = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=0", "--rdzv-backend=c10d",
           "--rdzv-endpoint=localhost:0", script] if ranks > 1 else [script]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent), **(env or {})}
    return subprocess.Popen(
        [sys.executable, *run, kind, str(recipe)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def text_only(folder: Path) -> Path:
    path = folder / "text.jsonl"
    rows = [Row((Turn("user", f"Say {i}"), Turn("assistant", "A")), truth="A", id=str(i)) for i in range(9)]
    path.write_text("".join(json.dumps(row.to_json(folder)) + "\n" for row in rows))
    return path


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "tolerance"), [({"offload": "always"}, 1e-6), ({"kind": "adamw8bit"}, 1e-4)], ids=["on the host", "in 8 bits"]
)
def test_two_ranks_with_lean_optimizers_equal_one(keys, tolerance, sft_recipe, tmp_path):
    """In 8 bits a gradient's last bit, which the order of a sum decides, may move a moment to the next of 256 values."""
    recipe = replace(sft_recipe, steps=3, save=SaveConfig(every=0, tensorboard=False))
    recipe = replace(recipe, optim=replace(recipe.optim, eps=1e-4, **keys))
    one = sft.train(replace(recipe, run=str(tmp_path / "one")))
    (tmp_path / "recipe.yaml").write_text(to_yaml(replace(recipe, run=str(tmp_path / "two"), dist=DistConfig(fsdp=True))))
    process = launch("sft", tmp_path / "recipe.yaml", ranks=2)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    two = weights(tmp_path / "two" / "sft" / "final" / "model")
    assert_same(two, weights(one), atol=tolerance)
    far = sum(int(((two[name] - value).abs() > 1e-6).sum()) for name, value in weights(one).items())
    assert far < 1e-3 * sum(value.numel() for value in two.values())


@pytest.mark.ranks
@pytest.mark.parametrize("fsdp", [False, True], ids=["replicated", "fsdp"])
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_two_ranks_equal_one(kind, fsdp, sft_recipe, grpo_recipe, tmp_path):
    recipe = sft_recipe if kind == "sft" else grpo_recipe
    sources = (*recipe.data.sources, SourceConfig(str(text_only(tmp_path))))  # a rank without an image must stay in step
    data = replace(recipe.data, sources=sources, max_prompt_tokens=220)
    # an epsilon with which AdamW's division does not blow up the rounding of gradients that are nearly zero
    optim = replace(recipe.optim, lr=1e-3, eps=1e-4)
    recipe = replace(recipe, data=data, optim=optim, micro_batch=1, pack_tokens=230, save=SaveConfig(every=0, tensorboard=False), steps=3)
    held = EvalConfig(loss_sources=(replace(sources[0], limit=5), replace(sources[-1], limit=1)))  # of the last, a rank has no row
    recipe = replace(recipe, eval=held)
    one = (sft if kind == "sft" else grpo).train(replace(recipe, run=str(tmp_path / "one")))
    two = replace(recipe, run=str(tmp_path / "two"), dist=DistConfig(fsdp=fsdp))
    (tmp_path / "recipe.yaml").write_text(to_yaml(two))
    process = launch(kind, tmp_path / "recipe.yaml", ranks=2)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    np.testing.assert_allclose(losses(two.run, kind), losses(str(tmp_path / "one"), kind), atol=1e-6)
    measured = [{k: v for k, v in read_metrics(tmp_path / run)[-1].items() if k.startswith("eval/")} for run in ("one", "two")]
    assert len(measured[0]) == 8 and measured[1] == pytest.approx(measured[0], rel=1e-5)
    assert_same(weights(tmp_path / "two" / kind / "final" / "model"), weights(one), atol=1e-6)


@pytest.mark.ranks
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "adapters on a bf16 base"])
def test_a_sharded_run_resumes_bit_for_bit(rank, sft_recipe, lab, tmp_path):
    model = replace(sft_recipe.model, checkpointing="full", tower_checkpointing="full")
    if rank:
        model = replace(model, lora=LoRAConfig(rank=rank), frozen_dtype="bfloat16")
    evaluation = EvalConfig(sources=(SourceConfig(str(lab.questions / "test.jsonl"), limit=4),), every=1, max_new_tokens=4)
    save = SaveConfig(every=1, keep=3, tensorboard=False)
    recipe = replace(sft_recipe, model=model, eval=evaluation, save=save, dist=DistConfig(fsdp=True), batch_size=4, steps=3)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    folder = Path(recipe.run) / "sft"
    ends = []
    for _ in range(2):
        process = launch("sft", tmp_path / "recipe.yaml", ranks=2)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        ends.append(weights(folder / "final" / "model"))
        shutil.rmtree(folder / "final")  # as if it had been killed after the first step
        for step in (2, 3):
            shutil.rmtree(checkpoint.path_of(folder, step))
    assert_same(*ends)
    assert not all(torch.equal(ends[0][name], value) for name, value in weights(lab.model).items())


def test_a_failing_rank_ends_the_job_with_its_error(sft_recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(to_yaml(sft_recipe))
    began = time.time()
    process = launch("sft", tmp_path / "recipe.yaml", ranks=2, env={"ACTIAL_TEST_FAIL_RANK": "1"})
    _, errors = process.communicate(timeout=240)
    assert process.returncode != 0 and "rank 1 fails on purpose" in errors
    assert time.time() - began < 200


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_bad_rows_end_the_run_or_are_skipped_and_counted(kind, sft_recipe, grpo_recipe, tmp_path):
    """A row that only the tokenizer can refuse, among good ones; also a batch in which nothing is left."""
    path = tmp_path / "rows.jsonl"
    texts = ["fine"] * FIRST + ["<|im_end|>"] * 2  # behind the rows that the preflight looks at
    rows = [Row((Turn("user", t), Turn("assistant", "A")), truth="A", id=str(i)) for i, t in enumerate(texts)]
    path.write_text("".join(json.dumps(row.to_json(tmp_path)) + "\n" for row in rows))
    recipe, loop = (sft_recipe, sft) if kind == "sft" else (grpo_recipe, grpo)
    sizes = {"batch_size": 1} if kind == "sft" else {"prompts": 1, "minibatch": 1}
    data = DataConfig(sources=(SourceConfig(str(path)),), workers=1)
    recipe = replace(recipe, data=data, steps=6, save=SaveConfig(every=0, tensorboard=False), **sizes)
    with pytest.raises(BadRow, match=r"rows.jsonl:[56]: the text contains the special token"):
        loop.train(recipe)
    skipping = replace(recipe, run=str(tmp_path / "skip"), data=replace(data, on_bad_row="skip"))
    loop.train(skipping)
    metrics = read_metrics(tmp_path / "skip")
    assert metrics[-1]["rejected_rows"] >= 2 and len(metrics) == 6
    assert all(m["answer_tokens" if kind == "sft" else "response_length"] > 0 for m in metrics), "no step trains on nothing"
    rejects = [json.loads(line) for line in (tmp_path / "skip" / kind / "rejects.jsonl").read_text().splitlines()]
    assert sorted(r["where"].rsplit(":")[-1] for r in rejects) == ["5", "6"]


def test_metrics_are_strict_json(sft_recipe):
    sft.train(replace(sft_recipe, steps=1))
    for line in (Path(sft_recipe.run) / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} in metrics.jsonl"))
