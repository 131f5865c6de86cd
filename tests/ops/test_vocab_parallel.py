"""A head spread over 2 and 4 ranks computes what one has, on the CPU path and through the kernels."""

import pytest
import torch
import torch.distributed as dist

from actial_fast import ops
from actial_fast.ops import VocabParallel
from tests.ops.vocab_ranks import CASES
from tests.ranks import on_ranks

EXACT = {"cpu": 1e-7, "kernels": 2e-6}  # of the largest value: float64 with float32 statistics, and float32 added up in another order


@pytest.mark.parametrize(
    ("ranks", "cases", "path"),
    [
        (2, ",".join(CASES), "cpu"),
        (4, ",".join(CASES), "cpu"),
        pytest.param(2, "all,banned", "kernels", marks=pytest.mark.ranks),
        pytest.param(2, "rows,half,sequences,buffer", "kernels", marks=pytest.mark.slow),
        pytest.param(4, "plain,all,sequences", "kernels", marks=pytest.mark.slow),
    ],
)
def test_ranks_find_what_one_process_finds(ranks, cases, path):
    everyone = on_ranks("tests.ops.vocab_ranks", cases, path, ranks=ranks)
    assert len(everyone) == ranks
    for found in everyone:
        assert list(found) == cases.split(",")
        for case, differences in found.items():
            for name, difference in differences.items():
                # halves: the gradients of the hidden states are rounded once a rank, all others once
                limit = EXACT[path] if case != "half" else 2**-9 if "hidden" in name else 2**-11
                assert difference <= limit, (case, name, difference)


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_target_that_no_rank_has_is_nan(alone):
    parallel = VocabParallel.of(torch.zeros(7, 2))
    peak, log_total, entropy, chosen = torch.zeros(4, 3)
    _, _, logp, entropy = parallel.merge(peak, log_total, entropy, chosen, torch.tensor([True, False, True]))
    assert logp[[0, 2]].tolist() == [0, 0] and logp[1].isnan() and entropy.isfinite().all()
    hidden, weight = torch.randn(3, 2), torch.randn(7, 2)
    with pytest.raises(ValueError, match=r"targets: expected ids in \[0, 7\), got 7"):
        ops.linear_logprob(hidden, weight, torch.tensor([0, 7, 1]), vocab_parallel=parallel)


def test_what_does_not_fit_is_refused(alone, monkeypatch):
    parallel = VocabParallel.of(torch.zeros(7, 2))
    hidden, weight, targets = torch.randn(3, 2), torch.randn(6, 2), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="vocab_parallel: made of 7 rows, but weight has 6"):
        ops.linear_logprob(hidden, weight, targets, vocab_parallel=parallel)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match=r"vocab_parallel: not under torch\.compile"):
        ops.linear_logprob(hidden, torch.zeros(7, 2), targets, vocab_parallel=parallel)


def test_a_process_group_is_needed():
    with pytest.raises(ValueError, match="vocab_parallel: no process group"):
        VocabParallel.of(torch.zeros(7, 2))
