"""The gradient of the logits, in place of their scaled exponentials, and which rows have one.

T rows (a chunk of them), V vocabulary, P parts of PART vocabulary columns each. From what head.py left:

dz_v = g_logp * ([v = target] - p_v) - g_entropy * p_v * (log p_v + entropy);  dx = dz * (1 - tanh^2) / temperature;  dbias = sum_t dx

Rows whose coefficients are both 0 have a gradient of 0 whatever they hold. `compact_kernel` counts the others; `dlogits_kernel` turns
exp(z - peak) into dx in place and moves it to the front. Several targets a row: selected.py.

Bytes, 16-bit inputs: T V 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from actial_fast.kernels import common
from actial_fast.kernels.head import VECTORS, Head, Softmax, tile_for
from actial_fast.kernels.rows import compact_kernel
from actial_fast.kernels.selected import Selected, write_gradient

KIND = {"dlogits_kernel": "memory"}


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


@dataclass(frozen=True)
class Active:
    """Which rows of a chunk have a gradient, and how it is stored.

    largest, g_entropy (T,) float32: coefficients, both 0 where there is none (g_entropy None: all 0); scale (1,) float32, by which dx is
    stored. Where these rows are moved together: position (T,), source (T,) and count (1,) int32 of `compact_kernel`; else position is None.
    """

    largest: Tensor
    g_entropy: Tensor | None
    scale: Tensor
    position: Tensor | None
    source: Tensor | None
    count: Tensor

    @classmethod
    def of(cls, largest: Tensor, g_entropy: Tensor | None, dtype: torch.dtype, compact: bool) -> Active:
        """From each row's largest coefficient of a log-prob, and that of its entropy; compact: the rows move together."""
        rows, device = len(largest), largest.device
        scale, count = _loss_scale(largest, g_entropy, dtype), torch.empty(1, dtype=torch.int32, device=device)
        position = source = None
        if compact or dtype == torch.float16:  # whose scale lives on the device
            position, source = torch.empty((2, rows), dtype=torch.int32, device=device)
            compact_kernel[(1,)](largest, g_entropy, position, source, count, rows, BLOCK=1024)
        return cls(largest, g_entropy, scale, position, source, count)


def dlogits(
    head: Head,
    parts: Softmax,
    entropy: Tensor,
    g_logp: Tensor,
    g_entropy: Tensor | None,
    dbias: Tensor | None,
    compact: bool,
    selected: Selected | None,
) -> Active:
    """Turns a chunk's parts.scaled into its dx: see `head_grad.backward`. dbias (V,) float32 is added to."""
    rows, vocab = head.hidden.shape[0], head.weight.shape[0]
    tile, scaled = tile_for(head.hidden.dtype), parts.scaled
    assert scaled is not None, "the forward pass has kept it"
    if selected is None:  # NaN, as the log-prob of a target that is no token
        targets, g_logp = head.targets, torch.where(parts.chosen.isnan() & (g_logp != 0), parts.chosen, g_logp)
        active = Active.of(g_logp, g_entropy, head.hidden.dtype, compact)
    else:
        targets, g_logp = torch.full_like(head.targets[:, 0], -1), selected.total
        active = Active.of(selected.largest(), g_entropy, head.hidden.dtype, compact)
    part = tile.n // tile.parts
    row_temperature = isinstance(head.inverse_temperature, Tensor)
    dlogits_kernel[(parts.peak.shape[0],)](
        scaled=scaled,
        peak=parts.peak,
        chosen=parts.chosen,
        top=parts.top,
        log_total=parts.log_total,
        entropy=entropy,
        targets=targets,
        g_logp=g_logp,
        g_entropy=g_entropy,
        inverse_temperature=head.inverse_temperature if row_temperature else float(head.inverse_temperature),
        scale=active.scale,
        position=active.position,
        count=active.count,
        dbias=dbias if selected is None else None,
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
    if selected is not None:
        statistics = parts.top, parts.log_total, entropy
        write_gradient(head, selected, g_entropy, statistics, scaled, dbias, active.scale, active.position, active.count)
    return active


def _loss_scale(g_logp: Tensor, g_entropy: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(1,) float32 by which dx is stored: for float16 the power of two that brings the largest coefficient near 1, else 1.

    Coefficients carry the loss's normaliser: 1e-6 * p underflows float16.
    """
    if dtype != torch.float16:
        return torch.ones(1, device=g_logp.device)
    largest = g_logp.abs().nan_to_num(0.0).amax()
    if g_entropy is not None:
        largest = torch.maximum(largest, g_entropy.abs().amax())
    return torch.where(largest > 0, torch.exp2(-torch.floor(torch.log2(largest))), 1.0).clamp(2.0**-60, 2.0**60).reshape(1)
