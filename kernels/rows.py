"""Rows that have a gradient, moved together and back, their number known to the device alone.

T rows, H hidden size. Bytes: gather_kernel 2 C H, combine_kernel (4 SPLIT + 2) C H for C rows of 16-bit inputs; the other is a prefix sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

KIND = {"compact_kernel": "small", "gather_kernel": "memory", "combine_kernel": "memory"}


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["g_logp", "g_entropy", "position", "source"])
def compact_kernel(g_logp, g_entropy, position, source, count, rows, BLOCK: tl.constexpr):
    """Numbers the rows whose coefficients are not both 0: position (T,) int32 (-1 = left out), source (T,) its inverse, count (1,)."""
    found = 0
    for r0 in range(0, rows, BLOCK):
        row = r0 + tl.arange(0, BLOCK)
        active = tl.load(g_logp + row, row < rows, 0.0) != 0
        if g_entropy is not None:
            active = active | (tl.load(g_entropy + row, row < rows, 0.0) != 0)
        place = found + tl.cumsum(active.to(tl.int32), 0) - 1
        tl.store(position + row, tl.where(active, place, -1), row < rows)
        tl.store(source + place, row, active)
        found += tl.sum(active.to(tl.int32), 0)
    tl.store(count, found)


@triton.jit(do_not_specialize_on_alignment=["source"])
def gather_kernel(x, out, source, count, width, stride_x, stride_out, PAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr):
    """out[i] = x[source[i]] for i < count, then zeros up to a multiple of PAD rows."""
    n = tl.load(count)
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(0) * BLOCK_R < tl.cdiv(n, PAD) * PAD:
        row = tl.load(source + i, i < n, 0).to(tl.int64)
        column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        inside = column[None, :] < width
        value = tl.load(x + row[:, None] * stride_x + column[None, :], (i < n)[:, None] & inside, 0.0)
        tl.store(out + i.to(tl.int64)[:, None] * stride_out + column[None, :], value, (i < tl.cdiv(n, PAD) * PAD)[:, None] & inside)


@triton.jit(do_not_specialize=["padded"], do_not_specialize_on_alignment=["source"])
def combine_kernel(
    partial,  # (SPLIT, T padded, H) float32
    out,  # (T, H)
    source,  # (T,) int32
    count,  # (1,) int32
    scale,  # (1,) float32
    padded,
    width,
    stride,
    SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out[source[i]] = sum_s partial[s, i] / scale for i < count: the shares in a fixed order, so that a row's sum never varies."""
    n = tl.load(count)
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(0) * BLOCK_R < n:
        column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (i < n)[:, None] & (column < width)[None, :]
        acc = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
        for s in tl.static_range(SPLIT):
            row = (s * padded + i).to(tl.int64)
            acc += tl.load(partial + row[:, None] * width + column[None, :], mask, 0.0)
        to = tl.load(source + i, i < n, 0).to(tl.int64)
        acc = acc / tl.load(scale)
        tl.store(out + to[:, None] * stride + column[None, :], acc.to(out.dtype.element_ty), mask)
