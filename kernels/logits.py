"""Log-prob, entropy and the GRPO loss from logits that somebody already holds, forward and backward.

T rows, V vocabulary. With z = logits / temperature, m the largest logit, z_m = m / temperature, s = sum_v exp(z_v - z_m):

forward    logp = (z_target - z_m) - log s;  entropy = log s - sum_v p_v (z_v - z_m);  p = exp((z - z_m) - log s)
backward   dlogits_v = (g_logp ([v = target] - p_v) - g_entropy p_v (log p_v + entropy)) / temperature

z_m and log s are kept apart: their sum would lose log s where logits are large. Everything is fp32 from the load on; a row is one program.
These kernels are close to the rate at which instructions issue: what belongs to a row is worked out before its elements, and the target's 1
is added to its one element afterwards.

`logprob_kernel` reads the logits once, `gradient_kernel` reads and writes them once. `grpo_logits_kernel` is both with the loss between: it
reads a row, forms loss and coefficients, and goes back over the row from its end, which is still in the L2 cache. Rows whose coefficients
are both 0 (masked, clipped, no advantage) get a gradient of 0 without being read.
Bytes: T V (1 + 2) elements from HBM, of which the loss in one launch saves up to T V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from actial_fast.kernels import common
from actial_fast.kernels.objective import grpo_rows
from actial_fast.kernels.objective_math import STATS, arguments, token_objective
from actial_fast.kernels.scale import scale_

KIND = {"logprob_kernel": "memory", "gradient_kernel": "memory", "grpo_logits_kernel": "memory"}


@dataclass(frozen=True)
class Launch:
    """Launch configuration: warps a row and how many 16-byte loads each thread has in flight."""

    warps: int
    loads: int

    def block(self, dtype: torch.dtype) -> dict[str, int]:
        vector = 16 // dtype.itemsize
        return {"THREADS": self.warps * 32, "LOADS": self.loads, "VECTOR": vector, "num_warps": self.warps}


SWEEP = Launch(warps=8, loads=4)  # one pass over a row: several rows share a multiprocessor
TWO_SWEEPS = Launch(warps=32, loads=4)  # a row a multiprocessor: all rows in flight fit into the L2 cache until they are read again


@triton.jit
def _row_softmax(row, vocab, inverse, THREADS: tl.constexpr, LOADS: tl.constexpr, VECTOR: tl.constexpr):
    """m, log s and entropy of one row, from a pointer to it. Threads keep sums of their own, so that nothing waits before the row's end."""
    step = inverse * common.LOG2E
    m = tl.full((THREADS,), float("-inf"), tl.float32)
    s = tl.zeros((THREADS,), tl.float32)
    u = tl.zeros((THREADS,), tl.float32)
    BLOCK: tl.constexpr = THREADS * LOADS * VECTOR
    whole = vocab // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):  # without a mask, which costs an instruction an element
        x = _by_thread(tl.load(row + first + tl.arange(0, BLOCK)), THREADS, LOADS, VECTOR)
        m, s, u = common.online_softmax_step(m, s, u, x, step, 1)
    if whole < vocab:
        column = whole + tl.arange(0, BLOCK)
        x = _by_thread(tl.load(row + column, column < vocab, float("-inf")), THREADS, LOADS, VECTOR)
        m, s, u = common.online_softmax_step(m, s, u, x, step, 1)
    m, s, u = common.softmax_join(m, s, u, step, 0)
    log_s = tl.log(s)
    entropy = log_s - common.LN2 * u / s
    return m, log_s, tl.where(entropy < 0, 0.0, entropy)


@triton.jit
def _by_thread(x, THREADS: tl.constexpr, LOADS: tl.constexpr, VECTOR: tl.constexpr):
    """The columns that one thread has loaded side by side, in fp32: no data moves."""
    x = tl.reshape(tl.permute(tl.reshape(x, (LOADS, THREADS, VECTOR)), (1, 0, 2)), (THREADS, LOADS * VECTOR))
    return x.to(tl.float32)


@triton.jit
def _target_logp(row, target, vocab, inverse, m, log_s):
    """The target's log-prob; NaN, and no read, where the target is not in the vocabulary."""
    valid = (target >= 0) & (target < vocab)
    x = tl.load(row + target, valid, float("nan")).to(tl.float32)
    logp = (x - m) * inverse - log_s
    return tl.where(logp > 0, 0.0, logp)


@triton.jit
def _dlogits(x, m, step, bits, slope, flat, ENTROPY: tl.constexpr):
    """p (slope log2 p + flat) of logits x, log2 p = (x - m) step - bits; without entropy's term p flat."""
    power = (x - m) * step - bits
    if ENTROPY:
        power = tl.maximum(power, common.FAR_BITS, propagate_nan=tl.PropagateNan.ALL)  # 0 * -inf would be NaN
        return tl.exp2(power) * (slope * power + flat)
    else:
        return tl.exp2(power) * flat


@triton.jit
def _row_gradient(row, out, vocab, inverse, m, log_s, entropy, target, logp, a, b, BLOCK: tl.constexpr):
    """Writes one row of dlogits to `out`, which may be `row` once every thread has its logp, from the row's end to its start.

    a, b: d loss / d logp and d entropy, b None where there is none.
    """
    tiles = tl.cdiv(vocab, BLOCK)
    zero = a == 0
    if b is not None:
        zero = zero & (b == 0)
    if zero:
        for tile in range(0, tiles):
            column = tile * BLOCK + tl.arange(0, BLOCK)
            tl.store(out + column, tl.zeros((BLOCK,), out.dtype.element_ty), column < vocab)
    else:
        step = inverse * common.LOG2E
        bits = log_s * common.LOG2E
        flat = -a * inverse
        slope = 0.0
        if b is not None:
            flat -= b * entropy * inverse
            slope = -b * common.LN2 * inverse
        whole = vocab // BLOCK * BLOCK
        if whole < vocab:
            column = whole + tl.arange(0, BLOCK)
            x = tl.load(row + column, column < vocab, 0.0).to(tl.float32)
            dx = _dlogits(x, m, step, bits, slope, flat, b is not None)
            tl.store(out + column, dx.to(out.dtype.element_ty), column < vocab)
        for back in range(0, whole, BLOCK):  # without a mask, as above
            column = whole - BLOCK - back + tl.arange(0, BLOCK)
            dx = _dlogits(tl.load(row + column).to(tl.float32), m, step, bits, slope, flat, b is not None)
            tl.store(out + column, dx.to(out.dtype.element_ty))
        if (target >= 0) & (target < vocab):
            power = logp * common.LOG2E
            dx = a * inverse + tl.exp2(power) * (slope * power + flat)
            tl.debug_barrier()  # another thread has just written what stands there
            tl.store(out + target, dx.to(out.dtype.element_ty))


@triton.jit
def logprob_kernel(
    logits,  # (T, V), row stride `stride`
    targets,  # (T,) int64
    temperature,  # (T,) float32, or a number
    logp,  # (T,) float32, out
    entropy,  # (T,) float32, out
    peak,  # (T,) float32, out: m, as the logits are
    log_total,  # (T,) float32, out: log s
    vocab,
    stride,
    ROW_TEMPERATURE: tl.constexpr,
    THREADS: tl.constexpr,
    LOADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    inverse = 1.0 / (tl.load(temperature + t) if ROW_TEMPERATURE else temperature)
    row = logits + t * stride
    m, log_s, h = _row_softmax(row, vocab, inverse, THREADS, LOADS, VECTOR)
    tl.store(logp + t, _target_logp(row, tl.load(targets + t), vocab, inverse, m, log_s))
    tl.store(entropy + t, h)
    tl.store(peak + t, m)
    tl.store(log_total + t, log_s)


@triton.jit
def gradient_kernel(
    logits,  # (T, V), row stride `stride`
    targets,  # (T,) int64
    temperature,  # (T,) float32, or a number
    entropy,  # (T,) float32
    peak,  # (T,) float32
    log_total,  # (T,) float32
    g_logp,  # (T,) float
    g_entropy,  # (T,) float, or None
    factor,  # scalar that multiplies both, or None
    out,  # (T, V), row stride `out_stride`; may be logits
    vocab,
    stride,
    out_stride,
    ROW_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    inverse = 1.0 / (tl.load(temperature + t) if ROW_TEMPERATURE else temperature)
    a, b, f, h = tl.load(g_logp + t).to(tl.float32), None, 1.0, 0.0
    if factor is not None:
        f = tl.load(factor).to(tl.float32)
    if g_entropy is not None:
        b, h = tl.load(g_entropy + t).to(tl.float32) * f, tl.load(entropy + t)
    row, target, m, log_s = logits + t * stride, tl.load(targets + t), tl.load(peak + t), tl.load(log_total + t)
    logp = _target_logp(row, target, vocab, inverse, m, log_s)
    tl.debug_barrier()  # `out` may be `row`, whose target every thread has read
    _row_gradient(row, out + t * out_stride, vocab, inverse, m, log_s, h, target, logp, a * f, b, BLOCK)


@triton.jit
def grpo_logits_kernel(
    logits,  # (T, V), row stride `stride`
    targets,  # (T,) int64
    temperature,  # (T,) float32, or a number
    rows,
    numbers,
    logp,  # (T,) float32, out
    entropy,  # (T,) float32, out
    stats,  # (T, STATS) float32, out
    out,  # (T, V), row stride `out_stride`: dlogits; may be logits; None: no gradient is wanted
    vocab,
    stride,
    out_stride,
    OPTIONS: tl.constexpr,
    ENTROPY: tl.constexpr,  # whether the loss has an entropy term
    ROW_TEMPERATURE: tl.constexpr,
    THREADS: tl.constexpr,
    LOADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    inverse = 1.0 / (tl.load(temperature + t) if ROW_TEMPERATURE else temperature)
    row = logits + t * stride
    target = tl.load(targets + t)
    m, log_s, h = _row_softmax(row, vocab, inverse, THREADS, LOADS, VECTOR)
    x = _target_logp(row, target, vocab, inverse, m, log_s)
    tl.store(logp + t, x)
    tl.store(entropy + t, h)
    a, b, row_stats = token_objective(x, h, rows, numbers, t, t >= 0, OPTIONS)
    for i in tl.static_range(STATS):
        tl.store(stats + t * STATS + i, row_stats[i])
    if out is not None:
        tl.debug_barrier()  # `out` may be `row`, whose target every thread has read
        b = b if ENTROPY else None
        _row_gradient(row, out + t * out_stride, vocab, inverse, m, log_s, h, target, x, a, b, THREADS * LOADS * VECTOR)


def logprob_from_logits(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0, inplace_backward: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each row, both (T,) float32 and differentiable: one launch forward, one backward.

    logits (T, V) bf16, fp16 or fp32 whose rows are contiguous; targets (T,) int64, NaN where outside of [0, V); temperature a number
    or (T,). inplace_backward: the backward writes the gradient over the logits, which nothing else may read then.
    """
    return _LogProb.apply(logits, targets, _temperature(temperature), inplace_backward)


def grpo_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    spec: Any,
    *,
    token_weight: Tensor,
    cu_seqlens: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    policy_mask: Tensor | None = None,
    entropy_weight: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.grpo_terms` of the logits' log-probs: loss, statistics, logp and entropy, of which the loss is differentiable.

    logits (T, V) bf16, fp16 or fp32 whose rows are contiguous, targets (T,) int64; the others as for `objective.grpo_rows`. inplace: the
    gradient is written over the logits. Where rows do not depend on each other, one launch does loss and gradient, which the backward
    multiplies by the upstream gradient unless that is 1; it can run once. Where they do, and in fp16, whose small gradients would be
    lost before a loss scaler's factor reaches them, the backward forms the gradient.
    """
    rows = dict(
        advantages=advantages,
        old_logp=old_logp,
        ref_logp=ref_logp,
        token_weight=token_weight,
        sampler_logp=sampler_logp,
        policy_mask=policy_mask,
        entropy_weight=entropy_weight,
    )
    wanted = torch.is_grad_enabled() and logits.requires_grad
    if spec.needs_sequences(sampler_logp is not None) or (wanted and logits.dtype == torch.float16):
        return _LateLoss.apply(logits, targets, _temperature(temperature), inplace, spec, rows | {"cu_seqlens": cu_seqlens})
    return _EarlyLoss.apply(logits, targets, _temperature(temperature), inplace, spec, rows, wanted)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float | Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
        logp, entropy, peak, log_total = _logprob(logits, targets, temperature)
        ctx.save_for_backward(logits, targets, entropy, peak, log_total)
        ctx.temperature, ctx.inplace = temperature, inplace
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logp: Tensor, g_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, entropy, peak, log_total = ctx.saved_tensors
        out = _out(logits, ctx.inplace)
        return _gradient(logits, targets, entropy, peak, log_total, ctx.temperature, g_logp, g_entropy, None, out), None, None, None


class _LateLoss(torch.autograd.Function):
    """The gradient of the logits in the backward, from the coefficients that the forward has found."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float | Tensor, inplace: bool, spec: Any, rows: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        logp, entropy, peak, log_total = _logprob(logits, targets, temperature)
        g_logp, g_entropy, partial = grpo_rows(logp, entropy, spec=spec, **rows)
        ctx.save_for_backward(logits, targets, entropy, peak, log_total)
        ctx.temperature, ctx.inplace, ctx.coefficients = temperature, inplace, (g_logp, g_entropy)
        return _results(ctx, partial, logp, entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, entropy, peak, log_total = ctx.saved_tensors
        g_logp, g_entropy = ctx.coefficients
        out = _out(logits, ctx.inplace)
        return _gradient(logits, targets, entropy, peak, log_total, ctx.temperature, g_logp, g_entropy, g_loss, out), *[None] * 5


class _EarlyLoss(torch.autograd.Function):
    """Loss and gradient of the logits in one launch."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float | Tensor, inplace: bool, spec: Any, rows: dict[str, Any], wanted: bool
    ) -> tuple[Tensor, ...]:
        logp, entropy = (torch.empty(len(logits), device=logits.device, dtype=torch.float32) for _ in range(2))
        stats = torch.empty(len(logits), STATS.value, device=logits.device, dtype=torch.float32)
        out = _out(logits, inplace) if wanted else None
        vectors, numbers, options = arguments(spec, **rows)
        grpo_logits_kernel[(len(logits),)](
            logits=logits,
            targets=targets,
            temperature=temperature,
            rows=vectors,
            numbers=numbers,
            logp=logp,
            entropy=entropy,
            stats=stats,
            out=out,
            vocab=logits.shape[1],
            stride=logits.stride(0),
            out_stride=0 if out is None else out.stride(0),
            OPTIONS=options,
            ENTROPY=spec.entropy_coef != 0,
            ROW_TEMPERATURE=isinstance(temperature, Tensor),
            **(TWO_SWEEPS if wanted else SWEEP).block(logits.dtype),
        )
        if out is not None:
            torch.autograd.graph.increment_version(out)
            ctx.save_for_backward(out)
        return _results(ctx, stats, logp, entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return scale_(gradient, g_loss), *[None] * 6


def _results(ctx: Any, partial: Tensor, logp: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
    stats = partial.sum(0)
    ctx.mark_non_differentiable(stats, logp, entropy)
    return stats[1].clone(), stats, logp, entropy


def _logprob(logits: Tensor, targets: Tensor, temperature: float | Tensor) -> tuple[Tensor, ...]:
    assert logits.stride(1) == 1 or logits.shape[1] == 1, "rows must be contiguous"
    out = tuple(torch.empty(len(logits), device=logits.device, dtype=torch.float32) for _ in range(4))
    logprob_kernel[(len(logits),)](
        logits,
        targets,
        temperature,
        *out,
        vocab=logits.shape[1],
        stride=logits.stride(0),
        ROW_TEMPERATURE=isinstance(temperature, Tensor),
        **SWEEP.block(logits.dtype),
    )
    return out


def _out(logits: Tensor, inplace: bool) -> Tensor:
    return logits.detach() if inplace else torch.empty(logits.shape, device=logits.device, dtype=logits.dtype)


def _gradient(
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor,
    peak: Tensor,
    log_total: Tensor,
    temperature: float | Tensor,
    g_logp: Tensor,
    g_entropy: Tensor,
    factor: Tensor | None,
    out: Tensor,
) -> Tensor:
    block = SWEEP.block(logits.dtype)
    gradient_kernel[(len(logits),)](
        logits=logits,
        targets=targets,
        temperature=temperature,
        entropy=entropy,
        peak=peak,
        log_total=log_total,
        g_logp=g_logp.contiguous(),
        g_entropy=g_entropy.contiguous(),
        factor=factor,
        out=out,
        vocab=logits.shape[1],
        stride=logits.stride(0),
        out_stride=out.stride(0),
        ROW_TEMPERATURE=isinstance(temperature, Tensor),
        BLOCK=block["THREADS"] * block["LOADS"] * block["VECTOR"],
        num_warps=block["num_warps"],
    )
    torch.autograd.graph.increment_version(out)
    return out


def logits_forward(logits: Tensor, targets: Tensor, *, temperature: float | Tensor) -> tuple[Tensor, ...]:
    """logp, entropy, m and log s, all (T,) float32, unknown to autograd."""
    return _logprob(logits, targets, _temperature(temperature))


def logits_backward(
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor,
    peak: Tensor,
    log_total: Tensor,
    g_logp: Tensor,
    g_entropy: Tensor,
    out: Tensor,
    *,
    temperature: float | Tensor,
) -> None:
    """Writes the gradient of the logits to `out` (T, V), rows contiguous, which may be the logits."""
    _gradient(logits, targets, entropy, peak, log_total, _temperature(temperature), g_logp, g_entropy, None, out)


def _temperature(temperature: float | Tensor) -> float | Tensor:
    return temperature.detach().to(torch.float32).contiguous() if isinstance(temperature, Tensor) else float(temperature)
