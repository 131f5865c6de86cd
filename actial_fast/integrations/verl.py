"""Our losses and our head in verl 0.9: policy losses for its registry, and its fused log-prob function.

    VERL_USE_EXTERNAL_MODULES=actial_fast.integrations.verl python -m verl.trainer.main_ppo ... \\
        actor_rollout_ref.actor.policy_loss.loss_mode=actial_vanilla

verl imports the modules of that variable in every worker; this one then registers its losses (`register` does it by hand) and touches
nothing else. `patch_verl` also puts our head under verl's fused kernels (actor_rollout_ref.model.use_fused_kernels=True with the triton
backend). verl computes the log-probs in the model and the loss outside of it, without hidden states, so there is no place for the loss
that does both at once. This module needs torch only, until one of the functions that take verl in hand is called.

B responses of at most L tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actial_fast import ops
from actial_fast.ops import reference
from actial_fast.ops.reference import MAX_LOG_RATIO
from actial_fast.ops.spec import GRPOSpec

MODES = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "dro", "cispo")
"""verl's policy losses that are a GRPOSpec. Not among them: clip_cov (draws tokens at random), kl_cov (an absolute log-ratio), geo_mean
(clips tokens before a sequence's mean) and bypass_mode (chooses another loss and masks by rollout statistics first)."""
PREFIX = "actial_"
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
GSPO_MAX_LOG_RATIO = 10.0  # verl's

PolicyLoss = Callable[..., tuple[Tensor, dict[str, float]]]


# ---- the policy losses


@dataclass(frozen=True)
class _Terms:
    """What a loss mode makes of a micro-batch; rows are (B, L) without gradient, `shift` is subtracted from the log-probs."""

    spec: GRPOSpec
    old: Tensor | None
    ref: Tensor | None = None
    shift: Tensor | None = None
    kept: Tensor | None = None
    metrics: dict[str, Tensor] | None = None
    """Rows whose masked means are logged, by verl's name without "actor/"."""


def policy_loss(mode: str) -> PolicyLoss:
    """verl's policy loss of that name (`MODES`), with verl's arguments and results: loss(old_log_prob, log_prob, advantages,
    response_mask, loss_agg_mode, config, rollout_is_weights).

    All (B, L) floating, response_mask bool, int or float; config: verl's ActorConfig or a DictConfig with its fields. Gives the loss, a
    scalar, differentiable in log_prob, and verl's metrics as floats, which cost one host sync. Log-ratios are held below 20; a micro-batch
    without any token gives 0 where verl gives NaN.

    ValueError for another mode, for what verl refuses, and for shapes that differ. Source: verl 0.9.1, trainer/ppo/core_algos.py.
    """
    if mode not in MODES:
        raise ValueError(f"mode: {mode!r} has no GRPOSpec that equals it; supported are {', '.join(MODES)}; keep verl's own for others")

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if config is None:
            raise ValueError("config: needed; pass verl's ActorConfig")
        given = {"old_log_prob": old_log_prob, "advantages": advantages, "response_mask": response_mask}
        for name, x in {**given, "rollout_is_weights": rollout_is_weights}.items():
            if x is not None and x.shape != log_prob.shape:
                raise ValueError(f"{name}: expected {tuple(log_prob.shape)} like log_prob, got {tuple(x.shape)}")
        with torch.no_grad():
            old, advantages = old_log_prob.detach(), advantages.detach()
            terms = _terms(mode, config, log_prob.detach(), old, advantages, response_mask)
            aggregation = "seq-mean-token-mean" if mode == "sapo" else loss_agg_mode  # as in verl
            weight = aggregation_weights(response_mask, aggregation, **config.global_batch_info)
            if rollout_is_weights is not None:
                weight = weight * rollout_is_weights.detach()
        value, _ = reference.grpo_terms(
            (log_prob if terms.shift is None else log_prob - terms.shift).flatten(),
            torch.zeros_like(weight).flatten(),
            advantages.flatten(),
            None if terms.old is None else terms.old.flatten(),
            None if terms.ref is None else terms.ref.flatten(),
            terms.spec,
            token_weight=weight.flatten(),
            policy_mask=None if terms.kept is None else terms.kept.flatten(),
        )
        return value, _means(terms.metrics or {}, response_mask)

    loss.__name__ = loss.__qualname__ = f"policy_loss_{mode}"
    return loss


def _terms(mode: str, config: Any, logp: Tensor, old: Tensor, A: Tensor, mask: Tensor) -> _Terms:
    """The loss of that mode as a spec, the rows that it reads, and the rows that are logged."""
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    log_ratio = logp - old
    held = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = held.exp()

    def logged(clipped: Tensor | None = None, lower: Tensor | None = None, gap: Tensor = held) -> dict[str, Tensor]:
        none = torch.zeros_like(ratio)
        return {"pg_clipfrac": none if clipped is None else clipped, "ppo_kl": -gap, "pg_clipfrac_lower": none if lower is None else lower}

    def outside(x: Tensor) -> Tensor:
        """Where the clip lowers the gain."""
        return ((x > 1 + high) & (A > 0)) | ((x < 1 - low) & (A < 0))

    if mode == "vanilla":
        cap = config.get("clip_ratio_c", 3.0)
        stopped = (A < 0) & (ratio.clamp(min=1 - low) > cap)
        return _Terms(GRPOSpec(clip_low=low, clip_high=high, dual_clip=cap, beta=0.0), old, metrics=logged(outside(ratio), stopped))
    if mode == "gspo":
        # the sequence's ratio stands before each token's own gradient: a token ratio of that value, for advantages that differ by token
        mean = (torch.where(mask != 0, log_ratio, 0) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        spec = GRPOSpec(clip_low=low, clip_high=high, clip_delta=math.exp(GSPO_MAX_LOG_RATIO), beta=0.0)
        clipped = outside(mean.clamp(max=GSPO_MAX_LOG_RATIO).exp().expand_as(A))
        return _Terms(spec, -mean.expand_as(A), shift=logp, metrics=logged(clipped, gap=log_ratio))
    if mode == "sapo":
        pos, neg = float(config.tau_pos), float(config.tau_neg)
        return _Terms(GRPOSpec(objective="sapo", sapo_temperature_pos=pos, sapo_temperature_neg=neg, beta=0.0), old, metrics=logged())
    if mode == "gpg":
        return _Terms(GRPOSpec(objective="cispo", beta=0.0), None)  # a ratio of 1 before each token's gradient
    if mode == "dro":
        beta = config.policy_loss.dro_beta
        if beta is None or beta <= 0:
            raise ValueError(f"policy_loss.dro_beta: must be > 0 for dro, got {beta}")
        return _Terms(GRPOSpec(objective="cispo", beta=beta, kl="k2"), None, ref=old, metrics={"ppo_kl": -log_ratio})
    if mode == "cispo":
        spec = GRPOSpec(objective="cispo", clip_high=high, beta=0.0)
        # the spec caps the detached ratio above; raising old log-probs' gap to log(1 - low) holds it below
        floor = old if low >= 1 else torch.minimum(old, logp - math.log1p(-low))
        return _Terms(spec, floor, metrics=logged((ratio > 1 + high) | (ratio < 1 - low)))
    cap = config.get("clip_ratio_c", 20.0)  # dppo: clip_ratio bounds a divergence, and the detached ratio is capped
    p, q = logp.exp(), old.exp()
    if mode == "dppo_tv":
        kept = torch.where(A > 0, p - q <= high, p - q >= -low)
    else:
        kl = q * (old - logp) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
        kept = torch.where(A > 0, (kl <= high) | (p <= q), (kl <= low) | (p >= q))
    spec = GRPOSpec(objective="cispo", clip_high=cap - 1, beta=0.0)
    return _Terms(spec, old, kept=kept, metrics=logged(~kept, (ratio > cap) & kept))


def aggregation_weights(
    response_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """The weight of each token in verl's `agg_loss`, (B, L) float32: agg_loss(x, mask, mode, ...) = (weights * x).sum() over the mask.

    response_mask (B, L); loss_agg_mode one of `AGGREGATIONS`; dp_size undoes the mean that data-parallel training takes over ranks;
    batch_num_tokens and global_batch_size count the global batch (None: this one; sequences without a token do not count);
    loss_scale_factor: of seq-mean-token-sum-norm (None: L). ValueError for another mode, or a missing count where dp_size > 1.
    """
    if loss_agg_mode not in AGGREGATIONS:
        raise ValueError(f"loss_agg_mode: {loss_agg_mode!r} is not supported; supported are {', '.join(AGGREGATIONS)}")
    mask = response_mask.float()
    if loss_agg_mode == "token-sum":
        return mask * dp_size
    needed = "batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size"
    count = batch_num_tokens if loss_agg_mode == "token-mean" else global_batch_size
    tokens = mask.sum(-1, keepdim=True)
    if count is None:
        if dp_size > 1:
            raise ValueError(f"{needed}: needed for {loss_agg_mode} with dp_size = {dp_size}; pass the global batch's count")
        count = (mask.sum() if loss_agg_mode == "token-mean" else (tokens > 0).sum()).clamp(min=1)
    if loss_agg_mode == "seq-mean-token-mean":
        mask = mask / tokens.clamp(min=1)
    elif loss_agg_mode == "seq-mean-token-sum-norm":
        mask = mask / (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return mask * (dp_size / count)


def _means(rows: dict[str, Tensor], mask: Tensor) -> dict[str, float]:
    """Means over the mask, by verl's names, read from the device at once."""
    if not rows:
        return {}
    weight = mask.float()
    sums = torch.stack([(torch.where(mask != 0, x, 0).float() * weight).sum() for x in rows.values()])
    return dict(zip((f"actor/{name}" for name in rows), (sums / (weight.sum() + 1e-8)).tolist(), strict=True))


def register() -> tuple[str, ...]:
    """Registers every loss of `MODES` with verl, as "actial_" and its name there, to be named as policy_loss.loss_mode -> those names.

    verl's own losses stay. ImportError without verl.
    """
    try:
        from verl.trainer.ppo.core_algos import register_policy_loss
    except ImportError as error:
        raise ImportError(f"register needs verl 0.9 and what it imports ({error}): pip install verl==0.9.1") from error
    for mode in MODES:
        register_policy_loss(PREFIX + mode)(policy_loss(mode))
    return tuple(PREFIX + mode for mode in MODES)


# ---- the head


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's `linear_cross_entropy` (utils/kernel, 0.9): log-probs of the labels and entropies, of hidden @ weight.T / temperature.

    hidden (B, L, H), (1, T, H) of packed rows, or (T, H), weight (V, H) of its dtype, labels int of hidden's shape without H. Returns
    float32, flat as verl's: log-probs (B * L,), or their sum or mean, a scalar, with that reduction, and entropies (B * L,), both
    differentiable in hidden and weight, once. Any H, where verl's wants multiples of 128; CPU and CUDA. A label of -100 is none: its
    log-prob and entropy are 0, without gradient, and the mean is that of the others.

    ValueError for a reduction that is not none, sum or mean, for a vocabulary that is split over ranks, and as `ops.linear_logprob`.
    """
    if reduction.lower() not in ("none", "sum", "mean"):
        raise ValueError(f"reduction: {reduction!r} is not supported; supported are none, sum, mean")
    if dist_process_group is not None and torch.distributed.get_world_size(dist_process_group) > 1:
        raise ValueError(
            "dist_process_group: a vocabulary split over ranks is not supported; supported is one rank; unpatch_verl() for others"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: expected {tuple(hidden.shape[:-1])} to fit hidden, got {tuple(labels.shape)}")
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    logp, entropy = ops.linear_logprob(rows, weight, targets, temperature=temperature)
    assert entropy is not None
    if reduction.lower() == "none":
        return logp, entropy
    return logp.sum() / ((targets != reference.IGNORED).sum().clamp(min=1) if reduction.lower() == "mean" else 1), entropy


_REPLACED: dict[str, Any] = {}
_KERNEL = "verl.utils.kernel.linear_cross_entropy"


def patch_verl() -> None:
    """Puts `linear_cross_entropy` in the place of verl's for all models that ask for it from now on: those of its FSDP engines with
    use_fused_kernels and the triton backend look it up at each call (Megatron's took it when they were imported). Twice is once.

    ImportError without verl.
    """
    try:
        module: Any = importlib.import_module(_KERNEL)
    except ImportError as error:
        raise ImportError(f"patch_verl needs verl 0.9 and what it imports ({error}): pip install verl==0.9.1") from error
    _REPLACED.setdefault(_KERNEL, module.linear_cross_entropy)
    module.linear_cross_entropy = linear_cross_entropy


def unpatch_verl() -> None:
    """Puts verl's function back; without a patch nothing happens."""
    if _KERNEL in _REPLACED:
        module: Any = sys.modules[_KERNEL]
        module.linear_cross_entropy = _REPLACED.pop(_KERNEL)


if sys.modules.get("verl") is not None:  # verl is importing this module (VERL_USE_EXTERNAL_MODULES), or is there already
    register()
