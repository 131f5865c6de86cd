"""The operators beside those of `operators`: exact KL between two heads, log-probs from logits, advantages of groups.

T rows, H and G hidden sizes of two models, V vocabulary, N rewards, R reward functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from actial_fast.ops import chunked_kl, chunked_logits, library, reference
from actial_fast.ops.chunked_logits import compute_dtype
from actial_fast.ops.library import differentiable_once, filled, flat, implementation, joined, operator, spec_of, split
from actial_fast.ops.spec import AdvantageSpec, GRPOSpec

# ---- exact KL


def _kl_shapes(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(compute_dtype(hidden), compute_dtype(ref_hidden))
    return hidden.new_empty(hidden.shape[0], dtype=dtype), _kernels_only(hidden, 4)


def _kernels_only(like: Tensor, *shape: int) -> Tensor:
    """What the kernels keep of each row for their backward pass; empty on the CPU, which computes it again."""
    return like.new_empty((like.shape[0], *shape), dtype=torch.float32) if library.on_gpu(like) and like.shape[0] else like.new_empty(0)


@operator(_kl_shapes)
def _linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    workspace_mb: float,
) -> tuple[Tensor, Tensor]:
    run = implementation(hidden, "linear_kl", chunked_kl.linear_kl_forward)
    options = {"temperature": joined(temperature, row_temperature), "workspace_mb": workspace_mb}
    kl, stats = filled(hidden, *run(hidden, weight, ref_hidden, ref_weight, **options))
    return kl, stats


def _kl_gradient_shapes(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return filled(grad, *(x.new_empty(x.shape) if want else None for x, want in zip(rest[:4], rest[-1], strict=True)))


@operator(_kl_gradient_shapes)
def _linear_kl_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    kl: Tensor,
    stats: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    workspace_mb: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = implementation(hidden, "linear_kl", chunked_kl.linear_kl_backward)
    options = {"temperature": joined(temperature, row_temperature), "workspace_mb": workspace_mb}
    gradients = run(grad, hidden, weight, ref_hidden, ref_weight, kl, stats, tuple(wanted), **options)
    dhidden, dweight, dref_hidden, dref_weight = filled(grad, *gradients)
    return dhidden, dweight, dref_hidden, dref_weight


def _save_kl(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *heads, temperature, row_temperature, workspace_mb = inputs
    ctx.save_for_backward(*heads, *output, row_temperature)
    ctx.numbers = temperature, workspace_mb
    ctx.mark_non_differentiable(output[1])


@differentiable_once
def _kl_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, row_temperature = ctx.saved_tensors
    temperature, workspace_mb = ctx.numbers
    wanted = list(ctx.needs_input_grad[:4])
    gradients = _linear_kl_backward(grad, *tensors, temperature, row_temperature, workspace_mb, wanted)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *[None] * 3


torch.library.register_autograd(_linear_kl.name(), _kl_gradients, setup_context=_save_kl)


def linear_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, *, temperature: float | Tensor, workspace_mb: float
) -> Tensor:
    """As `ops.linear_kl`."""
    return _linear_kl(hidden, weight, ref_hidden, ref_weight, *split(temperature), workspace_mb)[0]


# ---- from logits


def _logits_shapes(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    rows = (logits.new_empty(logits.shape[0], dtype=compute_dtype(logits)) for _ in range(2))
    return *rows, *(_kernels_only(logits) for _ in range(2))


@operator(_logits_shapes)
def _logprob_from_logits(
    logits: Tensor, targets: Tensor, temperature: float, row_temperature: Tensor | None, inplace_backward: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = implementation(logits, "logits", chunked_logits.logits_forward)
    logp, entropy, peak, log_total = filled(logits, *run(logits, targets, temperature=joined(temperature, row_temperature)))
    return logp, entropy, peak, log_total


@operator(lambda *_: None, "out")
def _logprob_from_logits_backward(
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor,
    peak: Tensor,
    log_total: Tensor,
    g_logp: Tensor,
    g_entropy: Tensor,
    out: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
) -> None:
    run = implementation(logits, "logits", chunked_logits.logits_backward)
    run(logits, targets, entropy, peak, log_total, g_logp, g_entropy, out, temperature=joined(temperature, row_temperature))


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, ctx.temperature, row_temperature, ctx.inplace = inputs
    ctx.save_for_backward(logits, targets, *output[1:], row_temperature)
    ctx.mark_non_differentiable(*output[2:])


@differentiable_once
def _logits_gradient(ctx: Any, g_logp: Tensor, g_entropy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    logits, *tensors, row_temperature = ctx.saved_tensors
    out = logits.detach() if ctx.inplace else torch.empty_like(logits)
    _logprob_from_logits_backward(logits, *tensors, g_logp, g_entropy, out, ctx.temperature, row_temperature)
    return out, None, None, None, None


torch.library.register_autograd(_logprob_from_logits.name(), _logits_gradient, setup_context=_save_logits)


def logprob_from_logits(logits: Tensor, targets: Tensor, *, temperature: float | Tensor, inplace_backward: bool) -> tuple[Tensor, Tensor]:
    """As `ops.logprob_from_logits`."""
    logp, entropy, *_ = _logprob_from_logits(logits, targets, *split(temperature), inplace_backward)
    return logp, entropy


def grpo_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    spec: GRPOSpec,
    *,
    token_weight: Tensor,
    cu_seqlens: Tensor | None,
    temperature: float | Tensor,
    inplace: bool,
    **named: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `ops.grpo_loss_from_logits`: between the two passes over the logits there are rows only, which the compiler fuses itself."""
    logp, entropy = logprob_from_logits(logits, targets, temperature=temperature, inplace_backward=inplace)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(logits.device, non_blocking=True)
    loss, stats = reference.grpo_terms(
        logp, entropy, advantages, old_logp, ref_logp, spec, token_weight=token_weight, cu_seqlens=cu_seqlens, **named
    )
    return loss, stats, logp.detach(), entropy.detach()


def token_kl(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """As `ops.token_kl`: a few elementwise steps, which the compiler fuses with their surroundings."""
    return chunked_logits.token_kl(logp, ref_logp, kind)


# ---- advantages


@operator(lambda rewards, *_: rewards.new_empty(rewards.shape[0], dtype=compute_dtype(rewards)))
def _group_advantages(rewards: Tensor, groups: Tensor, weights: Tensor | None, words: str, numbers: Sequence[float]) -> Tensor:
    run = implementation(rewards, "advantages", reference.group_advantages)
    return run(rewards, groups, spec_of(AdvantageSpec, words, *numbers), weights=weights)


def group_advantages(rewards: Tensor, groups: Tensor, spec: AdvantageSpec, *, weights: Tensor | None) -> Tensor:
    """As `ops.group_advantages`."""
    return _group_advantages(rewards, groups, weights, *flat(spec))
