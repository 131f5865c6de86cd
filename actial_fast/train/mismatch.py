"""How far the sampler's log-probs are from the trainer's own, of the same tokens under the same weights: 0 but for rounding, or a bug."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from actial_fast.train.dist import World


def compared(sampled: Tensor, own: Tensor) -> Tensor:
    """(3,) float64, on their device: tokens, sum of |sampled - own|, largest |sampled - own|, of log-probs (T,) and (T,). No host sync."""
    assert sampled.shape == own.shape and sampled.ndim == 1
    if not len(sampled):
        return torch.zeros(3, dtype=torch.float64, device=sampled.device)
    distance = (sampled.double() - own.detach().double()).abs()
    return torch.stack([torch.ones_like(distance).sum(), distance.sum(), distance.max()])


class Mismatch:
    """The comparison of a step, micro-batch by micro-batch, kept on the device until the loop's wait."""

    def __init__(self, where: World):
        self._where = where
        self._found = torch.zeros(3, dtype=torch.float64, device=where.device)

    def add(self, sampled: Tensor, own: Tensor) -> None:
        """Log-probs (T,) of a micro-batch's sampled tokens: the sampler's, and those of the policy it sampled from."""
        count, total, largest = compared(sampled, own)
        self._found = torch.stack([self._found[0] + count, self._found[1] + total, torch.maximum(self._found[2], largest)])

    def total(self) -> Tensor:
        """(3,) float64, on the device, as `compared`, over all micro-batches and ranks. Every rank calls."""
        slots = torch.zeros(2 + self._where.size, dtype=torch.float64, device=self._where.device)
        slots[:2] = self._found[:2]
        slots[2 + self._where.rank] = self._found[2]
        slots = self._where.sum(slots)
        return torch.stack([slots[0], slots[1], slots[2:].max()])

    @staticmethod
    def metrics(count: float, total: float, largest: float) -> dict[str, float]:
        """mismatch/mean_abs: mean |d log p| of a token; mismatch/max_ratio: the largest of p / q and q / p. Empty where no token was
        compared."""
        return {"mismatch/mean_abs": total / count, "mismatch/max_ratio": math.exp(min(largest, 700.0))} if count else {}
