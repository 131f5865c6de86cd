"""What is computed, as data: frozen specs that the ops, the reference and the recipes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AdvantageSpec:
    """How the rewards of a group become advantages (GRPO, arXiv 2402.03300; without the scale: Dr. GRPO, arXiv 2503.20783)."""

    scale: Literal["std", "none"] = "std"
    """std: divide by the group's standard deviation. none: only subtract the mean."""
    epsilon: float = 1e-6
    """Added to the standard deviation."""


@dataclass(frozen=True)
class GRPOSpec:
    """The clipped policy objective with a KL penalty to a reference (GRPO, arXiv 2402.03300)."""

    clip_low: float = 0.2
    """The ratio of new to old probability is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    beta: float = 0.01
    """Weight of the KL penalty (k3 estimator); 0 = no reference model is held or run."""
    aggregation: Literal["token", "sequence"] = "token"
    """token: mean over all reply tokens of the mini-batch. sequence: mean over replies of each reply's token mean."""

    def __post_init__(self):
        for name in ("clip_low", "clip_high", "beta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must be >= 0, got {getattr(self, name)}")
