"""The estimators of a token's KL divergence and exp's remainders they need, as device functions for the kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from actial_fast.kernels import common

MAX_LOG_RATIO = tl.constexpr(common.MAX_LOG_RATIO)


@triton.jit
def expm1_minus_x(x):
    """(expm1(x) - x, expm1(x)) of float32 x <= 88, each to a few float32 roundings; NaN stays NaN.

    exp(x) - 1 - x cancels for small x, and tl.exp is off by 1e-6 of the value at x = 20 (it rounds x * log2(e)). So, with
    q(h) = exp(h) - 1 - h from its series on a short interval:
    |x| <= 1.5: h = x / 2 and exp(x) - 1 - x = (h + q)^2 + 2 q, a sum of positive terms; expm1(x) = (h + q) (h + q + 2);
    beyond:     x = k log(2) + h and exp(x) = 2^k (1 + h + q), where subtracting 1 + x is harmless.
    """
    near = tl.abs(x) <= 1.5
    low = tl.where(x < -104.0, -104.0, x)  # exp is 0 there already; -inf would become NaN below
    k = tl.floor(low * 1.4426950408889634 + 0.5)
    h = tl.where(near, 0.5 * x, (low - k * 0.693145751953125) - k * 1.4286067653302226e-06)  # log(2) in two parts: k * the first is exact
    series = 1 / 3628800
    series = series * h + 1 / 362880
    series = series * h + 1 / 40320
    series = series * h + 1 / 5040
    series = series * h + 1 / 720
    series = series * h + 1 / 120
    series = series * h + 1 / 24
    series = series * h + 1 / 6
    series = series * h + 0.5
    q = h * h * series
    m = h + q
    beyond = tl.exp2(k) * (1.0 + m) - 1.0
    return tl.where(near, m * m + 2.0 * q, beyond - x), tl.where(near, m * (m + 2.0), beyond)


@triton.jit
def kl_estimate(log_ratio, KIND: tl.constexpr):
    """An estimate of KL(policy || reference) from log_ratio = ref_logp - logp, and its derivative by log_ratio.

    With d = min(log_ratio, MAX_LOG_RATIO): k1 = -d, k2 = d^2 / 2, k3 = expm1(d) - d. Beyond the bound the derivative is 0. NaN stays NaN.
    """
    inside = log_ratio <= MAX_LOG_RATIO
    d = tl.where(log_ratio > MAX_LOG_RATIO, MAX_LOG_RATIO, log_ratio)
    if KIND == "k3":
        kl, slope = expm1_minus_x(d)
    elif KIND == "k2":
        kl, slope = 0.5 * d * d, d
    else:
        kl, slope = -d, tl.full(d.shape, -1.0, d.dtype)
    return kl, tl.where(inside, slope, d - d)
