"""The sampler's log-probs against the trainer's, micro-batch by micro-batch and in one go."""

import math
from types import SimpleNamespace

import pytest
import torch

from actial_fast.ops.spec import GRPOSpec
from actial_fast.train.mismatch import Band, Mismatch, compared
from tests.loops import ALONE


def test_micro_batches_and_ranks_add_up_to_a_direct_computation():
    g = torch.Generator().manual_seed(0)
    sampled, own = torch.randn(2, 50, generator=g)
    sampled[3] = own[3] - 5  # the largest, in the first part
    distance = (sampled.double() - own.double()).abs()
    ranks = [Mismatch(SimpleNamespace(rank=r, size=2, device=torch.device("cpu"), sum=lambda x: x)) for r in (0, 1)]
    for k, part in enumerate(torch.arange(50).split([7, 0, 20, 23])):
        ranks[k % 2].add(sampled[part], own[part], [len(part)])
    slots = []
    for each in ranks:  # what the collective would add up
        each._where.sum = lambda x: slots.append(x.clone()) or x
        each.total()
    ranks[0]._where.sum = lambda x: sum(slots)
    found = ranks[0].total().tolist()
    assert found[0] == 50 and found[1] == pytest.approx(distance.sum().item()) and found[-1] == distance.max().item()
    figures = Mismatch.metrics(found)
    assert figures["mismatch/mean_abs"] == pytest.approx(distance.mean().item())
    ratio = torch.exp(own.double() - sampled.double())
    assert figures["mismatch/kl"] == pytest.approx((ratio - 1 - ratio.log()).mean().item())
    assert "mismatch/outside" not in figures
    assert figures["mismatch/max_ratio"] == pytest.approx(torch.maximum(ratio, 1 / ratio).max().item())


def test_nothing_compared_says_nothing():
    nothing = Mismatch(ALONE)
    nothing.add(torch.empty(0), torch.empty(0), [])
    assert Mismatch.metrics(nothing.total().tolist()) == {}


def test_a_gradient_is_neither_kept_nor_a_difference_without_bound_an_error():
    own = torch.zeros(3, requires_grad=True)
    found = compared(torch.tensor([0.0, -1e6, 2.0]), own)
    count, distance, kl, largest = found.tolist()
    assert not found.requires_grad and [count, distance, largest] == [3, 1e6 + 2, 1e6]
    assert all(map(math.isfinite, Mismatch.metrics([count, distance, kl, 0.0, largest]).values()))


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_tokens_outside_the_bounds_are_those_whose_weight_the_op_changes(mode):
    """Against the weights of the reference, with bounds and without."""
    g = torch.Generator().manual_seed(1)
    lengths, bounds = [3, 1, 5, 4], {"importance": mode, "importance_min": 0.5, "importance_max": 1.5}
    sampled, own = -torch.rand(2, 13, generator=g, dtype=torch.float64)
    gap = own - sampled
    if mode.startswith("sequence"):
        gap = torch.cat([part.sum().expand(len(part)) for part in gap.split(lengths)])
    changed = ((gap.exp() < 0.5) | (gap.exp() > 1.5)).double().mean().item()
    assert 0 < changed < 1
    mismatch = Mismatch(ALONE, GRPOSpec(**bounds))
    for part, sizes in ((slice(0, 4), lengths[:2]), (slice(4, 13), lengths[2:])):
        mismatch.add(sampled[part].float(), own[part].float(), sizes)
    assert Mismatch.metrics(mismatch.total().tolist(), weighed=True)["mismatch/outside"] == pytest.approx(changed)


class Log:
    stage = "grpo"

    def __init__(self):
        self.events, self.said = [], []

    def event(self, kind, payload, step):
        self.events.append((kind, step, payload))

    def say(self, text):
        self.said.append(text)


@pytest.mark.parametrize(("dtype", "fine", "off"), [(torch.float32, 9e-5, 2e-4), (torch.bfloat16, 2e-3, 0.1)])
def test_a_mismatch_beyond_rounding_is_told_once_with_its_usual_causes(dtype, fine, off):
    log = Log()
    band = Band(log, dtype)
    for step, found in enumerate([fine, off, fine, 9.0], 1):
        band.look(step, {"mismatch/mean_abs": found})
    band.look(5, {})
    ((kind, step, payload),) = log.events
    assert kind == "mismatch" and step == 2 and payload["mean_abs"] == off and len(log.said) == 1
    for cause in ("stale", "image preprocessing", "chat template", "bans", "dtype"):
        assert cause in payload["text"] and cause in log.said[0]
