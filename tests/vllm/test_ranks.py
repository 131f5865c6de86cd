"""Two ranks of gloo, each with an engine of its own in its process, or with one together."""

from pathlib import Path

import pytest

from actial_fast.model.tiny import TinyConfig
from tests.ranks import on_ranks
from tests.vllm.shared import create_model

CLOSE = 1e-5
PROGRAM = "tests.vllm.scenes"


def test_weights_reach_each_ranks_engine_out_of_the_shards(model):
    for found in on_ranks(PROGRAM, "sharded", model):
        assert len(found["far"]) == 4 and max(found["far"]) < CLOSE


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("*cpushm*")}


def test_two_ranks_share_an_engine(tmp_path):
    left = Path("/dev/shm/-tp:1-[0-1]-cpushm_0")  # as vLLM names it, by a run that was killed
    left.touch()
    before = _shared_memory()
    halved = TinyConfig(hidden=384, heads=12, layers=2, vision_hidden=384, vision_depth=2, image_size=28)
    model = create_model(tmp_path / "model", halved)
    first, second = on_ranks(PROGRAM, "together", model)
    for found in (first, second):
        assert found["same"] and found["told"] and found["stopped"]
        assert max(found["far"], found["far after a sync"]) < 5 * CLOSE  # a wider model, summed in halves
    assert (first["dropped"], second["dropped"]) == ([], [0])
    assert _shared_memory() == before
    left.unlink()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_a_sync_takes_no_more_than_a_block_beside_the_shard(tmp_path, monkeypatch):
    """Prints the figures: pytest -s."""
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(name, str(1 << 18))  # what is freed is gone: glibc would keep it, and residence would be more than what is held
    model = create_model(tmp_path / "model", TinyConfig(hidden=1024, heads=32, layers=6, vision_hidden=128, vision_depth=2, image_size=28))
    for rank, found in enumerate(on_ranks(PROGRAM, "memory", model)):
        print(
            f"rank {rank}: " + ", ".join(f"{name} {found[name] / 1e6:.1f}" for name in ("model", "shard", "block", "whole", "sync")) + " MB"
        )
        assert found["model"] > 200e6 and found["block"] < 0.2 * found["model"]
        assert found["whole"] <= found["block"], "more than a block at a time was whole"
        assert found["sync"] <= found["shard"] + found["block"]
        assert found["far"] < CLOSE * max(1, found["scale"])
