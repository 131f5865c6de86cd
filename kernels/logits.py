"""Log-prob, entropy and the GRPO loss from logits that somebody already holds, forward and backward.

T rows, V vocabulary. With z = logits / temperature, m the largest logit, z_m = m / temperature, s = sum_v exp(z_v - z_m):

forward    logp = (z_target - z_m) - log s;  entropy = log s - sum_v p_v (z_v - z_m);  p = exp((z - z_m) - log s)
backward   dlogits_v = (g_logp ([v = target] - p_v) - g_entropy p_v (log p_v + entropy)) / temperature

z_m and log s are kept apart: their sum would lose log s where logits are large. Everything is fp32 from the load on; a row is one program.

`logprob_kernel` reads the logits once, `gradient_kernel` reads and writes them once. `grpo_logits_kernel` is both with the loss between: it
reads a row, forms loss and coefficients, and goes back over the row from its end, which is still in the L2 cache. Rows whose coefficients
are both 0 (masked, clipped, no advantage) get a gradient of 0 without being read.
Bytes: T V (1 + 2) elements from HBM, of which the loss in one launch saves up to T V.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from actial_fast.kernels import common
from actial_fast.kernels.objective import grpo_rows
from actial_fast.kernels.objective_math import STATS, arguments, token_objective
from actial_fast.kernels.scale import scale_, upstream_scaled
from actial_fast.kernels.sweeps import row_gradient, row_softmax, target_logp

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


def two_sweeps() -> Launch:
    """TWO_SWEEPS, with half the loads where the compiler would spill four: Triton 3.6 on sm_120, 3.8 on all but sm_100 and sm_103, 3.7 on
    none."""
    version, chip = tuple(map(int, triton.__version__.split(".")[:2])), common.capability()[0]
    spills = chip >= 12 if version < (3, 7) else version > (3, 7) and chip != 10
    return replace(TWO_SWEEPS, loads=2) if spills else TWO_SWEEPS


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
    m, log_s, h = row_softmax(row, vocab, inverse, THREADS, LOADS, VECTOR)
    tl.store(logp + t, target_logp(row, tl.load(targets + t), vocab, inverse, m, log_s))
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
    logp = target_logp(row, target, vocab, inverse, m, log_s)
    tl.debug_barrier()  # `out` may be `row`, whose target every thread has read
    row_gradient(row, out + t * out_stride, vocab, inverse, m, log_s, h, target, logp, a * f, b, BLOCK)


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
    m, log_s, h = row_softmax(row, vocab, inverse, THREADS, LOADS, VECTOR)
    x = target_logp(row, target, vocab, inverse, m, log_s)
    tl.store(logp + t, x)
    tl.store(entropy + t, h)
    a, b, row_stats = token_objective(x, h, rows, numbers, t, t >= 0, OPTIONS)
    for i in tl.static_range(STATS):
        tl.store(stats + t * STATS + i, row_stats[i])
    if out is not None:
        tl.debug_barrier()  # `out` may be `row`, whose target every thread has read
        b = b if ENTROPY else None
        row_gradient(row, out + t * out_stride, vocab, inverse, m, log_s, h, target, x, a, b, THREADS * LOADS * VECTOR)


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
    gradient is written over the logits, and the backward can run once. Where rows do not depend on each other, one launch does loss and
    gradient, which the backward multiplies by the upstream gradient unless that is 1. Where they do, and in fp16, whose small gradients
    would be lost before a loss scaler's factor reaches them, the backward forms the gradient.
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
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(logits.device, non_blocking=True)
        return _LateLoss.apply(logits, targets, _temperature(temperature), inplace, spec, rows | {"cu_seqlens": cu_seqlens})
    return _EarlyLoss.apply(logits, targets, _temperature(temperature), inplace, spec, rows, wanted)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float | Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
        logp, entropy, peak, log_total = _logprob(logits, targets, temperature)
        by_row = isinstance(temperature, Tensor)
        ctx.save_for_backward(logits, targets, entropy, peak, log_total, temperature if by_row else None)
        ctx.number, ctx.inplace = None if by_row else temperature, inplace
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logp: Tensor, g_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, entropy, peak, log_total, by_row = ctx.saved_tensors
        temperature, out = ctx.number if by_row is None else by_row, _out(logits, ctx.inplace)
        return _gradient(logits, targets, entropy, peak, log_total, temperature, g_logp, g_entropy, None, out), None, None, None


class _LateLoss(torch.autograd.Function):
    """The gradient of the logits in the backward, from the coefficients that the forward has found."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float | Tensor, inplace: bool, spec: Any, rows: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        logp, entropy, peak, log_total = _logprob(logits, targets, temperature)
        g_logp, g_entropy, partial = grpo_rows(logp, entropy, spec=spec, **rows)
        by_row = isinstance(temperature, Tensor)
        ctx.save_for_backward(logits, targets, entropy, peak, log_total, g_logp, g_entropy, temperature if by_row else None)
        ctx.number, ctx.inplace = None if by_row else temperature, inplace
        return _results(ctx, partial, logp, entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, entropy, peak, log_total, g_logp, g_entropy, by_row = ctx.saved_tensors
        temperature, out = ctx.number if by_row is None else by_row, _out(logits, ctx.inplace)
        return _gradient(logits, targets, entropy, peak, log_total, temperature, g_logp, g_entropy, g_loss, out), *[None] * 5


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
            **(two_sweeps() if wanted else SWEEP).block(logits.dtype),
        )
        if out is not None:
            torch.autograd.graph.increment_version(out)
            ctx.save_for_backward(out)
            ctx.inplace = inplace
        return _results(ctx, stats, logp, entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return scale_(gradient, g_loss) if ctx.inplace else upstream_scaled(gradient, g_loss, gradient.dtype), *[None] * 6


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
