"""The least FLOPs of an update's samples: `actial_fast.model.flops` has the formulas."""

from __future__ import annotations

from actial_fast.grpo import Sample
from actial_fast.model import flops
from actial_fast.model.flops import Work


def work_of(samples: list[Sample], n: int) -> Work:
    """The least rows, pairs and images of the samples, of which each n share a prompt."""
    return flops.work_of([s.sequence for s in samples[start : start + n]] for start in range(0, len(samples), n))
