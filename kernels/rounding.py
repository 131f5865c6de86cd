"""Stochastic rounding of float32 to bfloat16 with random bits that are a function of (key, step, place); see ops/rounding.py.

n elements. Bits of x as an integer, plus 16 random bits, the lower half cut off: up with the probability that the lower half says.
Bytes: 4 n read, 2 n written; the mixing of three 32-bit multiplications a round hides behind them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

KIND = {"round_kernel": "memory"}
WARPS, BLOCK = 8, 4096


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["key_low", "key_high", "first"])
def round_kernel(
    out,  # (n,) bfloat16
    value,  # (n,) float32
    step,  # scalar float32
    key_low,  # the bits of an int32, and the next
    key_high,
    first,
    n,  # a multiple of 16 moves 16 bytes at a time
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = at + first
    one = _mixed(_mixed(tl.load(step).to(tl.uint32) ^ key_low.to(tl.uint32)) ^ key_high.to(tl.uint32))
    other = _mixed(one ^ 0x9E3779B9)
    random = _mixed(_mixed(place.to(tl.uint32) ^ one) ^ (place >> 32).to(tl.uint32) ^ other)
    bits = tl.load(value + at, at < n, 0.0).to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    bits = tl.where(finite, (bits + (random >> 16)) & 0xFFFF0000, bits)
    tl.store(out + at, bits.to(tl.float32, bitcast=True).to(tl.bfloat16), at < n)


def round_stochastic_(out: Tensor, value: Tensor, key: int, step: Tensor, first: int) -> None:
    """out (n,) bfloat16 from value (n,) float32, both contiguous; step a float32 scalar on their device; key of 64 bits."""
    grid = (triton.cdiv(len(out), BLOCK),)
    # signed, so that every key compiles to the same kernel
    low, high = (bits - ((bits & 0x80000000) << 1) for bits in (key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF))
    round_kernel[grid](out, value, step, low, high, first, len(out), BLOCK=BLOCK, num_warps=WARPS)
    torch.autograd.graph.increment_version(out)
