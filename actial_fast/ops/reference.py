"""The plain PyTorch twin of every op: the specification, readable, and usable in float64.

T rows that carry loss, H hidden size, V vocabulary, S sequences. Everything after the head's product is computed in at least float32.
A row whose token weight is 0 is masked: it is left out of the loss, of the statistics and of its sequence's means. So is one whose target
is IGNORED, whatever its weight: its log-prob and entropy are 0, without gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actial_fast.ops.spec import AdvantageSpec, GRPOSpec, Kept

STATS = ("tokens", "loss", "policy_loss", "kl", "entropy", "clip_low", "clip_high", "ratio", "ratio_sq", "importance")
"""Entries of the statistics of the GRPO losses. `loss` and `policy_loss` are sums weighted like the loss; the others are plain sums over
the rows that count, of which there are `tokens`: divided by it they are means, also after adding micro-batches and ranks."""
IGNORED = -100  # what transformers and torch.nn.functional.cross_entropy take for "no label here"
MAX_LOG_RATIO = 20.0  # exp of more says nothing more and overflows float32 at 88; a value beyond the bound has no gradient
# Rounding leaves a deviation of about 1e-8 where all rewards of a group are equal: not the exact 0 that skipping needs, and blown up by a
# small epsilon. Below this share of the mean (or of 1) they count as equal.
EQUAL_REWARDS = 1e-6
MIN_LOG_RATIO_VESPO = -18.420680743952367  # log(1e-8), the lower bound in VESPO's reference implementation


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float | Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature, (T, V) in float32 (float64 for float64 inputs)."""
    out = _upcast(hidden @ weight.T if bias is None else torch.nn.functional.linear(hidden, weight, bias))
    return _scaled(out, temperature, softcap)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row's distribution.

    hidden (T, H), weight (V, H) and bias (V,) of one floating dtype, targets (T,) or (T, K) int64, temperature one number or (T,) ->
    log-probabilities of the targets' shape and entropies (T,) in float32 (float64 for float64 inputs). kept: the distribution is that of
    the tokens which a sampler keeps.
    """
    z = logits(hidden, weight, bias, temperature, softcap)
    if kept is None:
        return _logp_and_entropy(z, targets)
    logp, entropy = _logp_and_entropy(z.masked_fill(z < lowest_kept(z.detach(), kept), -torch.inf), targets)
    return torch.where(logp == -torch.inf, -torch.inf, logp), entropy  # a token that is not drawn has no gradient


def labelled(targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Targets with a token in the place of IGNORED; where that was, of their shape; and the rows that have no label at all, (T,) bool."""
    ignored = targets == IGNORED
    return targets.masked_fill(ignored, 0), ignored, ignored if targets.ndim == 1 else ignored.all(1)


def lowest_kept(z: Tensor, kept: Kept) -> Tensor:
    """The lowest of the scaled logits z (T, V) that a sampler keeps, (T, 1), as vLLM finds it: min_p first, then top_k, then top_p.

    A token is kept where those above it are fewer than top_k, and have less than top_p of the probability of all that top_k and min_p
    keep. Tokens of one logit are kept together, where vLLM's top_p keeps some of them, in an order of its own.
    """
    lowest = z.amax(-1, keepdim=True) + z.new_tensor(kept.min_p).log()
    if kept.top_k:
        lowest = torch.maximum(lowest, z.topk(min(kept.top_k, z.shape[1])).values[:, -1:])
    if kept.top_p < 1:
        ordered = z.sort(-1, descending=True).values
        mass = (ordered - ordered[:, :1]).exp_().masked_fill_(ordered < lowest, 0).cumsum_(-1)
        above = (mass < kept.top_p * mass[:, -1:]).sum(-1, keepdim=True)
        lowest = torch.maximum(lowest, ordered.gather(1, above))
    return lowest


def logprob_from_logits(logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row: logits (T, V), targets (T,) int64 -> two (T,) of at least float32."""
    return _logp_and_entropy(_scaled(_upcast(logits), temperature, None), targets)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weight: Tensor, *, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Weighted sum of negative log-probabilities: -sum_t token_weight[t] * log p(targets[t]).

    hidden (T, H), weight (V, H), targets (T,) int64, token_weight (T,) float -> scalar. The weights carry the normaliser, so that
    a batch split over micro-batches and ranks adds up to the whole.
    """
    logp, _ = linear_logprob(hidden, weight, targets, bias=bias, softcap=softcap)
    token_weight = token_weight.masked_fill(targets == IGNORED, 0)
    return -(token_weight * torch.where(token_weight != 0, logp, 0)).sum()


def token_kl(logp: Tensor, ref_logp: Tensor, kind: str = "k3") -> Tensor:
    """An estimate of KL(policy || reference) per token, (T,) and (T,) -> (T,).

    With d = ref_logp - logp up to MAX_LOG_RATIO: k1 = -d, k2 = d^2 / 2, k3 = expm1(d) - d >= 0; expm1 keeps it exact where d is small.
    Source: J. Schulman, "Approximating KL divergence", 2020.
    """
    d = ref_logp - logp
    d = torch.where(d > MAX_LOG_RATIO, MAX_LOG_RATIO, nan_in_both(d))
    if kind == "k3":
        return torch.expm1(d) - d
    return -d if kind == "k1" else 0.5 * d * d


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """KL(p || q) per row over the whole vocabulary, p from (hidden, weight), q from (ref_hidden, ref_weight).

    hidden (T, H), weight (V, H), ref_hidden (T, G), ref_weight (V, G): the two models may differ in width -> (T,), differentiable in all
    four. Swap the pairs for KL(q || p).
    """
    logp = logits(hidden, weight, None, temperature, None).log_softmax(-1)
    logq = logits(ref_hidden, ref_weight, None, temperature, None).log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


def token_weights(
    spec: GRPOSpec,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    tokens: float | Tensor | None = None,
    sequences: float | Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Each row's weight in the loss, (T,) float32: the aggregation and its normaliser.

    cu_seqlens (S + 1,) int, on the CPU unless mask is given; mask (T,) bool, False = masked. `tokens` and `sequences` count the global
    batch over ranks and accumulation steps; left out, those given here are counted.
    """
    device = cu_seqlens.device if mask is None else mask.device
    rows = int(cu_seqlens[-1]) if mask is None else len(mask)
    mask = torch.ones(rows, device=device) if mask is None else mask.float()
    owner = sequence_of_rows(cu_seqlens.to(device, non_blocking=True), rows)
    count = torch.zeros(len(cu_seqlens) - 1, device=device).index_add_(0, owner, mask)
    sequences = len(cu_seqlens) - 1 if sequences is None else sequences
    if spec.aggregation == "token":
        return mask / (count.sum().clamp(min=1) if tokens is None else tokens)
    if spec.aggregation == "sequence":
        return mask / (count.clamp(min=1)[owner] * sequences)
    if spec.aggregation == "sequence_sum":
        return mask / sequences
    if max_length is None:
        raise ValueError("max_length: needed for aggregation='constant'; pass the generation limit in tokens")
    return mask / (sequences * max_length)


def high_entropy(entropy: Tensor, token_weight: Tensor, share: float) -> Tensor:
    """The `share` of the unmasked rows with the highest entropy: (T,) and (T,) -> (T,) bool."""
    if len(entropy) == 0:
        return torch.zeros_like(entropy, dtype=torch.bool)
    counted = token_weight != 0
    ranked = torch.where(counted, entropy, -torch.inf).sort().values  # masked rows first
    n = counted.sum()
    position = len(entropy) - n + (1 - share) * (n - 1).clamp(min=0)  # linear interpolation between ranks, as torch.quantile
    low, high = (ranked.take(x.long().clamp(0, len(entropy) - 1)) for x in (position.floor(), position.ceil()))  # indexing would sync
    threshold = torch.lerp(low, high, (position - position.floor()).to(ranked.dtype))
    return counted & (entropy >= torch.where(low == high, low, threshold))


def grpo_terms(
    logp: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    spec: GRPOSpec,
    *,
    token_weight: Tensor,
    cu_seqlens: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    policy_mask: Tensor | None = None,
    entropy_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The GRPO-family loss from log-probs: everything after the head. All (T,) but cu_seqlens (S + 1,).

    loss = sum_t token_weight * (policy_mask * importance * policy + beta * kl) - entropy_coef * sum_t entropy_weight * entropy, with
    the policy term of `spec.objective`. `old_logp` None means on policy: the ratio is 1 and its gradient that of the log-prob.
    `entropy_weight` is token_weight (times policy_mask) when left out. A NaN in a row that counts is NaN in the loss and in the
    gradient; only in `sampler_logp` it stands for a token that the sampler could not score, whose importance is 1. Returns the loss and
    detached statistics (len(STATS),) float32.
    """
    counted = token_weight != 0
    logp, entropy, A = (torch.where(counted, x, 0) for x in (logp, entropy, advantages))
    old = logp.detach() if old_logp is None else torch.where(counted, old_logp, 0)
    ref = None if ref_logp is None else torch.where(counted, ref_logp, 0)
    owner = None if cu_seqlens is None else sequence_of_rows(cu_seqlens.to(logp.device), len(logp))

    def over_sequence(x: Tensor, mean: bool) -> Tensor:
        """Each row's sequence's sum or mean of x over its counted rows."""
        assert cu_seqlens is not None and owner is not None, "rows that depend on their sequence come with cu_seqlens"
        sums = x.new_zeros(2, len(cu_seqlens) - 1).index_add(1, owner, torch.stack([torch.where(counted, x, 0), counted.to(x.dtype)]))
        return (sums[0] / sums[1].clamp(min=1) if mean else sums[0])[owner]

    log_ratio = nan_in_both(logp - old)
    ratio = nan_in_both(over_sequence(log_ratio, mean=True)) if spec.ratio == "sequence" else log_ratio
    ratio = ratio.clamp(max=MAX_LOG_RATIO).exp()
    importance = torch.ones_like(logp)
    if sampler_logp is not None:
        gap = torch.where(counted, old.detach() - sampler_logp, 0).nan_to_num(nan=0.0)  # a token that the sampler could not score
        gap = over_sequence(gap, mean=False) if spec.importance.startswith("sequence") else gap
        importance = gap.clamp(max=MAX_LOG_RATIO).exp()
        inside = (importance >= spec.importance_min) & (importance <= spec.importance_max)
        if spec.importance.endswith("mask"):
            importance = torch.where(inside, importance, 0)
        else:
            importance = importance.clamp(spec.importance_min, spec.importance_max)
    applied = importance

    if spec.objective == "clip":
        clipped = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
        gain = torch.minimum(ratio.clamp(max=spec.clip_delta) * A if spec.clip_delta is not None else ratio * A, clipped * A)
        if spec.dual_clip is not None:
            gain = torch.where(A < 0, torch.maximum(gain, spec.dual_clip * A), gain)
    elif spec.objective == "cispo":
        gain = ratio.clamp(max=1 + spec.clip_high).detach() * A * logp
    elif spec.objective == "sapo":
        tau = torch.where(A > 0, spec.sapo_temperature_pos, spec.sapo_temperature_neg).to(A.dtype)
        gain = torch.sigmoid(tau * (ratio - 1)) * 4 / tau * A
    else:  # vespo
        log_w = over_sequence(log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), mean=False)
        if sampler_logp is not None:
            log_importance = importance.log().clamp(MIN_LOG_RATIO_VESPO, MAX_LOG_RATIO)
            log_w = log_w + (log_importance if spec.importance.startswith("sequence") else over_sequence(log_importance, mean=False))
            applied = torch.ones_like(logp)  # it is part of the weight
        log_w = log_w.clamp(MIN_LOG_RATIO_VESPO, MAX_LOG_RATIO)
        k = torch.where(A >= 0, spec.vespo_k_pos, spec.vespo_k_neg).to(A.dtype)
        decay = torch.where(A >= 0, spec.vespo_lambda_pos, spec.vespo_lambda_neg).to(A.dtype).clamp(min=1e-4)
        gain = (decay + k * log_w - decay * log_w.exp()).exp() * A * logp

    policy = -gain * applied
    kept = torch.ones_like(token_weight) if policy_mask is None else policy_mask.to(token_weight.dtype)
    policy = policy * kept
    kl = torch.zeros_like(logp)
    if ref is not None:
        kl = token_kl(logp, ref, spec.kl) * (ratio if spec.kl_bias_correction else 1)
    entropy_weight = token_weight * kept if entropy_weight is None else torch.where(counted, entropy_weight, 0)
    policy_loss = (token_weight * policy).sum()
    loss = policy_loss + spec.beta * (token_weight * kl).sum() - spec.entropy_coef * (entropy_weight * entropy).sum()
    with torch.no_grad():
        low, high = torch.zeros_like(counted), torch.zeros_like(counted)
        if spec.objective == "clip":
            low = (ratio < 1 - spec.clip_low) & (A < 0)
        if spec.objective in ("clip", "cispo"):
            high = (ratio > 1 + spec.clip_high) & (A > 0)
        rows = (kl, entropy, low, high, ratio, ratio * ratio, importance)
        sums = [counted.sum(), loss, policy_loss, *(torch.where(counted, x, 0).sum() for x in rows)]
        return loss, torch.stack([x.float() for x in sums])


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
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    **rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`grpo_terms` of the log-probs and entropies that the head gives; `rows` are its other arguments."""
    logp, entropy = linear_logprob(hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap)
    token_weight = token_weight.masked_fill(targets == IGNORED, 0)
    return grpo_terms(logp, entropy, advantages, old_logp, ref_logp, spec, token_weight=token_weight, **rows)


def group_advantages(rewards: Tensor, groups: Tensor, spec: AdvantageSpec, *, weights: Tensor | None = None) -> Tensor:
    """Rewards relative to their group: (r - baseline) / (std + epsilon), or undivided.

    rewards (N,) or (N, R) float, groups (N,) int64 (any ids, in any order), weights (R,) float, 1 when left out -> (N,) float32, float64
    for float64 rewards; 16-bit ones are taken for what they hold (0.1, 0.2 and 0.3 lie unevenly in bfloat16). The baseline is the group's
    mean, or that of its other members, which is n / (n - 1) * (r - mean) in all; deviations are the unbiased ones. sum_then_normalize does
    this to the weighted sums of the rewards; normalize_then_sum does it to each reward and divides the weighted sums of the results by
    their deviation over the call (their mean is 0, since those of a group add up to 0).

    NaN rewards stay out of the statistics and count 0 in a row's sum; a row with no other reward is unscorable: out of all statistics and
    0. So are groups of one and, exactly, groups of equal rewards. An infinite reward has no mean: its group is NaN, and all of the call
    where a deviation is taken over that.
    """
    table = _upcast(rewards if rewards.ndim == 2 else rewards[:, None])  # (N, R)
    weights = table.new_ones(table.shape[1]) if weights is None else weights.to(table.dtype)
    unscorable = table.isnan().all(1)
    _, groups = groups.unique(return_inverse=True)
    if spec.combine == "sum_then_normalize":
        sums = (torch.where(table.isnan(), 0, table) * weights).sum(1).masked_fill(unscorable, torch.nan)
        return _normalized(sums, ~unscorable, groups, spec)
    sums = sum(
        (weight * _normalized(column, ~column.isnan(), groups, spec) for weight, column in zip(weights, table.T, strict=True)),
        table.new_zeros(len(table)),
    )
    std = _std(torch.where(unscorable, 0, sums).square().sum(), (~unscorable).sum())
    return torch.where(unscorable | (std <= EQUAL_REWARDS), 0, sums / (std + spec.epsilon))


def _normalized(rewards: Tensor, known: Tensor, groups: Tensor, spec: AdvantageSpec) -> Tensor:
    """One reward (N,) relative to its group, groups (N,) from 0 on; 0 where it is not known."""
    value = torch.where(known, rewards, 0)
    total = value.new_zeros(3, int(groups.max()) + 1 if len(groups) else 0)
    total[0].index_add_(0, groups, known.to(value.dtype))
    total[1].index_add_(0, groups, value)
    count, mean = total[0], total[1] / total[0].clamp(min=1)
    centred = torch.where(known, value - mean[groups], 0)
    total[2].index_add_(0, groups, centred * centred)
    std = _std(total[2], count)
    differ = (count > 1) & ~(std <= EQUAL_REWARDS * mean.abs().clamp(min=1))  # NaN, of infinite rewards, is to show
    if spec.baseline == "leave_one_out":
        centred = centred * (count / (count - 1).clamp(min=1))[groups]
    if spec.scale == "std":
        centred = centred / (std + spec.epsilon)[groups]
    elif spec.scale == "batch_std":
        call_mean = value.sum() / known.sum().clamp(min=1)
        centred = centred / (_std(torch.where(known, value - call_mean, 0).square().sum(), known.sum()) + spec.epsilon)
    return torch.where(differ[groups] & known, centred, 0)


def _std(squares: Tensor, count: Tensor) -> Tensor:
    """The unbiased deviation from the sum of squares about the mean; 0 for one value."""
    return (squares / (count - 1).clamp(min=1)).sqrt()


def sequence_of_rows(cu_seqlens: Tensor, rows: int) -> Tensor:
    """The sequence that each row belongs to: cu_seqlens (S + 1,) int -> (rows,) int64, without a host sync."""
    return torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device), cu_seqlens.diff().long(), output_size=rows)


def _scaled(out: Tensor, temperature: float | Tensor, softcap: float | None) -> Tensor:
    if softcap is not None:
        out = softcap * torch.tanh(out / softcap)
    return out / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def _logp_and_entropy(scaled: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = scaled.log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
    targets, ignored, unlabelled = labelled(targets)
    index, valid = in_vocabulary(targets, scaled.shape[-1])
    chosen = torch.where(valid, logp.gather(1, columns(index)).view_as(targets), torch.nan)
    return chosen.masked_fill(ignored, 0), entropy.masked_fill(unlabelled, 0)


def columns(x: Tensor) -> Tensor:
    """What belongs to a row's targets, x (T,) or (T, K), as columns, (T, 1) or (T, K)."""
    return x if x.ndim == 2 else x[:, None]


def in_vocabulary(targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Targets, of any shape, that can be looked up, and which of them were in [0, vocabulary): the log-prob of another is NaN."""
    valid = (targets >= 0) & (targets < vocabulary)
    return torch.where(valid, targets, 0), valid


def nan_in_both(x: Tensor) -> Tensor:
    """x, whose NaN is also the derivative: a clamp behind it would make that 0, and a loss of NaN would come with a gradient of 0."""
    return x * torch.where(x.isnan(), torch.nan, 1.0).to(x.dtype)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
