"""What leaves the device while an engine samples, and comes back."""

import pytest
import torch
from torch import nn

from actial_fast.train.offload import SMALL, Offload


def trained() -> tuple[nn.Linear, torch.optim.AdamW]:
    layer = nn.Linear(256, 256)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.randn(4, 256)).square().mean().backward()
    optimizer.step()
    return layer, optimizer


def held(tensors) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def test_states_and_models_leave_and_come_back_in_place():
    layer, optimizer = trained()
    reference = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    states = [optimizer.state[layer.weight][key] for key in ("exp_avg", "exp_avg_sq")]
    large = [*states, *(p for p in reference.parameters() if p.nbytes >= SMALL)]
    values = [t.detach().clone() for t in large]
    offload = Offload(optimizer, reference)
    for _ in range(2):
        offload.out()
        offload.out()
        assert held(large) == 0 and held(layer.parameters()) > 0, "the policy stays"
        offload.back()
        offload.back()
        assert all(torch.equal(a, b) for a, b in zip(values, large, strict=True))
    buffers = {id(host) for host in offload._host.values()}
    offload.out()
    assert {id(host) for host in offload._host.values()} == buffers, "the host's memory is used again"
    offload.back()
    optimizer.step()
    assert optimizer.state[layer.weight]["exp_avg"] is states[0] and reference(torch.ones(1, 256)).isfinite().all()


def test_tensors_that_share_memory_leave_once():
    flat = torch.randn(2 * SMALL)

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(flat[:SMALL]), nn.Parameter(flat[SMALL:])

    views, before = Views(), flat.clone()
    offload = Offload(None, views)
    offload.out()
    assert len(offload._gone) == 1 and flat.untyped_storage().nbytes() == 0
    offload.back()
    assert torch.equal(flat, before) and torch.equal(views.b.detach(), before[SMALL:])


def test_what_is_gone_cannot_be_read_by_mistake():
    layer = nn.Linear(256, 256)
    offload = Offload(None, layer)
    offload.out()
    with pytest.raises(RuntimeError, match="storage"):
        layer(torch.ones(1, 256))
    offload.back()


def test_memory_that_numpy_has_seen_stays():
    """As that of weights which were read from a file on a CPU."""
    layer = nn.Linear(256, 256)
    layer.weight.detach().numpy()
    offload = Offload(None, layer, nn.Linear(256, 256))
    offload.out()
    assert held(layer.parameters()) > 0 and len(offload._gone) == 1
    offload.back()


def test_a_disabled_one_does_nothing():
    layer, optimizer = trained()
    offload = Offload(optimizer, layer, enabled=False)
    offload.out()
    assert held(layer.parameters()) > 0
    offload.back()
