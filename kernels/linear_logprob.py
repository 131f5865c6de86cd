"""Log-probabilities and entropies from hidden states and the language-model head, without keeping any (T, V).

The forward is one product of T x H x V (head.py), with several targets a row K rows of the head more for each (selected.py); where the
distribution is cut to what a sampler keeps, the product and sweeps over its fp32 logits (truncated.py). The backward computes the logits
again, chunk by chunk, and then the gradients of hidden and weight (head_grad.py): 4 products in all, 3 with a frozen head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from actial_fast.kernels import truncated
from actial_fast.kernels.chunks import Sums, cut, stride_of
from actial_fast.kernels.head import Head, Softmax, make_head
from actial_fast.kernels.head_paths import backward, forward
from actial_fast.kernels.selected import Selected, selected_logits


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float | Tensor,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        head = _head(hidden, weight, targets, bias=bias, temperature=temperature, **options)
        logp, entropy = (torch.empty(shape, dtype=torch.float32, device=hidden.device) for shape in (head.targets.shape, hidden.shape[:1]))
        chunks = cut(head, False, options["workspace_mb"])
        room = _logits_room(head, chunks) if head.kept else None
        for start, stop in chunks:
            rows = head.rows(start, stop)
            if room is not None:
                statistics, _, logp[start:stop] = truncated.forward(rows, room)
                entropy[start:stop] = statistics[2]
            elif targets.ndim == 2:
                _, _, logp[start:stop], entropy[start:stop] = _several(rows, None)
            else:
                _, logp[start:stop], entropy[start:stop] = forward(rows, None)
        ctx.set_materialize_grads(False)
        by_row = isinstance(temperature, Tensor)
        ctx.save_for_backward(hidden, weight, targets, bias, temperature if by_row else None)
        ctx.number, ctx.options = None if by_row else temperature, options
        return logp.view_as(targets), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, by_row = ctx.saved_tensors
        options = ctx.options | {"bias": bias, "temperature": ctx.number if by_row is None else by_row}
        wanted = ctx.needs_input_grad[:3]
        return *linear_logprob_backward(hidden, weight, targets, g_logp, g_entropy, wanted, **options), *[None] * 3


def _head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    kept: Any,
    vocab_parallel: Any,
    workspace_mb: float,
    head: str,
    by_logp: bool = False,
) -> Head:
    """The arguments as kernels take them; one target a row is (T, 1) where the distribution is truncated."""
    targets = targets[:, None] if kept and targets.ndim == 1 else targets
    return make_head(hidden, weight, targets.contiguous(), bias, temperature, softcap, vocab_parallel, kept, head, by_logp)


def _several(rows: Head, scaled: Tensor | None) -> tuple[Softmax, Tensor, Tensor, Tensor]:
    """For targets (T, K): the softmax, the targets' logits and log-probs (T, K), and entropies (T,)."""
    parts, _, entropy = forward(replace(rows, targets=torch.full_like(rows.targets[:, 0], -1)), scaled)
    parts = parts._replace(chosen=torch.zeros_like(parts.top))  # of no target: not NaN, which would say that there is a wrong one
    chosen = selected_logits(rows)
    shifted = chosen - parts.top[:, None]
    if rows.parallel:
        here = rows.targets >= 0
        shifted, found = rows.parallel.sum(torch.where(here, shifted, 0), here.to(shifted.dtype))
        shifted = torch.where(found > 0, shifted, torch.nan)
    return parts, chosen, (shifted - parts.log_total[:, None]).clamp(max=0), entropy


def _gradients(
    head: Head, width: int, g_logp: Tensor | None, g_entropy: Tensor | None, wanted: tuple[bool, bool, bool], workspace_mb: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of hidden, weight and bias, of the caller's width, as computed."""
    g_logp = (
        torch.zeros(head.targets.shape, device=head.hidden.device) if g_logp is None else g_logp.reshape(head.targets.shape).contiguous()
    )
    g_entropy = None if g_entropy is None else g_entropy.contiguous()
    sums, chunks = Sums(head, wanted), cut(head, True, workspace_mb)
    room = _logits_room(head, chunks) if head.kept else None
    scaled = room[:, : len(head.weight)] if room is not None and head.hidden.dtype == torch.float32 else workspace(head, chunks)
    for start, stop in chunks:
        rows, selected = head.rows(start, stop), None
        g, h = g_logp[start:stop], None if g_entropy is None else g_entropy[start:stop]
        if room is not None:
            statistics, chosen, logp = truncated.forward(rows, room)
            selected = Selected.of(chosen, logp, g, truncated=True)
            truncated.backward(rows, statistics, selected, h, room, scaled, sums.chunk(start, stop))
            continue
        if head.targets.ndim == 2:
            parts, chosen, logp, entropy = _several(rows, scaled)
            selected = Selected.of(chosen, logp, g, truncated=False)
        else:
            parts, _, entropy = forward(rows, scaled)
        backward(rows, parts, entropy, g, h, sums.chunk(start, stop), compact=False, selected=selected)
    return sums.results(width)


def workspace(head: Head, chunks: list[tuple[int, int]]) -> Tensor:
    """Room for the scaled exponentials, and then the logits' gradient, of the largest chunk: (C, V) with aligned rows."""
    vocab, rows = head.weight.shape[0], -(-_most(chunks) // head.unit) * head.unit
    return torch.empty((rows, stride_of(vocab)), dtype=head.hidden.dtype, device=head.hidden.device)[:, :vocab]


def _logits_room(head: Head, chunks: list[tuple[int, int]]) -> Tensor:
    """Room for the float32 logits of the largest chunk."""
    return torch.empty((_most(chunks), truncated.padded_vocab(len(head.weight))), dtype=torch.float32, device=head.hidden.device)


def _most(chunks: list[tuple[int, int]]) -> int:
    return max((stop - start for start, stop in chunks), default=0)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    workspace_mb: float,
    kept: Any = None,
    vocab_parallel: Any = None,
    head: str = "triton",
) -> tuple[Tensor, Tensor]:
    """See `ops.linear_logprob`, which has checked the arguments. A target outside [0, V) has a NaN log-prob. Returns float32."""
    options = {"softcap": softcap, "workspace_mb": workspace_mb, "kept": kept, "vocab_parallel": vocab_parallel, "head": head}
    return LinearLogprob.apply(hidden, weight, bias, targets, temperature, options)


def linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    wanted: tuple[bool, bool, bool],
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    workspace_mb: float,
    kept: Any = None,
    vocab_parallel: Any = None,
    head: str = "triton",
) -> tuple[Tensor | None, ...]:
    """The gradients of hidden, weight and bias, where wanted and in their dtype, from those of log-probs and entropies."""
    options = {"softcap": softcap, "workspace_mb": workspace_mb, "kept": kept, "vocab_parallel": vocab_parallel, "head": head}
    made = _head(hidden, weight, targets, bias=bias, temperature=temperature, **options, by_logp=g_entropy is None)
    gradients = _gradients(made, hidden.shape[1], g_logp, g_entropy, wanted, workspace_mb)
    return tuple(None if x is None else x.to(weight.dtype) for x in gradients)
