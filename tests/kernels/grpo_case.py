"""Rows with log-probs, advantages and all the rest for the tests of the GRPO kernels, and the rule that results are held to."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from actial_fast.ops import reference
from actial_fast.ops.spec import GRPOSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1, 3, 0, 30, 260)  # the sequence of 3 is masked altogether; 260 is longer than any block


@dataclass(frozen=True)
class Case:
    """Arguments of `reference.grpo_terms` but logp and entropy, on the CPU in float32."""

    advantages: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    token_weight: Tensor
    cu_seqlens: Tensor
    sampler_logp: Tensor | None
    policy_mask: Tensor | None
    entropy_weight: Tensor | None

    def arguments(self, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> dict[str, Tensor | None]:
        convert = {name: x.to(device) if x is not None else None for name, x in vars(self).items()}
        return {name: x.to(dtype) if x is not None and x.is_floating_point() else x for name, x in convert.items()}

    def poisoned(self) -> Case:
        """The masked rows' other inputs become NaN or infinite: nothing may change."""
        bad = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(len(self.token_weight))[: len(self.token_weight)]
        names = ("advantages", "old_logp", "ref_logp", "sampler_logp", "entropy_weight")
        given = {name: x for name in names if (x := getattr(self, name)) is not None}
        return replace(self, **{name: torch.where(self.token_weight == 0, bad, x) for name, x in given.items()})


def draw(
    logp: Tensor,
    lengths: tuple[int, ...] = LENGTHS,
    *,
    old: bool = True,
    ref: bool = True,
    sampler: bool = False,
    policy_mask: bool = False,
    entropy_weight: bool = False,
    seed: int = 0,
) -> Case:
    """Rows around the log-probs (T,): old, reference and sampler so near that ratios fall on both sides of every usual clip."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    assert len(logp) == rows
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))

    def near(scale: float) -> Tensor:
        """A whole sequence is off in one direction too: the mean over many rows would hide what is drawn per row."""
        sign = torch.tensor([1.0 if s % 3 == 0 else -1.0 for s in range(len(lengths))])
        return logp + scale * (torch.randn(rows, generator=generator) + 1.2 * sign[owner])

    weight = (0.5 + torch.rand(rows, generator=generator)) / max(rows, 1)
    weight[torch.rand(rows, generator=generator) < 0.2] = 0
    for s, length in enumerate(lengths):
        if length in (1, 3):
            weight[owner == s] = 0 if length == 3 else 1 / rows
    sampled = near(0.3) if sampler else None
    if sampled is not None:
        sampled[::7] = float("nan")
    return Case(
        advantages=torch.randn(rows, generator=generator),
        old_logp=near(0.3) if old else None,
        ref_logp=near(0.5) if ref else None,
        token_weight=weight,
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)]),
        sampler_logp=sampled,
        policy_mask=torch.rand(rows, generator=generator) < 0.7 if policy_mask else None,
        entropy_weight=torch.rand(rows, generator=generator) / rows if entropy_weight else None,
    )


def policy(rows: int = sum(LENGTHS), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of a policy, (T,) float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return -0.01 - 2 * torch.rand(rows, generator=generator), 2 * torch.rand(rows, generator=generator)


def from_logp(spec: GRPOSpec, case: Case, logp: Tensor, entropy: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The specification's d loss / d logp, d loss / d entropy and statistics."""
    logp, entropy = (x.detach().to(dtype, copy=True).requires_grad_() for x in (logp, entropy))
    loss, stats = reference.grpo_terms(logp, entropy, spec=spec, **case.arguments(dtype, "cpu"))
    loss.backward()
    return *(torch.zeros_like(x) if x.grad is None else x.grad for x in (logp, entropy)), stats


def check(ours: Tensor, torch_same: Tensor, oracle: Tensor, what: str, floor: float = 1e-6, terms: float = 0.0) -> None:
    """err(ours) <= 2 err(torch in the same dtype) + floor, relative to the oracle's largest entry or, for a sum whose terms cancel, to
    the size of its `terms`."""
    assert ours.shape == oracle.shape, f"{what}: {tuple(ours.shape)} for {tuple(oracle.shape)}"
    assert (ours.isnan().cpu() == oracle.isnan()).all(), f"{what}: NaN where there should be none, or the reverse"
    ours, torch_same, oracle = (torch.nan_to_num(x.detach().double().cpu(), nan=0.0) for x in (ours, torch_same, oracle))
    scale = max(oracle.abs().max().item() if oracle.numel() else 0.0, terms)
    errors = [(x - oracle).abs().max().item() if oracle.numel() else 0.0 for x in (ours, torch_same)]
    assert errors[0] <= 2 * errors[1] + floor * scale, f"{what}: off by {errors[0]:.3g}, torch by {errors[1]:.3g}, of {scale:.3g}"
