"""What several kernel files share: the chip at hand, the online log-sum-exp step, and the reduction of its parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(-200.0)  # exp of it is 0 in float32, and its product with a sum does not overflow: parts masked with the lowest float
FAR_BITS = tl.constexpr(-288.0)  # the same in powers of two
MAX_LOG_RATIO = 20.0  # as in the reference: exp of more says nothing more and overflows float32 at 88


def capability() -> tuple[int, int]:
    """Compute capability of the current CUDA device; (9, 0) where there is none (Triton's interpreter runs any configuration)."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)


def device_name() -> str:
    """The current CUDA device's name, for messages."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a device without a name"


def sm_count() -> int:
    """Multiprocessors of the current CUDA device: the grid of a persistent kernel. A few where there is none."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count if torch.cuda.is_available() else 4


def l2_bytes() -> int:
    """Size of the current CUDA device's L2 cache; an H100's where there is none."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size if torch.cuda.is_available() else 50 * 2**20


# A softmax in parts. With z = scale * x, scale > 0, a part of a row of logits x is known by its peak m = max x, s = sum exp(z - z_m) and
# u = sum exp(z - z_m) * log2 exp(z - z_m): log-sum-exp = z_m + log(s), entropy = log(s) - LN2 u / s. Exponents are powers of two, as in the
# hardware: step = scale * LOG2E bits a unit of x. Differences come first and the scale after them, so that large logits do not cancel. A
# part whose x are all -inf has m = -inf, s = u = 0.


@triton.jit
def softmax_tile(x, step, axis: tl.constexpr):
    """Along `axis` of logits x (masked: -inf): m, exp(z - z_m), s and u. step is a number or of x's rank."""
    peak = tl.max(x, axis)
    power = exponents(x, tl.expand_dims(peak, axis), step)
    e = tl.exp2(power)  # without exp's care for denormals, which are nothing here
    return peak, e, tl.sum(e, axis), tl.sum(e * power, axis)


@triton.jit
def exponents(x, peak, step):
    """log2 exp(z - z_peak), not below FAR_BITS: 0 * -inf would be NaN. NaN stays NaN."""
    return tl.maximum((x - tl.where(peak == float("-inf"), 0.0, peak)) * step, FAR_BITS, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def softmax_merge(m, s, u, m2, s2, u2, step):
    """The (m, s, u) of two parts of a row together, elementwise."""
    peak = tl.maximum(m, m2)
    a, b = exponents(m, peak, step), exponents(m2, peak, step)
    scale_a, scale_b = tl.exp2(a), tl.exp2(b)  # an empty part has s = u = 0
    return peak, scale_a * s + scale_b * s2, scale_a * (u + a * s) + scale_b * (u2 + b * s2)


@triton.jit
def softmax_join(m, s, u, step, axis: tl.constexpr):
    """The (m, s, u) of many parts of a row as one, along `axis`."""
    peak = tl.max(m, axis)
    shift = exponents(m, tl.expand_dims(peak, axis), step)
    scale = tl.exp2(shift)
    return peak, tl.sum(scale * s, axis), tl.sum(scale * (u + shift * s), axis)


@triton.jit
def online_softmax_step(m, s, u, x, step, axis: tl.constexpr):
    """Folds a tile of logits x into the running (m, s, u) along `axis`; they start at (-inf, 0, 0)."""
    peak = tl.maximum(m, tl.max(x, axis))
    power = exponents(x, tl.expand_dims(peak, axis), step)
    shift = exponents(m, peak, step)
    e, scale = tl.exp2(power), tl.exp2(shift)
    return peak, scale * s + tl.sum(e, axis), scale * (u + shift * s) + tl.sum(e * power, axis)
