"""The softmax of a chunk of logits and its gradient, and the CPU path of the ops that start from logits.

T rows, V vocabulary, C rows of a chunk. With logits x, z = softcap * tanh(x / softcap) / temperature, p = softmax(z), and the coefficients
g = d loss / d logp and h = d loss / d entropy of each row:

    dz = g * (onehot(target) - p) - h * p * (log p + entropy)        dx = dz * (1 - tanh(x / softcap)^2) / temperature

Computed in float32, in float64 for float64 inputs, in place as far as it goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actial_fast.ops import reference
from actial_fast.ops.library import differentiable_once, joined, split
from actial_fast.ops.parallel import VocabParallel
from actial_fast.ops.spec import GRPOSpec

BUFFERS = 3  # (C, V) tensors alive at once: logits, exponentials, one temporary
WORKSPACE = 64 * 2**20  # bytes of them when the logits are given


def compute_dtype(x: Tensor) -> torch.dtype:
    """What is computed in for inputs like x: float64 for float64, float32 for the rest."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass
class Softmax:
    """A chunk's distribution: z (C, V) logits minus their row's peak, e = exp(z); peak, total = sum of e, (C, 1); entropy (C,); of the
    targets' shape, (C,) or (C, K): logp, and valid, whether the target is a token."""

    z: Tensor
    e: Tensor
    peak: Tensor
    total: Tensor
    logp: Tensor
    entropy: Tensor | None
    valid: Tensor

    @classmethod
    def of(cls, z: Tensor, targets: Tensor, entropy: bool, parallel: VocabParallel | None = None) -> Softmax:
        """Of scaled logits (C, V), which it takes over. parallel: they are a part of the vocabulary's, and a target of -1 is elsewhere."""
        peak = z.amax(-1, keepdim=True)
        if parallel:
            parallel.max(peak)
        z.sub_(peak)
        e = z.exp()
        index, valid = reference.in_vocabulary(targets, z.shape[1])
        total, chosen = e.sum(-1, keepdim=True), z.gather(1, reference.columns(index))
        z.clamp_(min=-1e4)  # -inf times a probability of 0 is 0 here; exp of anything below is 0 already
        moment = (e * z).sum(-1, keepdim=True) if entropy else torch.zeros_like(total)
        if parallel:
            found = reference.columns(valid).to(z.dtype)
            total, chosen, moment, found = parallel.sum(total, chosen.masked_fill_(found == 0, 0), moment, found)
            valid = found.view_as(targets) > 0
        logp = torch.where(valid, (chosen - total.log()).view_as(targets), torch.nan)
        h = (total.log() - moment / total).squeeze(1) if entropy else None
        return cls(z, e, peak, total, logp, h, valid)

    def gradient(self, targets: Tensor, g: Tensor, h: Tensor | None, temperature: float | Tensor, softcap: float | None) -> Tensor:
        """dx (C, V) for the coefficients g, of the targets' shape, and h (C,) of log-prob and entropy; temperature a number or (C, 1).
        Consumes z and e."""
        index, here = (reference.columns(x) for x in reference.in_vocabulary(targets, self.z.shape[1]))
        slope = None
        if softcap is not None:
            slope = (self.z + self.peak).mul_(temperature / softcap).square_().neg_().add_(1)
            chosen = (reference.columns(self.logp) + self.total.log() + self.peak) * (temperature / softcap)  # z stops at -1e4
            slope.scatter_(1, index, torch.where(here & chosen.isfinite(), 1 - chosen.square(), slope.gather(1, index)))
        p = self.e.div_(self.total)
        g = reference.columns(torch.where(self.valid | (g == 0), g, torch.nan)) / temperature
        share = g.sum(1, keepdim=True)
        if h is None:
            out = p.mul_(-share)
        else:
            assert self.entropy is not None, "it was asked for, as its coefficient says"
            h = h[:, None] / temperature
            out = self.z.add_(self.entropy[:, None] - self.total.log()).mul_(h).add_(share).mul_(p).neg_()
        del self.z, self.e
        out.scatter_add_(1, index, torch.where(here, g, 0))
        return out if slope is None else out.mul_(slope)


def token_kl(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """As `ops.token_kl`."""
    return reference.token_kl(logp.to(compute_dtype(logp)), ref_logp.to(compute_dtype(logp)), kind)


def logprob_from_logits(logits: Tensor, targets: Tensor, *, temperature: float | Tensor, inplace_backward: bool) -> tuple[Tensor, Tensor]:
    """As `ops.logprob_from_logits`: reads the logits once, and once more in the backward pass."""
    return _LogitsLogprob.apply(logits, targets, temperature, inplace_backward)


def grpo_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    spec: GRPOSpec,
    *,
    token_weight: Tensor,
    temperature: float | Tensor,
    inplace: bool,
    **named: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `ops.grpo_loss_from_logits`: only vectors (T,) stand between the two passes over the logits."""
    logp, entropy = logprob_from_logits(logits, targets, temperature=temperature, inplace_backward=inplace)
    loss, stats = reference.grpo_terms(logp, entropy, advantages, old_logp, ref_logp, spec, token_weight=token_weight, **named)
    return loss, stats, logp.detach(), entropy.detach()


class _LogitsLogprob(torch.autograd.Function):
    """Keeps the logits (T, V) that its caller holds anyway."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float | Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
        logp, entropy, *_ = logits_forward(logits, targets, temperature=temperature)
        ctx.number, by_row = split(temperature)
        ctx.save_for_backward(logits, targets, by_row)
        ctx.inplace = inplace
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, by_row = ctx.saved_tensors
        temperature = joined(ctx.number, by_row)
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        logits_backward(logits, targets, None, None, None, g_logp, g_entropy, out, temperature=temperature)
        return out, None, None, None


def logits_forward(logits: Tensor, targets: Tensor, *, temperature: float | Tensor) -> tuple[Tensor, Tensor, None, None]:
    """Log-probs and entropies (T,), unknown to autograd; then nothing, where the kernels leave what their backward pass needs."""
    logp, entropy = (torch.empty(len(logits), dtype=compute_dtype(logits), device=logits.device) for _ in range(2))
    for rows in _logits_chunks(logits):
        logp[rows], entropy[rows] = _values(logits, targets, temperature, rows)
    return logp, entropy, None, None


def logits_backward(
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor | None,
    peak: None,
    log_total: None,
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    out: Tensor,
    *,
    temperature: float | Tensor,
) -> None:
    """Writes the gradient of the logits to `out` (T, V), which may be the logits; everything is computed from these again."""
    for rows in _logits_chunks(logits):
        out[rows] = _gradient(logits, targets, temperature, rows, g_logp, g_entropy)


def _values(logits: Tensor, targets: Tensor, temperature: float | Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the rows."""
    soft = _softmax(logits, targets, _column(temperature, rows), rows, entropy=True)
    assert soft.entropy is not None
    return soft.logp, soft.entropy


def _gradient(
    logits: Tensor, targets: Tensor, temperature: float | Tensor, rows: slice, g_logp: Tensor | None, g_entropy: Tensor | None
) -> Tensor:
    """The logits' gradient of the rows from those of log-probs and entropies (T,), either of which may be None."""
    temperature = _column(temperature, rows)
    soft = _softmax(logits, targets, temperature, rows, entropy=g_entropy is not None)
    g, h = torch.zeros_like(soft.logp) if g_logp is None else g_logp[rows], None if g_entropy is None else g_entropy[rows]
    idle = g == 0 if h is None else (g == 0) & (h == 0)
    return zero_rows(soft.gradient(targets[rows], g, h, temperature, None), idle)


def zero_rows(x: Tensor, idle: Tensor) -> Tensor:
    """x (C, N) with its idle (C,) rows set to 0 in place, whatever they held (NaN times 0 would be NaN); other rows are not touched."""
    return x.index_fill_(0, idle.nonzero().squeeze(1), 0)


def _softmax(logits: Tensor, targets: Tensor, temperature: float | Tensor, rows: slice, *, entropy: bool) -> Softmax:
    return Softmax.of(logits[rows].to(compute_dtype(logits), copy=True).div_(temperature), targets[rows], entropy)


def _column(temperature: float | Tensor, rows: slice) -> float | Tensor:
    return temperature[rows, None] if isinstance(temperature, Tensor) else temperature


def _logits_chunks(logits: Tensor) -> list[slice]:
    size = max(1, WORKSPACE // (compute_dtype(logits).itemsize * BUFFERS * logits.shape[1]))
    return [slice(start, start + size) for start in range(0, len(logits), size)]
