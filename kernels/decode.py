"""Attention of single new tokens over keys and values in blocks: the rows of one item, such as the replies to a prompt, read its blocks
together, so that the prompt's keys and values are read once for all of them.

    out[r] = softmax(q[r] K^T scale) V,   lse[r] = logsumexp(q[r] K^T scale),   K, V the item's first `tokens` keys and values

N items of up to M rows each, R rows, H query heads, K key-value heads (K divides H), D head dimension, S tokens a block, C blocks an item.
A program has the rows of an item that share a key-value head and walks over the item's blocks with an online softmax, all sums in fp32.
Two names for one program: prompt_kernel has tiles of 64 queries, which a warpgroup's matrix instruction takes; reply_kernel one tile of 16,
enough for the H / K queries of a single row.
Bytes: per item and tile tokens * 2 K D elements of keys and values; q and out once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

KIND = {"prompt_kernel": "matrix", "reply_kernel": "thin"}
LOG2E = 1.4426950408889634


@triton.jit
def read_blocks(
    out, lse, q, keys, values, rows, table, tokens, R, M, C, scale_log2, row_out, row_q, row_kv,
    SHARE: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The program of both kernels; arguments are theirs."""
    item = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    query = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(rows + item * M + query // SHARE, query < M * SHARE, -1).to(tl.int64)
    real = row >= 0
    column = tl.arange(0, BLOCK_D)
    narrow = column < D
    at = (head * SHARE + query % SHARE)[:, None] * D + column[None, :]
    mask = real[:, None] & narrow[None, :]
    x = tl.load(q + row[:, None] * row_q + at, mask, 0.0)
    count = tl.load(tokens + item)
    place = tl.arange(0, S)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, count, S):
        block = tl.load(table + item * C + start // S).to(tl.int64)
        inside = start + place < count
        base = (block * S + place)[:, None] * row_kv + head * D + column[None, :]
        held = inside[:, None] & narrow[None, :]
        k = tl.load(keys + base, held, 0.0)
        scores = tl.dot(x, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(inside[None, :], scores, float("-inf"))
        above = tl.maximum(peak, tl.max(scores, 1))  # finite: a block that is read has a token inside
        p = tl.exp2(scores - above[:, None])
        shrink = tl.exp2(peak - above)
        v = tl.load(values + base, held, 0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        peak = above
    tl.store(out + row[:, None] * row_out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask)
    tl.store(lse + (head * SHARE + query % SHARE) * R.to(tl.int64) + row, (peak + tl.log2(total)) * 0.6931471805599453, real)


@triton.jit
def prompt_kernel(
    out,  # (R, H, D)
    lse,  # (H, R) fp32
    q,  # (R, H, D)
    keys,  # (blocks, S, K, D)
    values,
    rows,  # (N, M) int32, -1 where an item has fewer
    table,  # (N, C) int32
    tokens,  # (N,) int32, at least 1
    R,
    M,
    C,
    scale_log2,  # of the scores, times log2(e)
    row_out,
    row_q,
    row_kv,  # from a token to the next
    SHARE: tl.constexpr,  # H / K
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    read_blocks(out, lse, q, keys, values, rows, table, tokens, R, M, C, scale_log2, row_out, row_q, row_kv, SHARE, S, D, BLOCK_M, BLOCK_D)


@triton.jit
def reply_kernel(
    out,  # all as above
    lse,
    q,
    keys,
    values,
    rows,
    table,
    tokens,
    R,
    M,
    C,
    scale_log2,
    row_out,
    row_q,
    row_kv,
    SHARE: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    read_blocks(out, lse, q, keys, values, rows, table, tokens, R, M, C, scale_log2, row_out, row_q, row_kv, SHARE, S, D, BLOCK_M, BLOCK_D)


def decode(q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, table: Tensor, tokens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out (R, H, D) in q's dtype and lse (H, R) fp32 for q (R, H, D), keys and values (blocks, S, K, D), rows (N, M), table (N, C) and
    tokens (N,) int32. Rows that no item has are not written. S is a power of two, at least 16; no host sync.
    """
    R, H, D = q.shape
    _, S, K, _ = keys.shape
    N, M = rows.shape
    share = H // K
    assert q.stride()[1:] == (D, 1) and keys.stride() == values.stride() and keys.stride()[1:] == (K * D, D, 1)
    assert S >= 16 and S & (S - 1) == 0, "a block is the side of a matrix product"
    out, lse = torch.empty_like(q), torch.empty(H, R, dtype=torch.float32, device=q.device)
    block_m = 64 if M * share > 16 else 16
    (prompt_kernel if block_m == 64 else reply_kernel)[(N, K, triton.cdiv(M * share, block_m))](
        out,
        lse,
        q,
        keys,
        values,
        rows,
        table,
        tokens,
        R=R,
        M=M,
        C=table.shape[1],
        scale_log2=scale * LOG2E,
        row_out=out.stride(0),
        row_q=q.stride(0),
        row_kv=K * D,
        SHARE=share,
        S=S,
        D=D,
        BLOCK_M=block_m,
        BLOCK_D=max(16, triton.next_power_of_2(D)),
        num_warps=8 if block_m == 64 and q.dtype == torch.float32 else 4,
    )
    return out, lse
