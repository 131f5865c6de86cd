"""The kernel of stochastic rounding gives the bits that the CPU path does."""

import pytest
import torch

from actial_fast.kernels import rounding as kernel
from actial_fast.ops import rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("n", [1, kernel.BLOCK - 1, 2 * kernel.BLOCK + 77])
@pytest.mark.parametrize(("key", "step", "first"), [(0, 0, 0), (2**64 - 1, 7, 2**33 + 5), (12345678901234567890, 16_000_000, 2**31 - 3)])
def test_the_kernel_is_the_cpu_path(monkeypatch, n, key, step, first):
    g = torch.Generator().manual_seed(0)
    value = torch.randn(n, generator=g) * torch.logspace(-40, 38, n)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.5, 3.4e38])
    value[: len(special)] = special[:n]
    wanted = torch.empty(n, dtype=torch.bfloat16)
    rounding.round_stochastic_(wanted, value, key=key, step=torch.tensor(float(step)), first=first)
    monkeypatch.setattr(rounding, "on_gpu", lambda x: True)
    got = torch.empty(n, dtype=torch.bfloat16, device=DEVICE)
    rounding.round_stochastic_(got, value.to(DEVICE), key=key, step=torch.tensor(float(step), device=DEVICE), first=first)
    assert torch.equal(got.cpu().nan_to_num(1.0), wanted.nan_to_num(1.0)) and torch.equal(got.isnan().cpu(), wanted.isnan())
