"""Several targets a row: their logits, and their share of the logits' gradient.

T rows (a chunk of them), H hidden size, V vocabulary, K targets a row, t_k the k-th.

z_k = z[t_k] of head.py's z; logp_k = (z_k - top) - log_total
dz = sum_k g_k (onehot(t_k) - p) - h p (log p + entropy) with the coefficients g (T, K) of the log-probs and h (T,) of the entropy

The softmax needs no target (head.py): `selected_logits_kernel` multiplies each row's hidden state with K rows of the weight, in fp32.
In dz all but the ones is what a row without a target has for the coefficient sum_k g_k: dlogits.py or truncated.py write it. Then
`selected_gradient_kernel` writes the targets' elements anew, whole and from fp32 logits, so that each is rounded once. Where a token
stands several times among a row's targets, each writes the same sum. `column_sum_kernel` adds dx up where a bias has a gradient.

Bytes, 16-bit inputs: selected_logits_kernel T K (2 H + 12), most of it from L2 where rows share their targets; selected_gradient_kernel
T K 18 and its K reads of each row's g and targets; column_sum_kernel T V 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from actial_fast.kernels import common
from actial_fast.kernels.head import Head, tanh

KIND = {"selected_logits_kernel": "memory", "selected_gradient_kernel": "scattered", "column_sum_kernel": "memory"}


@triton.jit(do_not_specialize=["count", "blocks"], do_not_specialize_on_alignment=["targets", "inverse_temperature", "out"])
def selected_logits_kernel(
    hidden,  # (T, H)
    weight,  # (V, H)
    bias,  # (V,) or None
    targets,  # (T, K) int64
    inverse_temperature,  # (T,) float32, or a number
    out,  # (T, K) float32: z, NaN for a target outside of [0, V)
    vocab,
    width,
    count,  # K
    blocks,  # of BLOCK_K targets in a row
    hidden_stride,
    weight_stride,
    softcap,
    HAS_CAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    target = tl.load(targets + row * count + k, k < count, -1)
    valid = (target >= 0) & (target < vocab)
    acc = tl.zeros((BLOCK_K, BLOCK_H), tl.float32)
    for first in range(0, width, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        inside = column < width
        h = tl.load(hidden + row * hidden_stride + column, inside, 0.0).to(tl.float32)
        w = tl.load(weight + target[:, None] * weight_stride + column[None, :], valid[:, None] & inside[None, :], 0.0).to(tl.float32)
        acc += w * h[None, :]
    x = tl.sum(acc, 1)
    if bias is not None:
        x += tl.load(bias + target, valid, 0.0).to(tl.float32)
    if HAS_CAP:
        x = softcap * tanh(x * (1.0 / softcap))
    inverse = tl.load(inverse_temperature + row) if ROW_TEMPERATURE else inverse_temperature
    tl.store(out + row * count + k, tl.where(valid, x * inverse, float("nan")), k < count)


@triton.jit(
    do_not_specialize=["count", "blocks"],
    do_not_specialize_on_alignment=[
        "targets",
        "chosen",
        "g_selected",
        "g_total",
        "g_entropy",
        "top",
        "log_total",
        "entropy",
        "inverse_temperature",
        "position",
    ],
)
def selected_gradient_kernel(
    dx,  # (T, V), row stride `stride`: its elements at the targets are written
    targets,  # (T, K) int64
    chosen,  # (T, K) float32: z
    g_selected,  # (T, K) float32: 0 where nothing is to be written
    g_total,  # (T,) float32: its sum
    g_entropy,  # (T,) float32, or None
    top,  # (T,) float32
    log_total,  # (T,) float32
    entropy,  # (T,) float32
    inverse_temperature,  # (T,) float32, or a number
    scale,  # (1,) float32 by which dx is stored
    position,  # (T,) int32: the row's place in dx, -1 = left out; None: every row keeps its place
    vocab,
    stride,
    count,  # K
    blocks,  # of BLOCK_K targets in a row
    softcap,
    HAS_CAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    target = tl.load(targets + row * count + k, k < count, -1)
    own = tl.load(g_selected + row * count + k, k < count, 0.0)
    g = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, count, BLOCK_K):  # a token's own coefficient, and those of its doubles
        j = first + tl.arange(0, BLOCK_K)
        other = tl.load(targets + row * count + j, j < count, -2)
        value = tl.load(g_selected + row * count + j, j < count, 0.0)
        g += tl.sum(tl.where(target[:, None] == other[None, :], value[None, :], 0.0), 1)
    inverse = tl.load(inverse_temperature + row) if ROW_TEMPERATURE else inverse_temperature
    z = tl.load(chosen + row * count + k, k < count, 0.0)
    logp = (z - tl.load(top + row)) - tl.load(log_total + row)
    p = tl.exp(logp)
    g -= tl.load(g_total + row) * p
    if g_entropy is not None:
        h = tl.load(g_entropy + row)
        g -= tl.where(h == 0, 0.0, h * p * (tl.maximum(logp, common.FAR, propagate_nan=tl.PropagateNan.ALL) + tl.load(entropy + row)))
    slope = inverse
    if HAS_CAP:
        ratio = z * (1.0 / (inverse * softcap))
        slope = inverse * (1.0 - ratio * ratio)
    # a coefficient of 0 writes nothing: what stands there already is right, and the row may be one that is left out
    to = row if position is None else tl.load(position + row).to(tl.int64)
    valid = (own != 0) & (target >= 0) & (target < vocab) & (to >= 0)
    tl.store(dx + to * stride + target, (g * slope * tl.load(scale)).to(dx.dtype.element_ty), valid)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["count"])
def column_sum_kernel(dx, out, scale, count, rows, vocab, stride, COUNTED: tl.constexpr, BLOCK_R: tl.constexpr, PART: tl.constexpr):
    """out (V,) += the sum over rows of dx (T, V) / scale, over `count` rows where they have moved together; always in one order."""
    column = tl.program_id(0) * PART + tl.arange(0, PART)
    inside = column < vocab
    n = tl.load(count) if COUNTED else rows
    total = tl.zeros((PART,), tl.float32)
    for r0 in range(0, n, BLOCK_R):
        row = r0 + tl.arange(0, BLOCK_R)
        x = tl.load(dx + row.to(tl.int64)[:, None] * stride + column[None, :], (row < n)[:, None] & inside[None, :], 0.0)
        total += tl.sum(x.to(tl.float32), 0)
    before = tl.load(out + column, inside, 0.0)
    tl.store(out + column, before + total / tl.load(scale), inside)


@dataclass(frozen=True)
class Selected:
    """Of a chunk's targets (T, K): their logits z, and the coefficients g of their log-probs, 0 where one has no gradient; g's sum over a
    row, total (T,); all float32."""

    chosen: Tensor
    g: Tensor
    total: Tensor

    @classmethod
    def of(cls, chosen: Tensor, logp: Tensor, g_logp: Tensor, truncated: bool) -> Selected:
        """From logits, log-probs and the gradient of these. A log-prob of NaN, as of a target that is no token, makes its row's gradient
        NaN; one of -inf has none, where the distribution is truncated."""
        g = torch.where(logp.isnan() & (g_logp != 0), logp, g_logp.float())
        if truncated:
            g = g.masked_fill_(logp == -torch.inf, 0)
        return cls(chosen, g.contiguous(), g.sum(1))

    def largest(self) -> Tensor:
        """(T,): each row's largest coefficient in magnitude, 0 where it has none."""
        return self.g.abs().amax(1)


def selected_logits(head: Head) -> Tensor:
    """z (T, K) float32 of the head's targets (T, K); NaN for one that is no token or, with head.parallel, that another rank has."""
    rows, count = head.targets.shape
    out = torch.empty((rows, count), dtype=torch.float32, device=head.hidden.device)
    row_temperature = isinstance(head.inverse_temperature, Tensor)
    block, blocks = _blocks(count)
    selected_logits_kernel[(rows * blocks,)](
        hidden=head.hidden,
        weight=head.weight,
        bias=head.bias,
        targets=head.targets,
        inverse_temperature=head.inverse_temperature if row_temperature else float(head.inverse_temperature),
        out=out,
        vocab=head.weight.shape[0],
        width=head.hidden.shape[1],
        count=count,
        blocks=blocks,
        hidden_stride=head.hidden.stride(0),
        weight_stride=head.weight.stride(0),
        softcap=float(head.softcap or 0.0),
        HAS_CAP=head.softcap is not None,
        ROW_TEMPERATURE=row_temperature,
        BLOCK_K=block,
        BLOCK_H=256,
        num_warps=4,
    )
    return out


def write_gradient(
    head: Head,
    selected: Selected,
    g_entropy: Tensor | None,
    statistics: tuple[Tensor, ...],
    dx: Tensor,
    dbias: Tensor | None,
    scale: Tensor,
    position: Tensor | None,
    moved: Tensor,
) -> None:
    """Writes the targets' elements of a chunk's dx (T, V), all others of which are there, and adds dx up to dbias (V,), where wanted.

    statistics: top, log_total and entropy (T,); position: the rows' places in dx, where `moved` (1,) of them have moved together.
    """
    rows, count = selected.g.shape
    top, log_total, entropy = statistics
    row_temperature = isinstance(head.inverse_temperature, Tensor)
    block, blocks = _blocks(count)
    selected_gradient_kernel[(rows * blocks,)](
        dx=dx,
        targets=head.targets,
        chosen=selected.chosen,
        g_selected=selected.g,
        g_total=selected.total,
        g_entropy=g_entropy,
        top=top,
        log_total=log_total,
        entropy=entropy,
        inverse_temperature=head.inverse_temperature if row_temperature else float(head.inverse_temperature),
        scale=scale,
        position=position,
        vocab=head.weight.shape[0],
        stride=dx.stride(0),
        count=count,
        blocks=blocks,
        softcap=float(head.softcap or 0.0),
        HAS_CAP=head.softcap is not None,
        ROW_TEMPERATURE=row_temperature,
        BLOCK_K=block,
        num_warps=1,
    )
    if dbias is not None:
        vocab = head.weight.shape[0]
        column_sum_kernel[(triton.cdiv(vocab, 256),)](
            dx, dbias, scale, moved, rows, vocab, dx.stride(0), COUNTED=position is not None, BLOCK_R=32, PART=256, num_warps=8
        )


def _blocks(count: int) -> tuple[int, int]:
    """Targets that a program takes, and how many programs a row has."""
    block = 4 if count <= 4 else 16
    return block, triton.cdiv(count, block)
