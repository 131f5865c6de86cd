"""`linear_kl` on the CPU: chunks of rows in plain torch, so that (T, V) never exists; float64 for float64 inputs, else float32.

T rows, H and G hidden sizes of the two models, V vocabulary, C rows of a chunk. The maths is in `reference.linear_kl`; by the logits

    dKL/dz_p = p ((log p - log q) - KL),  dKL/dz_q = q - p

Products of T x V: 2 forward; backward 2 again and one for each gradient that is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from actial_fast.ops.chunked_logits import zero_rows
from actial_fast.ops.chunks import blocks
from actial_fast.ops.library import joined, split
from actial_fast.ops.parallel import VocabParallel


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, options: dict[str, Any]) -> Tensor:
        inputs = hidden, weight, ref_hidden, ref_weight
        kl, _ = linear_kl_forward(*inputs, **options)
        number, by_row = split(options["temperature"])
        ctx.save_for_backward(*inputs, kl, by_row)
        ctx.options = options | {"temperature": number}
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ref_hidden, ref_weight, kl, by_row = ctx.saved_tensors
        options = ctx.options | {"temperature": joined(ctx.options["temperature"], by_row)}
        wanted = ctx.needs_input_grad[:4]
        return *linear_kl_backward(grad, hidden, weight, ref_hidden, ref_weight, kl, None, wanted, **options), None


def linear_kl_forward(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    temperature: float | Tensor,
    workspace_mb: float,
    vocab_parallel: VocabParallel | None = None,
) -> tuple[Tensor, None]:
    """KL (T,), unknown to autograd, and nothing: the backward pass on the CPU needs no statistics of the rows."""
    inputs = hidden, weight, ref_hidden, ref_weight
    kl = hidden.new_empty(hidden.shape[0], dtype=torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32)
    chunks, block = _plan(*inputs, kl.dtype, workspace_mb, vocab_parallel)
    for rows, log_p, log_q, p in _log_probs(*inputs, temperature, chunks, block, kl.dtype, vocab_parallel):
        torch.exp(log_p, out=p)
        value = log_p.sub_(log_q).mul_(p).sum(-1)
        if vocab_parallel:
            (value,) = vocab_parallel.sum(value)
        kl[rows] = value.clamp_(min=0)  # below 0 by rounding only
    return kl, None


def linear_kl_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    kl: Tensor,
    stats: None,
    wanted: Sequence[bool],
    *,
    temperature: float | Tensor,
    workspace_mb: float,
    vocab_parallel: VocabParallel | None = None,
) -> list[Tensor | None]:
    """The gradients of sum(grad * KL) by the four inputs, where wanted and in their dtypes."""
    inputs = hidden, weight, ref_hidden, ref_weight
    chunks, block = _plan(*inputs, kl.dtype, workspace_mb, vocab_parallel)
    dtypes = [kl.dtype if i % 2 else x.dtype for i, x in enumerate(inputs)]  # the heads' gradients are sums over chunks
    grads = [torch.zeros(x.shape, dtype=dtypes[i], device=x.device) if wanted[i] else None for i, x in enumerate(inputs)]
    for rows, log_p, log_q, p in _log_probs(*inputs, temperature, chunks, block, kl.dtype, vocab_parallel):
        factor = (grad[rows] / (temperature[rows] if isinstance(temperature, Tensor) else temperature))[:, None]
        idle = grad[rows] == 0
        torch.exp(log_p, out=p)
        if wanted[0] or wanted[1]:
            by_logits = zero_rows(log_p.sub_(log_q).sub_(kl[rows, None]).mul_(p).mul_(factor), idle)
            _add_gradients(by_logits, rows, hidden, weight, grads[0], grads[1], idle, block)
        if wanted[2] or wanted[3]:
            by_logits = zero_rows(log_q.exp_().sub_(p).mul_(factor), idle)
            _add_gradients(by_logits, rows, ref_hidden, ref_weight, grads[2], grads[3], idle, block)
    return [None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]


def _add_gradients(
    by_logits: Tensor,
    rows: slice,
    states: Tensor,
    head: Tensor,
    by_states: Tensor | None,
    by_head: Tensor | None,
    idle: Tensor,
    block: int,
) -> None:
    if by_states is not None:
        total = by_logits.new_zeros(len(by_logits), head.shape[1])
        for part, weights in blocks(head, block, by_logits.dtype):
            torch.addmm(total, by_logits[:, part], weights, out=total)
        by_states[rows] = total
    if by_head is not None:
        torch.addmm(by_head, by_logits.T, states[rows].to(by_logits.dtype).masked_fill(idle[:, None], 0), out=by_head)


def _log_probs(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    temperature: float | Tensor,
    chunks: list[slice],
    block: int,
    dtype: torch.dtype,
    parallel: VocabParallel | None,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Chunk by chunk: its rows, log p and log q (C, V) and a third array of that size, all of which the caller may overwrite."""
    workspace = hidden.new_empty(3, chunks[0].stop if chunks else 0, weight.shape[0], dtype=dtype)
    for rows in chunks:
        log_p, log_q, spare = workspace[:, : rows.stop - rows.start]
        for states, head, out in ((hidden[rows].to(dtype), weight, log_p), (ref_hidden[rows].to(dtype), ref_weight, log_q)):
            for part, weights in blocks(head, block, dtype):
                torch.mm(states, weights.T, out=out[:, part])
            out.div_(temperature[rows, None] if isinstance(temperature, Tensor) else temperature)
            peak = out.amax(-1, keepdim=True)
            out.sub_(parallel.max(peak) if parallel else peak)  # the peak first: logits of -1e4 keep their digits
            total = torch.exp(out, out=spare).sum(-1, keepdim=True)
            if parallel:
                (total,) = parallel.sum(total)
            out.sub_(total.log_())
        yield rows, log_p, log_q, spare


def _plan(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    dtype: torch.dtype,
    workspace_mb: float,
    parallel: VocabParallel | None,
) -> tuple[list[slice], int]:
    """The chunks of rows and the block of the vocabulary that is converted at once, so that both fit the workspace."""
    total, vocab = hidden.shape[0], parallel.largest if parallel else weight.shape[0]
    converted = max((x.shape[1] for x in (weight, ref_weight) if x.dtype != dtype), default=0)
    share = 0.75 if converted else 1.0  # of the workspace for rows; the rest holds a block of the head in the working dtype
    budget = workspace_mb * 2**20 / dtype.itemsize
    row = 3 * vocab + 2 * (hidden.shape[1] + ref_hidden.shape[1])  # its states and their gradients too
    if share * budget < row:
        need = math.ceil(row * dtype.itemsize / share / 2**20 * 100) / 100
        raise ValueError(f"workspace_mb: {workspace_mb} is too small for one row; with V={vocab} it takes workspace_mb={need:g}")
    step = int(share * budget / row)
    block = max(1, min(vocab, int((1 - share) * budget / converted))) if converted else vocab
    return [slice(start, min(start + step, total)) for start in range(0, total, step)], block


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    workspace_mb: float = 700,
    vocab_parallel: VocabParallel | None = None,
) -> Tensor:
    """KL(p || q) per row, p from (hidden, weight) and q from (ref_hidden, ref_weight): see `reference.linear_kl`.

    hidden (T, H) and weight (V, H) of one dtype, ref_hidden (T, G) and ref_weight (V, G) of one dtype; temperature a number or (T,), which
    gets no gradient -> (T,) float32 (float64 if any input is), differentiable (once) in all four inputs. Not more than workspace_mb MiB are
    held above inputs, outputs and the heads' gradients in float32. ValueError when that holds no row; else arguments are taken as checked.
    """
    options = {"temperature": temperature, "workspace_mb": workspace_mb, "vocab_parallel": vocab_parallel}
    return _LinearKL.apply(hidden, weight, ref_hidden, ref_weight, options)
