"""actial_fast: Actial's two-stage viewpoint training for Qwen2.5-VL, and the ops it is made of.

Importing this package pulls in torch and nothing heavier; loops, data and the command line are imported by name.
"""

from actial_fast.ops import STATS, group_advantages, linear_cross_entropy, linear_grpo_loss, linear_logprob, token_kl
from actial_fast.spec import AdvantageSpec, GRPOSpec

__all__ = [
    "STATS",
    "AdvantageSpec",
    "GRPOSpec",
    "group_advantages",
    "linear_cross_entropy",
    "linear_grpo_loss",
    "linear_logprob",
    "token_kl",
]
