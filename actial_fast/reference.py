"""The plain PyTorch twin of every op: the specification, readable, and usable in float64.

T rows that carry loss, H hidden size, V vocabulary. Everything after the head's product is computed in at least float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actial_fast.spec import AdvantageSpec, GRPOSpec

STATS = ("tokens", "policy_loss", "kl", "entropy", "clip_low", "clip_high", "ratio")
"""Entries of the statistics that `linear_grpo_loss` returns: `tokens` is a count, the others are sums weighted like the loss."""
MAX_LOG_RATIO = 20.0  # exp of more says nothing more and overflows float32 at 88; a value at the bound has no gradient


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row's distribution.

    hidden (T, H) and weight (V, H) of one floating dtype, targets (T,) int64 -> (T,) and (T,) in float32 (float64 for float64 inputs).
    """
    logits = _upcast(hidden @ weight.T) / temperature  # (T, V)
    logp = logits.log_softmax(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, token_weight: Tensor) -> Tensor:
    """Weighted sum of negative log-probabilities: -sum_t token_weight[t] * log p(targets[t]).

    hidden (T, H), weight (V, H), targets (T,) int64, token_weight (T,) float -> scalar. The weights carry the normaliser, so that
    a batch split over micro-batches and ranks adds up to the whole.
    """
    logp, _ = linear_logprob(hidden, weight, targets)
    return -(token_weight * logp).sum()


def token_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference) per token: expm1(d) - d, d = ref_logp - logp up to MAX_LOG_RATIO. Both (T,) -> (T,), >= 0.

    Source: J. Schulman, "Approximating KL divergence", 2020; expm1 keeps it exact where d is small.
    """
    d = (ref_logp - logp).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(d) - d


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
    """The clipped policy loss plus beta times k3, summed with `token_weight`.

    hidden (T, H), weight (V, H), targets (T,) int64, the rest (T,). `old_logp` None means on policy: the ratio is 1 and its gradient
    that of the log-prob. `ref_logp` may be None only when spec.beta is 0. Returns the scalar loss and detached statistics
    (len(STATS),) float32 on the device.
    """
    logp, entropy = linear_logprob(hidden, weight, targets, temperature=temperature)
    log_ratio = logp - (logp.detach() if old_logp is None else old_logp)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    policy = -torch.minimum(ratio * advantages, clipped * advantages)
    kl = token_kl(logp, ref_logp) if ref_logp is not None else torch.zeros_like(logp)
    loss = (token_weight * (policy + spec.beta * kl)).sum()
    with torch.no_grad():
        low = (ratio < 1 - spec.clip_low) & (advantages < 0)
        high = (ratio > 1 + spec.clip_high) & (advantages > 0)
        sums = [(token_weight * value).sum() for value in (policy, kl, entropy, low, high, ratio)]
        stats = torch.stack([torch.tensor(float(len(targets)), device=hidden.device), *sums]).float()
    return loss, stats


def group_advantages(rewards: Tensor, groups: Tensor, spec: AdvantageSpec) -> Tensor:
    """Rewards relative to their group: (r - mean) / (std + epsilon), or r - mean.

    rewards (N,) float, groups (N,) int64 in [0, number of groups). NaN rewards (unscorable) stay out of the statistics and get 0, as do
    groups of one and, exactly, groups of equal rewards. The deviation is the unbiased one. Returns (N,) of the rewards' dtype.
    """
    known = ~rewards.isnan()
    value = torch.where(known, rewards, 0)
    size = int(groups.max()) + 1 if len(groups) else 0
    total = value.new_zeros(3, size)
    total[0].index_add_(0, groups, known.to(value.dtype))
    total[1].index_add_(0, groups, value)
    count, mean = total[0], total[1] / total[0].clamp(min=1)
    centred = torch.where(known, value - mean[groups], 0)
    total[2].index_add_(0, groups, centred * centred)
    std = (total[2] / (count - 1).clamp(min=1)).sqrt()
    # rounding leaves about 1e-8 where all rewards are equal, which is not the exact 0 that skipping needs and which epsilon would blow up
    differ = (count > 1) & (std > 1e-6 * mean.abs().clamp(min=1))
    scale = std + spec.epsilon if spec.scale == "std" else torch.ones_like(std)
    return torch.where(differ[groups], centred / scale[groups], 0)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
