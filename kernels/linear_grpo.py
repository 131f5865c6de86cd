"""The losses that know their coefficients before the head runs: GRPO's family and cross-entropy, with their gradients in one pass.

Per chunk of rows: one product for the logits' softmax (head.py), the loss's gradients by log-prob and entropy on (C,) vectors, then one
product each for the gradients of hidden and weight (head_grad.py). 3 products of T x H x V, 2 with a frozen head, 1 without gradients,
and one more for a sequence that a loss needs whole and no chunk holds: log-probs first, then coefficients, then its logits again;
nothing of size (T, V) outlives its chunk. The gradients wait for the backward, which only scales them. The head's is in weight_grad, where
one is given, before the backward begins: the upstream gradient must be 1, and another one, which the host cannot know without waiting,
makes weight_grad and all other gradients NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from actial_fast.kernels.chunks import Sums, cut_sequences
from actial_fast.kernels.head import Head, make_head
from actial_fast.kernels.head_paths import backward, forward
from actial_fast.kernels.linear_logprob import workspace
from actial_fast.kernels.objective import grpo_rows
from actial_fast.kernels.scale import scale_, upstream_scaled

SPENT = "weight_grad: the head's gradient was added to it once, with the loss, and a second backward would not: call the loss again"
LOSS = 1  # its place among the statistics
Wanted = tuple[bool, bool, bool]  # which of hidden, weight and bias need a gradient
Coefficients = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor | None, Tensor]]


@dataclass(frozen=True)
class Call:
    """One loss. `coefficients` turns log-probs and entropies of rows [start, stop) into the loss's gradients by them and (programs, *)
    partial statistics, the loss in column LOSS. compact: rows without a gradient are possible and leave the gradients' products."""

    head: Head
    coefficients: Coefficients
    compact: bool
    workspace_mb: float
    cu_seqlens: Tensor | None
    weight_grad: Tensor | None


class FusedLoss(torch.autograd.Function):
    """hidden, weight and bias come a second time beside the `Head` made of them, for autograd to see."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss, stats, logp, entropy, *gradients = _run(call, hidden.shape[1], ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.weight_grad, ctx.spent = call.weight_grad if ctx.needs_input_grad[1] else None, False
        ctx.mark_non_differentiable(stats, logp, entropy)
        return loss, stats, logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if ctx.weight_grad is not None:
            if ctx.spent:
                raise RuntimeError(SPENT)
            ctx.spent = True
            upstream = torch.where(upstream == 1, 1.0, torch.nan)  # the host does not wait for it: a wrong one shows as NaN
            scale_(ctx.weight_grad, upstream)
        return *(None if x is None else upstream_scaled(x, upstream, d) for x, d in zip(gradients, ctx.dtypes, strict=True)), None


def _run(call: Call, width: int, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Loss, statistics, log-probs, entropies; then the gradients of hidden, weight and bias, of the caller's width and as computed."""
    wanted = (wanted[0], wanted[1] or call.weight_grad is not None, wanted[2]) if any(wanted) else wanted
    head, sums, statistics = call.head, Sums(call.head, wanted, call.weight_grad), []
    logp, entropy = (torch.empty(len(head.hidden), dtype=torch.float32, device=head.hidden.device) for _ in range(2))
    groups = cut_sequences(head, any(wanted), call.workspace_mb, call.cu_seqlens)
    scaled = workspace(head, [chunk for chunks in groups for chunk in chunks]) if any(wanted) else None
    for chunks in groups:
        first, last = chunks[0][0], chunks[-1][1]
        for start, stop in chunks:
            parts, logp[start:stop], entropy[start:stop] = forward(head.rows(start, stop), scaled if len(chunks) == 1 else None)
        g_logp, g_entropy, partial = call.coefficients(logp[first:last], entropy[first:last], first, last)
        statistics.append(partial)
        for start, stop in chunks if any(wanted) else ():
            rows, here = head.rows(start, stop), slice(start - first, stop - first)
            if len(chunks) > 1:  # the coefficients waited for all chunks of the sequence: their softmax comes a second time
                parts, *_ = forward(rows, scaled)
            g = None if g_entropy is None else g_entropy[here]
            backward(rows, parts, entropy[start:stop], g_logp[here], g, sums.chunk(start, stop), call.compact)
    stats = torch.cat(statistics).sum(0)
    return stats[LOSS].clone(), stats, logp, entropy, *sums.results(width)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    spec: Any,
    *,
    token_weight: Tensor,
    cu_seqlens: Tensor | None,
    sampler_logp: Tensor | None,
    policy_mask: Tensor | None,
    entropy_weight: Tensor | None,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    weight_grad: Tensor | None,
    skip_zero_rows: bool,
    workspace_mb: float,
    wanted: Wanted | None = None,
    vocab_parallel: Any = None,
    head: str = "triton",
) -> tuple[Tensor | None, ...]:
    """See `ops.linear_grpo_loss`, which has checked the arguments: loss (), statistics (len(STATS),), logp and entropy (T,), all float32.

    cu_seqlens (S + 1,) on the CPU where the loss needs whole sequences, else None. With `wanted` autograd is left out: the gradients of
    hidden, weight and bias follow, for an upstream gradient of 1 and as computed (see `Sums`).
    """
    # copied once for all chunks, from where the caller keeps it: in pinned memory a CUDA graph may capture that
    ends = torch.empty(0) if cu_seqlens is None else cu_seqlens.to(hidden.device, non_blocking=True)
    vectors = {"sampler_logp": sampler_logp, "policy_mask": policy_mask, "entropy_weight": entropy_weight}

    def coefficients(logp: Tensor, entropy: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor | None, Tensor]:
        rows, sequences = slice(start, stop), None
        if cu_seqlens is not None:
            first, last = int((cu_seqlens < start).sum()), int((cu_seqlens <= stop).sum())
            sequences = ends[first:last] - start
        part = {name: None if x is None else x[rows] for name, x in vectors.items()}
        old, ref = (None if x is None else x[rows] for x in (old_logp, ref_logp))
        g_logp, g_entropy, partial = grpo_rows(
            logp, entropy, advantages[rows], old, ref, spec, token_weight=token_weight[rows], cu_seqlens=sequences, **part
        )
        return g_logp, g_entropy if spec.entropy_coef else None, partial

    alone = None if bias is None else bias.detach()
    by_logp = not skip_zero_rows and not spec.entropy_coef
    made = make_head(hidden.detach(), weight.detach(), targets, alone, temperature, softcap, vocab_parallel, None, head, by_logp)
    call = Call(made, coefficients, skip_zero_rows, workspace_mb, cu_seqlens, weight_grad)
    return FusedLoss.apply(hidden, weight, bias, call) if wanted is None else _run(call, hidden.shape[1], wanted)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    weight_grad: Tensor | None,
    workspace_mb: float,
    wanted: Wanted | None = None,
    vocab_parallel: Any = None,
    head: str = "triton",
) -> Tensor | tuple[Tensor | None, ...]:
    """See `ops.linear_cross_entropy`, which has checked the arguments: -sum token_weight * logp, () float32; `wanted` as above."""

    def coefficients(logp: Tensor, entropy: Tensor, start: int, stop: int) -> tuple[Tensor, None, Tensor]:
        weights = token_weight[start:stop].float()
        loss = -torch.where(weights != 0, weights * logp, 0.0).sum()
        return -weights, None, torch.stack([torch.zeros_like(loss), loss])[None]

    alone = None if bias is None else bias.detach()
    made = make_head(hidden.detach(), weight.detach(), targets, alone, 1.0, softcap, vocab_parallel, None, head, by_logp=True)
    call = Call(made, coefficients, False, workspace_mb, None, weight_grad)
    if wanted is None:
        return FusedLoss.apply(hidden, weight, bias, call)[0]
    loss, _, _, _, *gradients = _run(call, hidden.shape[1], wanted)
    return loss, *gradients
