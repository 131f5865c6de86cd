"""The operators that start from hidden states and a head: log-probs, the policy losses, cross-entropy.

T rows, H hidden size, V vocabulary. Log-probs come with a derivative of their own; a loss returns its gradients beside it, and
`with_gradients` ties them to it. wanted: which of hidden, weight and bias need one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from actial_fast.ops import chunked
from actial_fast.ops.chunked_logits import compute_dtype
from actial_fast.ops.library import differentiable_once, filled, flat, implementation, joined, operator, spec_of, split
from actial_fast.ops.reference import STATS
from actial_fast.ops.spec import GRPOSpec, Kept

# ---- log-probs


def _logprob_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(hidden.new_empty(shape, dtype=compute_dtype(hidden)) for shape in (targets.shape, hidden.shape[:1]))


@operator(_logprob_shapes)
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    softcap: float | None,
    kept: Sequence[float] | None,
    workspace_mb: float,
) -> tuple[Tensor, Tensor]:
    scaling = {"bias": bias, "temperature": joined(temperature, row_temperature), "softcap": softcap, "kept": _kept(kept)}
    run = implementation(hidden, "linear_logprob", chunked.linear_logprob)
    return run(hidden, weight, targets, **scaling, workspace_mb=workspace_mb)


def _kept(numbers: Sequence[float] | None) -> Kept | None:
    return None if numbers is None else Kept(int(numbers[0]), *numbers[1:])


def _logprob_gradient_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    inputs = (x if wanted else None for x, wanted in zip((hidden, weight, bias), rest[-1], strict=True))
    return filled(hidden, *(None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs))


@operator(_logprob_gradient_shapes)
def _linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    softcap: float | None,
    kept: Sequence[float] | None,
    workspace_mb: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    scaling = {"bias": bias, "temperature": joined(temperature, row_temperature), "softcap": softcap, "kept": _kept(kept)}
    run = implementation(hidden, "linear_logprob", chunked.linear_logprob_backward)
    gradients = run(hidden, weight, targets, g_logp, g_entropy, tuple(wanted), **scaling, workspace_mb=workspace_mb)
    dhidden, dweight, dbias = filled(hidden, *gradients)
    return dhidden, dweight, dbias


def _save_logprob(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, temperature, row_temperature, softcap, kept, workspace_mb = inputs
    ctx.save_for_backward(*tensors, row_temperature)
    ctx.numbers = temperature, softcap, kept, workspace_mb
    ctx.set_materialize_grads(False)


@differentiable_once
def _logprob_autograd(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, row_temperature = ctx.saved_tensors
    temperature, *others = ctx.numbers
    wanted = list(ctx.needs_input_grad[:3])
    gradients = _linear_logprob_backward(*tensors, g_logp, g_entropy, temperature, row_temperature, *others, wanted)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *[None] * 6


torch.library.register_autograd(_linear_logprob.name(), _logprob_autograd, setup_context=_save_logprob)


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
) -> tuple[Tensor, Tensor]:
    """As `ops.linear_logprob`."""
    numbers = None if kept is None else [float(x) for x in kept]
    return _linear_logprob(hidden, weight, bias, targets, *split(temperature), softcap, numbers, workspace_mb)


# ---- losses whose gradients are computed with them


def _loss_gradient_shapes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, weight_grad: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    kept = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype  # a loss scale is yet to come
    dtype, wanted = compute_dtype(hidden), (wanted[0], wanted[1] and weight_grad is None, wanted[2])
    kinds = zip((hidden, weight, bias), (kept, dtype, dtype), wanted, strict=True)
    return filled(hidden, *(hidden.new_empty(x.shape, dtype=d) if want and x is not None else None for x, d, want in kinds))


def _grpo_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    rows = (hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden)) for _ in range(2))
    statistics = hidden.new_empty(len(STATS), dtype=torch.float32)
    return _scalar(hidden), statistics, *rows, *_loss_gradient_shapes(hidden, weight, bias, rest[-2], rest[-1])


def _scalar(hidden: Tensor) -> Tensor:
    return hidden.new_empty((), dtype=compute_dtype(hidden))


@operator(_grpo_shapes, "weight_grad")
def _linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    token_weight: Tensor,
    cu_seqlens: Tensor | None,
    sampler_logp: Tensor | None,
    policy_mask: Tensor | None,
    entropy_weight: Tensor | None,
    words: str,
    numbers: Sequence[float],
    temperature: float,
    row_temperature: Tensor | None,
    softcap: float | None,
    skip_zero_rows: bool,
    workspace_mb: float,
    weight_grad: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = implementation(hidden, "linear_grpo", chunked.linear_grpo_loss)
    results = run(
        hidden,
        weight,
        targets,
        advantages,
        old_logp,
        ref_logp,
        spec_of(GRPOSpec, words, *numbers),
        token_weight=token_weight,
        cu_seqlens=cu_seqlens,
        sampler_logp=sampler_logp,
        policy_mask=policy_mask,
        entropy_weight=entropy_weight,
        bias=bias,
        temperature=joined(temperature, row_temperature),
        softcap=softcap,
        weight_grad=weight_grad,
        skip_zero_rows=skip_zero_rows,
        workspace_mb=workspace_mb,
        wanted=tuple(wanted),
    )
    loss, stats, logp, entropy, dhidden, dweight, dbias = filled(hidden, *results)
    return loss, stats, logp, entropy, dhidden, dweight, dbias


def _cross_entropy_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return _scalar(hidden), *_loss_gradient_shapes(hidden, weight, bias, rest[-2], rest[-1])


@operator(_cross_entropy_shapes, "weight_grad")
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weight: Tensor,
    softcap: float | None,
    workspace_mb: float,
    weight_grad: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = implementation(hidden, "linear_grpo", chunked.linear_cross_entropy)
    more = {"bias": bias, "softcap": softcap, "weight_grad": weight_grad, "workspace_mb": workspace_mb, "wanted": tuple(wanted)}
    loss, dhidden, dweight, dbias = filled(hidden, *run(hidden, weight, targets, token_weight, **more))
    return loss, dhidden, dweight, dbias


def _loss_shapes(loss: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(loss)


@operator(_loss_shapes)
def _with_gradients(
    loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dhidden: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    wanted: Sequence[bool],
    buffered: bool,
) -> Tensor:
    """The loss, whose gradients by hidden, weight and bias are known. buffered: the weight's is where it belongs already."""
    return loss.clone()


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, hidden, weight, bias, *gradients, ctx.wanted, ctx.buffered = inputs
    ctx.save_for_backward(*gradients)
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]


@differentiable_once
def _scaled_gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.buffered and upstream.is_cuda:  # where a failed assertion would end the process's CUDA context: NaN, as outside of the compiler
        upstream = torch.where(upstream == 1, upstream, torch.nan)
    elif ctx.buffered:
        torch._assert_async(upstream == 1, "with weight_grad the loss must be backpropagated as it is: scale token_weight instead")
    wanted = ctx.wanted[0], ctx.wanted[1] and not ctx.buffered, ctx.wanted[2]
    kinds = zip(ctx.saved_tensors, ctx.dtypes, wanted, strict=True)
    return None, *((g * upstream).to(dtype) if want else None for g, dtype, want in kinds), *[None] * 5


torch.library.register_autograd(_with_gradients.name(), _scaled_gradients, setup_context=_save_gradients)


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
    sampler_logp: Tensor | None,
    policy_mask: Tensor | None,
    entropy_weight: Tensor | None,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    weight_grad: Tensor | None,
    skip_zero_rows: bool,
    workspace_mb: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `ops.linear_grpo_loss`."""
    head, wanted = (hidden, weight, bias), _wanted(hidden, weight, bias)
    rows = (targets, advantages, old_logp, ref_logp, token_weight, cu_seqlens, sampler_logp, policy_mask, entropy_weight)
    numbers = (*flat(spec), *split(temperature), softcap, skip_zero_rows, workspace_mb)
    loss, stats, logp, entropy, *gradients = _linear_grpo_loss(*_detached(*head), *rows, *numbers, weight_grad, wanted)
    if any(wanted):
        loss = _with_gradients(loss, *head, *gradients, wanted, weight_grad is not None)
    return loss, stats, logp, entropy


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
) -> Tensor:
    """As `ops.linear_cross_entropy`."""
    head, wanted = (hidden, weight, bias), _wanted(hidden, weight, bias)
    loss, *gradients = _linear_cross_entropy(*_detached(*head), targets, token_weight, softcap, workspace_mb, weight_grad, wanted)
    return _with_gradients(loss, *head, *gradients, wanted, weight_grad is not None) if any(wanted) else loss


def _wanted(*inputs: Tensor | None) -> list[bool]:
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]


def _detached(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.detach() for x in tensors)
