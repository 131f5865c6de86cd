"""FusedGRPOTrainer under FSDP2, on two ranks over gloo: what sharded.py runs and compares there."""

import pytest

from tests.integrations.test_trl_bf16 import NOTHING
from tests.ranks import on_ranks

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("part", ["steps", "training"])
def test_sharded_it_gives_what_trl_gives_on_one_rank_and_on_two(tmp_path, part):
    on_ranks("tests.integrations.sharded", part, tmp_path)


def test_sharded_in_bf16_a_policy_that_has_not_moved_has_ratios_of_1(tmp_path):
    """FSDP2 as accelerate sets it up would round log-probs to bfloat16 on their way out of the model."""
    logs = on_ranks("tests.integrations.sharded", "bfloat16", tmp_path)
    assert len(logs) == 8
    for entry in logs:
        assert entry["kl"] < NOTHING and entry["clip_ratio/region_mean"] == 0 and abs(entry["loss"]) < 1e-6, entry
        assert entry["grad_norm"] > 0.1, "an update without a gradient says nothing"
