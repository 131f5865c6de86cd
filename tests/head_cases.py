"""Inputs of the ops that end in a head, and the rule by which a result is right: err(ours) <= 2 * err(torch in the same dtype) + floor."""

import math
from types import SimpleNamespace

import torch

from actial_fast.ops import reference

FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2e-3,
    torch.float16: 5e-4,
}  # of the largest entry; the last 2 round outputs


def make(T=37, H=12, V=29, dtype=torch.float64, seed=0, spread=0.35, scale=0.5, lengths=None, softcap=None) -> SimpleNamespace:
    """Old, reference and sampler log-probs near the policy's, so that many ratios are clipped, in both directions, and many are not.

    Every seventh advantage is 0; rows are float32, float64 for float64. lengths: of the sequences, T is their sum.
    """
    g = torch.Generator().manual_seed(seed)
    T = T if lengths is None else sum(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight, bias = normal(T, H).to(dtype), (scale * normal(V, H)).to(dtype), (0.3 * normal(V)).to(dtype)
    targets, temperature = torch.randint(0, V, (T,), generator=g), 0.5 + torch.rand(T, generator=g, dtype=torch.float64)
    logp, _ = reference.linear_logprob(
        hidden.double(), weight.double(), targets, bias=bias.double(), temperature=temperature, softcap=softcap
    )
    advantages = normal(T)
    advantages[::7] = 0
    token_weight = torch.rand(T, generator=g, dtype=torch.float64) / max(T, 1)
    token_weight[3::11] = 0
    rows = {"advantages": advantages, "token_weight": token_weight, "temperature": temperature}
    rows |= {name: logp + spread * normal(T) for name in ("old_logp", "ref_logp", "sampler_logp")}
    rows["entropy_weight"] = torch.rand(T, generator=g, dtype=torch.float64) / max(T, 1)
    rows = {name: x.to(torch.float64 if dtype == torch.float64 else torch.float32) for name, x in rows.items()}
    policy_mask = torch.rand(T, generator=g) < 0.7
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    head = {"hidden": hidden, "weight": weight, "bias": bias}
    return SimpleNamespace(
        **{name: x.requires_grad_() for name, x in head.items()}, **rows, targets=targets, policy_mask=policy_mask, cu_seqlens=cu_seqlens
    )


def doubled(case: SimpleNamespace) -> SimpleNamespace:
    """The case in float64: the same numbers, no further rounding."""
    out = SimpleNamespace()
    for name, x in vars(case).items():
        y = x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        setattr(out, name, y.requires_grad_() if isinstance(x, torch.Tensor) and x.requires_grad else y)
    return out


def error(got: torch.Tensor, want: torch.Tensor, least: float = 1e-12) -> float:
    """Largest difference, in units of the oracle's largest entry, or of `least`; infinite for NaN or another shape."""
    got, want = got.detach(), want.detach().double()
    if got.shape != want.shape or not got.isfinite().all():
        return math.inf
    return float((got.double() - want).abs().max() / want.abs().max().clamp(min=least)) if want.numel() else 0.0


def assert_agrees(
    got: dict, torchs: dict, want: dict, dtype: torch.dtype, floor: float | None = None, terms: dict[str, float] | None = None
) -> None:
    """Every entry of `got` against the oracle `want`, by the rule; torchs: what torch's autograd gives in the same dtype.

    terms: for a sum whose terms may cancel, the sum of their magnitudes, in which rounding is measured.
    """
    assert got.keys() == want.keys()
    for name in want:
        least = max((terms or {}).get(name, 0.0), 1e-12)
        ours, theirs = error(got[name], want[name], least), error(torchs[name], want[name], least)
        allowed = 2 * theirs + (FLOOR[dtype] if floor is None else floor)
        assert ours <= allowed, f"{name}: off by {ours:.2e}, torch in {dtype} by {theirs:.2e}"


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference in units of the largest entry; infinite when anything is not finite or everything is 0 on one side only."""
    if got.shape != want.shape or not got.isfinite().all():
        return math.inf
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
