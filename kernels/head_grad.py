"""The gradient of the language-model head: two products of T x H x V, bounded by a count of rows that stays on the device.

T rows (a chunk of them), H hidden size, V vocabulary. From dx (T, V), the gradient of the logits (dlogits.py, truncated.py):

dhidden = dx @ weight;  dweight = dx.T @ hidden

Rows without a gradient take no part in the products: `dhidden_kernel` and `dweight_kernel` stop at the count of the others. Where every
row has a gradient (compact=False) cuBLAS does the products, with zeros for rows that have none after all.

Bytes beside the products, 16-bit inputs: V H 8 for each chunk's addition to dweight, which accumulates in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from actial_fast.kernels import common
from actial_fast.kernels.blocks import column_part, load_block, store_block
from actial_fast.kernels.dlogits import Active, dlogits
from actial_fast.kernels.head import Head, Softmax, block_argument, tile_for
from actial_fast.kernels.rows import combine_kernel, gather_kernel
from actial_fast.kernels.selected import Selected

KIND = {"dhidden_kernel": "matrix", "dweight_kernel": "matrix"}
SPLIT = 4  # shares of the vocabulary in dhidden_kernel: 2,048 rows make 224 tiles of 128 x 256, not enough for 132 multiprocessors


@triton.jit(do_not_specialize=["rows", "padded"])
def dhidden_kernel(
    dx,  # (T, V), blocks (BLOCK_M, BLOCK_K); this, weight and partial are descriptors with TMA, else pointers
    weight,  # (V, H), blocks (BLOCK_K, BLOCK_N)
    partial,  # (SPLIT * T padded, H) float32, blocks (BLOCK_M, BLOCK_N / PARTS)
    count,  # (1,) int32
    rows,
    padded,  # rows of one share of `partial`: T rounded up to a multiple of BLOCK_M
    vocab,
    width,
    dx_stride,
    weight_stride,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[s] = dx[:count] @ weight over the s-th share of the vocabulary: few output tiles would leave multiprocessors idle."""
    tiles_m = tl.cdiv(tl.load(count), BLOCK_M)
    tiles_n = tl.cdiv(width, BLOCK_N)
    share = tl.cdiv(tl.cdiv(vocab, BLOCK_K), SPLIT) * BLOCK_K
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n * SPLIT, tl.num_programs(0), flatten=not SPECIALIZE):
        s = tile // (tiles_m * tiles_n)
        m0 = (tile % tiles_m) * BLOCK_M
        n0 = (tile // tiles_m) % tiles_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in tl.range(s * share, tl.minimum((s + 1) * share, vocab), BLOCK_K, warp_specialize=SPECIALIZE):
            a = load_block(dx, m0, k0, rows, vocab, dx_stride, TMA, BLOCK_M, BLOCK_K)
            b = load_block(weight, k0, n0, vocab, width, weight_stride, TMA, BLOCK_K, BLOCK_N)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        for part in tl.static_range(PARTS):
            store_block(
                partial,
                column_part(acc, part, PARTS),
                s * padded + m0,
                n0 + part * (BLOCK_N // PARTS),
                SPLIT * padded,
                width,
                width,
                TMA,
                BLOCK_M,
                BLOCK_N // PARTS,
            )


@triton.jit(do_not_specialize=["rows"])
def dweight_kernel(
    dx,  # (T, V), blocks (BLOCK_K, BLOCK_M); this, hidden and out are descriptors with TMA, else pointers
    hidden,  # (T, H), blocks (BLOCK_K, BLOCK_N): the active rows, zeros up to a multiple of BLOCK_K
    out,  # (V, H) float32, blocks (BLOCK_M, BLOCK_N / PARTS)
    count,  # (1,) int32
    scale,  # (1,) float32
    rows,
    vocab,
    width,
    dx_stride,
    hidden_stride,
    out_stride,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out (+)= dx[:count].T @ hidden[:count] / scale."""
    n = tl.load(count)
    inverse = 1.0 / tl.load(scale)
    tiles_n = tl.cdiv(width, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(vocab, BLOCK_M) * tiles_n, tl.num_programs(0), flatten=not SPECIALIZE):
        # columns of hidden run fastest: a block of dx is read once and shared
        m0 = (tile // tiles_n) * BLOCK_M
        n0 = (tile % tiles_n) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in tl.range(0, n, BLOCK_K, warp_specialize=SPECIALIZE):
            a = load_block(dx, k0, m0, rows, vocab, dx_stride, TMA, BLOCK_K, BLOCK_M)
            b = load_block(hidden, k0, n0, rows, width, hidden_stride, TMA, BLOCK_K, BLOCK_N)
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        for part in tl.static_range(PARTS):
            value = column_part(acc, part, PARTS) * inverse
            c0 = n0 + part * (BLOCK_N // PARTS)
            if ADD and TMA:
                out.atomic_add([m0, c0], value)  # in L2: a block has one program, so that the sum has one order
            else:
                if ADD:
                    value += load_block(out, m0, c0, vocab, width, out_stride, TMA, BLOCK_M, BLOCK_N // PARTS)
                store_block(out, value, m0, c0, vocab, width, out_stride, TMA, BLOCK_M, BLOCK_N // PARTS)


@dataclass(frozen=True)
class Gradients:
    """Where a chunk's gradients go; None = not wanted. `add` says whether dweight already holds something to add to."""

    dhidden: Tensor | None  # (T, H) of the inputs' dtype, zeros where nothing is written
    dweight: Tensor | None  # (V, H) float32
    dbias: Tensor | None  # (V,) float32, added to
    add: bool


def backward(
    head: Head,
    parts: Softmax,
    entropy: Tensor,
    g_logp: Tensor,
    g_entropy: Tensor | None,
    out: Gradients,
    compact: bool,
    selected: Selected | None = None,
) -> None:
    """The gradients of sum(g_logp * logp + g_entropy * entropy) of one chunk, one product each; consumes parts.scaled.

    entropy, g_logp (T,) float32, g_entropy too or None for 0. compact: rows whose coefficients are 0 leave the products; else cuBLAS
    does all of them. selected: several targets a row, head.targets (T, K), with coefficients of their own instead of g_logp.
    """
    active = dlogits(head, parts, entropy, g_logp, g_entropy, out.dbias, compact, selected)
    assert parts.scaled is not None, "the forward pass has kept it"
    products(head, parts.scaled, active, out)


def products(head: Head, dx: Tensor, active: Active, out: Gradients) -> None:
    """The gradients of hidden states and weight from dx (T, V), that of the logits, as `active` says that it is stored."""
    (rows, width), vocab = head.hidden.shape, head.weight.shape[0]
    dtype, device, tile = head.hidden.dtype, head.hidden.device, tile_for(head.hidden.dtype)
    count, scale, source, part = active.count, active.scale, active.source, tile.n // tile.parts
    if source is None:
        _dense_products(head, dx, active, out)
        return
    blocks = {
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "TMA": tile.tma,
        "SPECIALIZE": tile.specialize,
        "PARTS": tile.parts,
        "PRECISION": head.precision,
    }
    launch = blocks | {"num_warps": tile.warps, "num_stages": tile.stages}
    if out.dhidden is not None:
        padded = triton.cdiv(rows, tile.m) * tile.m
        partial = torch.empty((SPLIT * padded, width), dtype=torch.float32, device=device)
        tiles = padded // tile.m * triton.cdiv(width, tile.n) * SPLIT
        dhidden_kernel[(min(tiles, common.sm_count()),)](
            dx=block_argument(dx, tile.m, tile.k, tile.tma),
            weight=block_argument(head.weight, tile.k, tile.n, tile.tma),
            partial=block_argument(partial, tile.m, part, tile.tma),
            count=count,
            rows=rows,
            padded=padded,
            vocab=vocab,
            width=width,
            dx_stride=dx.stride(0),
            weight_stride=head.weight.stride(0),
            SPLIT=SPLIT,
            **launch,
        )
        combine_kernel[(triton.cdiv(rows, 4), triton.cdiv(width, 1024))](
            partial,
            out.dhidden,
            source,
            count,
            scale,
            padded,
            width,
            out.dhidden.stride(0),
            SPLIT=SPLIT,
            BLOCK_R=4,
            BLOCK_H=1024,
            num_warps=4,
        )
    if out.dweight is not None:
        together = torch.empty((triton.cdiv(rows, tile.k) * tile.k, width), dtype=dtype, device=device)
        gather_kernel[(triton.cdiv(len(together), 4), triton.cdiv(width, 1024))](
            head.hidden, together, source, count, width, head.hidden.stride(0), width, PAD=tile.k, BLOCK_R=4, BLOCK_H=1024, num_warps=4
        )
        tiles = triton.cdiv(vocab, tile.m) * triton.cdiv(width, tile.n)
        dweight_kernel[(min(tiles, common.sm_count()),)](
            dx=block_argument(dx, tile.k, tile.m, tile.tma),
            hidden=block_argument(together, tile.k, tile.n, tile.tma),
            out=block_argument(out.dweight, tile.m, part, tile.tma),
            count=count,
            scale=scale,
            rows=rows,
            vocab=vocab,
            width=width,
            dx_stride=dx.stride(0),
            hidden_stride=width,
            out_stride=out.dweight.stride(0),
            ADD=out.add,
            **launch,
        )


def _dense_products(head: Head, dx: Tensor, rows: Active, out: Gradients) -> None:
    """Both products by cuBLAS. A row without a coefficient may hold NaN, which times 0 is NaN: it is multiplied as zeros."""
    if out.dhidden is not None:
        torch.mm(dx, head.weight, out=out.dhidden)
    if out.dweight is not None:
        active = rows.largest != 0 if rows.g_entropy is None else (rows.largest != 0) | (rows.g_entropy != 0)
        hidden = torch.where(active[:, None], head.hidden, 0)
        mixed: dict[str, Any] = {} if dx.dtype == torch.float32 else {"out_dtype": torch.float32}
        if out.add:
            torch.addmm(out.dweight, dx.T, hidden, out=out.dweight, **mixed)
        else:
            torch.mm(dx.T, hidden, out=out.dweight, **mixed)
