"""Log-probabilities and entropies from hidden states and the language-model head, without keeping any (T, V).

The forward is one product of T x H x V (head.py). The backward computes the logits again, chunk by chunk, and then the gradients of hidden
and weight (head_grad.py): 4 products in all, 3 with a frozen head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from actial_fast.kernels.chunks import Sums, cut, stride_of
from actial_fast.kernels.head import Head, make_head
from actial_fast.kernels.head_paths import backward, forward


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
        scaling = bias, temperature, options["softcap"]
        head = make_head(hidden, weight, targets, *scaling, options["vocab_parallel"], options["head"])
        logp, entropy = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
        for start, stop in cut(head, False, options["workspace_mb"]):
            _, logp[start:stop], entropy[start:stop] = forward(head.rows(start, stop), None)
        ctx.set_materialize_grads(False)
        by_row = isinstance(temperature, Tensor)
        ctx.save_for_backward(hidden, weight, targets, bias, temperature if by_row else None)
        ctx.number, ctx.options = None if by_row else temperature, options
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, by_row = ctx.saved_tensors
        options = ctx.options | {"bias": bias, "temperature": ctx.number if by_row is None else by_row}
        wanted = ctx.needs_input_grad[:3]
        return *linear_logprob_backward(hidden, weight, targets, g_logp, g_entropy, wanted, **options), *[None] * 3


def _gradients(
    head: Head, width: int, g_logp: Tensor | None, g_entropy: Tensor | None, wanted: tuple[bool, bool, bool], workspace_mb: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of hidden, weight and bias, of the caller's width, as computed."""
    g_logp = torch.zeros(len(head.hidden), device=head.hidden.device) if g_logp is None else g_logp.contiguous()
    g_entropy = None if g_entropy is None else g_entropy.contiguous()
    sums, chunks = Sums(head, wanted), cut(head, True, workspace_mb)
    scaled = workspace(head, chunks)
    for start, stop in chunks:
        rows = head.rows(start, stop)
        parts, _, entropy = forward(rows, scaled)
        g = None if g_entropy is None else g_entropy[start:stop]
        backward(rows, parts, entropy, g_logp[start:stop], g, sums.chunk(start, stop), compact=False)
    return sums.results(width)


def workspace(head: Head, chunks: list[tuple[int, int]]) -> Tensor:
    """Room for the scaled exponentials, and then the logits' gradient, of the largest chunk: (C, V) with aligned rows."""
    vocab, rows = head.weight.shape[0], max((stop - start for start, stop in chunks), default=0)
    rows = -(-rows // head.unit) * head.unit
    return torch.empty((rows, stride_of(vocab)), dtype=head.hidden.dtype, device=head.hidden.device)[:, :vocab]


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    workspace_mb: float,
    vocab_parallel: Any = None,
    head: str = "triton",
) -> tuple[Tensor, Tensor]:
    """See `ops.linear_logprob`, which has checked the arguments. A target outside [0, V) has a NaN log-prob. Returns two (T,) float32."""
    options = {"softcap": softcap, "workspace_mb": workspace_mb, "vocab_parallel": vocab_parallel, "head": head}
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
    vocab_parallel: Any = None,
    head: str = "triton",
) -> tuple[Tensor | None, ...]:
    """The gradients of hidden, weight and bias, where wanted and in their dtype, from those of log-probs and entropies (T,)."""
    made = make_head(hidden, weight, targets, bias, temperature, softcap, vocab_parallel, head, by_logp=g_entropy is None)
    gradients = _gradients(made, hidden.shape[1], g_logp, g_entropy, wanted, workspace_mb)
    return tuple(None if x is None else x.to(weight.dtype) for x in gradients)
