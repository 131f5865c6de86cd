"""The gradient of the language-model head: two products of T x H x V, bounded by a count of rows that stays on the device.

T rows (a chunk of them), H hidden size, V vocabulary, P parts of PART vocabulary columns each. From what head.py left:

dz_v = g_logp * ([v = target] - p_v) - g_entropy * p_v * (log p_v + entropy);  dx = dz * (1 - tanh^2) / temperature
dhidden = dx @ weight;  dweight = dx.T @ hidden;  dbias = sum_t dx

Rows whose coefficients are both 0 take no part in the products, and their gradient is 0 whatever they hold: `compact_kernel` counts the
others, `dlogits_kernel` turns exp(z - peak) into dx in place and moves it to the front, `dhidden_kernel` and `dweight_kernel` stop at the
count. Where every row has a gradient (compact=False) cuBLAS does the products, with zeros for rows that have none after all.

Bytes beside the products, 16-bit inputs: T V 4 by dlogits_kernel, V H 8 for each chunk's addition to dweight, which accumulates in fp32.
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
from actial_fast.kernels.head import VECTORS, Head, Softmax, block_argument, tile_for
from actial_fast.kernels.rows import combine_kernel, compact_kernel, gather_kernel

KIND = {"dlogits_kernel": "memory", "dhidden_kernel": "matrix", "dweight_kernel": "matrix"}
SPLIT = 4  # shares of the vocabulary in dhidden_kernel: 2,048 rows make 224 tiles of 128 x 256, not enough for 132 multiprocessors


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=[*VECTORS, "g_logp", "g_entropy", "position", "count"])
def dlogits_kernel(
    # inputs
    scaled,  # (T, V): exp(z - peak), overwritten with dx * scale of the active rows, in order
    peak,  # (P, T) float32
    chosen,  # (T,) float32
    top,  # (T,) float32
    log_total,  # (T,) float32
    entropy,  # (T,) float32
    targets,  # (T,) int64
    g_logp,  # (T,) float32
    g_entropy,  # (T,) float32, or None
    inverse_temperature,  # (T,) float32, or a number
    scale,  # (1,) float32: a power of two that keeps float16 out of its subnormals
    position,  # (T,) int32, -1 = left out; None: every row keeps its place
    count,  # (1,) int32
    dbias,  # (V,) float32 that the gradient is added to, or None
    # sizes
    rows,
    vocab,
    stride,
    softcap,
    # constants
    HAS_CAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PART: tl.constexpr,
):
    part = tl.program_id(0)
    column = part * PART + tl.arange(0, PART)
    inside = column < vocab
    factor = tl.load(scale)
    # with no room beside the row to write to, one program owns PART columns of all rows and walks down: a row moves up onto rows that this
    # program has read already, and the barrier keeps warps that are ahead from writing what others have still to read in this block
    column_sum = tl.zeros((PART,), tl.float32)
    for r0 in range(0, rows, BLOCK_R):
        row = r0 + tl.arange(0, BLOCK_R)
        present = row < rows
        to = row if position is None else tl.load(position + row, present, -1)
        a = tl.load(g_logp + row, present, 0.0)
        active = a != 0
        if g_entropy is not None:
            b = tl.load(g_entropy + row, present, 0.0)
            active = active | (b != 0)
        # a row without a coefficient is not read: its gradient is 0 whatever it holds, NaN of a masked row included
        e = tl.load(scaled + row.to(tl.int64)[:, None] * stride + column[None, :], active[:, None] & inside[None, :], 0.0).to(tl.float32)
        inverse = inverse_temperature
        if ROW_TEMPERATURE:
            inverse = tl.load(inverse_temperature + row, active, 1.0)
        m = tl.load(peak + part.to(tl.int64) * rows + row, active, 0.0)
        # a part of nothing but -inf has a peak of -inf and e = 0: its offset stays finite, as 0 * inf is NaN
        shift = tl.maximum(m - tl.load(top + row, active, 0.0), common.FAR, propagate_nan=tl.PropagateNan.ALL)
        offset = shift - tl.load(log_total + row, active, 0.0)
        target = tl.load(targets + row, active, -1).to(tl.int32)  # one beyond 32 bits has a coefficient of NaN or 0, wherever it lands
        is_target = column[None, :] == target[:, None]
        a *= inverse
        # what belongs to a row stays out of the element's way: this kernel is to wait for memory alone
        p_scale = tl.exp(offset)
        dx = e * (-a * p_scale)[:, None] + tl.where(is_target, a[:, None], 0.0)
        log_e = tl.zeros_like(e)
        if HAS_CAP or g_entropy is not None:
            log_e = tl.log(tl.where(e > 0, e, 1.0))
        if g_entropy is not None:
            h = tl.load(entropy + row, active, 0.0)
            dx -= (e * (b * inverse * p_scale)[:, None]) * (log_e + (offset + h)[:, None])
        if HAS_CAP:
            z = tl.where(is_target, tl.load(chosen + row, active, 0.0)[:, None], log_e + m[:, None])
            ratio = z * (1.0 / (inverse * softcap))[:, None] if ROW_TEMPERATURE else z * (1.0 / (inverse * softcap))
            dx = dx * tl.where((e > 0) | is_target, 1.0 - ratio * ratio, 0.0)
        if dbias is not None:
            column_sum += tl.sum(dx, 0)
        if position is not None:
            tl.debug_barrier()
        mask = (present & (to >= 0))[:, None] & inside[None, :]
        tl.store(scaled + to.to(tl.int64)[:, None] * stride + column[None, :], (dx * factor).to(scaled.dtype.element_ty), mask)
    if position is not None:
        tl.debug_barrier()
        n = tl.load(count)
        pad = n + tl.arange(0, PAD)
        zero = tl.zeros((PAD, PART), scaled.dtype.element_ty)
        tl.store(
            scaled + pad.to(tl.int64)[:, None] * stride + column[None, :],
            zero,
            (pad < tl.minimum(tl.cdiv(n, PAD) * PAD, rows))[:, None] & inside[None, :],
        )
    if dbias is not None:
        before = tl.load(dbias + column, inside, 0.0)
        tl.store(dbias + column, before + column_sum, inside)


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


def backward(head: Head, parts: Softmax, entropy: Tensor, g_logp: Tensor, g_entropy: Tensor | None, out: Gradients, compact: bool) -> None:
    """The gradients of sum(g_logp * logp + g_entropy * entropy) of one chunk, one product each; consumes parts.scaled.

    entropy, g_logp (T,) float32, g_entropy too or None for 0. compact: rows whose coefficients are 0 leave the products; else cuBLAS
    does all of them.
    """
    (rows, width), vocab = head.hidden.shape, head.weight.shape[0]
    dtype, device = head.hidden.dtype, head.hidden.device
    compact = compact or dtype == torch.float16  # whose scale lives on the device
    tile, scaled = tile_for(dtype), parts.scaled
    assert scaled is not None, "the forward pass has kept it"
    scale, count = _loss_scale(g_logp, g_entropy, dtype), torch.empty(1, dtype=torch.int32, device=device)
    g_logp = torch.where(parts.chosen.isnan() & (g_logp != 0), parts.chosen, g_logp)  # NaN, as the log-prob of a target that is no token
    position = source = None
    if compact:
        position, source = torch.empty((2, rows), dtype=torch.int32, device=device)
        compact_kernel[(1,)](g_logp, g_entropy, position, source, count, rows, BLOCK=1024)
    part = tile.n // tile.parts
    row_temperature = isinstance(head.inverse_temperature, Tensor)
    dlogits_kernel[(parts.peak.shape[0],)](
        scaled=scaled,
        peak=parts.peak,
        chosen=parts.chosen,
        top=parts.top,
        log_total=parts.log_total,
        entropy=entropy,
        targets=head.targets,
        g_logp=g_logp,
        g_entropy=g_entropy,
        inverse_temperature=head.inverse_temperature if row_temperature else float(head.inverse_temperature),
        scale=scale,
        position=position,
        count=count,
        dbias=out.dbias,
        rows=rows,
        vocab=vocab,
        stride=scaled.stride(0),
        softcap=float(head.softcap or 0.0),
        HAS_CAP=head.softcap is not None,
        ROW_TEMPERATURE=row_temperature,
        PAD=tile.k,
        BLOCK_R=32,
        PART=part,
        num_warps=4,
    )
    if not compact:
        _products(head, scaled, g_logp, g_entropy, out)
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
            dx=block_argument(scaled, tile.m, tile.k, tile.tma),
            weight=block_argument(head.weight, tile.k, tile.n, tile.tma),
            partial=block_argument(partial, tile.m, part, tile.tma),
            count=count,
            rows=rows,
            padded=padded,
            vocab=vocab,
            width=width,
            dx_stride=scaled.stride(0),
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
        active = torch.empty((triton.cdiv(rows, tile.k) * tile.k, width), dtype=dtype, device=device)
        gather_kernel[(triton.cdiv(len(active), 4), triton.cdiv(width, 1024))](
            head.hidden, active, source, count, width, head.hidden.stride(0), width, PAD=tile.k, BLOCK_R=4, BLOCK_H=1024, num_warps=4
        )
        tiles = triton.cdiv(vocab, tile.m) * triton.cdiv(width, tile.n)
        dweight_kernel[(min(tiles, common.sm_count()),)](
            dx=block_argument(scaled, tile.k, tile.m, tile.tma),
            hidden=block_argument(active, tile.k, tile.n, tile.tma),
            out=block_argument(out.dweight, tile.m, part, tile.tma),
            count=count,
            scale=scale,
            rows=rows,
            vocab=vocab,
            width=width,
            dx_stride=scaled.stride(0),
            hidden_stride=width,
            out_stride=out.dweight.stride(0),
            ADD=out.add,
            **launch,
        )


def _products(head: Head, dx: Tensor, g_logp: Tensor, g_entropy: Tensor | None, out: Gradients) -> None:
    """Both products by cuBLAS. A row without a coefficient may hold NaN, which times 0 is NaN: it is multiplied as zeros."""
    if out.dhidden is not None:
        torch.mm(dx, head.weight, out=out.dhidden)
    if out.dweight is not None:
        active = g_logp != 0 if g_entropy is None else (g_logp != 0) | (g_entropy != 0)
        hidden = torch.where(active[:, None], head.hidden, 0)
        mixed: dict[str, Any] = {} if dx.dtype == torch.float32 else {"out_dtype": torch.float32}
        if out.add:
            torch.addmm(out.dweight, dx.T, hidden, out=out.dweight, **mixed)
        else:
            torch.mm(dx.T, hidden, out=out.dweight, **mixed)


def _loss_scale(g_logp: Tensor, g_entropy: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(1,) float32 by which dx is stored: for float16 the power of two that brings the largest coefficient near 1, else 1.

    Coefficients carry the loss's normaliser: 1e-6 * p underflows float16.
    """
    if dtype != torch.float16:
        return torch.ones(1, device=g_logp.device)
    largest = g_logp.abs().amax()
    if g_entropy is not None:
        largest = torch.maximum(largest, g_entropy.abs().amax())
    return torch.where(largest > 0, torch.exp2(-torch.floor(torch.log2(largest))), 1.0).clamp(2.0**-60, 2.0**60).reshape(1)
