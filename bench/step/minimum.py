"""The least FLOPs of an update's samples: `actial_fast.model.flops` has the formulas."""

from __future__ import annotations

import numpy as np

from actial_fast.grpo import Sample
from actial_fast.model import flops
from actial_fast.model.flops import Work


def work_of(samples: list[Sample], n: int) -> Work:
    """The least rows, pairs and images of the samples, of which each n share a prompt."""
    groups = []
    for start in range(0, len(samples), n):
        group = [s.sequence for s in samples[start : start + n]]
        shortest = min(map(len, group))
        same = np.all([s.ids[:shortest] == group[0].ids[:shortest] for s in group], axis=0)
        groups.append((shortest if same.all() else int(same.argmin()), group))
    return flops.work_of(groups)
