"""Packed passes against the plain ones: the same losses, gradients and log-probs, with prompts and images computed once."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actial_fast import grpo, ops
from actial_fast.data.sources.row import Row, Turn
from actial_fast.data.sources.source import SourceConfig
from actial_fast.data.sources.stream import Example, Stream
from actial_fast.model.policy import load_policy
from actial_fast.model.processor import Processor
from actial_fast.ops.spec import GRPOSpec
from actial_fast.packing.batch import Sequence, pack, share
from actial_fast.settings.model import ModelConfig
from actial_fast.settings.recipe import GRPORecipe
from actial_fast.train.rounds import _in_step
from tests.loops import ALONE, accumulate, log_probs, rounds

IMAGE = "<image>"


@pytest.fixture(scope="module")
def processor(lab) -> Processor:
    return Processor.load(str(lab.model), min_pixels=28 * 28, max_pixels=28 * 28 * 40)


def prompt(processor: Processor, images: int, text: str, seed: int) -> Sequence:
    """A prompt with images of different sizes."""
    rng = np.random.default_rng(seed)
    sizes = [(28 * int(rng.integers(1, 6)), 28 * int(rng.integers(1, 6))) for _ in range(images)]
    pixels = tuple(rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes)
    row = Row(turns=(Turn("user", IMAGE * images + text), Turn("assistant", "-")), images=pixels, where="test")
    return processor.encode_prompt(Example(row=row, position=0))


def samples_of(processor: Processor, plan: list[tuple[int, int]], seed: int = 0) -> list[grpo.Sample]:
    """Samples of prompts with (images, replies) each, replies of 1 to 12 tokens, off policy."""
    rng = np.random.default_rng(seed)
    out = []
    for p, (images, replies) in enumerate(plan):
        start = prompt(processor, images, f"which side? {'now ' * (p % 3)}", seed + p)
        start = replace(start, trained=np.zeros(len(start), bool))
        for _ in range(replies):
            ids = rng.integers(5, 60, int(rng.integers(1, 13)))
            old, ref = (rng.normal(-4, 0.3, len(ids)).astype(np.float32) for _ in range(2))
            out.append(
                grpo.Sample(
                    sequence=start.extended(ids),
                    text="",
                    sampled=old,
                    rewards=np.zeros(1, np.float32),
                    reward=0.0,
                    advantage=float(rng.normal()),
                    minibatch=1,
                    finished=True,
                    old=torch.from_numpy(old),
                    ref=torch.from_numpy(ref),
                )
            )
    return out


def recipe_of(lab, **changes) -> GRPORecipe:
    return replace(GRPORecipe(model=ModelConfig(path=str(lab.model)), loss=GRPOSpec(beta=0.05, clip_low=0.5, clip_high=0.5)), **changes)


def loaded(lab, packed: bool, **changes):
    """A policy with weights away from their small start, so that attention matters."""
    policy = load_policy(ModelConfig(path=str(lab.model), **changes), ALONE.device, 0, packed=packed)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.05 * torch.randn(p.shape, generator=g)
    return policy


def run(lab, processor, samples, packed: bool, **changes):
    """Statistics, gradients by name, and log-probs in eval mode."""
    model = changes.pop("model", {})
    recipe = recipe_of(lab, packing="packed" if packed else "plain", micro_batch=1, **changes)
    policy = loaded(lab, packed, **model)
    logp = log_probs(policy, processor, [s.sequence for s in samples], recipe)
    stats = accumulate(policy, processor, samples, recipe).numpy()
    return stats, {name: p.grad for name, p in policy.trained().items() if p.grad is not None}, logp


def assert_same(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)
    assert got[1].keys() == want[1].keys() and want[1]
    for name, gradient in want[1].items():
        # biases of keys move the softmax nowhere: their gradient is rounding, and the largest of a layer's gives the scale
        assert (got[1][name] - gradient).abs().max() <= 1e-5 * max(gradient.abs().max().item(), 1e-2), name
    for a, b in zip(got[2], want[2], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


CASES = {
    "uneven groups": ([(2, 4), (1, 3), (2, 2)], {}),
    "one sample each": ([(2, 1), (1, 1)], {}),
    "text only among images": ([(0, 3), (2, 3), (0, 1)], {}),
    "ten images": ([(10, 3), (1, 2)], {}),
    "a group split over micro-batches": ([(2, 6), (1, 2)], {"pack_tokens": 90}),
    "frozen tower": ([(2, 3), (1, 2)], {"model": {"freeze": ("model.visual",)}}),
    "gradient checkpointing": ([(2, 3), (0, 2)], {"model": {"checkpointing": "full", "tower_checkpointing": "full"}}),
}


@pytest.mark.parametrize("name", CASES)
def test_packed_equals_one_sample_at_a_time(name, lab, processor):
    plan, changes = CASES[name]
    samples = samples_of(processor, plan)
    if "pack_tokens" in changes:
        recipe = recipe_of(lab, pack_tokens=changes["pack_tokens"])
        cut = rounds([s.sequence for s in samples], recipe, loaded(lab, True), processor)
        assert len(cut) > 1 and sum(0 in r.members or 5 in r.members for r in cut) > 1, "the first group was not split"
    assert_same(run(lab, processor, samples, True, **changes), run(lab, processor, samples, False, **changes))


def test_a_wrong_prompt_fails_the_comparison(lab, processor):
    """Packed against plain would pass emptily if the images did not matter."""
    samples = samples_of(processor, [(2, 3)])
    flipped = {key: processor.store.put(processor.store.pixels(key)[::-1].copy()) for key in samples[0].sequence.images}
    other = [replace(s, sequence=replace(s.sequence, images=tuple(flipped.values()))) for s in samples]
    with pytest.raises(AssertionError):
        assert_same(run(lab, processor, other, True), run(lab, processor, samples, False))


def test_samples_never_see_each_other(lab, processor):
    samples = samples_of(processor, [(2, 4), (1, 2)])
    policy, recipe = loaded(lab, True), recipe_of(lab)
    before = log_probs(policy, processor, [s.sequence for s in samples], recipe)
    changed = [s.sequence for s in samples]
    ids = changed[1].ids.copy()
    ids[-len(samples[1]) :] = ids[-len(samples[1]) :][::-1] % 50 + 7
    changed[1] = replace(changed[1], ids=ids)
    after = log_probs(policy, processor, changed, recipe)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert np.array_equal(a, b) == (i != 1)


def test_prompts_and_images_are_computed_once(lab, processor, monkeypatch):
    samples = samples_of(processor, [(2, 5), (1, 4)])
    policy, recipe = loaded(lab, True), recipe_of(lab)
    towers, rows = [], []
    tower, trunk = policy.base.model.visual, policy.base.model.language_model
    tower.register_forward_pre_hook(lambda m, args, kwargs: towers.append(len(kwargs["grid_thw"])), with_kwargs=True)
    trunk.register_forward_pre_hook(lambda m, args, kwargs: rows.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True)
    accumulate(policy, processor, samples, recipe)
    prompts = {s.sequence.images[0]: len(s.sequence) - len(s) for s in samples}
    least = sum(prompts.values()) + sum(map(len, samples))
    assert towers == [3] and len(rows) == 1
    assert least - sum(map(len, samples)) // 2 <= rows[0] <= least, "shared beginnings of replies may save a few more"


def test_share_keeps_every_sequence_and_its_tokens(processor):
    samples = samples_of(processor, [(2, 4), (0, 3), (1, 1)], seed=3)
    sequences = [s.sequence for s in samples]
    groups = share(sequences, processor.image_token)
    assert sorted(i for g in groups for i in g.members) == list(range(len(sequences)))
    batch, order = pack(sequences, [(g, 0, len(g.members)) for g in groups], processor.image_token, processor.image_processor.merge_size)
    ends = np.cumsum([0, *(int(sequences[i].trained[1:].sum()) for i in order)])
    for i, (a, b) in zip(order, itertools.pairwise(ends), strict=True):
        assert np.array_equal(batch.targets[a:b].numpy(), sequences[i].ids[1:][sequences[i].trained[1:]])
    assert not torch.isin(batch.targets, processor.image_token).any() and len(batch.loss_rows) == ends[-1]


def test_questions_about_the_same_images_are_apart_where_their_replies_are_many(lab, processor):
    """One group would have every reply repeat its question; one group a question repeats the images' rows. The tower sees them once."""
    first = samples_of(processor, [(2, 1)])[0].sequence
    asked = []
    for text in ("which side is it, seen from there? ", "how far did it turn? ", "what is that? "):
        row = Row(turns=(Turn("user", IMAGE * 2 + text * 5), Turn("assistant", "-")), images=(), where="test")
        keys = iter(first.images)
        pixels = tuple(processor.store.pixels(key).copy() for key in keys)
        start = processor.encode_prompt(Example(replace(row, images=pixels), 0))
        asked.append(replace(start, trained=np.zeros(len(start), bool)))
    rng = np.random.default_rng(0)
    for n in (1, 8):
        sequences = [start.extended(rng.integers(5, 60, 6)) for start in asked for _ in range(n)]
        groups = share(sequences, processor.image_token)
        assert sorted(i for g in groups for i in g.members) == list(range(len(sequences)))
        assert len(groups) == (1 if n == 1 else 3), "n replies"
        (each,) = rounds(sequences, recipe_of(lab), loaded(lab, True), processor)
        shared = (len(asked[0].ids) if n > 1 else groups[0].prefix) - 1
        assert each.batch.images == first.images and len(each.batch.input_ids) < sum(map(len, sequences)) - shared


def test_too_long_a_sequence_is_named_before_any_model_work(lab, processor):
    samples = samples_of(processor, [(2, 2)])
    with pytest.raises(ValueError, match="sequence 0"):
        rounds([s.sequence for s in samples], recipe_of(lab, pack_tokens=10), loaded(lab, True), processor)


def test_a_model_that_is_not_prepared_refuses_packed_rows(lab, processor):
    samples = samples_of(processor, [(1, 2)])
    policy = loaded(lab, False)
    (each,) = rounds([s.sequence for s in samples], recipe_of(lab), policy, processor)
    with pytest.raises(AssertionError, match="see each other"):
        policy(each.batch, lambda hidden, head: ops.linear_logprob(hidden, head, each.batch.targets))


def test_a_limit_that_the_longest_reply_would_break_is_refused_before_sampling(lab):
    with pytest.raises(ValueError, match="pack_tokens: a prompt and its reply may have"):
        grpo.train(recipe_of(lab, pack_tokens=16384))


def watched_tower(policy) -> list[int]:
    """How many images each call of the policy's tower has, as they come."""
    calls: list[int] = []
    policy.base.model.visual.register_forward_pre_hook(lambda m, args, kwargs: calls.append(len(kwargs["grid_thw"])), with_kwargs=True)
    return calls


def test_images_of_a_group_that_is_split_pass_the_tower_once(lab, processor):
    samples = samples_of(processor, [(2, 6), (1, 2)])
    policy, recipe = loaded(lab, True), recipe_of(lab, pack_tokens=90)
    assert len(rounds([s.sequence for s in samples], recipe, loaded(lab, True), processor)) > 2
    calls = watched_tower(policy)
    accumulate(policy, processor, samples, recipe)
    assert sum(calls) == 3


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_a_frozen_tower_runs_once_for_all_passes_of_a_step(frozen, lab, processor):
    samples = [replace(s, minibatch=i % 2) for i, s in enumerate(samples_of(processor, [(2, 4), (1, 4)]))]
    changes = {"freeze": ("model.visual",)} if frozen else {}
    policy, reference = loaded(lab, True, **changes), loaded(lab, True).requires_grad_(False)
    recipe = recipe_of(lab, prompts=2, minibatch=1)
    calls, others = watched_tower(policy), watched_tower(reference)
    minibatches = [[s for s in samples if s.minibatch == m] for m in range(2)]
    ahead = grpo._passes(policy, reference, processor, minibatches, recipe, ALONE)
    ready = grpo._log_probs(policy, reference, minibatches, ahead, recipe)
    for each, found in zip(ready, ahead.updates, strict=True):
        grpo._accumulate(policy, each, (sum(map(len, each)), len(each)), found, recipe, ALONE)
    # trained: the old pass of the second mini-batch, and each mini-batch's update, see all three images; the reference has its own tower
    assert (sum(calls), sum(others)) == ((3, 0) if frozen else (9, 3))


def test_an_image_is_decoded_once_a_run(lab, tmp_path):
    processor = Processor.load(str(lab.model), image_cache=str(tmp_path))
    examples = Stream([SourceConfig(str(lab.questions / "train.jsonl"))], seed=0, workers=0, encode=processor.encode).next_batch(30)
    distinct = {key for example in examples for key in example.encoded.images}
    assert processor.store.decodes == len(distinct) < processor.store.hits
    again = Processor.load(str(lab.model), image_cache=str(tmp_path))
    for example in examples:
        assert again.encode(example).images == example.encoded.images
    assert again.store.decodes == 0, "a later run finds them"


def test_questions_of_a_pair_share_it(lab, processor):
    stream = Stream([SourceConfig(str(lab.questions / "train.jsonl"))], seed=0, workers=0, encode=processor.encode)
    sequences = [example.encoded for example in stream.next_batch(24)]
    groups = share(sequences, processor.image_token)
    assert len(groups) == len({s.images for s in sequences}) <= 12 and max(len(g.members) for g in groups) == 3
    (each,) = rounds(sequences, recipe_of(lab), loaded(lab, True), processor, trained=True)
    assert len(each.batch.input_ids) < 0.8 * sum(map(len, sequences))


def test_idle_images_put_ranks_in_step():
    """Every rank calls the tower, and ends the call, at the same micro-batches as the others."""
    ranks = [[["a"], ["a", "b"], []], [[], ["c"], ["c"]], [["d", "e"], ["d"], ["e"]]]
    ends = [[1, 1, -1], [-1, 2, -1], [2, -1, -1]]
    for images, mine in zip(ranks, ends, strict=True):
        world = SimpleNamespace(gather=lambda told, mine=mine: [*ends] if told == [mine] else pytest.fail(f"{told} is not {mine}"))
        used, first, last = _in_step(images, world), {}, {}
        for k, keys in enumerate(used):
            assert len(set(keys)) == len(keys) and [key for key in keys if isinstance(key, str)] == images[k]
            for key in keys:
                last[first.setdefault(key, k)] = k
        assert last == {0: 2, 1: 2}
