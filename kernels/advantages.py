"""Rewards relative to their group, for any number of groups of uneven size, in one launch.

N rewards, R kinds of reward. With the statistics of the known (not NaN) values of a group, n of them:
    centred = r - mean                        baseline mean;  times n / (n - 1) for leave_one_out
    advantage = centred / (std + epsilon)     std of the group, or of the whole call; or undivided
sum_then_normalize applies this once, to the weighted sums of the R rewards; normalize_then_sum to each reward, weighs and adds the results,
and divides by their std over the call (their mean is 0, since those of a group add up to 0).

A group is found by comparing ids: a program owns ROWS rewards and walks over all N in tiles, twice for each normalised reward (mean, then
squares of what is centred). So ids may be any int64 in any order, nothing is indexed by them, the host need not know how many groups there
are, and the result does not depend on timing. Cost: 2 N^2 comparisons a normalised reward, against N * (8 + R * width) bytes to read, which
stay in L2; N is a few thousand in a step (512 prompts times 16 is 8192). In float32, float64 for float64 rewards.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

KIND = {"group_advantages_kernel": "small"}
ROWS, TILE, WARPS = 8, 256, 4
REGISTERS = 224  # a cap it does not reach: without one, ptxas spills an address to fit one more warp
# as in the reference: rounding leaves about 1e-8 where all rewards are equal; below this share of the mean (or of 1) they count as equal
EQUAL = tl.constexpr(1e-6)


@triton.jit
def _rewards(rewards, weights, i, mask, k, R, SUM: tl.constexpr, ACC: tl.constexpr):
    """Reward k of the rows i, or the weighted sum of all R where SUM; and which are known. An unknown one is 0."""
    if not SUM:
        value = tl.load(rewards + i * R + k, mask=mask, other=float("nan")).to(ACC)
        known = value == value
        return tl.where(known, value, 0.0), known
    total = tl.zeros(i.shape, ACC)
    any_known = tl.zeros(i.shape, tl.int1)
    for kind in range(R):
        value = tl.load(rewards + i * R + kind, mask=mask, other=float("nan")).to(ACC)
        known = value == value
        if weights is not None:
            value *= tl.load(weights + kind).to(ACC)
        total += tl.where(known, value, 0.0)
        any_known = any_known | known
    return total, any_known


@triton.jit
def _std(squares, n):
    return tl.sqrt(squares / tl.maximum(n - 1.0, 1.0))


@triton.jit
def group_advantages_kernel(
    rewards,
    groups,
    weights,
    advantages,
    sums,
    finished,
    N,
    R,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    EPSILON: tl.constexpr,
    SUM: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = rows < N
    group = tl.load(groups + rows, mask=own, other=0)
    total = tl.zeros((ROWS,), ACC)
    scorable = tl.zeros((ROWS,), tl.int1)
    for k in range(1 if SUM else R):
        counts = tl.zeros((ROWS, TILE), tl.int32)
        added = tl.zeros((ROWS, TILE), ACC)
        call_counts = tl.zeros((TILE,), tl.int32)
        call_added = tl.zeros((TILE,), ACC)
        for start in range(0, N, TILE):
            j = start + tl.arange(0, TILE)
            other = tl.load(groups + j, mask=j < N, other=0)
            value, known = _rewards(rewards, weights, j, j < N, k, R, SUM, ACC)
            same = (group[:, None] == other[None, :]) & known[None, :]
            counts += same.to(tl.int32)
            added += tl.where(same, value[None, :], 0.0)
            if SCALE == "batch_std":
                call_counts += known.to(tl.int32)
                call_added += value
        n = tl.sum(counts, 1).to(ACC)
        mean = tl.sum(added, 1) / tl.maximum(n, 1.0)
        call_n = tl.sum(call_counts, 0).to(ACC)
        call_mean = tl.sum(call_added, 0) / tl.maximum(call_n, 1.0)

        squares = tl.zeros((ROWS, TILE), ACC)
        call_squares = tl.zeros((TILE,), ACC)
        for start in range(0, N, TILE):
            j = start + tl.arange(0, TILE)
            other = tl.load(groups + j, mask=j < N, other=0)
            value, known = _rewards(rewards, weights, j, j < N, k, R, SUM, ACC)
            same = (group[:, None] == other[None, :]) & known[None, :]
            centred = tl.where(same, value[None, :] - mean[:, None], 0.0)
            squares += centred * centred
            if SCALE == "batch_std":
                call_centred = tl.where(known, value - call_mean, 0.0)
                call_squares += call_centred * call_centred
        std = _std(tl.sum(squares, 1), n)

        value, known = _rewards(rewards, weights, rows, own, k, R, SUM, ACC)
        alike = std <= tl.maximum(tl.abs(mean), 1.0) * EQUAL  # not so for NaN, of infinite rewards, which is to show
        advantage = value - mean
        if BASELINE == "leave_one_out":
            advantage *= n / tl.maximum(n - 1.0, 1.0)
        if SCALE == "std":
            advantage /= std + EPSILON
        elif SCALE == "batch_std":
            advantage /= _std(tl.sum(call_squares, 0), call_n) + EPSILON
        advantage = tl.where(known & (n > 1.0) & (alike == 0), advantage, 0.0)
        if (not SUM) and weights is not None:
            advantage *= tl.load(weights + k).to(ACC)
        total += advantage
        scorable = scorable | known

    if SUM:
        tl.store(advantages + rows, total, mask=own)
    else:  # the std over the call needs every program's sums: the program that finishes last has them, and divides
        tl.store(sums + rows, tl.where(scorable, total, float("inf")), mask=own)  # infinite: unscorable; a sum is finite, or NaN
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(finished, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            counts = tl.zeros((TILE,), tl.int32)
            squares = tl.zeros((TILE,), ACC)
            for start in range(0, N, TILE):
                j = start + tl.arange(0, TILE)
                value = tl.load(sums + j, mask=j < N, other=float("inf"), cache_modifier=".cg")
                counts += (value != float("inf")).to(tl.int32)
                squares += tl.where(value != float("inf"), value * value, 0.0)
            n = tl.sum(counts, 0).to(ACC)
            std = _std(tl.sum(squares, 0), n)
            divisor = tl.where(std <= EQUAL, float("inf"), std + EPSILON)
            for start in range(0, N, TILE):
                j = start + tl.arange(0, TILE)
                value = tl.load(sums + j, mask=j < N, other=float("inf"), cache_modifier=".cg")
                value = tl.where(value == float("inf"), 0.0, value / divisor)
                tl.store(advantages + j, value, mask=j < N)


def group_advantages(rewards: Tensor, groups: Tensor, spec: Any, *, weights: Tensor | None = None) -> Tensor:
    """Advantages of rewards (N,) or (N, R) of a floating dtype within groups (N,) int64 -> (N,) float32, float64 for float64 rewards.

    spec an AdvantageSpec; weights (R,) of a floating dtype, 1 when left out. A NaN reward is left out of its statistics and counts 0 in
    its row's sum; a row without a known reward, a group of one and a group of equal rewards get exactly 0. An infinite reward makes its
    group NaN, and the whole call where that has a deviation. One launch, no host sync
    (normalize_then_sum also zeroes one int32). Assumes checked inputs.
    """
    N, R = len(groups), 1 if rewards.ndim == 1 else rewards.shape[1]
    acc = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    advantages = torch.empty(N, dtype=acc, device=rewards.device)
    if not N:
        return advantages
    assert N * R < 2**31, "indices are 32 bits wide; N^2 comparisons would take hours anyway"
    each = spec.combine == "normalize_then_sum"
    group_advantages_kernel[(triton.cdiv(N, ROWS),)](
        rewards.contiguous(),
        groups.contiguous(),
        None if weights is None else weights.contiguous(),
        advantages,
        torch.empty(N, dtype=acc, device=rewards.device) if each else None,
        torch.zeros(1, dtype=torch.int32, device=rewards.device) if each else None,
        N=N,
        R=R,
        BASELINE=spec.baseline,
        SCALE=spec.scale,
        EPSILON=spec.epsilon,
        SUM=not each,
        ACC=tl.float64 if acc == torch.float64 else tl.float32,
        ROWS=ROWS,
        TILE=TILE,
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )
    return advantages
