"""actial_fast: Actial's two-stage viewpoint training for Qwen2.5-VL, and the ops it is made of.

The public names are loaded on first use, so that a process that only reads data never imports torch; loops, data and the command line are
imported by their module's name.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actial_fast.ops import (
        STATS,
        GRPOLoss,
        group_advantages,
        grpo_loss_from_logits,
        linear_cross_entropy,
        linear_grpo_loss,
        linear_kl,
        linear_logprob,
        logprob_from_logits,
        token_kl,
        token_weights,
    )
    from actial_fast.spec import AdvantageSpec, GRPOSpec

__all__ = [
    "STATS",
    "AdvantageSpec",
    "GRPOLoss",
    "GRPOSpec",
    "group_advantages",
    "grpo_loss_from_logits",
    "linear_cross_entropy",
    "linear_grpo_loss",
    "linear_kl",
    "linear_logprob",
    "logprob_from_logits",
    "token_kl",
    "token_weights",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module("actial_fast.spec" if name.endswith("Spec") else "actial_fast.ops"), name)
