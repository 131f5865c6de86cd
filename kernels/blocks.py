"""Blocks of matrices as the products of the head have them: where a tile lies, how blocks are loaded, stored and taken apart."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_place(tile, tiles_m, tiles_n, group):
    """Row and column of a tile. Rows run fastest, within groups of `group` tiles of rows: a group of hidden states stays in L2 while the
    weights stream by, once for each group. Numbers past the last tile get a row >= 0 too."""
    first = tile // (group * tiles_n) * group
    height = tl.maximum(tl.minimum(group, tiles_m - first), 1)
    within = tile - first * tiles_n
    return first + within % height, within // height


@triton.jit
def load_block(x, r0, c0, rows, columns, stride, TMA: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """A block of a matrix, zeros outside of it: x is a descriptor with TMA, else a pointer."""
    if TMA:
        return x.load([r0, c0])
    else:
        r = r0 + tl.arange(0, BLOCK_R)
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (r[:, None] < rows) & (c[None, :] < columns)
        return tl.load(x + r.to(tl.int64)[:, None] * stride + c[None, :], mask, 0.0)


@triton.jit
def store_block(x, value, r0, c0, rows, columns, stride, TMA: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Stores a block of a matrix, nothing outside of it: x is a descriptor with TMA, else a pointer."""
    if TMA:
        x.store([r0, c0], value)
    else:
        r = r0 + tl.arange(0, BLOCK_R)
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (r[:, None] < rows) & (c[None, :] < columns)
        tl.store(x + r.to(tl.int64)[:, None] * stride + c[None, :], value, mask)


@triton.jit
def load_target(targets, row, mask, vocab):
    """The rows' targets (int64 in memory) as int32; -1 for one outside of the vocabulary, beyond 32 bits too, and outside of the mask."""
    target = tl.load(targets + row, mask, -1)
    return tl.where((target >= 0) & (target < vocab), target, -1).to(tl.int32)


@triton.jit
def column_part(x, part: tl.constexpr, PARTS: tl.constexpr):
    """The part-th of PARTS (1 or 2) column blocks of accumulators; two where the whole and its exponential outgrow the registers."""
    if PARTS == 1:
        return x
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
        return left if part == 0 else right
