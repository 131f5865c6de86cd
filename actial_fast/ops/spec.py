"""What is computed, as data: frozen specs that the ops, the reference, the kernels and the recipes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True)
class AdvantageSpec:
    """How the rewards of a group become advantages (GRPO, arXiv 2402.03300)."""

    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What is subtracted: the group's mean, or the mean of the group's other members (RLOO, arXiv 2402.14740)."""
    scale: Literal["std", "batch_std", "none"] = "std"
    """What divides: the group's standard deviation, that of all rewards of the call, or nothing (Dr. GRPO, arXiv 2503.20783)."""
    epsilon: float = 1e-6
    """Added to the standard deviation."""
    combine: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Several rewards: weigh and add them and then normalise, or normalise each within its group, weigh and add, and then normalise the
    sums over all rewards of the call (GDPO, arXiv 2601.05242)."""

    def __post_init__(self) -> None:
        _choices(self, baseline=("mean", "leave_one_out"), scale=("std", "batch_std", "none"))
        _choices(self, combine=("sum_then_normalize", "normalize_then_sum"))
        _at_least(self, 0, "epsilon")


@dataclass(frozen=True)
class GRPOSpec:
    """A policy objective of the GRPO family: what `linear_grpo_loss` computes. `GRPOSpec.named` knows the published combinations."""

    objective: Literal["clip", "cispo", "sapo", "vespo"] = "clip"
    """clip: PPO's minimum of ratio and clipped ratio. cispo: capped ratio, detached, times log-prob (arXiv 2506.13585). sapo: a sigmoid
    gate instead of the clip (arXiv 2511.20347). vespo: a gamma weight of the sequence's ratio, detached, times log-prob (2602.10693)."""
    ratio: Literal["token", "sequence"] = "token"
    """token: exp(logp - old_logp). sequence: exp of its mean over the sequence's rows (GSPO, arXiv 2507.18071)."""
    clip_low: float = 0.2
    """clip: the ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """clip: the ratio is clipped above at 1 + clip_high; cispo: it is capped there, and clip_high may be as low as -1."""
    clip_delta: float | None = None
    """clip: also the unclipped branch's ratio stops here (two-sided clip, arXiv 2505.07291); more than 1 + clip_high."""
    dual_clip: float | None = None
    """clip: with a negative advantage A the token's loss stops at -dual_clip * A (arXiv 1912.09729); more than 1."""
    sapo_temperature_pos: float = 1.0
    """sapo: the gate's temperature where the advantage is positive."""
    sapo_temperature_neg: float = 1.05
    """sapo: the gate's temperature elsewhere."""
    vespo_k_pos: float = 2.0
    """vespo: power of the sequence's ratio where the advantage is not negative."""
    vespo_lambda_pos: float = 3.0
    """vespo: decay with the sequence's ratio where the advantage is not negative."""
    vespo_k_neg: float = 3.0
    """vespo: power of the sequence's ratio where the advantage is negative."""
    vespo_lambda_neg: float = 2.0
    """vespo: decay with the sequence's ratio where the advantage is negative."""
    beta: float = 0.01
    """Weight of the KL penalty to the reference; 0 = no penalty, and no reference model is held or run."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL per token, with d = ref_logp - logp: -d, d^2 / 2, or expm1(d) - d (J. Schulman, 2020)."""
    kl_bias_correction: bool = False
    """Multiply the estimate by the ratio, so that its gradient is unbiased off policy (DeepSeek-V3.2, arXiv 2512.02556)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    importance: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "token_truncate"
    """With the sampler's own log-probs at hand: the policy term is weighted by old / sampler probability, per token or as the product
    over the sequence, clamped into [importance_min, importance_max] or set to 0 outside of it."""
    importance_min: float = 0.0
    """Lower bound of the importance weight."""
    importance_max: float = 3.0
    """Upper bound of the importance weight."""
    top_entropy: float = 1.0
    """Share of the tokens, those of highest entropy, that carry the policy term (arXiv 2506.01939); 1 = all."""
    aggregation: Literal["token", "sequence", "sequence_sum", "constant"] = "token"
    """token: mean over all tokens. sequence: mean over sequences of each one's token mean. sequence_sum: mean over sequences of each
    one's token sum. constant: sum over all tokens divided by sequences * max_length."""

    def __post_init__(self) -> None:
        _choices(self, objective=("clip", "cispo", "sapo", "vespo"), ratio=("token", "sequence"), kl=("k1", "k2", "k3"))
        _choices(self, importance=("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"))
        _choices(self, aggregation=("token", "sequence", "sequence_sum", "constant"))
        _at_least(self, 0, "clip_low", "beta", "importance_min")
        _at_least(self, -1 if self.objective == "cispo" else 0, "clip_high")
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: must be > 0, got {getattr(self, name)}")
        if self.clip_delta is not None and not self.clip_delta > 1 + self.clip_high:
            raise ValueError(f"clip_delta: must be > 1 + clip_high = {1 + self.clip_high}, got {self.clip_delta}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip: must be > 1, got {self.dual_clip}")
        if not self.importance_max >= self.importance_min:
            raise ValueError(f"importance_max: must be >= importance_min = {self.importance_min}, got {self.importance_max}")
        if not 0 < self.top_entropy <= 1:
            raise ValueError(f"top_entropy: must be in (0, 1], got {self.top_entropy}")

    @classmethod
    def named(cls, name: str, **changes: Any) -> GRPOSpec:
        """The published combination of that name (`NAMED`), with changes: GRPOSpec.named("dapo", beta=0.04).

        Raises ValueError for a name it does not know.
        """
        if name not in NAMED:
            raise ValueError(f"name: {name!r} is not one of {', '.join(NAMED)}")
        return cls(**(NAMED[name] | changes))

    def needs_sequences(self, sampler: bool = False) -> bool:
        """Whether a row's loss depends on the other rows of its sequence; `sampler`: whether the sampler's log-probs are given."""
        return self.ratio == "sequence" or self.objective == "vespo" or (sampler and self.importance.startswith("sequence"))


class Kept(NamedTuple):
    """What a sampler keeps of a row's distribution before it draws, by the parameters of vLLM's that say it. The defaults keep everything.

    top_k: the tokens of the k highest logits, 0 = all. top_p: of these the fewest whose probabilities make up that share of theirs.
    min_p: tokens whose probability is at least that share of the highest one.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


NAMED: dict[str, dict[str, Any]] = {
    "grpo": {"aggregation": "sequence"},
    "bnpo": {"aggregation": "token"},
    "dr_grpo": {"aggregation": "constant"},
    "dapo": {"aggregation": "token", "clip_high": 0.28, "beta": 0.0},
    "gspo": {"aggregation": "sequence", "ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "beta": 0.0},
    "cispo": {"objective": "cispo", "aggregation": "token", "clip_high": 4.0, "beta": 0.0},
    "sapo": {"objective": "sapo", "aggregation": "sequence", "beta": 0.0},
    "luspo": {"aggregation": "sequence_sum", "ratio": "sequence", "clip_low": 2e-3, "clip_high": 2.5e-3, "beta": 0.0},
    "vespo": {"objective": "vespo", "aggregation": "token", "beta": 0.0},
}
"""The published combinations. bnpo and dapo differ in what the token mean spans: the micro-batch, or the global batch over all ranks and
accumulation steps; the caller of `token_weights` says which."""


def _choices(spec: Any, **choices: tuple[str, ...]) -> None:
    for name, allowed in choices.items():
        if getattr(spec, name) not in allowed:
            raise ValueError(f"{name}: {getattr(spec, name)!r} is not one of {', '.join(allowed)}")


def _at_least(spec: Any, bound: float, *names: str) -> None:
    for name in names:
        if not getattr(spec, name) >= bound:
            raise ValueError(f"{name}: must be >= {bound}, got {getattr(spec, name)}")
