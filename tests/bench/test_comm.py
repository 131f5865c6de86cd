"""What bench.step.comm counts is what the least needs, and is what is committed."""

import json
from pathlib import Path

import pytest
import torch

from actial_fast.settings.running import DistConfig
from bench.step import comm

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "cpu-2core"


@pytest.mark.parametrize(
    ("way", "lora"),
    [({}, 0), ({"fsdp": True}, 0), ({"fsdp": True, "reshard": "step", "reduce": "step", "replicate": 2}, 0), ({"fsdp": True}, 4)],
    ids=["copies", "sharded", "for a step in two groups", "adapters"],
)
def test_what_is_seen_is_the_least(way, lora):
    """Layers twice a micro-batch, the rest once; of adapters nothing but adapters is summed. At these widths rows that FSDP pads count."""
    config = DistConfig(**way)
    found = comm.row("tiny", lora, config, 4, 3)
    assert found["seen_gb"].keys() == found["least_gb"].keys()
    for kind, size in found["seen_gb"].items():
        assert found["least_gb"][kind] <= size <= 1.02 * found["least_gb"][kind], (kind, found)
    layers, blocks = 2, 2
    if config.fsdp and not lora and config.reshard == "block":
        assert found["calls"] == {"gather": 3 * (2 * layers + 2 * (blocks + 1) + 3), "reduce": 3 * (layers + blocks + 4)}
    if config.replicate > 1:
        groups = layers + blocks + 4
        assert found["calls"] == {"gather": groups, "reduce": groups, "sum": groups} and found["sent_gb"]["between"] > 0


def test_the_committed_figures():
    result = json.loads((RESULTS / "comm-7b-2026-11-28.json").read_text())
    assert len(result["rows"]) == len(comm.policies_of(result["ranks"])) + 1
    for each in result["rows"]:
        for kind, size in each["seen_gb"].items():
            assert size == pytest.approx(each["least_gb"][kind], rel=1e-3), each
    assert comm.told(result).count("\n") == len(result["rows"]) + 2


def test_a_ring():
    assert comm.sent("gather", 8, 8e9) == comm.sent("reduce", 8, 8e9) == 7e9 and comm.sent("sum", 2, 8e9) == 8e9
    policy = comm.build("tiny", torch.bfloat16, 0)
    assert comm.extra(policy, DistConfig(), 8)["shares"] == pytest.approx(16e-9 * sum(p.numel() for p in policy.parameters()))
