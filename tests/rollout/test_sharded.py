"""Sampling from sharded weights: gathered once, then as from whole ones."""

from tests.ranks import on_ranks


def test_a_step_from_sharded_weights_is_that_from_whole_ones(tiny, tmp_path):
    """The same replies by the same operators: no hook runs. A rank without prompts waits for nobody."""
    found = on_ranks("tests.rollout.scenes", "decoding", tmp_path, tiny, 8)
    whole, sharded = found["whole"], found["sharded"]
    assert whole["ids"] == sharded["ids"] and len(whole["ids"]) == 5
    assert whole["calls"] == sharded["calls"] and sum(whole["calls"].values()) > 100
    print(f"host time of a step, least of many: whole {whole['seconds'] * 1e3:.2f} ms, sharded {sharded['seconds'] * 1e3:.2f} ms")
