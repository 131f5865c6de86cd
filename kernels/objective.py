"""The GRPO loss between log-probs and logits: gradients by log-prob and entropy, and the statistics, in one launch.

C rows, S sequences. Forward and backward equations: objective_math.py. Rows that do not depend on each other go in blocks; where a ratio or
an importance weight is a sequence's, one program takes one sequence of any length: its sums, its rows, and what every row owes to the
sequence's ratio. Sums are formed in a fixed order: the same bits every time.

Bytes: at most 33 read and 8 written a row, all arithmetic in fp32. Sequences are read up to three times, from cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from actial_fast.kernels.objective_math import (
    MAX_LOG_RATIO,
    MIN_RATIO_VESPO,
    STATS,
    arguments,
    importance_weight,
    old_log_prob,
    row_objective,
    sampler_gap,
    token_objective,
)

KIND = {"token_objective_kernel": "small", "sequence_objective_kernel": "small"}
TOKEN_BLOCK, TOKEN_WARPS = 128, 4  # rows a program: small, so that a chunk of some thousand rows fills the chip
SEQUENCE_BLOCK, SEQUENCE_WARPS = 256, 8  # rows a step of the loop over a sequence
SEQUENCE_REGISTERS = 128  # left alone, ptxas aims at 48 and spills one


@triton.jit(do_not_specialize=["n_rows"])
def token_objective_kernel(
    logp,  # (C,) float32
    entropy,  # (C,) float32
    rows,
    numbers,
    g_logp,  # (C,) float32, out
    g_entropy,  # (C,) float32, out
    partial,  # (programs, STATS) float32, out
    n_rows,
    OPTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_rows
    x = tl.load(logp + at, inside, 0.0)
    h = tl.load(entropy + at, inside, 0.0)
    a, b, stats = token_objective(x, h, rows, numbers, at, inside, OPTIONS)
    tl.store(g_logp + at, a, inside)
    tl.store(g_entropy + at, b, inside)
    for i in tl.static_range(STATS):
        tl.store(partial + program * STATS + i, tl.sum(stats[i], 0))


@triton.jit
def sequence_objective_kernel(
    logp,  # (C,) float32
    entropy,  # (C,) float32
    rows,
    cu_seqlens,  # (S + 1,) int
    numbers,
    g_logp,  # (C,) float32, out
    g_entropy,  # (C,) float32, out
    partial,  # (S, STATS) float32, out
    OPTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a sequence, of any length: its sums, then its rows, then what every row owes to the sequence's ratio."""
    s = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens + s).to(tl.int64)
    stop = tl.load(cu_seqlens + s + 1).to(tl.int64)
    zero = tl.zeros((BLOCK,), tl.float32)
    count, ratio_sum, gap_sum, w_sum = zero, zero, zero, zero
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        counted = tl.load(rows.token_weight + at, at < stop, 0.0) != 0
        x = tl.load(logp + at, counted, 0.0)
        old = old_log_prob(x, rows, at, counted)
        count += tl.where(counted, 1.0, 0.0)
        ratio_sum += x - old
        if OPTIONS.objective == "vespo":
            w_sum += _between(x - old, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        if rows.sampler_logp is not None:
            gap = sampler_gap(old, rows, at, counted)
            gap_sum += gap
            if OPTIONS.objective == "vespo" and not OPTIONS.sequence_importance:
                log_a = tl.log(tl.maximum(importance_weight(gap, numbers, OPTIONS.mask_importance), MIN_RATIO_VESPO))
                w_sum += tl.where(counted, log_a, 0.0)
    n = tl.maximum(tl.sum(count, 0), 1.0)
    mean_log_ratio = tl.sum(ratio_sum, 0) / n
    log_w = tl.sum(w_sum, 0)
    sequence_importance = 1.0
    if rows.sampler_logp is not None and OPTIONS.sequence_importance:
        sequence_importance = importance_weight(tl.sum(gap_sum, 0), numbers, OPTIONS.mask_importance)
        log_w += tl.log(tl.maximum(sequence_importance, MIN_RATIO_VESPO))
    log_w = _between(log_w, tl.log(MIN_RATIO_VESPO), MAX_LOG_RATIO)

    through_sum = zero
    totals = ()
    for _ in tl.static_range(STATS):
        totals += (zero,)  # type: ignore[assignment]  # Triton unrolls the loop: each tuple is a new one
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < stop
        weight = tl.load(rows.token_weight + at, inside, 0.0).to(tl.float32)
        counted = weight != 0
        x = tl.load(logp + at, counted, 0.0)
        h = tl.load(entropy + at, counted, 0.0)
        old = old_log_prob(x, rows, at, counted)
        log_ratio = x - old
        if OPTIONS.sequence_ratio:
            log_ratio = zero + mean_log_ratio
        importance = zero + sequence_importance
        if rows.sampler_logp is not None and not OPTIONS.sequence_importance:
            importance = importance_weight(sampler_gap(old, rows, at, counted), numbers, OPTIONS.mask_importance)
        direct, through, b, stats = row_objective(x, h, log_ratio, importance, log_w, weight, rows, numbers, at, counted, OPTIONS)
        if OPTIONS.sequence_ratio:
            through_sum += tl.where(counted, weight * through, 0.0)
        else:
            direct += through
        tl.store(g_logp + at, tl.where(counted, weight * direct, 0.0), inside)
        tl.store(g_entropy + at, b, inside)
        totals = _added(totals, stats)
    for i in tl.static_range(STATS):
        tl.store(partial + s * STATS + i, tl.sum(totals[i], 0))

    if OPTIONS.sequence_ratio:
        share = tl.sum(through_sum, 0) / n
        tl.debug_barrier()  # what is read back was written above
        for first in range(start, stop, BLOCK):
            at = first + tl.arange(0, BLOCK)
            counted = tl.load(rows.token_weight + at, at < stop, 0.0) != 0
            tl.store(g_logp + at, tl.load(g_logp + at, counted, 0.0) + share, counted)


@triton.jit
def _between(x, low, high):
    """x clamped; NaN stays, which tl.minimum and tl.maximum would drop."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def _added(a, b):
    out = ()
    for i in tl.static_range(STATS):
        out += (a[i] + b[i],)  # type: ignore[assignment]  # likewise
    return out


def grpo_rows(
    logp: Tensor,
    entropy: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the loss of `reference.grpo_terms` by logp and by entropy, and partial sums of its statistics. One launch.

    logp, entropy (C,) float32; the others (C,) of any float dtype, policy_mask (C,) bool; spec a GRPOSpec. cu_seqlens (S + 1,) int on
    the device, from 0 to C, needed where spec.needs_sequences(sampler_logp is not None). Returns g_logp (C,), g_entropy (C,) and
    (programs, STATS) float32 whose sum over dim 0 is the statistics, the loss among them: the same bits every time.
    """
    rows, numbers, options = arguments(
        spec,
        token_weight=token_weight,
        advantages=advantages,
        old_logp=old_logp,
        ref_logp=ref_logp,
        sampler_logp=sampler_logp,
        policy_mask=policy_mask,
        entropy_weight=entropy_weight,
    )
    g_logp, g_entropy = torch.empty_like(logp), torch.empty_like(logp)
    sequences = spec.needs_sequences(sampler_logp is not None)
    if sequences:
        assert cu_seqlens is not None, "the door asks for cu_seqlens"
        programs = len(cu_seqlens) - 1
    else:
        programs = triton.cdiv(len(logp), TOKEN_BLOCK)
    partial = torch.empty(programs, STATS.value, device=logp.device, dtype=torch.float32)
    outputs = dict(g_logp=g_logp, g_entropy=g_entropy, partial=partial, OPTIONS=options)
    if sequences:
        sequence_objective_kernel[(programs,)](
            logp, entropy, rows, cu_seqlens, numbers, **outputs, BLOCK=SEQUENCE_BLOCK, num_warps=SEQUENCE_WARPS, maxnreg=SEQUENCE_REGISTERS
        )
    else:
        token_objective_kernel[(programs,)](
            logp, entropy, rows, numbers, **outputs, n_rows=len(logp), BLOCK=TOKEN_BLOCK, num_warps=TOKEN_WARPS
        )
    return g_logp, g_entropy, partial
