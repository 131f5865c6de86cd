"""The sampler's log-probs against the trainer's, micro-batch by micro-batch and in one go."""

import math
from types import SimpleNamespace

import pytest
import torch

from actial_fast.train.mismatch import Mismatch, compared
from tests.loops import ALONE


def test_micro_batches_and_ranks_add_up_to_a_direct_computation():
    g = torch.Generator().manual_seed(0)
    sampled, own = torch.randn(2, 50, generator=g)
    sampled[3] = own[3] - 5  # the largest, in the first part
    distance = (sampled.double() - own.double()).abs()
    ranks = [Mismatch(SimpleNamespace(rank=r, size=2, device=torch.device("cpu"), sum=lambda x: x)) for r in (0, 1)]
    for k, part in enumerate(torch.arange(50).split([7, 0, 20, 23])):
        ranks[k % 2].add(sampled[part], own[part])
    slots = []
    for each in ranks:  # what the collective would add up
        each._where.sum = lambda x: slots.append(x.clone()) or x
        each.total()
    ranks[0]._where.sum = lambda x: sum(slots)
    count, total, largest = ranks[0].total().tolist()
    assert count == 50 and total == pytest.approx(distance.sum().item()) and largest == distance.max().item()
    figures = Mismatch.metrics(count, total, largest)
    assert figures["mismatch/mean_abs"] == pytest.approx(distance.mean().item())
    ratio = torch.exp(sampled.double() - own.double())
    assert figures["mismatch/max_ratio"] == pytest.approx(torch.maximum(ratio, 1 / ratio).max().item())


def test_nothing_compared_says_nothing():
    nothing = Mismatch(ALONE)
    nothing.add(torch.empty(0), torch.empty(0))
    assert Mismatch.metrics(*nothing.total().tolist()) == {}


def test_a_gradient_is_neither_kept_nor_a_difference_without_bound_an_error():
    own = torch.zeros(3, requires_grad=True)
    found = compared(torch.tensor([0.0, -1e6, 2.0]), own)
    assert not found.requires_grad and found.tolist() == [3, 1e6 + 2, 1e6]
    assert math.isfinite(Mismatch.metrics(*found.tolist())["mismatch/max_ratio"])
