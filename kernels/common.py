"""What several kernel files share: the chip at hand, the online log-sum-exp step, and the reduction of its parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FAR = tl.constexpr(-200.0)  # exp of it is 0 in float32, and its product with a sum does not overflow: parts masked with the lowest float
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


@triton.jit
def softmax_tile(z, axis: tl.constexpr):
    """Along `axis` of scaled logits z (masked: -inf): peak m = max z, e = exp(z - m), s = sum e, u = sum e * (z - m).

    log-sum-exp = m + log(s) and entropy = log(s) - u / s; u is centred, so that large logits do not cancel. All -inf: m = -inf, s = u = 0.
    """
    peak = tl.max(z, axis)
    centred = z - tl.expand_dims(tl.where(peak == float("-inf"), 0.0, peak), axis)
    e = tl.exp(centred)
    return peak, e, tl.sum(e, axis), tl.sum(tl.where(e > 0, e * centred, 0.0), axis)


@triton.jit
def softmax_merge(m, s, u, m2, s2, u2):
    """The (m, s, u) of two parts of a row together, elementwise."""
    peak = tl.maximum(m, m2)
    a = tl.where(m == float("-inf"), 0.0, tl.maximum(m - peak, FAR))
    b = tl.where(m2 == float("-inf"), 0.0, tl.maximum(m2 - peak, FAR))
    scale_a, scale_b = tl.exp(a), tl.exp(b)  # an empty part has s = u = 0
    return peak, scale_a * s + scale_b * s2, scale_a * (u + a * s) + scale_b * (u2 + b * s2)


@triton.jit
def softmax_join(m, s, u, axis: tl.constexpr):
    """The (m, s, u) of many parts of a row as one, along `axis`."""
    peak = tl.max(m, axis)
    shift = tl.where(m == float("-inf"), 0.0, tl.maximum(m - tl.expand_dims(peak, axis), FAR))
    scale = tl.exp(shift)
    return peak, tl.sum(scale * s, axis), tl.sum(scale * (u + shift * s), axis)


@triton.jit
def online_softmax_step(m, s, u, z, axis: tl.constexpr):
    """Folds a tile of scaled logits z into the running (m, s, u) along `axis`; they start at (-inf, 0, 0)."""
    peak, _, total, moment = softmax_tile(z, axis)
    return softmax_merge(m, s, u, peak, total, moment)
