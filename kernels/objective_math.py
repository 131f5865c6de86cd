"""The GRPO-family objective of a row with its derivatives by hand, as device functions that the kernels share.

With w = token_weight, r = ratio, a = importance weight, A = advantage, L = logp:

forward    loss = sum_t w (policy_mask a policy(r, A, L) + beta kl(L, r)) - entropy_coef sum_t entropy_weight entropy
backward   per row, `direct` = d (policy + beta kl) / d L with r held, and `through` = d (policy + beta kl) / d log r:
           token ratio     log r_t = L_t - old_t                     g_t = w_t (direct_t + through_t)
           sequence ratio  log r   = mean over counted rows          g_t = w_t direct_t + (sum_j w_j through_j) / counted rows
           clip: through = -a A r on the branch that the minimum takes, else 0; sapo: through = -4 a A r s (1 - s), s the gate;
           cispo, vespo: direct = -a A weight, the weight detached; kl: direct = d kl / d L, and with the bias correction through = kl r.

`token_objective` is the whole of it for rows that do not depend on each other: other kernels call it with the log-probs in registers.
Rows whose token_weight is 0 are masked: their other inputs are not even read, so that no NaN gets through, and their gradient is 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from actial_fast.kernels import common
from actial_fast.kernels.kl_math import kl_estimate

STATS = tl.constexpr(10)  # tokens, loss, policy_loss, kl, entropy, clip_low, clip_high, ratio, ratio_sq, importance
MAX_LOG_RATIO = tl.constexpr(common.MAX_LOG_RATIO)
MIN_RATIO_VESPO = tl.constexpr(1e-8)
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)


class Rows(NamedTuple):
    """Vectors of one entry a row; None = not given, and compiled out. Any float dtype, policy_mask bool."""

    token_weight: Tensor
    advantages: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    sampler_logp: Tensor | None
    policy_mask: Tensor | None
    entropy_weight: Tensor | None


class Numbers(NamedTuple):
    """The spec's floats: run-time arguments, so that another value compiles nothing. None = not used, and compiled out."""

    low: float
    high: float
    delta: float | None
    dual: float | None
    sapo_pos: float
    sapo_neg: float
    k_pos: float
    lambda_pos: float
    k_neg: float
    lambda_neg: float
    beta: float
    entropy_coef: float
    importance_min: float
    importance_max: float


class Options(NamedTuple):
    """The spec's choices: compile-time constants."""

    objective: str
    sequence_ratio: bool
    kl: str
    kl_times_ratio: bool
    sequence_importance: bool
    mask_importance: bool


def arguments(
    spec: Any,
    *,
    token_weight: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampler_logp: Tensor | None,
    policy_mask: Tensor | None,
    entropy_weight: Tensor | None,
) -> tuple[Rows, Numbers, Options]:
    """What the kernels take, from a GRPOSpec and vectors (C,) on one device."""
    optional = (old_logp, ref_logp, sampler_logp, policy_mask, entropy_weight)
    rows = Rows(token_weight.contiguous(), advantages.contiguous(), *(None if x is None else x.contiguous() for x in optional))
    clip = spec.objective == "clip"
    numbers = Numbers(
        low=1.0 - spec.clip_low,
        high=1.0 + spec.clip_high,
        delta=float(spec.clip_delta) if clip and spec.clip_delta is not None else None,
        dual=float(spec.dual_clip) if clip and spec.dual_clip is not None else None,
        sapo_pos=float(spec.sapo_temperature_pos),
        sapo_neg=float(spec.sapo_temperature_neg),
        k_pos=float(spec.vespo_k_pos),
        lambda_pos=max(float(spec.vespo_lambda_pos), 1e-4),
        k_neg=float(spec.vespo_k_neg),
        lambda_neg=max(float(spec.vespo_lambda_neg), 1e-4),
        beta=float(spec.beta),
        entropy_coef=float(spec.entropy_coef),
        importance_min=float(spec.importance_min),
        importance_max=float(spec.importance_max),
    )
    options = Options(
        objective=spec.objective,
        sequence_ratio=spec.ratio == "sequence",
        kl=spec.kl,
        kl_times_ratio=bool(spec.kl_bias_correction),
        sequence_importance=spec.importance.startswith("sequence"),
        mask_importance=spec.importance.endswith("mask"),
    )
    return rows, numbers, options


@triton.jit
def old_log_prob(logp, rows, at, counted):
    """The log-prob that the ratio is relative to: on policy (None) the policy's own, detached."""
    if rows.old_logp is None:
        old = logp
    else:
        old = tl.load(rows.old_logp + at, counted, 0.0).to(tl.float32)
    return old


@triton.jit
def sampler_gap(old, rows, at, counted):
    """log(old / sampler); 0 where the sampler could not score the token."""
    gap = old - tl.load(rows.sampler_logp + at, counted, 0.0).to(tl.float32)
    gap = tl.where(gap == gap, gap, 0.0)
    return tl.minimum(tl.maximum(gap, -FLOAT_MAX), FLOAT_MAX)  # sums of infinities of both signs would be NaN


@triton.jit
def importance_weight(gap, numbers, MASK: tl.constexpr):
    weight = tl.exp(tl.minimum(gap, MAX_LOG_RATIO))
    if MASK:
        weight = tl.where((weight >= numbers.importance_min) & (weight <= numbers.importance_max), weight, 0.0)
    else:
        weight = tl.minimum(tl.maximum(weight, numbers.importance_min), numbers.importance_max)
    return weight


@triton.jit
def row_objective(logp, entropy, log_ratio, importance, log_w, weight, rows, numbers, at, counted, OPTIONS: tl.constexpr):
    """direct, through, d loss / d entropy and the statistics of rows at offsets `at`.

    logp and entropy are 0 where not counted; log_ratio, importance and vespo's log_w are per row or the sequence's scalar.
    """
    A = tl.load(rows.advantages + at, counted, 0.0).to(tl.float32)
    kept = 1.0
    if rows.policy_mask is not None:
        kept = tl.where(tl.load(rows.policy_mask + at, counted, False), 1.0, 0.0)
    # comparisons and not tl.minimum, which would drop NaN: a bad row must show in the loss
    beyond = log_ratio > MAX_LOG_RATIO
    ratio = tl.exp(tl.where(beyond, MAX_LOG_RATIO, log_ratio))
    slope = tl.where(beyond, 0.0, ratio)  # d ratio / d log_ratio
    applied = importance * kept
    direct = A * 0.0
    through = A * 0.0
    low = 0.0
    high = 0.0
    if OPTIONS.objective == "clip":
        free = ratio
        if numbers.delta is not None:
            free = tl.where(ratio > numbers.delta, numbers.delta, ratio)
        gain = free * A
        bound = tl.minimum(tl.maximum(ratio, numbers.low), numbers.high) * A
        cut = gain > bound  # inside the range both are equal and the gradient is A
        gain = tl.where(cut, bound, gain)
        if numbers.delta is not None:
            cut = cut | (ratio > numbers.delta)
        if numbers.dual is not None:
            floor = (A < 0) & (gain < numbers.dual * A)
            gain = tl.where(floor, numbers.dual * A, gain)
            cut = cut | floor
        through = tl.where(cut, 0.0, -applied * A * slope)
        low = tl.where(counted & (A < 0) & (ratio < numbers.low), 1.0, 0.0)
        high = tl.where(counted & (A > 0) & (ratio > numbers.high), 1.0, 0.0)
    elif OPTIONS.objective == "cispo":
        capped = tl.where(ratio > numbers.high, numbers.high, ratio) * A
        gain = capped * logp
        direct = -applied * capped
        high = tl.where(counted & (A > 0) & (ratio > numbers.high), 1.0, 0.0)
    elif OPTIONS.objective == "sapo":
        tau = tl.where(A > 0, numbers.sapo_pos, numbers.sapo_neg)
        x = tau * (ratio - 1.0)
        e = tl.exp(-tl.abs(x))
        gate = tl.where(x >= 0, 1.0, e) / (1.0 + e)
        gain = gate * (4.0 / tau) * A
        through = -applied * A * (4.0 * e / ((1.0 + e) * (1.0 + e))) * slope
    else:  # vespo: the importance weight is part of log_w
        k = tl.where(A >= 0, numbers.k_pos, numbers.k_neg)
        decay = tl.where(A >= 0, numbers.lambda_pos, numbers.lambda_neg)
        gamma = tl.exp(decay + k * log_w - decay * tl.exp(log_w)) * A
        gain = gamma * logp
        applied = kept
        direct = -applied * gamma
    policy = -gain * applied
    kl = tl.zeros_like(logp)
    if rows.ref_logp is not None:
        ref_logp = tl.load(rows.ref_logp + at, counted, 0.0).to(tl.float32)
        kl, kl_slope = kl_estimate(ref_logp - logp, tl.constexpr(OPTIONS.kl))
        if OPTIONS.kl_times_ratio:
            direct -= numbers.beta * kl_slope * ratio
            through += numbers.beta * kl * slope
            kl = kl * ratio
        else:
            direct -= numbers.beta * kl_slope
    entropy_weight = weight * kept
    if rows.entropy_weight is not None:
        entropy_weight = tl.load(rows.entropy_weight + at, counted, 0.0).to(tl.float32)
    g_entropy = -numbers.entropy_coef * entropy_weight
    policy = weight * policy
    loss = policy + numbers.beta * weight * kl + g_entropy * entropy
    tokens = tl.where(counted, 1.0, 0.0)
    ratio = tl.where(counted, ratio, 0.0)
    stats = (tokens, loss, policy, kl, entropy, low * tokens, high * tokens, ratio, ratio * ratio, tl.where(counted, importance, 0.0))
    return direct, through, g_entropy, stats


@triton.jit
def token_objective(logp, entropy, rows, numbers, at, inside, OPTIONS: tl.constexpr):
    """Rows that do not depend on each other: d loss / d logp, d loss / d entropy and the statistics of each, of the shape of logp.

    logp and entropy float32, scalars or blocks; `at` int64 offsets into `rows`, `inside` which of them exist.
    """
    weight = tl.load(rows.token_weight + at, inside, 0.0).to(tl.float32)
    counted = weight != 0
    logp = tl.where(counted, logp, 0.0)
    entropy = tl.where(counted, entropy, 0.0)
    old = old_log_prob(logp, rows, at, counted)
    importance = 1.0
    if rows.sampler_logp is not None:
        importance = importance_weight(sampler_gap(old, rows, at, counted), numbers, OPTIONS.mask_importance)
    direct, through, g_entropy, stats = row_objective(
        logp, entropy, logp - old, importance, 0.0, weight, rows, numbers, at, counted, OPTIONS
    )
    return tl.where(counted, weight * (direct + through), 0.0), g_entropy, stats
