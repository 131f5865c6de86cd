"""The ops that the loops and other trainers call: arguments are checked here, then CUDA tensors go to the Triton kernels and CPU tensors to
`chunked`. `reference` is the readable form of the same equations. Under torch.compile each op is one node of the graph (`library`).

T rows that carry loss, H hidden size, V vocabulary, S sequences of rows, N rewards, R reward functions. Floating results are float32,
float64 for float64 inputs (CPU only). Under autocast hidden states, weight and bias are cast as F.linear would cast them.

Values are checked where that costs no host sync and no break in a compiled graph, on the CPU: out-of-range targets, advantages that are
not finite, a temperature of 0, infinite rewards. On CUDA they show: such a target's log-prob is NaN (nothing is read out of bounds), and
what is not finite makes loss and gradient so, or the advantages of its group. A NaN in a row that counts is never a gradient of 0.
A row with token_weight 0 may hold anything, any target and a NaN hidden state included: its gradient is 0 and its own log-prob, NaN
perhaps, is in `logp` alone. The same holds for a row whose log-prob and entropy get a gradient of 0. A target of -100 is no label, for
every op that takes targets and whatever the row's weight: the row has weight 0, and log-prob and entropy of 0. Of several targets of a
row those that are -100 are left out; its entropy is 0 where all are.

Gradients are those of autograd for any number of backward passes (retain_graph), for hooks on saved tensors and for inputs changed in
place before the backward, which is an error where they are needed again. They have no derivative: with create_graph=True they are right,
and differentiating them is a RuntimeError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actial_fast.ops import checks, chunked, chunked_kl, chunked_logits, operators, operators_logits, reference
from actial_fast.ops.library import implementation
from actial_fast.ops.parallel import VocabParallel
from actial_fast.ops.reference import STATS, token_weights
from actial_fast.ops.sharding import plain_tensors, refuse_reduced
from actial_fast.ops.spec import AdvantageSpec, GRPOSpec
from actial_fast.ops.workspace import workspace

__all__ = [
    "STATS",
    "GRPOLoss",
    "group_advantages",
    "grpo_loss_from_logits",
    "linear_cross_entropy",
    "linear_grpo_loss",
    "linear_kl",
    "linear_logprob",
    "logprob_from_logits",
    "token_kl",
    "token_weights",
]


class GRPOLoss(NamedTuple):
    """loss: scalar, differentiable; stats (len(STATS),) float32, named by STATS; logp, entropy (T,). All but the loss are detached."""

    loss: Tensor
    stats: Tensor
    logp: Tensor
    entropy: Tensor


@plain_tensors
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    return_entropy: bool = True,
    workspace_mb: float | None = None,
    vocab_parallel: VocabParallel | None = None,
    head: str = "triton",
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target and entropy of each row's distribution, from hidden states and the head.

    hidden (T, H), weight (V, H), bias (V,) of one floating dtype; targets (T,) int64, or (T, K) for K tokens a row, the same one as often
    as you like; logits are softcap * tanh(x / softcap) / temperature with a temperature for all rows or one each, (T,). Returns logp of
    the targets' shape and entropy (T,) in nats (None without return_entropy), both differentiable in hidden, weight and bias, once. At
    most workspace_mb MiB are held above inputs, outputs and a float32 weight gradient (None: 700 on the CPU, on CUDA 3% of the card's
    memory, between 700 and 2,800; not what is free, so that chunks are the same in every call). 1 GEMM of T * H * V; with its backward
    pass 4, with a frozen head 3. vocab_parallel: weight and bias are this rank's part of the vocabulary, targets are ids of the whole, and
    so are the results, on every rank. head: "triton", our kernels, or "quack", which makes the products by quack-kernels: bfloat16 on
    sm_90 and sm_100, V a multiple of 128, targets (T,), without bias, softcap, vocab_parallel and what follows. ValueError for arguments
    that do not fit together.

    top_k, top_p, min_p: what a sampler that was given these draws from, by vLLM's rules (`reference.lowest_kept`): log-probs and entropy
    are those of the kept tokens, whose probabilities make up 1 again, as in vLLM's logprobs_mode="processed_logprobs". A target outside
    of them has a log-prob of -inf, whose gradient is 0. The kept tokens are found anew from these hidden states: near the border they may
    differ from those of a sampler with other rounding or other weights, whose own ids, where it returns them, go in as targets (T, K).
    """
    workspace_mb = workspace(workspace_mb, hidden, vocab_parallel)
    hidden = _entered(hidden, vocab_parallel)
    hidden, weight, bias = checks.head(hidden, weight, targets, bias, softcap, workspace_mb, parallel=vocab_parallel, several=True)
    vocabulary = vocab_parallel.vocab if vocab_parallel else len(weight)
    targets, ignored, unlabelled = reference.labelled(targets)
    checks.in_vocabulary(targets, vocabulary)
    scaling = {"bias": bias, "temperature": checks.temperature(temperature, hidden), "softcap": softcap}
    kept = checks.kept(top_k, top_p, min_p, vocabulary, vocab_parallel)
    head = checks.path(head, hidden, weight, bias, softcap, vocab_parallel, targets=targets, kept=kept)
    logp, entropy = _logprob(hidden, weight, targets, vocab_parallel, head, **scaling, workspace_mb=workspace_mb, kept=kept)
    return logp.masked_fill(ignored, 0), entropy.masked_fill(unlabelled, 0) if return_entropy else None


def _logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, parallel: VocabParallel | None, head: str, **options: Any
) -> tuple[Tensor, Tensor]:
    run = _path(hidden, "linear_logprob", chunked.linear_logprob, operators.linear_logprob, parallel, head)
    return run(hidden, weight, parallel.local(targets) if parallel else targets, **options)


@plain_tensors
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    spec: GRPOSpec,
    *,
    token_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    policy_mask: Tensor | None = None,
    entropy_weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    weight_grad: Tensor | None = None,
    skip_zero_rows: bool | None = None,
    workspace_mb: float | None = None,
    vocab_parallel: VocabParallel | None = None,
    head: str = "triton",
) -> GRPOLoss:
    """A policy loss of the GRPO family from hidden states: `reference.grpo_terms` has the equation, GRPOSpec the papers.

    hidden, weight, targets, bias, temperature, softcap, workspace_mb, vocab_parallel and head as in `linear_logprob`. All other rows are
    (T,) floating, without gradient: advantages, which may also be (S,) with cu_seqlens; old_logp, log-probs of the policy that sampled
    (None: this one, the ratio is 1); ref_logp, of the reference (needed where spec.beta > 0); token_weight, each row's weight in the loss,
    0 = masked (None: those of spec.aggregation for these rows, see `token_weights`); sampler_logp, of the engine that sampled, for the
    importance weight; entropy_weight, of the entropy bonus (None: token_weight where the policy term counts); policy_mask (T,) bool, rows
    that carry the policy term (None: all; with spec.top_entropy < 1 the highest entropies of this call, found by one more GEMM).
    cu_seqlens (S + 1,) int32 or int64: where sequences begin and end; where rows depend on their sequence (spec.needs_sequences) on the
    CPU, because chunks are cut between sequences (pinned, where a CUDA graph captures the call).

    The gradients are computed with the loss: 3 GEMMs of T * H * V, 2 with a frozen head, 1 without gradients, and one more for the rows of
    a sequence that is longer than a chunk, where rows depend on their sequence; the backward pass only scales them. weight_grad (V, H)
    float32, contiguous: the head's gradient is added to it here, autograd gets none, and the loss must be the root of backward, once:
    another upstream gradient than 1, as of loss / n, is a ValueError on the CPU and, where the host would have to wait to know, NaN in
    weight_grad and all gradients. skip_zero_rows: rows without a gradient leave the two backward GEMMs (None: where the spec makes such
    rows). T = 0 gives 0 and zero gradients. ValueError for arguments that do not fit together, and when the workspace holds not one row.
    """
    if weight_grad is not None:
        refuse_reduced(weight)
    workspace_mb = workspace(workspace_mb, hidden, vocab_parallel)
    hidden = _entered(hidden, vocab_parallel)
    hidden, weight, bias = checks.head(hidden, weight, targets, bias, softcap, workspace_mb, parallel=vocab_parallel)
    rows: dict[str, Any] = {"old_logp": old_logp, "ref_logp": ref_logp, "sampler_logp": sampler_logp, "entropy_weight": entropy_weight}
    targets, ignored, _ = reference.labelled(targets)
    rows = checks.grpo_rows(hidden, advantages, spec, token_weight, cu_seqlens, policy_mask, ignored, **rows)
    checks.in_vocabulary(targets, vocab_parallel.vocab if vocab_parallel else len(weight), rows["token_weight"])
    weight_grad = checks.weight_grad(weight_grad, weight)
    temperature = checks.temperature(temperature, hidden)
    head = checks.path(head, hidden, weight, bias, softcap, vocab_parallel)
    scaling: dict[str, Any] = {"bias": bias, "temperature": temperature, "softcap": softcap, "workspace_mb": workspace_mb}
    if spec.top_entropy < 1 and policy_mask is None and len(targets):
        with torch.no_grad():
            entropy = _logprob(hidden, weight, torch.zeros_like(targets), vocab_parallel, head, **scaling)[1]
        rows["policy_mask"] = reference.high_entropy(entropy, rows["token_weight"], spec.top_entropy)
    if skip_zero_rows is None:
        skip_zero_rows = spec.beta == 0 and spec.entropy_coef == 0
    run = _path(hidden, "linear_grpo", chunked.linear_grpo_loss, operators.linear_grpo_loss, vocab_parallel, head)
    targets = vocab_parallel.local(targets) if vocab_parallel else targets
    more = {**scaling, "weight_grad": weight_grad, "skip_zero_rows": skip_zero_rows}
    return _labelled_only(GRPOLoss(*run(hidden, weight, targets, spec=spec, **rows, **more)), ignored)


def _labelled_only(loss: GRPOLoss, ignored: Tensor) -> GRPOLoss:
    return loss._replace(logp=loss.logp.masked_fill(ignored, 0), entropy=loss.entropy.masked_fill(ignored, 0))


@plain_tensors
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    weight_grad: Tensor | None = None,
    workspace_mb: float | None = None,
    vocab_parallel: VocabParallel | None = None,
    head: str = "triton",
) -> Tensor:
    """-sum_t token_weight[t] * log p(targets[t]), scalar: the weights carry the normaliser, so that micro-batches and ranks add up.

    hidden, weight, targets, bias, softcap, workspace_mb, vocab_parallel and head as in `linear_logprob`, token_weight (T,) floating,
    weight_grad as in `linear_grpo_loss`. The gradients are computed with the loss: 3 GEMMs, 2 with a frozen head, 1 without gradients.
    ValueError for arguments that do not fit together.
    """
    if weight_grad is not None:
        refuse_reduced(weight)
    workspace_mb = workspace(workspace_mb, hidden, vocab_parallel)
    hidden = _entered(hidden, vocab_parallel)
    hidden, weight, bias = checks.head(hidden, weight, targets, bias, softcap, workspace_mb, parallel=vocab_parallel)
    targets, ignored, _ = reference.labelled(targets)
    token_weight = checks.row("token_weight", token_weight, hidden).masked_fill(ignored, 0)
    checks.in_vocabulary(targets, vocab_parallel.vocab if vocab_parallel else len(weight), token_weight)
    weight_grad = checks.weight_grad(weight_grad, weight)
    head = checks.path(head, hidden, weight, bias, softcap, vocab_parallel)
    run = _path(hidden, "linear_grpo", chunked.linear_cross_entropy, operators.linear_cross_entropy, vocab_parallel, head)
    targets = vocab_parallel.local(targets) if vocab_parallel else targets
    return run(hidden, weight, targets, token_weight, bias=bias, softcap=softcap, weight_grad=weight_grad, workspace_mb=workspace_mb)


@plain_tensors
def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    workspace_mb: float | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> Tensor:
    """KL(p || q) of each row over the whole vocabulary, in nats: p from hidden and weight, q from ref_hidden and ref_weight.

    hidden (T, H), weight (V, H), ref_hidden (T, G), ref_weight (V, G), temperature, workspace_mb and vocab_parallel as in
    `linear_logprob` -> (T,), differentiable in all four, once. Swap the pairs for KL(q || p). ValueError for arguments that do not fit
    together.
    """
    workspace_mb = workspace(workspace_mb, hidden, vocab_parallel)
    hidden, ref_hidden = _entered(hidden, vocab_parallel), _entered(ref_hidden, vocab_parallel)
    hidden, weight, _ = checks.head(hidden, weight, None, None, None, workspace_mb, parallel=vocab_parallel)
    ref_hidden, ref_weight, _ = checks.head(ref_hidden, ref_weight, None, None, None, workspace_mb, names=("ref_hidden", "ref_weight"))
    for name, got, want in (("ref_hidden", len(ref_hidden), len(hidden)), ("ref_weight", len(ref_weight), len(weight))):
        if got != want:
            raise ValueError(f"{name}: expected {want} rows like {name.removeprefix('ref_')}, got {got}")
    checks.match("ref_hidden", ref_hidden, "hidden", hidden)
    run = _path(hidden, "linear_kl", chunked_kl.linear_kl, operators_logits.linear_kl, vocab_parallel)
    return run(hidden, weight, ref_hidden, ref_weight, temperature=checks.temperature(temperature, hidden), workspace_mb=workspace_mb)


@plain_tensors
def logprob_from_logits(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0, inplace_backward: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each row from logits (T, V) and targets (T,) int64 -> two (T,), differentiable once.

    temperature as in `linear_logprob`. inplace_backward: the gradient overwrites the logits' memory in the backward pass, so that no
    second (T, V) exists. ValueError for arguments that do not fit together.
    """
    logits = checks.logits(logits, targets)
    targets, ignored, _ = reference.labelled(targets)
    checks.in_vocabulary(targets, logits.shape[1])
    run = _path(logits, "logits", chunked_logits.logprob_from_logits, operators_logits.logprob_from_logits)
    logp, entropy = run(logits, targets, temperature=checks.temperature(temperature, logits), inplace_backward=inplace_backward)
    return logp.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0)


@plain_tensors
def grpo_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    spec: GRPOSpec,
    *,
    token_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    policy_mask: Tensor | None = None,
    entropy_weight: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    inplace: bool = False,
) -> GRPOLoss:
    """`linear_grpo_loss` for those who hold the logits (T, V): the same loss, arguments and errors.

    inplace: the gradient overwrites the logits' memory, during this call or the backward pass; the logits are of no use afterwards.
    """
    logits = checks.logits(logits, targets)
    rows: dict[str, Any] = {"old_logp": old_logp, "ref_logp": ref_logp, "sampler_logp": sampler_logp, "entropy_weight": entropy_weight}
    targets, ignored, _ = reference.labelled(targets)
    rows = checks.grpo_rows(logits, advantages, spec, token_weight, cu_seqlens, policy_mask, ignored, **rows)
    checks.in_vocabulary(targets, logits.shape[1], rows["token_weight"])
    temperature = checks.temperature(temperature, logits)
    if spec.top_entropy < 1 and policy_mask is None and len(targets):
        with torch.no_grad():
            entropy = logprob_from_logits(logits, torch.zeros_like(targets), temperature=temperature)[1]
        rows["policy_mask"] = reference.high_entropy(entropy, rows["token_weight"], spec.top_entropy)
    run = _path(logits, "logits", chunked_logits.grpo_loss_from_logits, operators_logits.grpo_loss_from_logits)
    return _labelled_only(GRPOLoss(*run(logits, targets, spec=spec, **rows, temperature=temperature, inplace=inplace)), ignored)


@plain_tensors
def group_advantages(rewards: Tensor, groups: Tensor, spec: AdvantageSpec, *, weights: Tensor | None = None) -> Tensor:
    """Rewards relative to those of their group: `reference.group_advantages` has the equations.

    rewards (N,) or (N, R) floating, NaN = unscorable; groups (N,) int64, any ids in any order; weights (R,) floating, of the reward
    functions (None: 1 each). Returns (N,) float32, float64 for float64 rewards, without gradient. ValueError for arguments that do not fit
    together.
    """
    rewards = checks.rewards(rewards)
    if groups.shape != rewards.shape[:1] or groups.dtype != torch.int64:
        raise ValueError(f"groups: expected ({len(rewards)},) int64, got {checks.text(groups)}")
    checks.match("groups", groups, "rewards", rewards, dtype=False)
    if weights is not None:
        if rewards.ndim != 2 or weights.shape != rewards.shape[1:] or not weights.is_floating_point():
            raise ValueError(
                f"weights: expected one per column of rewards {tuple(rewards.shape)}, floating point, got {checks.text(weights)}"
            )
        checks.match("weights", weights, "rewards", rewards, dtype=False)
    run = _path(rewards, "advantages", reference.group_advantages, operators_logits.group_advantages)
    return run(rewards, groups, spec, weights=weights)


@plain_tensors
def token_kl(logp: Tensor, ref_logp: Tensor, kind: str = "k3") -> Tensor:
    """An estimate (k1, k2 or k3) of KL(policy || reference) per token from log-probs (T,) and (T,), differentiable in both -> (T,).

    `reference.token_kl` has the equations. ValueError when shapes, dtypes or devices differ, or for another kind.
    """
    if logp.ndim != 1 or not logp.is_floating_point():
        raise ValueError(f"logp: expected (T,) floating point, got {checks.text(logp)}")
    if logp.shape != ref_logp.shape:
        raise ValueError(f"ref_logp: expected {tuple(logp.shape)} like logp, got {tuple(ref_logp.shape)}")
    checks.match("ref_logp", ref_logp, "logp", logp)
    if kind not in ("k1", "k2", "k3"):
        raise ValueError(f"kind: {kind!r} is not one of k1, k2, k3")
    return _path(logp, "token_kl", chunked_logits.token_kl, operators_logits.token_kl)(logp, ref_logp, kind)


def _entered(hidden: Tensor, parallel: VocabParallel | None) -> Tensor:
    return parallel.enter(hidden) if parallel else hidden


def _path(
    x: Tensor,
    module: str,
    cpu: Callable[..., Any],
    compiled: Callable[..., Any],
    parallel: VocabParallel | None = None,
    head: str = "triton",
) -> Callable[..., Any]:
    """What computes: an operator that the compiler leaves whole, or directly the kernels for CUDA tensors or `cpu`."""
    if head != "triton":
        run = implementation(x, module, cpu)
        return functools.partial(run, head=head) if len(x) else run
    if parallel:
        if torch.compiler.is_compiling():
            raise ValueError("vocab_parallel: not under torch.compile, whose operators know no process group; call the op outside of it")
        return functools.partial(implementation(x, module, cpu), vocab_parallel=parallel)
    return compiled if torch.compiler.is_compiling() else implementation(x, module, cpu)
