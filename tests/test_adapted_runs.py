"""The loops with adapters on every part and a base in 4 bits: the reference, ranks, a stop; and how much of the accuracy 4 bits cost."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actial_fast import grpo, ops, quickstart, sft
from actial_fast.data.sources.source import SourceConfig, open_source
from actial_fast.data.sources.stream import Stream
from actial_fast.evaluation.evaluate import evaluate, evaluate_checkpoint
from actial_fast.model.policy import load_policy
from actial_fast.model.processor import Processor
from actial_fast.model.tiny import TinyConfig, create
from actial_fast.report.metrics import read_metrics
from actial_fast.rollout.embedded import Embedded
from actial_fast.settings.config import config_from, load_recipe, to_yaml
from actial_fast.settings.model import LoRAConfig, ModelConfig
from actial_fast.settings.recipe import EvalConfig, GRPORecipe, SFTRecipe
from actial_fast.settings.running import DistConfig, SaveConfig
from actial_fast.train import checkpoint, forward
from actial_fast.train.preflight import Unready
from actial_fast.train.rounds import Pass, passes
from tests.loops import ALONE, log_probs
from tests.test_training import assert_same, launch

ROOT = Path(__file__).parent.parent
TOWER = LoRAConfig(rank=4, tower=True, merger=True, targets=())
EVERYTHING = LoRAConfig(rank=4, tower=True, merger=True, rslora=True, dora=True)


@pytest.fixture(scope="module")
def deep(lab, tmp_path_factory):
    """A model for the lab's questions whose tower has blocks."""
    rows = open_source(SourceConfig(str(lab.questions / "train.jsonl")))
    texts = [turn.content.replace("<image>", "") for i in range(len(rows)) for turn in rows[i].turns]
    folder: Path = tmp_path_factory.mktemp("deep") / "model"
    create(folder, texts, TinyConfig(hidden=32, vision_hidden=32, layers=2, vision_depth=2, heads=4, image_size=28), seed=0)
    return folder


def of(recipe, deep, lora, **model):
    return replace(recipe, model=replace(recipe.model, path=str(deep), lora=lora, **model))


def adapter(run: str, stage: str = "sft") -> dict[str, torch.Tensor]:
    return load_file(Path(run) / stage / "final" / "adapter" / "adapter_model.safetensors")


# ---- the reference


def test_the_reference_of_an_adapted_tower_sees_the_images_without_adapters(grpo_recipe, deep):
    """Features are shared by the passes of a step as long as the tower is what it was, which it is not here."""
    recipe, processor = of(grpo_recipe, deep, TOWER), Processor.load(str(deep))
    policy = load_policy(recipe.model, ALONE.device, 0, packed=True)
    with torch.no_grad():
        for name, p in policy.trained().items():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    sequences = [processor.encode(e) for e in Stream(recipe.data.sources[:1], seed=0).next_batch(4)]
    for packing in ("packed", "plain"):
        wanted = [Pass(policy, sequences, False, adapters=False), Pass(policy, sequences, True)]
        reference, update = passes(wanted, replace(recipe, packing=packing), processor, ALONE)
        with policy.adapter_off():
            found = forward.log_probs(policy, sequences, reference)
        base = load_policy(ModelConfig(path=str(deep)), ALONE.device, 0, packed=True).eval()
        for got, expected, now in zip(
            found, log_probs(base, processor, sequences, recipe), log_probs(policy, processor, sequences, recipe), strict=True
        ):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
            assert (got - now).abs().max() > 1e-3, "the adapters do nothing"
        policy.zero_grad()
        for each in update:
            policy(each.batch, lambda hidden, head, b=each.batch: ops.linear_logprob(hidden, head, b.targets)[0]).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.trained().values())
        assert any(p.grad.abs().max() > 0 for name, p in policy.trained().items() if "blocks.0" in name)


def test_the_kl_of_an_adapted_tower_begins_at_zero_and_grows(grpo_recipe, deep):
    recipe = replace(of(grpo_recipe, deep, TOWER, quantize="nf4"), minibatch=4, steps=2)
    grpo.train(recipe)
    first, second = (m["kl"] for m in read_metrics(Path(recipe.run)))
    assert abs(first) < 1e-9 < 1e-7 < second


# ---- ranks, and a run that stopped


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("fsdp", "kill"),
    [(False, False), pytest.param(False, True, marks=pytest.mark.slow), pytest.param(True, True, marks=pytest.mark.slow)],
    ids=["replicated", "replicated, killed", "fsdp, killed"],
)
def test_two_ranks_equal_one(fsdp, kill, sft_recipe, deep, tmp_path):
    """Sharded ranks hold the codes whole, and shares of everything else."""
    recipe = of(sft_recipe, deep, EVERYTHING, quantize="nf4", checkpointing="full", tower_checkpointing="full")
    optim = replace(recipe.optim, eps=1e-4)  # with which AdamW's division does not blow up the rounding of gradients that are nearly zero
    recipe = replace(recipe, optim=optim, save=SaveConfig(every=1, tensorboard=False), steps=3, batch_size=4, pack_tokens=230)
    sft.train(replace(recipe, run=str(tmp_path / "one")))
    two = replace(recipe, run=str(tmp_path / "two"), dist=DistConfig(fsdp=fsdp))
    (tmp_path / "recipe.yaml").write_text(to_yaml(two))
    if kill:
        killed = launch("sft", tmp_path / "recipe.yaml", ranks=2, env={"ACTIAL_TEST_KILL_AT": "2"})
        killed.communicate(timeout=300)
        assert killed.returncode and checkpoint.final(Path(two.run) / "sft") is None
    process = launch("sft", tmp_path / "recipe.yaml", ranks=2)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    one = adapter(str(tmp_path / "one"))
    assert_same(adapter(two.run), one, atol=1e-6)
    fresh = dict(load_policy(recipe.model, ALONE.device, recipe.seed).named_parameters())
    moved = [n for n, p in fresh.items() if "magnitude" in n and not torch.equal(p, checkpoint_of(two, 3, n))]
    assert len(moved) == 2 * 7 + 2 * 5 + 2


def checkpoint_of(recipe, step, name):
    return checkpoint.open_ranks(checkpoint.path_of(Path(recipe.run) / "sft", step)).rows(f"weight/{name}")


def test_a_stopped_run_goes_on_bit_for_bit(sft_recipe, deep, tmp_path):
    recipe = replace(of(sft_recipe, deep, replace(EVERYTHING, dropout=0.1), quantize="nf4"), steps=3, batch_size=4)
    final = sft.train(recipe)
    after, whole = adapter(recipe.run), load_file(final / "model.safetensors")
    folder = Path(recipe.run) / "sft"
    shutil.rmtree(folder / "final")
    shutil.rmtree(checkpoint.path_of(folder, 3))
    assert checkpoint.steps(folder) == [2]
    assert_same(load_file(sft.train(recipe) / "model.safetensors"), whole)
    assert_same(adapter(recipe.run), after)


# ---- what is refused


@pytest.mark.parametrize(
    ("cls", "overrides", "problem"),
    [
        (SFTRecipe, ["model.quantize=nf4"], r"^model.quantize: nf4 weights cannot be trained, only adapters beside them; set lora.rank"),
        (SFTRecipe, ["model.quantize=int8"], r"^model.quantize: 'int8' is not one of none, nf4"),
        (SFTRecipe, ["model.quantize_twice=false"], r"^model.quantize_twice: nothing is quantised"),
        (GRPORecipe, ["model.lora.tower=true"], r"^model.lora.tower: is about adapters, and there are none; set rank above 0"),
        (GRPORecipe, ["model.lora.dora=true"], r"^model.lora.dora: is about adapters"),
        (SFTRecipe, ["model.lora.rslora=true"], r"^model.lora.rslora: is about adapters"),
        (SFTRecipe, ["model.lora.rank=4", "model.lora.targets=[]"], r"^model.lora.targets: no layer gets adapters"),
        (GRPORecipe, ["model.lora={rank: 4, dora: true}", "rollout.engine=vllm"], r"^model.lora.dora: vLLM takes plain adapters"),
        (SFTRecipe, ["model.lora={rank: 4, merger: true}", "rollout.engine=vllm"], r"^model.lora.merger: vLLM takes plain adapters"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_by_name(cls, overrides, problem):
    with pytest.raises(ValueError, match=problem):
        config_from(cls, overrides)


def test_what_the_checkpoint_lacks_is_told_before_it_is_read(sft_recipe):
    lora = LoRAConfig(rank=2, tower=True, targets=("query",))
    with pytest.raises(Unready) as found:
        sft.train(replace(sft_recipe, model=replace(sft_recipe.model, lora=lora)))
    assert any("model.lora.tower: this model's tower has no blocks" in line for line in found.value.problems)
    assert any("model.lora.targets: the language model has no linear layer 'query'" in line for line in found.value.problems)


# ---- what 4 bits cost


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_quickstarts_sft_goes_on_as_accurately_beside_a_base_in_4_bits(tmp_path, monkeypatch):
    """The same adapters on the quickstart's model behind its SFT stage, for more of that stage, beside the base in float32 and in
    NF4: before and after within 4 points of each other.

    Prints the figures: pytest -m slow -s tests/test_adapted_runs.py; with QUICKSTART=RUN it starts from a finished run, and not from one of
    its own.
    """
    root = os.environ.get("QUICKSTART", str(tmp_path / "run"))
    recipe = quickstart._resolved(load_recipe(ROOT / "recipes/quickstart.yaml", [f"run={root}"]))
    if "QUICKSTART" not in os.environ:
        with monkeypatch.context() as patch:
            patch.setattr(grpo, "train", lambda _: (_ for _ in ()).throw(InterruptedError))
            with pytest.raises(InterruptedError):
                quickstart.run(recipe)
    found = {}
    for kind in ("none", "nf4"):
        model = replace(recipe.grpo.model, lora=LoRAConfig(rank=16), quantize=kind)  # stage 2 begins where stage 1 ended
        optim = replace(recipe.sft.optim, lr=2e-3, warmup_steps=5)
        stage = replace(recipe.sft, run=str(tmp_path / kind), model=model, optim=optim, steps=40, eval=EvalConfig())
        policy, processor = load_policy(model, ALONE.device, 0, packed=True), Processor.load(model.path)
        before = evaluate(Embedded(policy, processor), processor, recipe.sft.eval, ALONE)
        print(f"{kind}: before {accuracies(before)}", flush=True)
        after = evaluate_checkpoint(sft.train(stage), recipe.sft.eval)
        print(f"{kind}: after {stage.steps} steps {accuracies(after)}", flush=True)
        found[kind] = accuracies(before), accuracies(after)
    for plain, held in zip(*found.values(), strict=True):
        for name, accuracy in plain.items():
            assert accuracy > 0.9 and held[name] >= accuracy - 0.04, name


def accuracies(tables):
    return {name: round(figures["accuracy"], 4) for name, figures in tables["viewpoint/test"]["kinds"].items()}
