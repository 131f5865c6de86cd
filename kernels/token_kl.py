"""Per-token estimates of KL(policy || reference) from two log-probs: k1, k2, k3 (J. Schulman, "Approximating KL divergence", 2020).

T tokens. With d = min(ref_logp - logp, MAX_LOG_RATIO):
    forward   kl = -d | d^2 / 2 | expm1(d) - d
    backward  d kl / d ref_logp = -1 | d | expm1(d) below the bound and 0 beyond it; d kl / d logp is minus that

Memory-bound: float32 moves 12 bytes a token forward (two reads, one write) and 12 to 20 backward (one or two gradients, the upstream
gradient when it is not one number), in one launch each. Everything is computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from actial_fast.kernels.kl_math import kl_estimate

KIND = {"token_kl_forward_kernel": "memory", "token_kl_backward_kernel": "memory"}
BLOCK, WARPS = 1024, 4  # 8 tokens a thread: two 16-byte accesses in float32, one in 16-bit types
PIECE = tl.constexpr(128)  # the last block goes in pieces: a mask of an arbitrary T cuts 16-byte accesses into single ones


@triton.jit
def _forward_block(logp, ref_logp, kl, i, mask, ESTIMATOR: tl.constexpr):
    log_ratio = tl.load(ref_logp + i, mask=mask).to(tl.float32) - tl.load(logp + i, mask=mask).to(tl.float32)
    value, _ = kl_estimate(log_ratio, ESTIMATOR)
    tl.store(kl + i, value, mask=mask)


@triton.jit
def token_kl_forward_kernel(logp, ref_logp, kl, T, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= T:
        _forward_block(logp, ref_logp, kl, start + tl.arange(0, BLOCK), None, ESTIMATOR)
    else:
        for piece in range(start, T, PIECE):
            i = piece + tl.arange(0, PIECE)
            _forward_block(logp, ref_logp, kl, i, i < T, ESTIMATOR)


@triton.jit
def _backward_block(
    grad, logp, ref_logp, grad_logp, grad_ref_logp, i, mask, ESTIMATOR: tl.constexpr, ONE_GRAD: tl.constexpr
):  # a gradient that is not wanted is None
    log_ratio = tl.load(ref_logp + i, mask=mask).to(tl.float32) - tl.load(logp + i, mask=mask).to(tl.float32)
    _, slope = kl_estimate(log_ratio, ESTIMATOR)
    slope *= tl.load(grad) if ONE_GRAD else tl.load(grad + i, mask=mask)
    if grad_logp is not None:
        tl.store(grad_logp + i, -slope, mask=mask)
    if grad_ref_logp is not None:
        tl.store(grad_ref_logp + i, slope, mask=mask)


@triton.jit
def token_kl_backward_kernel(
    grad, logp, ref_logp, grad_logp, grad_ref_logp, T, ESTIMATOR: tl.constexpr, ONE_GRAD: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= T:
        _backward_block(grad, logp, ref_logp, grad_logp, grad_ref_logp, start + tl.arange(0, BLOCK), None, ESTIMATOR, ONE_GRAD)
    else:
        for piece in range(start, T, PIECE):
            i = piece + tl.arange(0, PIECE)
            _backward_block(grad, logp, ref_logp, grad_logp, grad_ref_logp, i, i < T, ESTIMATOR, ONE_GRAD)


def token_kl_forward(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """The estimate per token: two contiguous (T,) of a floating dtype -> (T,) float32."""
    kl = torch.empty_like(logp, dtype=torch.float32)
    if kl.numel():
        grid = (triton.cdiv(kl.numel(), BLOCK),)
        token_kl_forward_kernel[grid](logp, ref_logp, kl, T=kl.numel(), ESTIMATOR=kind, BLOCK=BLOCK, num_warps=WARPS)
    return kl


def token_kl_backward(
    grad: Tensor, logp: Tensor, ref_logp: Tensor, kind: str, *, need_logp: bool = True, need_ref_logp: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of logp and ref_logp that are needed, in their dtypes; grad (T,) float32, contiguous or one number expanded."""
    one_grad = grad.stride() == (0,)  # what kl.sum() and kl.mean() hand down
    grad_logp = torch.empty_like(logp) if need_logp else None
    grad_ref_logp = torch.empty_like(ref_logp) if need_ref_logp else None
    if logp.numel():
        token_kl_backward_kernel[(triton.cdiv(logp.numel(), BLOCK),)](
            grad if one_grad else grad.contiguous(),
            logp,
            ref_logp,
            grad_logp,
            grad_ref_logp,
            T=logp.numel(),
            ESTIMATOR=kind,
            ONE_GRAD=one_grad,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return grad_logp, grad_ref_logp


class TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
        logp, ref_logp = logp.contiguous(), ref_logp.contiguous()
        ctx.save_for_backward(logp, ref_logp)
        ctx.kind = kind
        return token_kl_forward(logp, ref_logp, kind)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_logp, need_ref_logp, _ = ctx.needs_input_grad
        logp, ref_logp = ctx.saved_tensors
        return *token_kl_backward(grad, logp, ref_logp, ctx.kind, need_logp=need_logp, need_ref_logp=need_ref_logp), None


def token_kl(logp: Tensor, ref_logp: Tensor, kind: str = "k3") -> Tensor:
    """An estimate of KL(policy || reference) per token in nats: two (T,) of a floating dtype -> (T,) float32.

    kind is "k1", "k2" or "k3". Differentiable once in logp and ref_logp, whose gradients have their dtypes. Assumes checked inputs.
    """
    return TokenKL.apply(logp, ref_logp, kind)
