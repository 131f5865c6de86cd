"""How far the sampler's log-probs are from the trainer's own, of the same tokens: under the same weights 0 but for rounding, or a bug."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from actial_fast.ops.spec import GRPOSpec
from actial_fast.report.metrics import MetricLog
from actial_fast.train.dist import World

FAR = 20.0  # log-ratios beyond are held there in the estimate of the KL, which they would make infinite
BAND = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest mean |d log p| that is taken for rounding, by the dtype that the model computes in. float32: the tiny models of the tests show
2e-7; this is 500 times that, room for depth, and a tenth of what one forgotten update changes there. bfloat16: it has 8 bits, so one
rounding of a logit of 20 is up to 0.06 off; tiny models show 0.002. Other inputs show at once; a single forgotten update at a learning rate
of 1e-6 may not, many do."""
CAUSES = (
    "weights that are stale after a sync, another image preprocessing, another chat template, tokens that one side bans before its "
    "softmax, another temperature, or a lower dtype than the trainer's"
)


def compared(sampled: Tensor, own: Tensor) -> Tensor:
    """(4,) float64, on their device: tokens, sum of |sampled - own|, sum of the estimate of KL(sampler || trainer), largest
    |sampled - own|, of log-probs (T,) and (T,). No host sync."""
    assert sampled.shape == own.shape and sampled.ndim == 1
    if not len(sampled):
        return torch.zeros(4, dtype=torch.float64, device=sampled.device)
    d = own.detach().double() - sampled.double()
    near = d.clamp(-FAR, FAR)
    return torch.stack([torch.ones_like(d).sum(), d.abs().sum(), (near.expm1() - near).sum(), d.abs().max()])


class Mismatch:
    """The comparison of a step, micro-batch by micro-batch, kept on the device until the loop's wait. spec: the loss, where it weighs
    tokens by their importance; then those outside its bounds are counted."""

    def __init__(self, where: World, spec: GRPOSpec | None = None):
        self._where, self._spec = where, spec
        self._sums = torch.zeros(4, dtype=torch.float64, device=where.device)
        self._largest = torch.zeros((), dtype=torch.float64, device=where.device)

    def add(self, sampled: Tensor, own: Tensor, lengths: Sequence[int]) -> None:
        """Log-probs (T,) of a micro-batch's sampled tokens: the sampler's, and those of the policy before the update. lengths: tokens of
        each reply."""
        *sums, largest = compared(sampled, own)
        self._sums = self._sums + torch.stack([*sums, self._outside(sampled, own, lengths)])
        self._largest = torch.maximum(self._largest, largest)

    def _outside(self, sampled: Tensor, own: Tensor, lengths: Sequence[int]) -> Tensor:
        """Tokens whose importance weight the bounds clamp or mask, as a float64 scalar."""
        if self._spec is None or not len(sampled):
            return self._sums.new_zeros(())
        gap = own.detach().double() - sampled.double()
        if self._spec.importance.startswith("sequence"):
            owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(gap.device, non_blocking=True)
            gap = gap.new_zeros(len(lengths)).index_add(0, owner, gap)[owner]
        weight = gap.exp()
        return ((weight < self._spec.importance_min) | (weight > self._spec.importance_max)).double().sum()

    def total(self) -> Tensor:
        """(5,) float64, on the device, what `metrics` takes: over all micro-batches and ranks. Every rank calls."""
        slots = torch.zeros(4 + self._where.size, dtype=torch.float64, device=self._where.device)
        slots[:4] = self._sums
        slots[4 + self._where.rank] = self._largest
        slots = self._where.sum(slots)
        return torch.cat([slots[:4], slots[4:].max()[None]])

    @staticmethod
    def metrics(total: Sequence[float], weighed: bool = False) -> dict[str, float]:
        """Of what `total` gave. mismatch/mean_abs: mean |d log p| of a token; mismatch/kl: mean of r - 1 - log r with r = trainer's /
        sampler's probability, which estimates KL(sampler || trainer) per token; mismatch/max_ratio: the largest of r and 1 / r; with
        importance weights (`weighed`) mismatch/outside: share of tokens whose weight is outside the bounds. Empty where no token was
        compared."""
        count, distance, kl, outside, largest = total
        if not count:
            return {}
        means = {"mismatch/mean_abs": distance / count, "mismatch/kl": kl / count, "mismatch/max_ratio": math.exp(min(largest, 700.0))}
        return means | ({"mismatch/outside": outside / count} if weighed else {})


class Band:
    """Tells, once in a run's process, when the mismatch is more than rounding explains."""

    def __init__(self, log: MetricLog, dtype: torch.dtype):
        self._log, self._limit, self._told = log, BAND[dtype], False

    def look(self, step: int, metrics: Mapping[str, float]) -> None:
        """At the metrics of a step whose replies were drawn with the weights that it began with."""
        found = metrics.get("mismatch/mean_abs", 0.0)
        if self._told or not found > self._limit:
            return
        self._told = True
        text = f"mean |d log p| between sampler and trainer is {found:.2g}, rounding explains {self._limit:g}; usual causes: {CAUSES}"
        self._log.event("mismatch", {"mean_abs": found, "limit": self._limit, "text": text}, step)
        self._log.say(f"{self._log.stage} step {step}: {text}")
