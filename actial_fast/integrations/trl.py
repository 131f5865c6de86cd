"""Our loss in TRL's GRPOTrainer: one call, or one class, and the same numbers.

    from actial_fast.integrations.trl import FusedGRPOTrainer     # in the place of trl.GRPOTrainer; or, before the trainer is made:
    from actial_fast.integrations.trl import patch_trl; patch_trl()

Two levels. "logprob" puts our head under every trainer of TRL that asks for log-probs: 1 product of T x H x V, and 3 more in the backward
pass (2 with a frozen head), as TRL's own, within a workspace and with fp32 accumulators. "loss" also gives GRPOTrainer the fused loss: 3
products in all (2 with a frozen head), and rows without a gradient leave two of them; top_entropy_quantile and off_policy_mask_threshold
need the log-probs first and cost one product more. Old and reference log-probs are scored with the same head. Loss, gradients and logged
metrics are TRL's; under bfloat16 TRL rounds logits where ours stay fp32 accumulators. What is not supported is refused;
importing this module raises ImportError where TRL is missing or of another release.

B sequences, C the longest completion, T rows that carry loss, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from actial_fast import ops
from actial_fast.integrations import trl_loss  # first: it checks the version of TRL
from actial_fast.integrations.trl_loss import SUPPORTED, spec_of

import trl.trainer.utils  # isort: skip
from trl.trainer.grpo_trainer import GRPOTrainer  # isort: skip

__all__ = ["SUPPORTED", "FusedGRPOTrainer", "LogProbFunction", "patch_trl", "spec_of", "unpatch"]

LEVELS = ("logprob", "loss")
WORKSPACE_MB = 700.0
EXTRA_OUTPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "log_sum_sq_probs": lambda z, targets: (2 * z).logsumexp(-1) - 2 * z.logsumexp(-1),
    "mean_logits": lambda z, targets: z.mean(-1),
    "is_top1": lambda z, targets: z.argmax(-1) == targets,  # of equal logits argmax gives the first, as TRL does
}
"""What other trainers of TRL report besides log-probs and entropies, from logits (rows, V) and targets (rows,): log(sum_v p_v^2), the mean
logit, and whether the target is the largest one."""


# ---- level "logprob": the per-token function


class LogProbFunction:
    """In the place of `trl.kernels.ChunkedLogProbFunction`: its arguments and outputs, our head."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", *EXTRA_OUTPUTS),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """hidden (N, H), weight (V, H), bias (V,), targets (N,) int64 -> log-probs (N,) float32 and, where `outputs` names them, entropy,
        log_sum_sq_probs, mean_logits (N,) float32 and is_top1 (N,) bool.

        The first two are differentiable in hidden, weight and bias, once; the others cost one more product, within WORKSPACE_MB. chunk_size
        goes unused. ValueError for a logit_scale that is not positive and for weights that DeepSpeed has partitioned.
        """
        trl_loss.refuse_partitioned(weight)
        scaling = trl_loss.head_scaling(temperature, final_logit_softcapping, logit_scale)
        weight, bias = trl_loss.like(hidden, weight), trl_loss.like(hidden, bias)
        logp, entropy = ops.linear_logprob(hidden, weight, targets, bias=bias, **scaling)
        entropy = entropy.float() if entropy is not None and "entropy" in outputs else None
        extra = _extra_outputs(hidden, weight, bias, targets, outputs, **scaling)
        log_sum_sq_probs, mean_logits, is_top1 = (extra.get(name) for name in EXTRA_OUTPUTS)
        return logp.float(), entropy, log_sum_sq_probs, mean_logits, is_top1


@torch.no_grad()
def _extra_outputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    outputs: tuple[str, ...],
    temperature: float,
    softcap: float | None,
) -> dict[str, Tensor]:
    """Those of EXTRA_OUTPUTS that `outputs` names, (N,) each, from one product in chunks of rows."""
    functions = {name: function for name, function in EXTRA_OUTPUTS.items() if name in outputs}
    parts: dict[str, list[Tensor]] = {name: [] for name in functions}
    size = max(1, int(WORKSPACE_MB * 2**20 / (16 * len(weight))))  # about four (rows, V) float32 at once
    for start in range(0, max(len(hidden), 1) if functions else 0, size):
        z = linear(hidden[start : start + size], weight, bias).float()
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
        for name, function in functions.items():
            parts[name].append(function(z, targets[start : start + size]))
    return {name: torch.cat(part) for name, part in parts.items()}


# ---- level "loss"


class FusedGRPOTrainer(GRPOTrainer):
    """trl.GRPOTrainer with `ops.linear_grpo_loss` in the place of its loss, and our head under the log-probs that it scores; arguments,
    logs and everything else are its own.

    workspace_mb: MiB that the loss may hold above hidden states, head and their gradients (None: as of the ops). ValueError for what is
    not SUPPORTED.
    """

    def __init__(self, *args: Any, workspace_mb: float | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        trl_loss.prepare(self, workspace_mb)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        trl_loss.keep_outputs(self.accelerator)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        return trl_loss.compute_loss(self, model, inputs)


# ---- patching


_replaced: list[tuple[Any, str, Any]] = []


def patch_trl(level: str = "loss") -> contextlib.ExitStack:
    """Put our code into the installed TRL, for trainers that are made from now on: "logprob" or "loss" (the module's docstring).

    Stays until `unpatch()`, or, as `with patch_trl(): ...`, until the block ends; a second call replaces the first. ValueError for another
    level; making a trainer raises it for what is not SUPPORTED, such as a subclass with a loss of its own.
    """
    if level not in LEVELS:
        raise ValueError(f"level: {level!r} is not one of {', '.join(LEVELS)}")
    unpatch()
    _replace(trl.trainer.utils, "_ChunkedLogProbFunction", LogProbFunction)
    if level == "loss":
        init = GRPOTrainer.__init__

        @functools.wraps(init)
        def prepared(self: Any, *args: Any, **kwargs: Any) -> None:
            if type(self)._compute_loss not in (trl_loss.compute_loss, FusedGRPOTrainer._compute_loss):
                name = type(self).__name__
                raise ValueError(f"{name}: computes its own loss; patch_trl('logprob') serves it, or a subclass of FusedGRPOTrainer")
            init(self, *args, **kwargs)
            trl_loss.prepare(self, None)

        _replace(GRPOTrainer, "__init__", prepared)
        _replace(GRPOTrainer, "_compute_loss", trl_loss.compute_loss)
        _replace(GRPOTrainer, "create_accelerator_and_postprocess", _create_accelerator)
    stack = contextlib.ExitStack()
    stack.callback(unpatch)
    return stack


def _create_accelerator(trainer: Any) -> None:
    """GRPOTrainer.create_accelerator_and_postprocess, which its constructor calls before it wraps the reference model."""
    super(GRPOTrainer, trainer).create_accelerator_and_postprocess()
    trl_loss.keep_outputs(trainer.accelerator)


def unpatch() -> None:
    """Give TRL its own code back; nothing happens where it has it."""
    while _replaced:
        setattr(*_replaced.pop())


def _replace(owner: Any, name: str, new: Any) -> None:
    _replaced.append((owner, name, getattr(owner, name)))
    setattr(owner, name, new)
