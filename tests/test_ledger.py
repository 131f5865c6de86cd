"""The ledger's minimum and counter against what a step really does, and that a benchmark of two different updates tells nothing."""

import argparse
import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.vision_utils import get_vision_window_index

from bench import ledger, update
from bench.ledger import Count, Work, attention_forward, narrow_step, recipe_step, window_sizes, work_of

NARROW = argparse.Namespace(prompts=1, n=2, mean=40, their_batch=2)


@pytest.fixture(scope="module")
def case() -> update.Case:
    return update.make_case(2, 3, 40)


def test_the_windows_are_those_of_transformers():
    for grid in itertools.product((1,), (2, 8, 10, 30, 38), (4, 16, 22)):
        _, cu = get_vision_window_index(torch.tensor([grid]), spatial_merge_size=2, window_size=112, patch_size=14)
        assert sorted(window_sizes(grid, 8)) == sorted(size for size in np.diff(cu).tolist() if size), grid


def test_the_least_rows_and_pairs_are_those_that_predict_something(case):
    work = work_of(case.samples, case.n)
    rows, pairs, images = 0, 0, 0
    for start in (0, 3):
        group = [s.sequence.ids for s in case.samples[start : start + 3]]
        seen = {ids[:end].tobytes(): end for ids in group for end in range(1, len(ids))}  # a row's state depends on what it has behind it
        rows, pairs, images = rows + len(seen), pairs + sum(seen.values()), images + 2
    assert (work.rows, work.pairs, len(work.images)) == (rows, pairs, images)
    assert work.predicted == sum(map(len, case.samples)) and work.tokens == sum(len(s.sequence) for s in case.samples)


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


def test_the_packed_step_does_what_is_needed_and_the_plain_one_repeats_it(tmp_path):
    packed = ledger.counted(narrow_step(NARROW, "packed", str(tmp_path)))
    plain = ledger.counted(narrow_step(NARROW, "plain", str(tmp_path)))
    for part in ("vision_forward", "vision_backward", "head"):
        assert packed["flops"][part] == packed["minimum"][part] > 0, part
    assert 1 <= packed["total_ratio"] <= 1.05 and packed["rows"] <= packed["minimum_rows"] + NARROW.n
    assert packed["tower_images"] == packed["distinct_images"] == 2 and packed["tower_calls"] == 1
    assert plain["tower_images"] == 4 and plain["flops"]["vision_forward"] == 2 * packed["flops"]["vision_forward"]
    assert plain["minimum"] == packed["minimum"] and plain["rows"] >= plain["rows_without_sharing_or_padding"]
    assert 1.8 < plain["total_ratio"]


def test_without_images_the_tower_needs_nothing(case):
    needed = ledger.minimum(update.narrow_model(case.tokenizer), Work(10, 55, 5, 10, ()), backward=False)
    assert needed["vision_forward"] == needed["vision_backward"] == needed["language_backward"] == 0 < needed["language_forward"]


def test_a_recipe_that_is_no_grpo_step_is_told_so():
    with pytest.raises(ValueError, match="of kind sft; the ledger counts a GRPO step"):
        recipe_step(argparse.Namespace(recipe="recipes/actial-7b-sft.yaml", overrides=[]), "packed")


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
