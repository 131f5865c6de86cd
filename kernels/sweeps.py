"""The sweeps of one program over one row of logits: its softmax, and its gradient.

These are close to the rate at which instructions issue: what belongs to a row is worked out before its elements, whole blocks have no mask,
and the target's 1 is added to its one element afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from actial_fast.kernels import common


@triton.jit
def row_softmax(row, vocab, inverse, THREADS: tl.constexpr, LOADS: tl.constexpr, VECTOR: tl.constexpr):
    """m, log s and entropy of one row, from a pointer to it. Threads keep sums of their own, so that nothing waits before the row's end."""
    step = inverse * common.LOG2E
    m = tl.full((THREADS,), float("-inf"), tl.float32)
    s = tl.zeros((THREADS,), tl.float32)
    u = tl.zeros((THREADS,), tl.float32)
    BLOCK: tl.constexpr = THREADS * LOADS * VECTOR
    whole = vocab // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):  # without a mask, which costs an instruction an element
        x = by_thread(tl.load(row + first + tl.arange(0, BLOCK)), THREADS, LOADS, VECTOR)
        m, s, u = common.online_softmax_step(m, s, u, x, step, 1)
    if whole < vocab:
        column = whole + tl.arange(0, BLOCK)
        x = by_thread(tl.load(row + column, column < vocab, float("-inf")), THREADS, LOADS, VECTOR)
        m, s, u = common.online_softmax_step(m, s, u, x, step, 1)
    m, s, u = common.softmax_join(m, s, u, step, 0)
    log_s = tl.log(s)
    entropy = log_s - common.LN2 * u / s
    return m, log_s, tl.where(entropy < 0, 0.0, entropy)


@triton.jit
def by_thread(x, THREADS: tl.constexpr, LOADS: tl.constexpr, VECTOR: tl.constexpr):
    """The columns that one thread has loaded side by side, in fp32: no data moves."""
    x = tl.reshape(tl.permute(tl.reshape(x, (LOADS, THREADS, VECTOR)), (1, 0, 2)), (THREADS, LOADS * VECTOR))
    return x.to(tl.float32)


@triton.jit
def target_logp(row, target, vocab, inverse, m, log_s):
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
def row_gradient(row, out, vocab, inverse, m, log_s, entropy, target, logp, a, b, BLOCK: tl.constexpr):
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
        a = tl.where((a != 0) & ((target < 0) | (target >= vocab)), float("nan"), a)  # as the log-prob of such a target
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
            power = tl.maximum(logp * common.LOG2E, common.FAR_BITS, propagate_nan=tl.PropagateNan.ALL)  # as above
            dx = a * inverse + tl.exp2(power) * (slope * power + flat)
            tl.debug_barrier()  # another thread has just written what stands there
            tl.store(out + target, dx.to(out.dtype.element_ty))
