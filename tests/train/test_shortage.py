"""Running out of memory is an answer: it names phase, batch, largest item and what to change; replies are drawn with half of it."""

import re
from dataclasses import replace

import pytest
import torch

from actial_fast import grpo, sft
from actial_fast.data.sources.source import SourceConfig
from actial_fast.ops.spec import GRPOSpec
from actial_fast.report.metrics import read_events, read_metrics
from actial_fast.settings.config import to_yaml
from actial_fast.settings.model import LoRAConfig, ModelConfig
from actial_fast.settings.recipe import DataConfig, EvalConfig, GRPORecipe, SFTRecipe
from actial_fast.settings.running import DistConfig, OptimConfig, SaveConfig
from actial_fast.settings.sampling import SamplingConfig
from actial_fast.tasks.rewards import RewardConfig
from actial_fast.train.shortage import NoRoom, OutOfMemory, keys_of, over, ran_out, told
from actial_fast.train.stage import MAY_CHANGE
from tests.faults import plant
from tests.ranks import on_ranks

BATCH = (
    r"a batch of [\d,]+ tokens, [\d,]+ patches and [\d,]+ loss rows; its largest item is \S+train.jsonl:\d+ with \d+ tokens and \d images?"
)


@pytest.fixture
def recipes(lab, tmp_path):
    data = DataConfig(sources=(SourceConfig(str(lab.questions / "train.jsonl")),), workers=0, max_prompt_tokens=220)
    evaluation = EvalConfig(sources=(SourceConfig(str(lab.questions / "test.jsonl"), limit=3),), max_new_tokens=3)
    common = {
        "run": str(tmp_path / "run"),
        "model": ModelConfig(path=str(lab.model)),
        "data": data,
        "eval": evaluation,
        "save": SaveConfig(every=0, tensorboard=False),
        "steps": 1,
        "pack_tokens": 300,
    }
    rewards = (RewardConfig("tests.faults:short", workers=0),)
    sampling = SamplingConfig(n=3, max_new_tokens=6)
    drawn = {"prompts": 4, "minibatch": 2, "sampling": sampling, "rewards": rewards, "log_rollouts": 0, "loss": GRPOSpec(beta=0.05)}
    return {
        "sft": SFTRecipe(batch_size=6, optim=OptimConfig(lr=1e-3, warmup_steps=0), **common),
        "grpo": GRPORecipe(optim=OptimConfig(lr=1e-3, warmup_steps=0), **drawn, **common),
    }


@pytest.mark.parametrize(
    ("kind", "fault", "said"),
    [
        ("sft", "oom:load:0:1", r"out of memory in phase load: OutOfMemoryError: CUDA out of memory.*set model.frozen_dtype to bfloat16"),
        ("sft", "oom:update:0:1", rf"out of memory in phase update: {BATCH} .*set model.checkpointing to selective, or lower pack_tokens"),
        ("sft", "oom:optimizer:0:1", r"in phase update, optimizer: the optimizer's step .*set optim.offload to always, or optim.kind"),
        ("grpo", "oom:load:0:2", r"out of memory in phase load"),
        ("grpo", "oom:logp:0:1", rf"in phase old: {BATCH} .*lower pack_tokens \(300\), or lower pack_patches"),
        ("grpo minibatch", "oom:logp:0:1", rf"in phase reference: {BATCH} .*lower pack_tokens \(300\), or lower pack_patches"),
        ("grpo", "oom:update:0:1", rf"in phase update: {BATCH} .*set model.checkpointing to selective, or lower pack_tokens"),
    ],
    ids=lambda value: value if ":" in value and len(value) < 20 else "",
)
def test_each_phase_names_itself_its_batch_and_the_keys(kind, fault, said, recipes):
    recipe = recipes[kind.split()[0]]
    if "minibatch" in kind:  # a single one needs no old log-probs
        recipe = replace(recipe, minibatch=recipe.prompts)
    with plant(fault, 0), pytest.raises(OutOfMemory, match=said) as found:
        (sft if kind == "sft" else grpo).train(recipe)
    assert "\n" not in str(found.value)


def test_replies_are_drawn_with_half_of_the_memory(recipes, tmp_path):
    """The same ones: in training and in evaluation, counted and told."""
    runs = {}
    for name, fault in (("whole", ""), ("halved", "oom:sample:0:2 oom:forward:0:4")):
        with plant(fault, 0):
            grpo.train(replace(recipes["grpo"], run=str(tmp_path / name)))
        runs[name] = read_metrics(tmp_path / name), read_events(tmp_path / name)
    (whole,), (halved,) = runs["whole"][0], runs["halved"][0]
    assert halved["loss"] == pytest.approx(whole["loss"], abs=1e-6) and halved["reward"] == whole["reward"]
    told_of = [e for e in runs["halved"][1] if e["kind"] == "short_of_memory"]
    assert len(told_of) == halved.get("sampling/halved", 0) + sum("over" in e["short_of_memory"]["text"] for e in told_of) >= 1
    tables = [[(e["step"], e["result"]) for e in events if e["kind"] == "eval"] for _, events in runs.values()]
    assert tables[0] == tables[1] and not [e for e in runs["halved"][1] if e["kind"] == "eval_failed"]


def test_one_reply_that_does_not_fit_ends_the_run_with_its_name(recipes, monkeypatch):
    from actial_fast.rollout import decoder, embedded

    monkeypatch.setattr(embedded, "SMALLEST", 1 / 4)
    tries = []

    def never(*args, **kwargs):
        tries.append(1)
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr(decoder, "draw", never)
    recipe = replace(recipes["grpo"], eval=EvalConfig())
    said = r"in phase sample: one reply at a time to 4 prompts; the largest is \S+train.jsonl:\d+ .*set sampling.kv_tokens.*_tokens \(6\)"
    with pytest.raises(OutOfMemory, match=said):
        grpo.train(recipe)
    assert len(tries) == 3, "whole, half, a quarter"


@pytest.mark.ranks
def test_no_rank_is_left_alone(recipes, tmp_path):
    """Memory runs out on one rank of two: while replies are drawn the other sees nothing of it, in an update it ends as well."""
    recipe = replace(recipes["grpo"], dist=DistConfig(fsdp=True, timeout=1), loss=GRPOSpec())
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    found = on_ranks("tests.train.sharded", "shortage", tmp_path / "ranks", tmp_path / "recipe.yaml")
    whole, *others, last = found.values()
    assert whole["outcome"] == "finished" and whole["halved"] == [0]
    for each in others:
        assert each["outcome"] == "finished" and each["losses"] == pytest.approx(whole["losses"], abs=1e-6), each
    assert others[0]["halved"] == [1] and all("short_of_memory" in each["events"] for each in others)
    assert last["outcome"] not in ("finished", "OutOfMemory"), "told by the rank that ran out"


def test_what_running_out_looks_like():
    assert ran_out(torch.OutOfMemoryError("x")) and ran_out(MemoryError()) and ran_out(NoRoom("x"))
    assert ran_out(
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8")
    )
    assert not ran_out(RuntimeError("shape mismatch")) and not ran_out(ValueError("out of memory"))
    with pytest.raises(ZeroDivisionError), told("update", {}), over(lambda: "x"):
        raise ZeroDivisionError
    with pytest.raises(OutOfMemory, match=r"^out of memory in phase update: x \(MemoryError\); less$"), told("update", {"update": "less"}):
        with over(lambda: "x"):
            raise MemoryError


def test_a_run_that_ran_out_may_go_on_with_what_it_is_told_first():
    advice = keys_of(GRPORecipe())
    firsts = [re.match(r"(?:set|lower) (\S+)", advice[phase]).group(1) for phase in ("update", "old", "reference", "sample", "eval")]
    assert firsts == ["model.checkpointing", "pack_tokens", "pack_tokens", "sampling.kv_tokens", "eval.kv_tokens"]
    assert all(key.startswith(MAY_CHANGE) for key in firsts) and not "packing".startswith(MAY_CHANGE)


@pytest.mark.parametrize(
    ("model", "keys", "update"),
    [
        ({}, {}, "set model.checkpointing to selective, or lower pack_tokens (24576)"),
        ({"checkpointing": "selective"}, {}, "set model.checkpointing to full, or lower pack_tokens (24576)"),
        ({"checkpointing": "full"}, {}, "set model.offload_activations to true, or lower pack_tokens (24576)"),
        ({"checkpointing": "full", "offload_activations": True}, {}, "lower pack_tokens (24576), or lower pack_patches (65536)"),
        ({}, {"packing": "plain", "micro_batch": 2}, "set model.checkpointing to selective, or lower micro_batch (2)"),
    ],
)
def test_keys_that_are_spent_are_not_named(model, keys, update):
    assert keys_of(SFTRecipe(model=ModelConfig(**model), **keys))["update"] == update
    assert "model.lora" in keys_of(SFTRecipe(model=ModelConfig(lora=LoRAConfig(rank=4))))["load"]
