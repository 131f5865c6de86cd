"""The ops that the loops and other trainers call: checked at the door, one signature for every device.

T rows that carry loss, H hidden size, V vocabulary. The maths is documented in `reference`, which also computes it for now.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actial_fast import reference
from actial_fast.reference import STATS
from actial_fast.spec import AdvantageSpec, GRPOSpec

__all__ = ["STATS", "group_advantages", "linear_cross_entropy", "linear_grpo_loss", "linear_logprob", "token_kl"]


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each row: hidden (T, H), weight (V, H), targets (T,) int64 -> two (T,) float32.

    Raises ValueError when shapes, dtypes or devices do not fit together or the temperature is not positive.
    """
    _check_head(hidden, weight, targets)
    _check_temperature(temperature)
    return reference.linear_logprob(hidden, weight, targets, temperature=temperature)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, token_weight: Tensor) -> Tensor:
    """-sum_t token_weight[t] * log p(targets[t]): hidden (T, H), weight (V, H), targets (T,) int64, token_weight (T,) -> scalar.

    Raises ValueError when shapes, dtypes or devices do not fit together.
    """
    _check_head(hidden, weight, targets)
    _check_rows(hidden, token_weight=token_weight)
    return reference.linear_cross_entropy(hidden, weight, targets, token_weight)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    spec: GRPOSpec,
    *,
    token_weight: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The GRPO loss from hidden states: see `reference.linear_grpo_loss` for the equation.

    hidden (T, H), weight (V, H), targets (T,) int64; advantages, old_logp, ref_logp, token_weight (T,) float. Returns the scalar loss and
    the statistics named by STATS, (len(STATS),) float32. Raises ValueError when shapes, dtypes or devices do not fit together, when
    beta > 0 comes without ref_logp, or when the temperature is not positive.
    """
    _check_head(hidden, weight, targets)
    _check_rows(hidden, advantages=advantages, old_logp=old_logp, ref_logp=ref_logp, token_weight=token_weight)
    _check_temperature(temperature)
    if spec.beta > 0 and ref_logp is None:
        raise ValueError(f"ref_logp: needed for beta={spec.beta}; pass the reference's log-probs (T,) or set beta to 0")
    return reference.linear_grpo_loss(
        hidden, weight, targets, advantages, old_logp, ref_logp, spec, token_weight=token_weight, temperature=temperature
    )


def group_advantages(rewards: Tensor, groups: Tensor, spec: AdvantageSpec) -> Tensor:
    """Advantages of rewards (N,) float within the groups (N,) int64; NaN rewards get 0.

    Raises ValueError on shapes, dtypes or a negative group.
    """
    if rewards.ndim != 1 or not rewards.is_floating_point():
        raise ValueError(f"rewards: expected a float vector (N,), got {tuple(rewards.shape)} {rewards.dtype}")
    if groups.shape != rewards.shape or groups.dtype != torch.int64:
        raise ValueError(f"groups: expected {tuple(rewards.shape)} int64, got {tuple(groups.shape)} {groups.dtype}")
    if len(groups) and int(groups.min()) < 0:
        raise ValueError(f"groups: expected ids from 0 on, got {int(groups.min())}")
    return reference.group_advantages(rewards, groups, spec)


def token_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference) per token, (T,) and (T,) -> (T,). Raises ValueError when the shapes differ."""
    if logp.shape != ref_logp.shape:
        raise ValueError(f"ref_logp: expected {tuple(logp.shape)} like logp, got {tuple(ref_logp.shape)}")
    return reference.token_kl(logp, ref_logp)


def _check_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden: expected (T, H) floating point, got {tuple(hidden.shape)} {hidden.dtype}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: expected (V, {hidden.shape[1]}) to fit hidden, got {tuple(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight: {weight.dtype} but hidden is {hidden.dtype}; cast one of them")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets: expected ({hidden.shape[0]},) int64, got {tuple(targets.shape)} {targets.dtype}")
    for name, tensor in (("weight", weight), ("targets", targets)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: on {tensor.device} but hidden is on {hidden.device}")


def _check_rows(hidden: Tensor, **rows: Tensor | None) -> None:
    for name, tensor in rows.items():
        if tensor is not None and (tensor.shape != hidden.shape[:1] or not tensor.is_floating_point() or tensor.device != hidden.device):
            raise ValueError(
                f"{name}: expected ({hidden.shape[0]},) floating point on {hidden.device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature: must be > 0, got {temperature}")
