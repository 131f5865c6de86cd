"""The fused ops: losses and log-probs from hidden states and the head, advantages, KL. Importable without the rest of the project.

Here lives what is computed and how it is called, not the Triton code (../kernels, reached through library.py alone), no model and no data.
Needs torch and numpy. In order of reading: spec.py (what a loss is, as data), reference.py (the same in plain torch, the truth of the
tests), api.py (what users call), checks.py (their arguments), sharding.py and parallel.py (several ranks); then chunks.py and chunked*.py
(a CPU, chunk by chunk) and library.py, operators*.py (torch.library operators, for compiled callers). warm.py compiles ahead. ranges.py
names what a profile shows, for the whole package.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actial_fast.ops.api import (
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
    from actial_fast.ops.parallel import VocabParallel
    from actial_fast.ops.spec import AdvantageSpec, GRPOSpec
    from actial_fast.ops.warm import warm_up

__all__ = [
    "STATS",
    "AdvantageSpec",
    "GRPOLoss",
    "GRPOSpec",
    "VocabParallel",
    "group_advantages",
    "grpo_loss_from_logits",
    "linear_cross_entropy",
    "linear_grpo_loss",
    "linear_kl",
    "linear_logprob",
    "logprob_from_logits",
    "token_kl",
    "token_weights",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    """On first use: a process that reads recipes knows the specs without importing torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    modules = {"VocabParallel": "parallel", "warm_up": "warm"}
    module = "spec" if name.endswith("Spec") else modules.get(name, "api")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
