"""Two attentions of the same queries over disjoint keys, made one in place: out and lse of the first become those over all keys.

    lse = log(exp(lse_a) + exp(lse_b)),   out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

S rows, H heads, D head dimension. The weights are 1 / (1 + e) and e / (1 + e) with e = exp(-|lse_a - lse_b|): nothing overflows. All
arithmetic is fp32.
Bytes: S * H * (6 D + 12) with 16-bit out, two read and one written of both out and lse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

KIND = {"merge_kernel": "memory"}
WARPS = 4


@triton.jit
def merge_kernel(
    out_a,  # (S, H, D), overwritten
    lse_a,  # (H, S) fp32, overwritten
    out_b,  # (S, H, D)
    lse_b,  # (H, S) fp32
    S,
    H,
    row_a,
    head_a,
    row_b,
    head_b,
    lse_head_a,
    lse_head_b,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # (row, head): neighbours are neighbours in out
    row, head = pair // H, pair % H
    inside = row < S
    a = tl.load(lse_a + head * lse_head_a + row, inside, 0.0)
    b = tl.load(lse_b + head * lse_head_b + row, inside, 0.0)
    column = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (column < D)[None, :]
    at = out_a + (row * row_a + head * head_a)[:, None] + column[None, :]
    x = tl.load(at, mask, 0.0).to(tl.float32)
    y = tl.load(out_b + (row * row_b + head * head_b)[:, None] + column[None, :], mask, 0.0).to(tl.float32)
    less = tl.exp(-tl.abs(a - b))
    more = 1.0 / (1.0 + less)
    weight_a, weight_b = tl.where(a >= b, more, less * more), tl.where(a >= b, less * more, more)
    merged = weight_a[:, None] * x + weight_b[:, None] * y
    tl.store(at, merged.to(out_a.dtype.element_ty), mask)
    tl.debug_barrier()  # several warps load one lse, and one may be late
    tl.store(lse_a + head * lse_head_a + row, tl.maximum(a, b) + tl.log(1.0 + less), inside)


def merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Folds part (S, H, D), part_lse (H, S) into out (S, H, D), lse (H, S), in place and in one launch.

    out, part fp32, fp16 or bf16 with contiguous heads' rows; lse fp32 with contiguous rows; views are fine.
    """
    S, H, D = out.shape
    assert out.stride(2) == part.stride(2) == lse.stride(1) == part_lse.stride(1) == 1 and lse.dtype == part_lse.dtype == torch.float32
    block_d = triton.next_power_of_2(D)
    block_p = max(1, WARPS * 32 * 16 // out.element_size() // block_d)  # 16 bytes a thread
    merge_kernel[(triton.cdiv(S * H, block_p),)](
        out,
        lse,
        part,
        part_lse,
        S=S,
        H=H,
        row_a=out.stride(0),
        head_a=out.stride(1),
        row_b=part.stride(0),
        head_b=part.stride(1),
        lse_head_a=lse.stride(0),
        lse_head_b=part_lse.stride(0),
        D=D,
        BLOCK_P=block_p,
        BLOCK_D=block_d,
        num_warps=WARPS,
    )
