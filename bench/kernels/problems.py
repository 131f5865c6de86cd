"""The inputs that are timed, and what a right answer to them is.

T rows that carry loss, H hidden size, V vocabulary. Rows are peaked the way a trained model's are: the target's log-prob spreads over
about -6 to 0. Old log-probs lie on both sides of the clip but not next to it, so that rounding cannot turn a row on or off.

The truth is float64 for float32 inputs and float32 for bf16 ones (their products are then exact to 1e-6), on a slice of the rows and of
the vocabulary. A side may be wrong by FACTOR times what torch is wrong by in the inputs' dtype, plus FLOOR; errors are relative, in norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from actial_fast.ops import reference
from actial_fast.ops.spec import AdvantageSpec, GRPOSpec
from bench.harness.timing import DEVICE

FACTOR = 4.0
FLOOR = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 2e-5}
SLICE = 64  # rows, and entries of the vocabulary, on which gradients are checked
SEQUENCE = 256  # rows of a completion; the recipe's mean is about 300
EXACT_ROWS = 1024
SPEC = GRPOSpec.named("dapo", clip_low=0.2, clip_high=0.28, beta=0.04)
NO_KL = replace(SPEC, beta=0.0)  # taken on policy: rows with advantage 0 have no gradient, and no other row is without one
ADVANTAGES = AdvantageSpec()


class Wrong(Exception):
    """A side's answer is not the right one; its speed is not told."""


@dataclass(frozen=True)
class Expected:
    """A right answer: `value` for the entries `at` of the output's first dimension (None = all), within `tolerance`."""

    value: Tensor
    at: Tensor | None
    tolerance: float
    scale: float = 0.0  # errors are relative to the value's norm or to this, whichever is more

    def error(self, output: Tensor) -> float:
        got = output if self.at is None else output[self.at]
        if got.shape != self.value.shape:
            raise Wrong(f"shape {tuple(got.shape)} where {tuple(self.value.shape)} is right")
        return relative_error(got, self.value, self.scale)


def check(outputs: dict[str, Tensor], expected: dict[str, Expected]) -> dict[str, float]:
    """The relative error of every output; raises Wrong beyond a tolerance, and where a gradient or every value is missing."""
    missing = [name for name in expected if name not in outputs]
    if len(missing) == len(expected) or any(name.startswith("grad_") for name in missing):  # not every peer gives every value
        raise Wrong(f"{', '.join(missing)} missing")
    errors = {}
    for name, right in expected.items():
        if name in missing:
            continue
        errors[name] = right.error(outputs[name])
        if not errors[name] <= right.tolerance:  # NaN is wrong, too
            raise Wrong(f"{name} is off by {errors[name]:.1e} relative to float32 or better; {right.tolerance:.1e} is allowed")
    return errors


def relative_error(got: Tensor, right: Tensor, scale: float = 0.0) -> float:
    return float((got.detach().to(right.dtype) - right).norm() / max(float(right.norm()), scale, 1e-30))


class Head:
    """Hidden states, a head and everything that the losses take beside them, on this machine's device."""

    def __init__(self, rows: int, hidden: int, vocab: int, dtype: torch.dtype, seed: int = 0):
        self.dtype, self.exact = dtype, torch.float64 if dtype == torch.float32 else torch.float32
        self.generator = torch.Generator(DEVICE).manual_seed(seed)
        self.weight = (self._normal(vocab, hidden) / hidden**0.5).requires_grad_()
        self.frozen = self.weight.detach()
        self.targets = torch.randint(vocab, (rows,), generator=self.generator, device=DEVICE)
        peak = torch.tensor(vocab, device=DEVICE).log() + 2 + self._uniform(rows) * 12 - 6
        self.hidden = (2 * self._normal(rows, hidden) + (peak[:, None] * self.frozen[self.targets]).to(dtype)).requires_grad_()
        self.length = min(SEQUENCE, rows // 8)  # at least 8 sequences
        self.sequence_advantages = self._normal(rows // self.length).float()
        self.advantages = self.sequence_advantages.repeat_interleave(self.length)
        self.token_weight = torch.full((rows,), 1 / rows, device=DEVICE)
        self.rows = torch.linspace(0, rows - 1, min(SLICE, rows), device=DEVICE).long()
        spread = torch.linspace(0, vocab - 1, SLICE // 2, device=DEVICE).long()
        self.entries = torch.cat([self.targets[self.rows[: SLICE // 2]], spread]).unique()
        self.logp, self.entropy, self.lse = self._exact_rows()
        steps = torch.randint(-1, 2, (rows,), generator=self.generator, device=DEVICE)
        self.old_logp = (self.logp + 0.45 * steps).float()  # ratios of 0.64, 1 and 1.57; the clip is at 0.8 and 1.28
        self.ref_logp = (self.logp + 0.3 * self._normal(rows).float()).float()
        self.torch_logits = (self.hidden.detach()[self.rows] @ self.frozen.T).float()  # what torch makes of the slice of rows
        own = zip(("logp", "entropy"), reference.logprob_from_logits(self.torch_logits, self.targets[self.rows]), strict=True)
        self.torch_error = {name: relative_error(x, getattr(self, name)[self.rows]) for name, x in own}

    @cached_property
    def logits(self) -> Tensor:
        """(T, V) in the inputs' dtype, for the ops that are given logits."""
        return self.hidden.detach() @ self.frozen.T

    @cached_property
    def reference_model(self) -> tuple[Tensor, Tensor]:
        """Hidden states and head of a model near this one."""
        return (
            self.hidden.detach() + 0.3 * self._normal(*self.hidden.shape),
            self.frozen + 0.1 / self.hidden.shape[1] ** 0.5 * self._normal(*self.weight.shape),
        )

    def grpo(self, spec: GRPOSpec, advantages: Tensor, frozen: bool = False) -> dict[str, Expected]:
        """Loss, log-probs, entropies and gradients of `linear_grpo_loss`."""
        others = (advantages, *self.others(spec), self.token_weight)
        loss, right = _coefficients(self.logp, self.entropy, spec, *others)
        at_rows = (None if x is None else x[self.rows] for x in others)
        _, own = _coefficients(*reference.logprob_from_logits(self.torch_logits, self.targets[self.rows]), spec, *at_rows)
        scale = float((self.token_weight * advantages.abs()).sum())  # the loss itself may cancel
        expected = {"loss": self._expected(loss, self.torch_error["logp"], scale=scale)} | self.logprob()
        return expected | self._head_gradients(right, frozen, own)

    def logprob(self, gradients: bool = False) -> dict[str, Expected]:
        """Log-probs and entropies, and the gradients of the mean log-prob."""
        expected = {name: self._expected(getattr(self, name), self.torch_error[name]) for name in ("logp", "entropy")}
        return expected | self._head_gradients(self.token_weight, frozen=False) if gradients else expected

    @cached_property
    def several(self) -> Tensor:
        """(T, 64): each row's target, and the tokens that follow it in the vocabulary."""
        return (self.targets[:, None] + torch.arange(64, device=DEVICE)) % len(self.frozen)

    def selected_logprob(self) -> dict[str, Expected]:
        """Log-probs of several targets a row, and entropies, of the slice of rows."""
        z = self.hidden.detach()[self.rows].to(self.exact) @ self.frozen.to(self.exact).T
        right, own = (reference.logprob_from_logits(x, self.several[self.rows]) for x in (z, self.torch_logits))
        found = zip(("logp", "entropy"), right, own, strict=True)
        return {name: self._expected(value, relative_error(torchs, value), self.rows) for name, value, torchs in found}

    def cross_entropy(self) -> dict[str, Expected]:
        """The token mean of -log p, and its gradients."""
        loss = -(self.token_weight * self.logp).sum()
        return {"loss": self._expected(loss, self.torch_error["logp"])} | self._head_gradients(-self.token_weight, frozen=False)

    def kl(self, gradients: bool) -> dict[str, Expected]:
        """KL(policy || reference model) of every row, and the gradients of its mean for the policy."""
        kl, entries = torch.empty_like(self.lse), torch.empty(len(self.lse), len(self.entries), dtype=self.exact, device=DEVICE)
        for part, p, q in self._pairs():
            kl[part] = (p.exp() * (p - q)).sum(-1)
            entries[part] = p[:, self.entries].exp() * ((p - q)[:, self.entries] - kl[part, None])
        right, own = (_kl_and_gradient(*self._log_probs(self.rows, dtype)) for dtype in (self.exact, self.dtype))
        expected = {"kl": self._expected(kl, relative_error(own[0], right[0]))}
        if not gradients:
            return expected
        weight, mean = self.frozen.to(self.exact), self.token_weight[self.rows, None]
        error = relative_error(own[1], right[1])
        head = (entries * self.token_weight[:, None]).T @ self.hidden.detach().to(self.exact)
        return expected | {
            "grad_hidden": self._expected((mean * right[1]) @ weight, error, self.rows),
            "grad_weight": self._expected(head, error, self.entries),
        }

    def from_logits(self, loss: bool) -> dict[str, Expected]:
        """Log-probs and entropies of the logits as they are stored and, with `loss`, the gradient of the GRPO loss for them."""
        z = self.logits[self.rows].to(self.exact)
        logp, entropy = reference.logprob_from_logits(z, self.targets[self.rows])
        if not loss:  # float32 arithmetic on the logits as they are stored
            values = {"logp": logp, "entropy": entropy}
            return {name: Expected(value, self.rows, FLOOR[torch.float32]) for name, value in values.items()}
        part = (self.advantages[self.rows], self.old_logp[self.rows], self.ref_logp[self.rows], self.token_weight[self.rows])
        _, coefficient = _coefficients(logp, entropy, SPEC, *part)
        gradient = _logit_gradient(z.log_softmax(-1), self.targets[self.rows], coefficient)
        return {"grad_logits": self._expected(gradient, 0.0, self.rows)}

    def _head_gradients(self, coefficient: Tensor, frozen: bool, own: Tensor | None = None) -> dict[str, Expected]:
        """Gradients of sum(coefficient * logp) for the hidden states' and the head's slices; `own` is what torch has for the coefficients
        of the slice of rows, where they depend on the log-probs."""
        weight, hidden = self.frozen.to(self.exact), self.hidden.detach().to(self.exact)
        at_rows, targets = coefficient[self.rows], self.targets[self.rows]
        right = _logit_gradient(hidden[self.rows] @ weight.T - self.lse[self.rows, None], targets, at_rows) @ weight
        torchs = _logit_gradient(self.torch_logits.log_softmax(-1), targets, at_rows if own is None else own).to(self.dtype) @ self.frozen
        error = relative_error(torchs, right)
        expected = {"grad_hidden": self._expected(right, error, self.rows)}
        if not frozen:
            p = (hidden @ weight[self.entries].T - self.lse[:, None]).exp()
            at_entries = (self.targets[:, None] == self.entries).to(self.exact) - p
            expected["grad_weight"] = self._expected((coefficient[:, None] * at_entries).T @ hidden, error, self.entries)
        return expected

    def others(self, spec: GRPOSpec) -> tuple[Tensor | None, Tensor | None]:
        """The old and the reference model's log-probs that go with SPEC or NO_KL."""
        return (None, None) if spec is NO_KL else (self.old_logp, self.ref_logp)

    def _exact_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-prob, entropy and log-sum-exp of every row, a few rows at a time."""
        weight = self.frozen.to(self.exact)
        out = torch.empty(3, len(self.targets), dtype=self.exact, device=DEVICE)
        for part in _parts(len(self.targets)):
            z = self.hidden.detach()[part].to(self.exact) @ weight.T
            out[2, part] = z.logsumexp(-1)
            out[0, part], out[1, part] = reference.logprob_from_logits(z, self.targets[part])
        return out[0], out[1], out[2]

    def _pairs(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Log-probs (C, V) of the policy and of the reference model, a few rows at a time."""
        return ((part, *self._log_probs(part, self.exact)) for part in _parts(len(self.targets)))

    def _log_probs(self, part: slice | Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """Of the policy and of the reference model, from products in `dtype`."""
        pairs = ((self.hidden.detach(), self.frozen), self.reference_model)
        return ((h[part].to(dtype) @ w.to(dtype).T).to(self.exact).log_softmax(-1) for h, w in pairs)

    def _expected(self, value: Tensor, torch_error: float, at: Tensor | None = None, scale: float = 0.0) -> Expected:
        return Expected(value.detach(), at, FACTOR * torch_error + FLOOR[self.dtype], scale)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=DEVICE, dtype=self.dtype)

    def _uniform(self, rows: int) -> Tensor:
        return torch.rand(rows, generator=self.generator, device=DEVICE)


class Rewards:
    """N rewards in groups of 16, and N log-probs of a policy and its reference: the ops without a head."""

    def __init__(self, rows: int, seed: int = 0):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        self.rewards = torch.randint(0, 5, (rows,), generator=generator, device=DEVICE).float() / 4
        self.groups = torch.arange(rows, device=DEVICE) // 16
        self.logp, gap = -torch.rand(2, rows, generator=generator, device=DEVICE)
        self.ref_logp = self.logp + gap - 0.5

    def advantages(self) -> dict[str, Expected]:
        right = reference.group_advantages(self.rewards.double(), self.groups, ADVANTAGES)
        return {"advantages": Expected(right, None, FLOOR[torch.float32])}

    def kl(self) -> dict[str, Expected]:
        right = reference.token_kl(self.logp.double(), self.ref_logp.double(), "k3")
        return {"kl": Expected(right, None, FLOOR[torch.float32])}


def _coefficients(
    logp: Tensor,
    entropy: Tensor,
    spec: GRPOSpec,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    token_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """The GRPO loss and its derivative for every row's log-prob."""
    logp = logp.detach().requires_grad_()
    with torch.enable_grad():
        loss, _ = reference.grpo_terms(logp, entropy, advantages, old_logp, ref_logp, spec, token_weight=token_weight)
    return loss, torch.autograd.grad(loss, logp)[0]


def _logit_gradient(logp: Tensor, targets: Tensor, coefficient: Tensor) -> Tensor:
    """coefficient * (one-hot - p): what sum(coefficient * log p(target)) has for a gradient; logp (T, V)."""
    coefficient = coefficient.to(logp.dtype)
    gradient = -coefficient[:, None] * logp.exp()
    return gradient.scatter_add_(1, targets[:, None], coefficient[:, None])


def _kl_and_gradient(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """sum p * (log p - log q) of every row and its gradient for p's logits; both are given as log-probs (T, V)."""
    kl = (p.exp() * (p - q)).sum(-1)
    return kl, p.exp() * (p - q - kl[:, None])


def _parts(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + EXACT_ROWS, rows)) for start in range(0, rows, EXACT_ROWS))
