"""A gradient that was computed early meets the upstream gradient, a scalar on the device, without a sync: x * factor.

`scale_` works in place: nothing beyond the factor is read where it is 1, else x is read and written once. `scaled` leaves x as it is and
writes another tensor, of another dtype where wanted: x is read once, and the result written once.
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
    out,  # (rows, columns), row stride `out_stride`; may be x
    factor,  # scalar float
    columns,
    stride,
    out_stride,
    tiles,  # of a row
    all_tiles,
    INPLACE: tl.constexpr,  # out is x: there is nothing to do for a factor of 1
    BLOCK: tl.constexpr,
):
    f = tl.load(factor).to(tl.float32)
    if (not INPLACE) | (f != 1.0):
        # a grid of the chip's size and not of x's: with a factor of 1 nothing but the launch is paid
        for tile in range(tl.program_id(0).to(tl.int64), all_tiles, tl.num_programs(0)):
            column = (tile % tiles) * BLOCK + tl.arange(0, BLOCK)
            inside = column < columns
            value = tl.load(x + (tile // tiles) * stride + column, inside).to(tl.float32) * f
            tl.store(out + (tile // tiles) * out_stride + column, value.to(out.dtype.element_ty), inside)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor: x fp32, fp16 or bf16, contiguous or (rows, columns) with contiguous rows; factor a float scalar on x's device."""
    _launch(x, x, factor)
    torch.autograd.graph.increment_version(x)
    return x


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor as a new contiguous tensor of another of these dtypes, or of the same; x and factor as for `scale_`."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(x, out, factor)
    return out


def upstream_scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor in that dtype, for a backward pass: in x's own memory where no other pass over the graph will want it."""
    if x.dtype != dtype or torch._C._autograd._get_current_graph_task_keep_graph():  # retain_graph=True
        return scaled(x, factor, dtype)
    return scale_(x, factor)


def _launch(x: Tensor, out: Tensor, factor: Tensor) -> None:
    whole = x.is_contiguous() and out.is_contiguous()
    rows, columns = (1, x.numel()) if whole else x.shape
    assert whole or (x.ndim == 2 and x.stride(1) == 1)
    block = WARPS * 32 * 32 // x.element_size()  # two 16-byte loads a thread
    tiles = triton.cdiv(columns, block)
    scale_kernel[(common.sm_count() * PROGRAMS_PER_SM,)](
        x,
        out,
        factor,
        columns,
        columns if whole else x.stride(0),
        columns if whole else out.stride(0),
        tiles=tiles,
        all_tiles=rows * tiles,
        INPLACE=out is x,
        BLOCK=block,
        num_warps=WARPS,
    )
