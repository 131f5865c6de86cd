"""Stochastic rounding: right in the mean, a function of key, step and place alone, and harmless to what bfloat16 can hold."""

import math

import pytest
import torch

from actial_fast.ops import rounding

STEP = torch.tensor(7.0)


def rounded(value, *, key=1, step=STEP, first=0):
    out = torch.empty(value.shape, dtype=torch.bfloat16, device=value.device)
    rounding.round_stochastic_(out, value, key=key, step=step, first=first)
    return out


@pytest.mark.parametrize("value", [1.0 + 2**-9, 1.0 + 2**-10 * 3, -0.02 - 1e-6, 3e-39, 1e38, -1.0 - 2**-16 * 500])
def test_the_mean_is_the_value_and_every_result_a_neighbour(value):
    """Of n roundings, within 4 standard errors of the mean of n draws."""
    n = 1 << 18
    x = torch.full((n,), value)
    got = rounded(x).double()
    bits = x[:1].view(torch.int32) & -0x10000
    below, above = bits.view(torch.float32).double(), (bits + 0x10000).view(torch.float32).double()
    assert set(got.unique().tolist()) <= {below.item(), above.item()}
    share = ((x[0].double() - below) / (above - below)).item()
    ups = (got == above).double().mean().item()
    assert abs(ups - share) < 4 * math.sqrt(share * (1 - share) / n)


def test_bits_are_fair_and_differ_between_keys_steps_and_places():
    n = 1 << 16
    place = torch.arange(n)
    draws = {
        (key, step, first): rounding.random_bits(key, torch.tensor(float(step)), place + first)
        for key in (0, 1, 1 << 40)
        for step in (1, 2, 1_000_000)
        for first in (0, 1 << 33)
    }
    error = 4 / (2 * math.sqrt(n))
    each = [torch.stack([(x >> bit & 1).double() for bit in range(32)]) for x in draws.values()]
    for bits in each:
        assert ((bits.mean(1) - 0.5).abs() < 1.3 * error).all(), "a bit that is more often one than not"
        assert (((bits[:, 1:] == bits[:, :-1]).double().mean(1) - 0.5).abs() < 1.3 * error).all(), "neighbours go together"
    for k, bits in enumerate(each[1:], 1):
        assert (((bits == each[k - 1]).double().mean(1) - 0.5).abs() < 1.3 * error).all(), "two streams go together"


def test_a_tensor_in_parts_is_rounded_as_the_whole(monkeypatch):
    value = torch.randn(5001)
    whole = rounded(value, first=123)
    parts = [rounded(value[a:b], first=123 + a) for a, b in ((0, 1), (1, 700), (700, 5001))]
    assert torch.equal(torch.cat(parts), whole)
    monkeypatch.setattr(rounding, "AT_ONCE", 97)
    assert torch.equal(rounded(value, first=123), whole)
    for other in (rounded(value, first=124), rounded(value, first=123, key=2), rounded(value, first=123, step=STEP + 1)):
        assert not torch.equal(other, whole)


def test_what_bfloat16_holds_is_kept():
    held = torch.randn(4096).bfloat16()
    held[:6] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 3.3895e38, 1e-40])
    assert torch.equal(rounded(held.float()).view(torch.int16), held.view(torch.int16))
    assert rounded(torch.full((1000,), float("nan"))).isnan().all()


def test_no_elements_are_no_error_and_others_are_told():
    assert len(rounded(torch.empty(0))) == 0
    for out, value in ((torch.bfloat16, torch.float64), (torch.float16, torch.float32)):
        with pytest.raises(ValueError, match=r"out, value: expected \(n,\) bfloat16 and float32, got"):
            rounding.round_stochastic_(torch.empty(3, dtype=out), torch.empty(3, dtype=value), key=0, step=STEP, first=0)
    with pytest.raises(ValueError, match=r"got torch.bfloat16 \(3,\) and torch.float32 \(4,\)"):
        rounding.round_stochastic_(torch.empty(3, dtype=torch.bfloat16), torch.empty(4), key=0, step=STEP, first=0)
