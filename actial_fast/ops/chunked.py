"""The CPU path of the ops that start from hidden states: torch over chunks of rows, so that no (T, V) tensor ever exists.

T rows, H hidden size, V vocabulary, C rows of a chunk. dx is a loss's gradient by hidden @ weight.T + bias (see chunked_logits.py):

    dhidden = dx @ weight        dweight = dx.T @ hidden        dbias = sum of dx over the rows

A loss's gradients by the chunk's log-probs and entropies depend on these (C,) vectors only, so a loss and its gradients take one pass:
3 GEMMs of T * H * V, 2 with a frozen head, 1 without gradients; rows whose gradient is 0 leave the last two.

Everything is computed in float32, in float64 for float64 inputs. A CPU's bf16 GEMM rounds what it returns, so bf16 and fp16 operands are
upcast first, the weight a block of the vocabulary at a time. A row's result depends on the chunk it is in only through the order in
which the GEMM adds up (rounding; the Triton path is exact in this).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from actial_fast.ops import reference
from actial_fast.ops.chunked_logits import Softmax, compute_dtype, zero_rows
from actial_fast.ops.chunks import blocks, plan
from actial_fast.ops.library import joined, split
from actial_fast.ops.parallel import VocabParallel
from actial_fast.ops.reference import STATS
from actial_fast.ops.spec import GRPOSpec, Kept

Terms = Callable[[slice, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""A loss from the log-probs and entropies (C,) of some rows, differentiable in them, and its statistics."""
SPENT = "weight_grad: the head's gradient was added to it once, with the loss, and a second backward would not: call the loss again"
Wanted = tuple[bool, bool, bool]
"""Which of hidden, weight and bias need a gradient."""


# ---- public: what the door calls, with checked arguments


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    workspace_mb: float,
    kept: Kept | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> tuple[Tensor, Tensor]:
    """As `ops.linear_logprob`: 1 GEMM; with the backward pass, which computes the logits again, 4, with a frozen head 3."""
    job = _logprob_job(hidden, weight, targets, temperature, softcap, workspace_mb, kept, vocab_parallel)
    return _LinearLogprob.apply(hidden, weight, bias, job)


def linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    wanted: Wanted,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    workspace_mb: float,
    kept: Kept | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of hidden, weight and bias, where wanted and in their dtypes, from those of log-probs and entropies."""
    job = _logprob_job(hidden, weight, targets, temperature, softcap, workspace_mb, kept)
    return _logprob_gradients(hidden, weight, bias, job, g_logp, g_entropy, wanted)


def _logprob_job(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    workspace_mb: float,
    kept: Kept | None,
    parallel: VocabParallel | None = None,
) -> Job:
    count = targets.shape[1] if targets.ndim == 2 else 1
    groups, block = plan(hidden, weight, workspace_mb, parallel=parallel, targets=count, kept=kept)
    return Job(targets, temperature, softcap, groups, block, kept=kept, parallel=parallel)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    spec: GRPOSpec,
    *,
    token_weight: Tensor,
    cu_seqlens: Tensor | None,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    weight_grad: Tensor | None,
    skip_zero_rows: bool,
    workspace_mb: float,
    wanted: Wanted | None = None,
    vocab_parallel: VocabParallel | None = None,
    **named: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """As `ops.linear_grpo_loss`; `named` are the other (T,) arguments of `reference.grpo_terms`.

    cu_seqlens (CPU) only where rows depend on their sequence: chunks are then cut between sequences, or within one that is longer, whose
    logits are computed twice. With `wanted` autograd is left out: the gradients of hidden, weight and bias follow the results, for an
    upstream gradient of 1 and as computed (see `Result`).
    """
    groups, block = plan(hidden, weight, workspace_mb, cu_seqlens, vocab_parallel)

    def terms(rows: slice, logp: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor]:
        inside = None
        if cu_seqlens is not None:
            inside = cu_seqlens[(cu_seqlens >= rows.start) & (cu_seqlens <= rows.stop)] - rows.start
        assert entropy is not None, "the job asks for it"
        old, ref = (None if x is None else x[rows] for x in (old_logp, ref_logp))
        others = {name: None if x is None else x[rows] for name, x in named.items()}
        return reference.grpo_terms(
            logp, entropy, advantages[rows], old, ref, spec, token_weight=token_weight[rows], cu_seqlens=inside, **others
        )

    more: dict[str, Any] = {"skip": skip_zero_rows, "weight_grad": weight_grad, "parallel": vocab_parallel}
    job = Job(targets, temperature, softcap, groups, block, terms, len(STATS), **more)
    return _loss(hidden, weight, bias, job, wanted)


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
    vocab_parallel: VocabParallel | None = None,
) -> Tensor | tuple[Tensor | None, ...]:
    """As `ops.linear_cross_entropy`; with `wanted` the gradients follow the loss, as in `linear_grpo_loss`."""
    groups, block = plan(hidden, weight, workspace_mb, parallel=vocab_parallel)

    def terms(rows: slice, logp: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor]:
        loss = -(token_weight[rows] * torch.where(token_weight[rows] != 0, logp, 0)).sum()
        return loss, loss.new_zeros(0)

    job = Job(targets, 1.0, softcap, groups, block, terms, entropy=False, weight_grad=weight_grad, parallel=vocab_parallel)
    loss, _, _, _, *gradients = _loss(hidden, weight, bias, job, wanted)
    return loss if wanted is None else (loss, *gradients)


# ---- hidden states and head


@dataclass(frozen=True)
class Job:
    """What a pass computes, but for the tensors that autograd follows.

    targets (T,), or (T, K) for log-probs; temperature and softcap, the scaling of the logits; groups of chunks of rows (see chunks.plan);
    block, how many vocabulary rows are upcast at once; terms, the loss (None: log-probs only), and stats, how many statistics it has;
    entropy, whether it is wanted; skip, whether rows of coefficient 0 leave the backward GEMMs; wanted, which of hidden, weight and bias
    need a gradient; weight_grad, where weight's is added; kept, to what the distribution is cut; parallel, the ranks that have the rest of
    the vocabulary.
    """

    targets: Tensor
    temperature: float | Tensor
    softcap: float | None
    groups: list[list[slice]]
    block: int
    terms: Terms | None = None
    stats: int = 0
    entropy: bool = True
    skip: bool = True
    wanted: Wanted = (False, False, False)
    weight_grad: Tensor | None = None
    kept: Kept | None = None
    parallel: VocabParallel | None = None


@dataclass
class Result:
    """loss scalar, stats, logp of the targets' shape, entropy (T,) or None, and the gradients that were wanted and are autograd's.

    Those of weight and bias are as computed, in at least float32, and so is that of float16 hidden states: a loss scale is yet to come.
    """

    loss: Tensor
    stats: Tensor
    logp: Tensor
    entropy: Tensor | None
    dhidden: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None


def _run(hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> Result:
    """The one loop over chunks of rows: log-probs, loss and gradients."""
    dtype = compute_dtype(hidden)
    to_hidden, to_weight, to_bias = job.wanted
    rows = len(hidden)
    zeros = torch.zeros((), dtype=dtype, device=hidden.device)
    out = Result(
        loss=zeros.clone(),
        stats=torch.zeros(job.stats, device=hidden.device),
        logp=zeros.new_empty(job.targets.shape),
        entropy=zeros.new_empty(rows) if job.entropy else None,
        dhidden=zeros.new_zeros(hidden.shape, dtype=dtype if hidden.dtype == torch.float16 else hidden.dtype) if to_hidden else None,
        dweight=(zeros.new_zeros(weight.shape) if job.weight_grad is None else job.weight_grad) if to_weight else None,
        dbias=zeros.new_zeros(bias.shape) if to_bias and bias is not None else None,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        for chunks in job.groups:
            if len(chunks) == 1:
                _run_chunk(chunks[0], hidden, weight, bias, job, out)
            else:
                _run_long(chunks, hidden, weight, bias, job, out)
    if job.weight_grad is not None:
        out.dweight = None
    return out


def _run_chunk(chunk: slice, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, out: Result) -> None:
    """One chunk's share of `out`. A function of its own, so that its (C, V) tensors are gone when the next chunk begins."""
    soft = _softmax(chunk, hidden, weight, bias, job, out)
    if job.terms is not None:
        _add_gradients(chunk, soft, *_coefficients(chunk, job.terms, any(job.wanted), out), hidden, weight, job, out)


def _run_long(chunks: list[slice], hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, out: Result) -> None:
    """The chunks of a sequence that no chunk holds: log-probs of all of them, coefficients, then their logits again and gradients."""
    assert job.terms is not None, "log-probs do not depend on a sequence"
    for chunk in chunks:
        _softmax(chunk, hidden, weight, bias, job, out)
    first = chunks[0].start
    g, h = _coefficients(slice(first, chunks[-1].stop), job.terms, any(job.wanted), out)
    for chunk in chunks if g is not None else ():
        here = slice(chunk.start - first, chunk.stop - first)
        g_here, h_here = (None if x is None else x[here] for x in (g, h))
        _add_gradients(chunk, _softmax(chunk, hidden, weight, bias, job, out), g_here, h_here, hidden, weight, job, out)


def _softmax(chunk: slice, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, out: Result) -> Softmax:
    """A chunk's logits as a distribution, its log-probs and entropies put into `out`."""
    h = hidden[chunk].to(out.logp.dtype)
    z = _logits(h, weight, bias, _column(job.temperature, chunk), job)
    if job.kept:
        z.masked_fill_(z < reference.lowest_kept(z, job.kept), -torch.inf)
    soft = Softmax.of(z, job.targets[chunk], job.entropy, job.parallel)
    out.logp[chunk] = soft.logp
    if out.entropy is not None and soft.entropy is not None:  # both, or neither
        out.entropy[chunk] = soft.entropy
    return soft


def _column(temperature: float | Tensor, chunk: slice) -> float | Tensor:
    return temperature[chunk, None] if isinstance(temperature, Tensor) else temperature


def _add_gradients(
    chunk: slice, soft: Softmax, g: Tensor | None, g_entropy: Tensor | None, hidden: Tensor, weight: Tensor, job: Job, out: Result
) -> None:
    """A chunk's gradients, from those of its log-probs and entropies; g None: none are wanted. Consumes its softmax."""
    if g is None:
        return
    if job.kept:
        g = g.masked_fill(soft.logp == -torch.inf, 0)  # of a token that is not drawn
    active = reference.columns(g != 0).any(1)
    if g_entropy is not None:
        active |= g_entropy != 0
    index = torch.nonzero(active).squeeze(1) if job.skip else torch.arange(len(g))
    if not len(index):
        return
    h = hidden[chunk].to(out.logp.dtype)
    dx = soft.gradient(job.targets[chunk], g, g_entropy, _column(job.temperature, chunk), job.softcap)
    if len(index) < len(h):
        dx, h = dx[index], h[index]
    if not job.skip:  # a row without a coefficient may hold NaN, which times 0 is NaN
        dx, h = zero_rows(dx, ~active), h.where(active[:, None], 0)
    if out.dhidden is not None:
        dh = torch.zeros_like(h)
        for part, block in blocks(weight, job.block, h.dtype):
            torch.addmm(dh, dx[:, part], block, out=dh)
        out.dhidden[chunk][index] = dh.to(out.dhidden.dtype)
    if out.dweight is not None:
        torch.addmm(out.dweight, dx.T, h, out=out.dweight)
    if out.dbias is not None:
        out.dbias += dx.sum(0)


def _coefficients(rows: slice, terms: Terms, wanted: bool, out: Result) -> tuple[Tensor | None, Tensor | None]:
    """Adds the rows' loss and statistics to `out`; d loss / d logp and d loss / d entropy (C,), the latter None where it is all 0."""
    with torch.set_grad_enabled(wanted):
        logp = out.logp[rows].clone().requires_grad_(wanted)
        entropy = None if out.entropy is None else out.entropy[rows].clone().requires_grad_(wanted)
        loss, stats = terms(rows, logp, entropy)
    out.loss += loss.detach()
    out.stats += stats
    if not wanted:
        return None, None
    inputs = (logp,) if entropy is None else (logp, entropy)
    g, *rest = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return g, rest[0] if rest and rest[0].any() else None


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, temperature: float | Tensor, job: Job) -> Tensor:
    """Scaled logits of a chunk's hidden states (C, H), in their dtype: (C, V)."""
    z = h.new_empty(len(h), len(weight))
    for part, block in blocks(weight, job.block, h.dtype):
        torch.mm(h, block.T, out=z[:, part])
    if bias is not None:
        z.add_(bias)
    if job.softcap is not None:
        z.div_(job.softcap).tanh_().mul_(job.softcap)
    return z.div_(temperature)


def _loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, wanted: Wanted | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, *tuple[Tensor | None, ...]]:
    """Loss, statistics, log-probs and entropies: known to autograd, or followed by the gradients that are wanted."""
    if wanted is None:
        return _LinearLoss.apply(hidden, weight, bias, job)
    out = _run(hidden, weight, bias, replace(job, wanted=wanted))
    return out.loss, out.stats, out.logp, out.entropy, out.dhidden, out.dweight, out.dbias


def _logprob_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, g_logp: Tensor | None, g_entropy: Tensor | None, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    def upstream(rows: slice, logp: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor]:
        loss = (logp * (0 if g_logp is None else g_logp[rows])).sum()
        if entropy is not None and g_entropy is not None:  # both, or neither
            loss = loss + (entropy * g_entropy[rows]).sum()
        return loss, loss.new_zeros(0)

    out = _run(hidden, weight, bias, replace(job, terms=upstream, entropy=g_entropy is not None, wanted=wanted))
    pairs = zip((out.dhidden, out.dweight, out.dbias), (hidden, weight, bias), strict=True)
    return tuple(None if g is None or x is None else g.to(x.dtype) for g, x in pairs)


class _LinearLogprob(torch.autograd.Function):
    """Keeps hidden states and head, and computes the logits again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> tuple[Tensor, Tensor | None]:
        out = _run(hidden, weight, bias, job)
        number, by_row = split(job.temperature)
        ctx.save_for_backward(hidden, weight, bias, job.targets, by_row)
        ctx.job = replace(job, targets=hidden.new_empty(0), temperature=number)  # tensors go where autograd watches them
        ctx.set_materialize_grads(False)
        return out.logp, out.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, by_row = ctx.saved_tensors
        job = replace(ctx.job, targets=targets, temperature=joined(ctx.job.temperature, by_row))
        return *_logprob_gradients(hidden, weight, bias, job, g_logp, g_entropy, ctx.needs_input_grad[:3]), None


class _LinearLoss(torch.autograd.Function):
    """Computes the gradients with the loss; the backward pass multiplies them by the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        job = replace(job, wanted=ctx.needs_input_grad[:3])
        out = _run(hidden, weight, bias, job)
        ctx.save_for_backward(out.dhidden, out.dweight, out.dbias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.buffered, ctx.spent = job.wanted[1] and job.weight_grad is not None, False
        ctx.mark_non_differentiable(*(x for x in (out.stats, out.logp, out.entropy) if x is not None))
        return out.loss, out.stats, out.logp, out.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        one = bool(upstream == 1)
        if ctx.buffered and ctx.spent:
            raise RuntimeError(SPENT)
        ctx.spent = True
        if ctx.buffered and not one:
            raise ValueError(
                f"weight_grad: the head's gradient is in it already, for an upstream gradient of 1, but {upstream.item():g} arrived; "
                "call backward on the loss itself and scale by token_weight instead"
            )
        scaled = (g if g is None or one else g * upstream for g in ctx.saved_tensors)
        return *(None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True)), None
