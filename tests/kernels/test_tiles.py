"""Which launch configuration a chip gets, and what is said where there is none."""

import pytest
import torch
import triton

from actial_fast import ops
from actial_fast.kernels import common, head, logits
from actial_fast.ops import library

SHARED = {8: 99, 9: 227, 10: 227, 11: 227, 12: 99}  # KiB a block can have; 8: of sm_86 and sm_89, the least


@pytest.mark.parametrize("chip", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_chip_gets_a_tile_that_its_shared_memory_holds(monkeypatch, chip, dtype):
    """Blocks of both operands for every stage but the one that is multiplied; what else a kernel needs, the compile guard counts."""
    monkeypatch.setattr(common, "capability", lambda: chip)
    tile = head.tile_for(dtype)
    held = (tile.stages - 1) * (tile.m + tile.n) * tile.k * 2
    assert held <= SHARED.get(chip[0], 99) * 1024
    assert not tile.tma or chip[0] >= 9, "TMA begins with Hopper"
    for version, loads in (("3.6.0", 2 if chip[0] >= 12 else 4), ("3.7.1", 4), ("3.8.0", 4 if chip[0] == 10 else 2)):
        monkeypatch.setattr(triton, "__version__", version)
        assert logits.two_sweeps().loads == loads


@pytest.mark.parametrize(("chip", "name"), [((7, 5), "Tesla T4"), ((7, 0), "Tesla V100-SXM2-32GB")])
def test_a_chip_that_is_too_old_is_named_and_what_it_lacks(monkeypatch, chip, name):
    monkeypatch.setattr(common, "capability", lambda: chip)
    monkeypatch.setattr(common, "device_name", lambda: name)
    monkeypatch.setattr(library, "on_gpu", lambda x: True)
    hidden, weight, targets = torch.ones(3, 8), torch.ones(5, 8), torch.tensor([0, 1, 2])
    calls = {
        "linear_logprob": lambda h, w: ops.linear_logprob(h, w, targets),
        "linear_cross_entropy": lambda h, w: ops.linear_cross_entropy(h, w, targets, torch.ones(3)),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=rf"hidden: torch\.float16 on {name}, compute capability {chip[0]}\.{chip[1]}; .* no bfloat16"):
            call(hidden.half(), weight.half())
        call(hidden, weight)  # float32 runs
