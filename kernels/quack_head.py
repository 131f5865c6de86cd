"""The head by quack's products: what head.py and head_grad.py leave and take, from the same rows and coefficients.

T rows (a chunk of them), H hidden size, V vocabulary, P parts of PART columns. quack_gemms.py leaves per row and part a whole number of
bits k with exp(z) = e * 2^k, sum e and sum e * log2 e; with k_row = max k and S = sum over the parts of 2^(k - k_row) sum e

lse = k_row ln 2 + log S;  logp = z_target - lse;  entropy = log S - ln 2 (sum e 2^(k - k_row) (log2 e + k - k_row)) / S

Where the gradient is one of log-probs alone, p - [v = target] = 2^(k - k_row) e / S with e of the target's column put right, and quack's
products take that apart: 2^(k - k_row) on the way in (`strips`), g_logp / (temperature * S) on the way out (hidden) or in the other
operand (weight). Else, where entropies have a gradient, rows without one are to leave the products, or the chip is not sm_90, head_grad.py
goes on from the same exponentials.

Bytes beside the products: T P 12 for the parts, T V / 32 for the strip, T H 4 for the rows multiplied by their factors. Nothing of T V is
read or written but by the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from actial_fast.kernels import common, head_grad
from actial_fast.kernels.head import VECTORS, Head, Softmax
from actial_fast.kernels.head_grad import Gradients

KIND = {"join_kernel": "small", "strip_kernel": "small", "factors_kernel": "memory"}
LN2_HIGH, LN2_LOW = tl.constexpr(0.693359375), tl.constexpr(-2.1219444005469058e-4)  # the first times a whole number below 2^15 is exact
LOWEST_BITS = tl.constexpr(-100.0)  # parts further below the row's peak count as this far: nothing beside it, and finite in every product
NAMES = [*VECTORS, "bits", "log_total", "g_logp", "inverse", "factor", "top_bits"]


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=NAMES)
def join_kernel(
    bits, total, moment, chosen, inverse, top_bits, log_total, logp, entropy, rows, parts, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr
):
    """The parts of each row, (T, P), as one: top_bits = k_row, log_total = log S, logp, entropy (T,)."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.full((BLOCK_R, BLOCK_P), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    u = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    for p0 in range(0, parts, BLOCK_P):
        part = p0 + tl.arange(0, BLOCK_P)
        at = row.to(tl.int64)[:, None] * parts + part[None, :]
        mask = (part[None, :] < parts) & (row[:, None] < rows)
        m2 = tl.load(bits + at, mask, float("-inf"))
        s2 = tl.load(total + at, mask, 0.0)
        u2 = tl.load(moment + at, mask, 0.0)
        m, s, u = common.softmax_merge(m, s, u, m2, s2, u2, 1.0)
    m, s, u = common.softmax_join(m, s, u, 1.0, 1)
    log_s = tl.log(s)
    z = tl.load(chosen + row, row < rows, 0.0) * tl.load(inverse + row, row < rows, 1.0)
    value = ((z - m * LN2_HIGH) - m * LN2_LOW) - log_s
    tl.store(logp + row, tl.minimum(value, 0.0, propagate_nan=tl.PropagateNan.ALL), row < rows)
    tl.store(top_bits + row, m, row < rows)
    tl.store(log_total + row, log_s, row < rows)
    tl.store(entropy + row, tl.maximum(log_s - common.LN2 * u / s, 0.0, propagate_nan=tl.PropagateNan.ALL), row < rows)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=NAMES)
def strip_kernel(bits, top_bits, g_logp, strip, rows, parts, padded, REPEAT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr):
    """strip (REPEAT * P, padded): 2^(k - k_row) of each part, REPEAT times; 0 for rows without a gradient and beyond the last."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    active = tl.load(g_logp + row, row < rows, 0.0) != 0
    k = tl.load(bits + row.to(tl.int64)[:, None] * parts + part[None, :], active[:, None] & (part[None, :] < parts), 0.0)
    shift = tl.maximum(k - tl.load(top_bits + row, active, 0.0)[:, None], LOWEST_BITS, propagate_nan=tl.PropagateNan.ALL)
    value = tl.trans(tl.where(active[:, None], tl.exp2(shift), 0.0)).to(strip.dtype.element_ty)
    for repeat in tl.static_range(REPEAT):
        at = (part * REPEAT + repeat).to(tl.int64)[:, None] * padded + row[None, :]
        tl.store(strip + at, value, (part[:, None] < parts) & (row[None, :] < padded))


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=NAMES)
def factors_kernel(
    # inputs
    hidden,  # (T, H)
    bits,  # (T, P) float32
    top_bits,  # (T,) float32
    log_total,  # (T,) float32
    logp,  # (T,) float32
    g_logp,  # (T,) float32
    inverse,  # (T,) float32
    targets,  # (T,) int64
    # outputs
    scaled,  # (padded, V): the target's entry of each row; zeros where a row has no gradient and is not finite, and beyond the last row
    factor,  # (padded,) float32: -g_logp * inverse / S
    multiplied,  # (padded, H): hidden * factor
    # sizes
    rows,
    parts,
    vocab,
    width,
    hidden_stride,
    stride,
    # constants
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    inside = row < rows
    g = tl.load(g_logp + row, inside, 0.0)
    log_s = tl.load(log_total + row, inside, float("nan"))
    active = g != 0
    value = tl.where(active, -g * tl.load(inverse + row, inside, 1.0) * tl.exp(-log_s), 0.0)
    tl.store(factor + row, value)
    if active:
        target = tl.load(targets + row)
        if (target >= 0) & (target < vocab):
            k = tl.load(bits + row.to(tl.int64) * parts + target // PART)
            shift = tl.maximum(k - tl.load(top_bits + row), LOWEST_BITS, propagate_nan=tl.PropagateNan.ALL)
            entry = (tl.exp(tl.load(logp + row)) - 1.0) * tl.exp(log_s - shift * common.LN2)
            tl.store(scaled + row.to(tl.int64) * stride + target, entry.to(scaled.dtype.element_ty))
    elif log_s != log_s:  # what is multiplied by 0 is to be finite
        for v0 in range(0, vocab, BLOCK):
            column = v0 + tl.arange(0, BLOCK)
            tl.store(scaled + row.to(tl.int64) * stride + column, tl.zeros((BLOCK,), scaled.dtype.element_ty), column < vocab)
    read = tl.where(active, width, 0)
    for h0 in range(0, width, BLOCK):
        column = h0 + tl.arange(0, BLOCK)
        x = tl.load(hidden + row.to(tl.int64) * hidden_stride + column, column < read, 0.0).to(tl.float32)
        tl.store(multiplied + row.to(tl.int64) * width + column, (x * value).to(multiplied.dtype.element_ty), column < width)


def forward(head: Head, scaled: Tensor | None) -> tuple[Softmax, Tensor, Tensor]:
    """As `head.forward`; scaled (>= T, V), rounded up to `head.unit` rows. The peaks are bits, (T, P) and (T,), for `backward` alone."""
    from actial_fast.kernels import quack_gemms

    rows, vocab, device = head.hidden.shape[0], head.weight.shape[0], head.hidden.device
    parts = vocab // quack_gemms.PART
    bits, total, moment = torch.empty((3, rows, parts), dtype=torch.float32, device=device)
    chosen = torch.full((rows,), torch.nan, device=device)
    top_bits, log_total, logp, entropy = torch.empty((4, rows), dtype=torch.float32, device=device)
    inverse = _inverse(head)
    # quack reads an index as 32 bits, from a vector that starts at a multiple of 32 bytes
    target = torch.where((head.targets >= 0) & (head.targets < vocab), head.targets, -1)
    sums = {"bits": bits, "total": total, "moment": moment, "chosen": chosen}
    kept = None if scaled is None else scaled[:rows]
    quack_gemms.logits(head.hidden, head.weight, inverse, target, scaled=kept, **sums, major=common.capability()[0])
    join_kernel[(triton.cdiv(rows, 16),)](
        bits, total, moment, chosen, inverse, top_bits, log_total, logp, entropy, rows, parts, BLOCK_R=16, BLOCK_P=64, num_warps=4
    )
    kept = None if scaled is None else scaled[: _padded(head)]
    return Softmax(bits, top_bits, log_total, chosen * inverse, kept), logp, entropy


def backward(head: Head, parts: Softmax, entropy: Tensor, g_logp: Tensor, g_entropy: Tensor | None, out: Gradients, compact: bool) -> None:
    """As `head_grad.backward`, from what `forward` above has left."""
    if not head.strips:
        peak, top = (parts.peak.T * common.LN2.value).contiguous(), parts.top * common.LN2.value
        head_grad.backward(head, parts._replace(peak=peak, top=top), entropy, g_logp, g_entropy, out, compact)
        return
    assert g_entropy is None and not compact and out.dbias is None and parts.scaled is not None, "what strips do not carry"
    from actial_fast.kernels import quack_gemms

    (rows, width), vocab, padded = head.hidden.shape, head.weight.shape[0], _padded(head)
    scaled, inverse, device = parts.scaled, _inverse(head), head.hidden.device
    logp = ((parts.chosen - parts.top * LN2_HIGH.value) - parts.top * LN2_LOW.value) - parts.log_total
    g_logp = torch.where(logp.isnan() & (g_logp != 0), logp, g_logp)  # NaN, as the log-prob of a target that is no token
    strip = torch.empty((vocab // 64, padded), dtype=scaled.dtype, device=device)
    factor = torch.empty(padded, dtype=torch.float32, device=device)
    multiplied = torch.empty((padded, width), dtype=scaled.dtype, device=device)
    count = parts.peak.shape[1]
    strip_kernel[(triton.cdiv(padded, 64), triton.cdiv(count, 64))](
        parts.peak, parts.top, g_logp, strip, rows, count, padded, REPEAT=quack_gemms.PART // 64, BLOCK_R=64, BLOCK_P=64, num_warps=4
    )
    factors_kernel[(padded,)](
        hidden=head.hidden,
        bits=parts.peak,
        top_bits=parts.top,
        log_total=parts.log_total,
        logp=logp,
        g_logp=g_logp,
        inverse=inverse,
        targets=head.targets,
        scaled=scaled,
        factor=factor,
        multiplied=multiplied,
        rows=rows,
        parts=count,
        vocab=vocab,
        width=width,
        hidden_stride=head.hidden.stride(0),
        stride=scaled.stride(0),
        PART=quack_gemms.PART,
        BLOCK=1024,
        num_warps=4,
    )
    if out.dhidden is not None:
        whole = out.dhidden if padded == rows else torch.empty((padded, width), dtype=out.dhidden.dtype, device=device)
        quack_gemms.dhidden(scaled, strip, factor, head.weight, whole)
        if whole is not out.dhidden:
            out.dhidden.copy_(whole[:rows])
    if out.dweight is not None:
        quack_gemms.dweight(scaled, strip, multiplied, out.dweight, out.add)


def _inverse(head: Head) -> Tensor:
    """1 / temperature of each row (T,) float32."""
    inverse = head.inverse_temperature
    if isinstance(inverse, Tensor):
        return inverse.clone()  # a chunk's begins anywhere, and is to begin at a multiple of 16 bytes
    return torch.full((head.hidden.shape[0],), float(inverse), device=head.hidden.device)


def _padded(head: Head) -> int:
    return triton.cdiv(head.hidden.shape[0], head.unit) * head.unit
