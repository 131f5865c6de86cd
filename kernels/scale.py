"""x *= factor in place, the factor a scalar on the device: a gradient that was computed early meets the upstream gradient, without a sync.

Bytes: nothing beyond the factor where it is 1, else one read and one write of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from actial_fast.kernels import common

KIND = {"scale_kernel": "memory"}
WARPS = 8
PROGRAMS_PER_SM = 4


@triton.jit(do_not_specialize=["tiles", "all_tiles"])
def scale_kernel(
    x,  # (rows, columns), row stride `stride`
    factor,  # scalar float32
    columns,
    stride,
    tiles,  # of a row
    all_tiles,
    BLOCK: tl.constexpr,
):
    f = tl.load(factor).to(tl.float32)
    if f != 1.0:
        # a grid of the chip's size and not of x's: with a factor of 1 nothing but the launch is paid
        for tile in range(tl.program_id(0).to(tl.int64), all_tiles, tl.num_programs(0)):
            column = (tile % tiles) * BLOCK + tl.arange(0, BLOCK)
            at = x + (tile // tiles) * stride + column
            inside = column < columns
            tl.store(at, (tl.load(at, inside).to(tl.float32) * f).to(x.dtype.element_ty), inside)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor: x fp32, fp16 or bf16, contiguous or (rows, columns) with contiguous rows; factor a float scalar on x's device."""
    rows, columns, stride = (1, x.numel(), x.numel()) if x.is_contiguous() else (*x.shape, x.stride(0))
    assert x.is_contiguous() or (x.ndim == 2 and x.stride(1) == 1)
    block = WARPS * 32 * 32 // x.element_size()  # two 16-byte loads a thread
    tiles = triton.cdiv(columns, block)
    grid = (common.sm_count() * PROGRAMS_PER_SM,)
    scale_kernel[grid](x, factor, columns, stride, tiles=tiles, all_tiles=rows * tiles, BLOCK=block, num_warps=WARPS)
    torch.autograd.graph.increment_version(x)
    return x
