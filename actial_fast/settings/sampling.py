"""What a GRPO recipe says of sampling: how replies are drawn, which prompts and which replies a step learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


def at_least(config: Any, low: float, *names: str) -> None:
    """ValueError for the first of these fields that is below `low`, or no number."""
    for name in names:
        if not getattr(config, name) >= low:
            raise ValueError(f"{name}: must be at least {low}, got {getattr(config, name)}")


@dataclass(frozen=True)
class GateConfig:
    """Which sources a step draws from, by how often their prompts are answered right; [0, 1] closes none."""

    low: float = 0.0
    """A source whose pass rate is below is closed."""
    high: float = 1.0
    """A source whose pass rate is above is closed."""
    reward: str = "accuracy"
    """The pass rate is a running mean of this reward, one of `rewards`, over the groups of the source."""
    window: int = 64
    """Groups that the running mean goes over: a plain mean up to so many, then each new group counts one in so many."""
    retry: int = 16
    """Of a closed source's positions in the stream one in so many is drawn all the same, which may open it again."""

    def __post_init__(self) -> None:
        at_least(self, 1, "window", "retry")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low, high: expected 0 <= low < high <= 1, got {self.low} and {self.high}")

    @property
    def on(self) -> bool:
        """Whether any source can be closed."""
        return self.low > 0 or self.high < 1


@dataclass(frozen=True)
class OverlongConfig:
    """What becomes of replies near the length limit, and of those that it cut (DAPO, arXiv 2503.14476)."""

    mask: bool = False
    """Replies that the limit cut leave the loss and its normaliser; their rewards stay in their group's mean and deviation."""
    buffer: int = 0
    """The last so many tokens before the limit are fined: a reply of l tokens has the further reward
    -penalty * clip((l - (max_new_tokens - buffer)) / buffer, 0, 1). 0 = no fine."""
    penalty: float = 1.0
    """The fine of a reply as long as the limit."""

    def __post_init__(self) -> None:
        at_least(self, 0, "buffer", "penalty")


@dataclass(frozen=True)
class SamplingConfig:
    """How replies are drawn during training."""

    n: int = 16
    """Replies per prompt (the group)."""
    temperature: float = 1.0
    """Softmax temperature of sampling and of the loss's log-probs."""
    max_new_tokens: int = 4096
    """Longest reply, in tokens."""
    kv_tokens: int = 0
    """Embedded engine: most tokens of prompts and replies whose keys and values are held at once on one rank, a prompt's counted once for
    all its replies; as many replies are decoded together as find room. 0 = as many as free memory takes."""
    oversample: float = 0.0
    """1 or more: dynamic sampling (DAPO, arXiv 2503.14476). So many times `prompts` are drawn, and the first `prompts` groups in the stream
    whose rewards differ make the step; what cannot be among them is given up while it is drawn. 0 = every group drawn makes the step."""
    max_draws: int = 8
    """oversample: most draws of one step, of which those behind the first are sized by what was missing. Where groups are missing after
    the last one, the first of equal rewards take their places, and the log says so."""
    gate: GateConfig = GateConfig()
    """Sources that are too easy or too hard for now."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_new_tokens", "max_draws")
        at_least(self, 0, "kv_tokens")
        if not (self.oversample == 0 or self.oversample >= 1):
            raise ValueError(f"oversample: must be 0 (off) or at least 1, got {self.oversample}")
        if self.n < 2:
            raise ValueError(
                f"n: must be at least 2, got {self.n}: advantages are relative to a prompt's other replies, so one teaches nothing"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature: must be above 0, got {self.temperature}; training samples, it does not decode greedily")
