"""What the C++ extension does between matrix products and when it draws, against float64 and against torch's operators."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from actial_fast.model import trunk
from actial_fast.model.trunk import Norm, products
from actial_fast.packing import native
from actial_fast.rollout import decoder
from actial_fast.rollout.decoder import draw


@pytest.mark.parametrize("width", [1, 7, 8, 96, 101])
@pytest.mark.parametrize("added", [True, False])
def test_norms(width, added):
    make = torch.Generator().manual_seed(0)
    x, more = torch.randn(2, 5, width, generator=make)
    weight = torch.randn(width, generator=make)
    total = (x + more if added else x).double()
    exact = total / (total.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    for host in (weight.numpy(), None):
        kept, found = Norm(weight, host, 1e-3)(x.clone(), more if added else None)
        torch.testing.assert_close(found.double(), exact, rtol=3e-6, atol=1e-6)
        assert torch.equal(kept, x + more if added else x)


@pytest.mark.parametrize("width", [1, 8, 53])
def test_gates(width):
    """Where exp overflows and underflows too."""
    x = torch.randn(6, 2 * width, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1, 10, 80, 100, 1000])[:, None]
    gate, up = x.double().chunk(2, 1)
    found = torch.from_numpy(native.gated(x.numpy())).double()
    torch.testing.assert_close(found, F.silu(gate) * up, rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize("vocabulary", [1, 12, 64, 1000, 1344])
@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.7])
def test_draws_are_those_of_torch(vocabulary, spread, temperature, monkeypatch):
    """The same tokens for the same uniform numbers, and log-probs of the whole vocabulary, for replies that share rows in any order."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy((spread * rng.standard_normal((7, vocabulary))).astype(np.float32))
    banned = torch.from_numpy(rng.permutation(vocabulary)[: vocabulary // 3])
    row = torch.from_numpy(rng.integers(0, 7, 300))
    uniform = torch.from_numpy(rng.random(300)) if temperature else None
    token, logp = draw(logits, uniform, temperature, banned, row)
    monkeypatch.setattr(decoder, "on_host", lambda x: False)
    expected, _ = draw(logits, uniform, temperature, banned, row)
    assert (token == expected).all() and not torch.isin(token, banned).any()
    exact = (logits.double() / (temperature or 1.0)).log_softmax(-1)[row, token]
    torch.testing.assert_close(logp.double(), exact, rtol=1e-6, atol=2e-6)


def test_a_draw_at_the_ends_of_a_distribution_has_a_probability():
    """Zero begins with the first token that may be drawn, and what is just below one ends with the last, past parts without any weight."""
    logits = torch.full((1, 300), -200.0)
    logits[0, [70, 80, 140]] = torch.tensor([0.0, 1.0, 0.5])
    banned = torch.tensor([80])
    token, logp = draw(logits.expand(3, -1), torch.tensor([0.0, 0.3, 1 - 2**-53], dtype=torch.float64), 1.0, banned)
    assert token.tolist() == [70, 70, 140]
    assert torch.allclose(logp, logits[0].log_softmax(0)[token], atol=1e-6)


def test_bans_hold_where_the_model_wants_nothing_else():
    """By so much that what is allowed has no probability in float32."""
    logits = torch.zeros(4, 130)
    logits[:, 5] = 500.0
    uniform = torch.tensor([0.0, 0.4, 0.8, 0.999], dtype=torch.float64)
    for numbers in (uniform, None):
        token, logp = draw(logits, numbers, 1.0, torch.tensor([5]))
        assert (token != 5).all() and torch.allclose(logp, torch.full((4,), -500.0))


def test_numbers_that_are_none_end_nowhere():
    """The log-prob says so; the token is one."""
    logits = torch.randn(3, 200)
    logits[0, 7], logits[1], logits[2, 9] = math.nan, math.nan, math.inf
    token, logp = draw(logits, torch.full((3,), 0.9, dtype=torch.float64), 1.0, torch.tensor([1]))
    assert ((token >= 0) & (token < 200)).all() and logp[1:].isnan().all()


@pytest.mark.parametrize(("row", "banned", "problem"), [([3], [0], "row"), ([-1], [0], "row"), ([0], [9], "banned")])
def test_a_draw_out_of_range_is_refused(row, banned, problem):
    with pytest.raises(ValueError, match=f"{problem} out of range"):
        native.draw(np.zeros((3, 9), np.float32), np.array(row), np.zeros(1), 1.0, np.array(banned))


@pytest.mark.parametrize("bias", [[True, True], [False, False], [True, False]])
@pytest.mark.parametrize("limit", [0, 2**20])
def test_products_of_one_input(bias, limit, monkeypatch):
    """Small ones are one product; adapters and layers that are not alike stay apart."""
    monkeypatch.setattr(trunk, "JOINED", limit)
    modules = [torch.nn.Linear(5, 3 + k, bias=b) for k, b in enumerate(bias)]
    x = torch.randn(4, 5)
    with torch.no_grad():
        found = products(modules)(x)
        assert len(found) == (1 if limit and len(set(bias)) == 1 else 2)
        torch.testing.assert_close(torch.cat(list(found), 1), torch.cat([module(x) for module in modules], 1))
        odd = torch.nn.Sequential(modules[0])
        assert torch.equal(products([odd, modules[1]])(x)[0], modules[0](x))
