"""The distribution that a sampler draws from, of top_k, top_p and min_p, over a chunk of logits: what it keeps, and the gradient.

T rows (a chunk of them), H hidden size, V vocabulary, K targets a row. With z of head.py, which is a product of the library's here and
stands in fp32:

kept_v = z_v >= lowest;  logp = (z_target - top) - log_total, -inf where it is not kept;  p = kept * exp((z - top) - log_total)
entropy = -sum_v p_v log p_v;  dz of dlogits.py and selected.py with these

lowest is the largest of three (`ops.reference.lowest_kept`): top + log(min_p); the k-th highest logit; the highest c for which the tokens
of z >= c have top_p of the probability of all that the first two keep. The last two are the highest c with f(c) >= wanted for an f that
falls, a count or a sum of exponentials, and are found exactly: each sweep over the row evaluates f at 7 points that cut what is left of
all floats into 8, and where the row's own logits begin and end there. At most 11 sweeps; 4 to 7 where the row is one of a language model.

A row is one program of `truncate_kernel`, `truncated_gradient_kernel` owns columns of all rows.
Bytes: T V 12 to write z, T V 4 for each sweep, most of them from L2 where the rows in flight fit; T V (4 + 2) for the gradient in 16 bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from actial_fast.kernels import common
from actial_fast.kernels.dlogits import Active
from actial_fast.kernels.head import VECTORS, Head, tanh, tile_for
from actial_fast.kernels.head_grad import Gradients, products
from actial_fast.kernels.selected import Selected, write_gradient
from actial_fast.kernels.sweeps import by_thread

KIND = {"truncate_kernel": "memory", "truncated_gradient_kernel": "memory"}
THREADS, VECTOR = 256, 4


@triton.jit
def _key(x):
    """A float's place among all floats, as a whole number."""
    i = x.to(tl.int32, bitcast=True)
    return (i ^ ((i >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _float(key):
    """The float of that place."""
    i = key.to(tl.int32)
    return (i ^ ((i >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _highest(row, padded, low, m, wanted, MASS: tl.constexpr, THREADS: tl.constexpr, LOADS: tl.constexpr, VECTOR: tl.constexpr):
    """The highest c in [low, m] for which the logits >= c are `wanted` or more or, with MASS, have that sum of exp(z - m)."""
    BLOCK: tl.constexpr = THREADS * LOADS * VECTOR
    a = _key(low)  # f(a) >= wanted
    b = _key(m) + 1  # f(b) < wanted
    while b - a > 1:
        width = b - a
        k1, k2, k3 = (a + width // 8).to(tl.int32), (a + width * 2 // 8).to(tl.int32), (a + width * 3 // 8).to(tl.int32)
        k4, k5, k6 = (a + width * 4 // 8).to(tl.int32), (a + width * 5 // 8).to(tl.int32), (a + width * 6 // 8).to(tl.int32)
        k7, begin, end = (a + width * 7 // 8).to(tl.int32), a.to(tl.int32), (b - 1).to(tl.int32)
        f1 = tl.zeros((THREADS,), tl.float32)
        f2, f3, f4, f5, f6, f7 = f1, f1, f1, f1, f1, f1
        first = tl.full((THREADS,), 2**31 - 1, tl.int32)
        last = tl.full((THREADS,), -(2**31), tl.int32)
        for start in range(0, padded, BLOCK):
            x = by_thread(tl.load(row + start + tl.arange(0, BLOCK)), THREADS, LOADS, VECTOR)
            w = tl.exp2((x - m) * common.LOG2E) if MASS else tl.full(x.shape, 1.0, tl.float32)
            key = x.to(tl.int32, bitcast=True)
            key ^= (key >> 31) & 0x7FFFFFFF
            f1 += tl.sum(tl.where(key >= k1, w, 0.0), 1)
            f2 += tl.sum(tl.where(key >= k2, w, 0.0), 1)
            f3 += tl.sum(tl.where(key >= k3, w, 0.0), 1)
            f4 += tl.sum(tl.where(key >= k4, w, 0.0), 1)
            f5 += tl.sum(tl.where(key >= k5, w, 0.0), 1)
            f6 += tl.sum(tl.where(key >= k6, w, 0.0), 1)
            f7 += tl.sum(tl.where(key >= k7, w, 0.0), 1)
            first = tl.minimum(first, tl.min(tl.where(key >= begin, key, 2**31 - 1), 1))
            last = tl.maximum(last, tl.max(tl.where(key <= end, key, -(2**31)), 1))
        enough = (tl.sum(f1, 0) >= wanted).to(tl.int64) + (tl.sum(f2, 0) >= wanted) + (tl.sum(f3, 0) >= wanted)
        enough += (tl.sum(f4, 0) >= wanted).to(tl.int64) + (tl.sum(f5, 0) >= wanted) + (tl.sum(f6, 0) >= wanted)
        enough += tl.sum(f7, 0) >= wanted  # of the 7 points: f falls
        a, b = (
            tl.maximum(a + width * enough // 8, tl.min(first, 0).to(tl.int64)),
            tl.minimum(a + width * (enough + 1) // 8, tl.max(last, 0).to(tl.int64) + 1),
        )
    return _float(a)


@triton.jit(do_not_specialize_on_alignment=[*VECTORS, "lowest"])
def truncate_kernel(
    z,  # (T, padded): hidden @ weight.T, overwritten with z, beyond V with -inf
    bias,  # (V,) or None
    inverse_temperature,  # (T,) float32, or a number
    top,  # (T,) float32, out: the highest z
    log_total,  # (T,) float32, out: log of the sum of exp(z - top) over what is kept
    entropy,  # (T,) float32, out
    lowest,  # (T,) float32, out: the lowest z that is kept
    vocab,
    padded,  # V rounded up to whole blocks: sweeps need no mask
    softcap,
    top_k,
    top_p,
    log_min_p,
    reach,  # log of the share of the peak below which all of V together are within 1 - top_p
    HAS_CAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    THREADS: tl.constexpr,
    LOADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    row = z + t * padded
    inverse = tl.load(inverse_temperature + t) if ROW_TEMPERATURE else inverse_temperature
    BLOCK: tl.constexpr = THREADS * LOADS * VECTOR
    peaks = tl.full((THREADS,), float("-inf"), tl.float32)
    for start in range(0, padded, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(row + column, column < vocab, 0.0)
        if bias is not None:
            x += tl.load(bias + column, column < vocab, 0.0).to(tl.float32)
        if HAS_CAP:
            x = softcap * tanh(x * (1.0 / softcap))
        x = tl.where(column < vocab, x * inverse, float("-inf"))
        tl.store(row + column, x)
        peaks = tl.maximum(peaks, tl.max(by_thread(x, THREADS, LOADS, VECTOR), 1))
    tl.debug_barrier()
    m = tl.max(peaks, 0)
    border = m + log_min_p if MIN_P else float("-inf")
    if TOP_K:
        # as many threads as tokens are looked for have one that is not below the lowest of their peaks
        low = tl.where(top_k <= THREADS, tl.min(peaks, 0), float("-inf"))
        border = tl.maximum(border, _highest(row, padded, low, m, top_k, False, THREADS, LOADS, VECTOR))
    if TOP_P:
        total = tl.zeros((THREADS,), tl.float32)
        for start in range(0, padded, BLOCK):
            x = by_thread(tl.load(row + start + tl.arange(0, BLOCK)), THREADS, LOADS, VECTOR)
            total += tl.sum(tl.where(x >= border, tl.exp2((x - m) * common.LOG2E), 0.0), 1)
        low = tl.maximum(border, m + reach)
        border = _highest(row, padded, low, m, top_p * tl.sum(total, 0), True, THREADS, LOADS, VECTOR)
    s = tl.zeros((THREADS,), tl.float32)
    u = tl.zeros((THREADS,), tl.float32)
    for start in range(0, padded, BLOCK):
        x = by_thread(tl.load(row + start + tl.arange(0, BLOCK)), THREADS, LOADS, VECTOR)
        power = common.exponents(x, m, common.LOG2E)
        e = tl.where(x < border, 0.0, tl.exp2(power))  # NaN is in
        s += tl.sum(e, 1)
        u += tl.sum(e * power, 1)
    total_s = tl.sum(s, 0)
    log_s = tl.log(total_s)
    h = log_s - common.LN2 * tl.sum(u, 0) / total_s
    tl.store(top + t, m)
    tl.store(log_total + t, log_s)
    tl.store(entropy + t, tl.where(h < 0, 0.0, h))
    tl.store(lowest + t, border + (log_s - log_s))  # NaN in a row of NaN: all of it is kept


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=[*VECTORS, "lowest", "largest", "g_total", "g_entropy", "position"])
def truncated_gradient_kernel(
    z,  # (T, V), row stride `stride`: of truncate_kernel
    out,  # (T, V), row stride `out_stride`: dx * scale; may be z where all rows keep their place
    top,  # (T,) float32
    log_total,  # (T,) float32
    entropy,  # (T,) float32
    lowest,  # (T,) float32
    largest,  # (T,) float32: not 0 where the row's log-probs have a gradient
    g_total,  # (T,) float32: the sum of their coefficients
    g_entropy,  # (T,) float32, or None
    inverse_temperature,  # (T,) float32, or a number
    scale,  # (1,) float32
    position,  # (T,) int32, -1 = left out; None: every row keeps its place
    count,  # (1,) int32
    rows,
    vocab,
    stride,
    out_stride,
    softcap,
    HAS_CAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PART: tl.constexpr,
):
    """The gradient but for the targets' ones, which selected_gradient_kernel writes."""
    column = tl.program_id(0) * PART + tl.arange(0, PART)
    inside = column < vocab
    factor = tl.load(scale)
    for r0 in range(0, rows, BLOCK_R):
        row = r0 + tl.arange(0, BLOCK_R)
        present = row < rows
        to = row if position is None else tl.load(position + row, present, -1)
        active = tl.load(largest + row, present, 0.0) != 0
        if g_entropy is not None:
            b = tl.load(g_entropy + row, present, 0.0)
            active = active | (b != 0)
        # a row without a coefficient is not read: its gradient is 0 whatever it holds
        x = tl.load(z + row.to(tl.int64)[:, None] * stride + column[None, :], active[:, None] & inside[None, :], float("-inf"))
        inverse = inverse_temperature
        if ROW_TEMPERATURE:
            inverse = tl.load(inverse_temperature + row, active, 1.0)
        a = tl.load(g_total + row, active, 0.0)
        logp = (x - tl.load(top + row, active, 0.0)[:, None]) - tl.load(log_total + row, active, 0.0)[:, None]
        p = tl.where(x < tl.load(lowest + row, active, 0.0)[:, None], 0.0, tl.exp(logp))
        dx = p * (-a * inverse)[:, None]
        if g_entropy is not None:
            h = tl.load(entropy + row, active, 0.0)
            bounded = tl.maximum(logp, common.FAR, propagate_nan=tl.PropagateNan.ALL)  # 0 * -inf would be NaN
            dx -= p * (b * inverse)[:, None] * (bounded + h[:, None])
        if HAS_CAP:
            ratio = x * (1.0 / (inverse * softcap))[:, None] if ROW_TEMPERATURE else x * (1.0 / (inverse * softcap))
            dx = tl.where(p == 0, 0.0, dx * (1.0 - ratio * ratio))
        mask = (present & (to >= 0))[:, None] & inside[None, :]
        tl.store(out + to.to(tl.int64)[:, None] * out_stride + column[None, :], (dx * factor).to(out.dtype.element_ty), mask)
    if position is not None:
        n = tl.load(count)
        pad = n + tl.arange(0, PAD)
        zero = tl.zeros((PAD, PART), out.dtype.element_ty)
        mask = (pad < tl.minimum(tl.cdiv(n, PAD) * PAD, rows))[:, None] & inside[None, :]
        tl.store(out + pad.to(tl.int64)[:, None] * out_stride + column[None, :], zero, mask)


def padded_vocab(vocab: int) -> int:
    """Columns of a row of logits in the workspace: whole blocks of truncate_kernel."""
    block = THREADS * VECTOR * _loads(vocab)
    return triton.cdiv(vocab, block) * block


def _loads(vocab: int) -> int:
    return 4 if vocab > 16384 else 1


def forward(head: Head, room: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """One product: statistics (top, log_total, entropy, lowest, each (T,)), z and log-probs of the head's targets (T, K), all float32.

    room (>= T, padded_vocab(V)) float32 receives z. A target outside of [0, V) is not read, its z and log-prob are NaN.
    """
    rows, vocab, kept = head.hidden.shape[0], head.weight.shape[0], head.kept
    assert kept is not None and not head.parallel, "else head.py and selected.py know the way"
    z = room[:rows]
    mixed = {} if head.hidden.dtype == torch.float32 else {"out_dtype": torch.float32}
    torch.mm(head.hidden, head.weight.T, out=z[:, :vocab], **mixed)
    statistics = torch.empty((4, rows), dtype=torch.float32, device=z.device).unbind()
    row_temperature = isinstance(head.inverse_temperature, Tensor)
    truncate_kernel[(rows,)](
        z,
        head.bias,
        head.inverse_temperature if row_temperature else float(head.inverse_temperature),
        *statistics,
        vocab=vocab,
        padded=z.stride(0),
        softcap=float(head.softcap or 0.0),
        top_k=float(kept.top_k),
        top_p=kept.top_p,
        log_min_p=math.log(kept.min_p) if kept.min_p else 0.0,
        reach=math.log((1 - kept.top_p) / (2 * vocab)) if kept.top_p < 1 else 0.0,
        HAS_CAP=head.softcap is not None,
        ROW_TEMPERATURE=row_temperature,
        TOP_K=kept.top_k > 0,
        TOP_P=kept.top_p < 1,
        MIN_P=kept.min_p > 0,
        THREADS=THREADS,
        LOADS=_loads(vocab),
        VECTOR=VECTOR,
        num_warps=THREADS // 32,
    )
    top, log_total, _, lowest = (x[:, None] for x in statistics)
    valid = (head.targets >= 0) & (head.targets < vocab)
    chosen = torch.where(valid, z.gather(1, torch.where(valid, head.targets, 0)), torch.nan)
    logp = torch.where(chosen < lowest, -torch.inf, ((chosen - top) - log_total).clamp(max=0))
    return statistics, chosen, logp


def backward(
    head: Head,
    statistics: tuple[Tensor, ...],
    selected: Selected,
    g_entropy: Tensor | None,
    room: Tensor,
    dx: Tensor,
    out: Gradients,
) -> None:
    """The gradients of one chunk from what `forward` left in `room`: dx (>= T, V) of the inputs' dtype takes that of the logits, which for
    float32 may be the same memory."""
    (rows, _), vocab, dtype = head.hidden.shape, head.weight.shape[0], head.hidden.dtype
    dx, tile, part = dx[:rows], tile_for(dtype), 128
    active = Active.of(selected.largest(), g_entropy, dtype, compact=False)
    row_temperature = isinstance(head.inverse_temperature, Tensor)
    truncated_gradient_kernel[(triton.cdiv(vocab, part),)](
        room,
        dx,
        *statistics,
        largest=active.largest,
        g_total=selected.total,
        g_entropy=g_entropy,
        inverse_temperature=head.inverse_temperature if row_temperature else float(head.inverse_temperature),
        scale=active.scale,
        position=active.position,
        count=active.count,
        rows=rows,
        vocab=vocab,
        stride=room.stride(0),
        out_stride=dx.stride(0),
        softcap=float(head.softcap or 0.0),
        HAS_CAP=head.softcap is not None,
        ROW_TEMPERATURE=row_temperature,
        PAD=tile.k,
        BLOCK_R=32,
        PART=part,
        num_warps=4,
    )
    write_gradient(head, selected, g_entropy, statistics[:3], dx, out.dbias, active.scale, active.position, active.count)
    products(head, dx, active, out)
