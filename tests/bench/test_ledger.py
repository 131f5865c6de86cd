"""The ledger's minimum and counter against what a step really does, and that a benchmark of two different updates tells nothing."""

import argparse
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.vision_utils import get_vision_window_index

from actial_fast import grpo
from actial_fast.data.sources.source import SourceConfig
from actial_fast.model.families.qwen2_5_vl import window_sizes
from actial_fast.model.flops import Least, Work, images_once, minimum
from actial_fast.model.policy import load_policy
from actial_fast.model.processor import Processor
from actial_fast.ops.spec import GRPOSpec
from actial_fast.settings.config import to_yaml
from actial_fast.settings.model import LoRAConfig, ModelConfig
from actial_fast.settings.recipe import DataConfig, GRPORecipe
from actial_fast.settings.sampling import SamplingConfig
from actial_fast.tasks.rewards import RewardConfig
from actial_fast.train.account import Account
from actial_fast.train.phases import Phases
from bench.step import ledger, models, update
from bench.step.ledger import Count, attention_forward, counted, recipe_steps, shape_steps
from bench.step.minimum import work_of
from tests.bench.packed_work import packed_work
from tests.loops import ALONE
from tests.train.test_rounds import samples_of

FIRST_LAYER = ("model.visual", "model.language_model.embed_tokens", "model.language_model.layers.0")


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> update.Case:
    return update.make_case(2, 3, 40, str(tmp_path_factory.mktemp("images")))


# ---- the minimum


def test_the_windows_are_those_of_transformers():
    for grid in itertools.product((1,), (2, 8, 10, 30, 38), (4, 16, 22)):
        _, cu = get_vision_window_index(torch.tensor([grid]), spatial_merge_size=2, window_size=112, patch_size=14)
        assert sorted(window_sizes(grid, 8)) == sorted(size for size in np.diff(cu).tolist() if size), grid


def by_beginnings(samples, image_token: int) -> tuple[int, int, int, int]:
    """Rows, pairs, predictions and images, from every beginning of every sequence: a row's state depends on all that it has behind it."""
    rows, predicting = {}, set()
    for s in (sample.sequence for sample in samples):
        shown = np.flatnonzero(np.diff((s.ids == image_token).astype(int), prepend=0) == 1)  # where each image begins
        for end in range(1, len(s)):
            behind = (*s.ids[:end].tolist(), *s.images[: int((shown < end).sum())])
            rows[behind] = end
            predicting |= {behind} if s.trained[end] else set()
    return len(rows), sum(rows.values()), len(predicting), len({key for sample in samples for key in sample.sequence.images})


def least(work: Work) -> tuple[int, int, int, int]:
    return work.rows, work.pairs, work.predicted, len(work.images)


def test_the_least_takes_every_row_once_however_late_sequences_part(lab, case):
    """Replies that begin alike and are the same, one of them trained in part; questions about the same images and about others."""
    processor = Processor.load(str(lab.model), min_pixels=28 * 28, max_pixels=28 * 28 * 40)
    drawn = samples_of(processor, [(2, 3), (1, 3), (0, 3)])
    first = drawn[0]
    longer = replace(first, sequence=first.sequence.extended(np.array([5, 6])))
    turned = replace(first, sequence=replace(first.sequence, images=first.sequence.images[::-1]))
    longest = max(drawn[1:], key=len)
    untaught = replace(longest, sequence=replace(longest.sequence, trained=np.arange(len(longest.sequence)) == len(longest.sequence) - 1))
    chosen = [*drawn, first, longer, turned, untaught]
    work = work_of(chosen, processor.image_token)
    assert least(work) == by_beginnings(chosen, processor.image_token)
    assert work.tokens == sum(len(s.sequence) for s in chosen)
    assert least(work_of(chosen[::-1], processor.image_token)) == least(work)
    with_first, other = (work_of([*drawn, x], processor.image_token) for x in (first, turned))
    assert least(with_first) == least(work_of(drawn, processor.image_token)), "the same sequence again costs nothing"
    assert other.rows > with_first.rows, "other images are other rows"
    assert least(work_of(case.samples, case.image_token)) == by_beginnings(case.samples, case.image_token)


@pytest.fixture
def as_packed(monkeypatch):
    """The needed work is that of one common beginning a group: what packed batches are to do, and nothing else."""
    monkeypatch.setattr(ledger, "work_of", packed_work)


def test_nothing_is_below_the_least(case, tmp_path):
    step = shape_steps(argparse.Namespace(**narrow()), str(tmp_path))
    packed, plain = counted(step("packed")), counted(step("plain"))
    parts = {part: flops for part, flops in packed["minimum"].items() if flops}
    assert all(packed["flops"][part] >= flops for part, flops in parts.items()) and 1 < packed["total_ratio"] < 1.02 < plain["total_ratio"]
    assert packed["flops"]["head"] > packed["minimum"]["head"], "both replies' first tokens are predicted by one row, which is scored twice"
    assert packed["rows"] == packed["minimum_rows"]


def test_without_images_the_tower_needs_nothing(case):
    needed = minimum(models.narrow_model(case.tokenizer), Work(10, 55, 5, 10, {}), backward=False)
    assert needed["vision_forward"] == needed["vision_backward"] == needed["language_backward"] == 0 < needed["language_forward"]


def test_a_frozen_tower_sees_an_image_in_its_first_pass_only():
    grids = dict.fromkeys("abc", (1, 4, 4))
    works = [Work(1, 1, 1, 1, {key: grids[key] for key in keys}) for keys in ("ab", "bc", "abc")]
    assert ["".join(work.images) for work in images_once(works)] == ["ab", "c", ""]
    assert works[2].images == grids


def test_a_layer_that_is_trained_takes_three_products_and_a_frozen_one_what_lies_behind_asks_for(case):
    """By hand, in weights of the language model that 64 rows without images meet."""
    model, work = models.narrow_model(case.tokenizer), Work(64, 0, 0, 64, {})
    layer = sum(m.weight.numel() for m in model.model.language_model.layers[0].modules() if isinstance(m, torch.nn.Linear))

    def backward() -> float:
        return minimum(model, work, backward=True)["language_backward"] / (2 * 64)

    assert minimum(model, work, backward=False)["language_forward"] == 2 * 64 * 4 * layer
    assert backward() == 2 * 4 * layer
    model.requires_grad_(False)
    assert backward() == 0
    model.model.language_model.layers[2].mlp.requires_grad_(True)
    mlp = sum(p.numel() for p in model.model.language_model.layers[2].mlp.parameters())
    first = mlp * 2 // 3  # gate and up, whose input nobody trains
    assert backward() == mlp + (mlp - first) + layer
    model.model.language_model.layers[2].input_layernorm.requires_grad_(True)
    assert backward() == mlp + 2 * layer  # in all of the layer, since q, k and v read what the norm gives


@pytest.mark.parametrize("frozen", [(), ("model.visual",), FIRST_LAYER, ("model.language_model", "model.visual.blocks")], ids=str)
def test_what_a_step_is_charged_is_the_minimum(case, frozen):
    """With images of several sizes and without, of whole models and such with frozen parts and adapters."""
    model = models.narrow_model(case.tokenizer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
    work = packed_work(case.samples, case.image_token)
    works = [work, replace(work, images={}), replace(work, images={"a": (1, 4, 6), "b": (1, 16, 8)}), Work(0, 0, 0, 0, {})]
    adapted = models.with_adapters(models.narrow_model(case.tokenizer), ModelConfig(lora=LoRAConfig(rank=8))).get_base_model()
    for base in (model, adapted):
        least = Least(base)
        for each, backward, adapters in itertools.product(works, (True, False), (True, False)):
            how = {"backward": backward, "adapters": adapters}
            assert least(each, **how) == sum(minimum(base, each, **how).values())


@pytest.mark.parametrize("model", [{}, {"freeze": ("model.visual",)}, {"lora": LoRAConfig(rank=4)}], ids=str)
def test_a_step_of_the_loop_is_charged_what_its_groups_take(lab, recipe, model, as_packed):
    """By the groups that are packed, and not by those of n samples."""
    recipe = replace(recipe, minibatch=2, model=replace(recipe.model, **model), sampling=SamplingConfig(n=3))
    processor = Processor.load(str(lab.model), min_pixels=28 * 28, max_pixels=28 * 28 * 40)
    policy = load_policy(recipe.model, ALONE.device, 0, packed=True)
    samples = samples_of(processor, [(2, 3), (1, 3), (0, 3)])
    minibatches = [samples[:3], samples[3:]]
    works, needed = ledger.passes_of(policy, minibatches, recipe, processor.image_token)
    phases = Phases(ALONE)
    Account(phases).passes(grpo._passes(policy, None, processor, minibatches, recipe, ALONE).wanted)
    assert sum(phases._flops.values()) == sum(needed.values()) and phases._flops.keys() == {"old", "reference", "update"}
    assert sum(phases._tokens.values()) == sum(work.tokens for work in works)
    phases = Phases(ALONE)
    Account(phases).sampled(policy, [s.sequence for s in samples], 3)
    prompts = [s.sequence.trained.argmax() for s in samples]  # a reply's first token is drawn where its prompt ends
    rows = sum(prompts[::3]) + sum(len(s) - 1 for s in samples)
    pairs = sum(p * (p + 1) // 2 for p in prompts[::3]) + sum(sum(range(p + 1, p + len(s))) for p, s in zip(prompts, samples, strict=True))
    drawn = Work(
        int(rows),
        int(pairs),
        sum(map(len, samples)),
        0,
        dict(zip(*([x for s in samples for x in getattr(s.sequence, name)] for name in ("images", "grids")), strict=True)),
    )
    assert phases._tokens["sample"] == phases._tokens["score"] == drawn.predicted
    assert phases._flops["sample"] == sum(minimum(policy.base, drawn, backward=False).values())


# ---- the counter


def test_a_causal_call_counts_half_and_products_count_by_shape():
    q = torch.randn(2, 3, 10, 4, requires_grad=True)
    with Count() as count:
        out = scaled_dot_product_attention(q, q, q, is_causal=True)
        assert count.flops["head"] == attention_forward(q, q, q, 0.0, True) == 4 * 2 * 3 * 4 * 55
        before = count.flops["head"]
        out.sum().backward()
        assert count.flops["head"] - before == 10 * 2 * 3 * 4 * 55
        before = count.flops["head"]
        torch.randn(5, 6) @ torch.randn(6, 7)
        assert count.flops["head"] - before == 2 * 5 * 6 * 7


def test_without_computing_products_are_zeros_as_they_would_be_laid_out():
    x, weight = torch.randn(6, 8).T, torch.randn(6, 5, requires_grad=True)
    with Count(compute=False) as count:
        out = x @ weight
        into = torch.full((8, 5), 7.0)
        torch.addmm(into, x, weight.detach(), out=into)
        out.sum().backward()
    assert out.shape == (8, 5) and not out.any() and (into == 7).all() and not weight.grad.any() and weight.grad.stride() == (5, 1)
    assert count.flops["head"] == 3 * 2 * 8 * 6 * 5


# ---- one update of a model of any shape


def narrow(**changes) -> dict:
    return {"shape": "narrow", "prompts": 1, "n": 2, "mean": 40, "their_batch": 2, "lora": 0} | changes


def test_the_packed_step_does_what_is_needed_and_the_plain_one_repeats_it(tmp_path, as_packed):
    step = shape_steps(argparse.Namespace(**narrow()), str(tmp_path))
    packed, unknown, plain = counted(step("packed")), *(counted(replace(step(side), compute=False)) for side in ("packed", "plain"))
    assert packed == unknown, "what is counted does not depend on the products"
    assert packed["flops"] == packed["minimum"] and min(packed["flops"].values()) > 0 and packed["total_ratio"] == 1
    assert packed["rows"] == packed["minimum_rows"]
    assert packed["tower_images"] == packed["minimum_tower_images"] == packed["distinct_images"] == 2 and packed["tower_calls"] == 1
    assert plain["tower_images"] == 4 and plain["flops"]["vision_forward"] == 2 * packed["flops"]["vision_forward"]
    assert plain["minimum"] == packed["minimum"] and plain["rows"] >= plain["rows_without_sharing_or_padding"]
    assert 1.8 < plain["total_ratio"]


@pytest.mark.parametrize(
    "frozen",
    [("model.visual",), ("lm_head",), ("model.language_model",), FIRST_LAYER, ("model.visual.patch_embed", "model.visual.blocks.0")],
    ids=["tower", "head", "language model", "first layer", "first block"],
)
def test_a_step_with_frozen_parts_does_what_is_needed(case, frozen):
    model = models.narrow_model(case.tokenizer)
    whole = minimum(model, packed_work(case.samples, case.image_token), backward=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    work, found = count_packed(case, model)
    assert found == minimum(model, work, backward=True) and sum(found.values()) < sum(whole.values())
    assert (found["vision_backward"] == 0) == ("model.visual" in frozen)


def test_a_step_with_adapters_does_what_is_needed(case):
    model = models.with_adapters(models.narrow_model(case.tokenizer), ModelConfig(lora=LoRAConfig(rank=8, targets=("v_proj", "up_proj"))))
    base = model.get_base_model()
    work, found = count_packed(case, model)
    assert found == minimum(base, work, backward=True)
    without = minimum(base, work, backward=False, adapters=False)
    assert without["language_forward"] + 4 * 2 * 8 * (128 + 64 + 128 + 341) * work.rows == found["language_forward"]


def count_packed(case: update.Case, model) -> tuple[Work, dict[str, int]]:
    side = update.our_side(model, case, "packed", 1)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with Count(base, compute=False) as count:
        side.accumulate()
    return packed_work(case.samples, case.image_token), count.flops


def test_a_wide_step_is_counted_without_its_products(tmp_path, monkeypatch, as_packed):
    small = {"vocab_size": 8192, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    shape = ledger.SHAPES["7b"]
    monkeypatch.setitem(ledger.SHAPES, "7b", replace(shape, text=shape.text | small | rope, vision=shape.vision | tower))
    for rank in (0, 4):
        result = counted(shape_steps(argparse.Namespace(**narrow(shape="7b", lora=rank)), str(tmp_path))("packed"))
        assert result["flops"] == result["minimum"] and result["tower_images"] == 2
        assert (result["flops"]["vision_backward"] == 0) == bool(rank)


# ---- a recipe's step


@pytest.fixture
def recipe(lab, tmp_path):
    return GRPORecipe(
        run=str(tmp_path / "run"),
        model=ModelConfig(path=str(lab.model)),
        data=DataConfig(sources=(SourceConfig(str(lab.questions / "train.jsonl")),), together=False),
        rewards=(RewardConfig("tests.helpers:short"),),
        sampling=SamplingConfig(n=4, max_new_tokens=8),
        loss=GRPOSpec(beta=0.05),
        prompts=4,
        minibatch=4,
        micro_batch=8,
    )


def steps(recipe: GRPORecipe, folder):
    path = folder / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    return recipe_steps(argparse.Namespace(recipe=str(path), overrides=[]), str(folder / "images"))


def test_a_recipes_step_and_the_same_by_trl(recipe, tmp_path, as_packed):
    make = steps(recipe, tmp_path)
    results, gradients = {}, {}
    for side in ("packed", "plain", "trl"):
        step = make(side)
        results[side] = counted(step)
        gradients[side] = torch.cat([p.grad.flatten() for p in step.models[0].parameters()])
    packed, plain, trl = results.values()
    assert packed["flops"] == packed["minimum"] == plain["minimum"] == trl["minimum"] and packed["passes"] == 2
    assert packed["images_prepared"] == packed["distinct_images"] == plain["images_prepared"] and trl["images_prepared"] is None
    assert packed["tower_images"] == packed["minimum_tower_images"] == 2 * packed["distinct_images"]
    assert plain["tower_images"] == trl["tower_images"] == 4 * packed["tower_images"] and plain["rows"] <= trl["rows"]
    for side in ("plain", "trl"):
        assert (gradients[side] - gradients["packed"]).norm() < 1e-4 * gradients["packed"].norm() > 0, side


@pytest.mark.parametrize(
    "model, calls", [({"freeze": ("model.visual",)}, 1), ({"lora": LoRAConfig(rank=4)}, 1), ({"freeze": ("lm_head",)}, 2)], ids=str
)
def test_a_frozen_tower_runs_once_for_all_passes_of_a_recipes_step(recipe, tmp_path, model, calls, as_packed):
    result = counted(steps(replace(recipe, model=replace(recipe.model, **model)), tmp_path)("packed"))
    assert (
        result["flops"] == result["minimum"]
        and result["tower_images"] == calls * result["distinct_images"] == calls * result["images_prepared"]
    )


def test_late_minibatches_need_old_log_probs(recipe, tmp_path, as_packed):
    make = steps(replace(recipe, minibatch=2), tmp_path)
    result = counted(make("packed"))
    assert result["passes"] == 4 and result["flops"] == result["minimum"]
    with pytest.raises(ValueError, match=r"TRL is counted where one optimizer step has all samples.*got 2 mini-batches"):
        make("trl")


def test_a_recipe_that_is_no_grpo_step_is_told_so(tmp_path):
    with pytest.raises(ValueError, match="of kind sft; the ledger counts a GRPO step"):
        recipe_steps(argparse.Namespace(recipe="recipes/actial-7b-sft.yaml", overrides=[]), str(tmp_path))


# ---- bench.step.update


def test_sides_that_make_different_updates_are_not_compared():
    def done(loss: float, gradient: list[float]) -> list[dict]:
        return [{"loss": loss, "gradient": np.array(gradient)}]

    assert update.compare(done(0.5, [1.0, 2.0]), done(0.5, [1.0, 2.0]))["gradient_difference"] == 0
    with pytest.raises(AssertionError, match="losses are apart"):
        update.compare(done(0.5, [1.0, 2.0]), done(0.501, [1.0, 2.0]))
    with pytest.raises(AssertionError, match="gradients are apart"):
        update.compare(done(0.5, [1.0, 2.0]), done(0.5, [1.0, 2.01]))
    with pytest.raises(AssertionError, match="gradient of zero"):
        update.compare(done(0.5, [0.0, 0.0]), done(0.5, [0.0, 0.0]))
