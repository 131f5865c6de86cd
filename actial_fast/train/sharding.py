"""Weights, gradients and optimizer states cut over the ranks by FSDP2, and when they travel.

What is gathered together is a group: each layer of the language model and of the vision tower, the rest of the tower, the embedding, the
head, and the last norm. A layer is gathered for its forward pass and once more for its backward pass. The head's backward pass follows its
forward pass at once, so it is gathered once; the embedding's needs no weight. Tied, the two are one matrix, in the last norm's group, which
is whole from the beginning of a pass to its end. The recipe's dist.reshard, dist.reduce and dist.replicate change when groups go back to
shards, when gradients are summed, and over which ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from actial_fast.model.policy import Policy
from actial_fast.settings.running import DistConfig
from actial_fast.train.dist import Agreed, World

SHARDED = DistConfig(fsdp=True)


@dataclass(frozen=True)
class Travel:
    """What `shard` settled for a policy: its groups, those that stay gathered behind their forward pass, and the recipe's keys."""

    groups: tuple[FSDPModule, ...]
    kept: frozenset[FSDPModule]
    config: DistConfig


def shard(policy: Policy, where: World, config: DistConfig = SHARDED) -> Policy:
    """Cut the policy's weights over the ranks, as the recipe's `dist` says. Every rank calls.

    ValueError for a single rank, and where dist.replicate leaves no ranks to cut them over.
    """
    if problem := unfit(config, where):
        raise ValueError(problem)
    mesh = where.mesh if config.replicate == 1 else where.grid(config.replicate)
    low = policy.compute_dtype != torch.float32
    mixed = MixedPrecisionPolicy(param_dtype=policy.compute_dtype, reduce_dtype=torch.float32) if low else MixedPrecisionPolicy()
    base, trunk = policy.base, policy.base.model
    embedding, head = trunk.get_input_embeddings(), base.lm_head
    ends: list[nn.Module] = [] if embedding.weight is head.weight else [embedding, head]
    # a tower gives its features alone: without blocks its hidden states are a view, which a group may not return
    trunk.visual.register_forward_hook(lambda module, args, out: type(out)(**{k: out[k] for k in out if k != "last_hidden_state"}))
    for module in [*trunk.visual.blocks, trunk.visual, *trunk.language_model.layers, *ends, policy]:
        fully_shard(module, mesh=mesh, mp_policy=mixed)
    for module in ends:
        register_fsdp_forward_method(module, "lend")
    groups = tuple(module for module in policy.modules() if isinstance(module, FSDPModule))
    kept = groups if config.reshard == "step" else [module for module in groups if module in (head, policy)]
    policy.travel = Travel(groups, frozenset(kept), config)
    for group in groups:
        group.set_gradient_divide_factor(1.0)  # sums: the loss already carries the global count
        group.set_force_sum_reduction_for_comms(True)  # a plain sum, which gloo has and NCCL does without a copy
        group.set_reshard_after_forward(group not in kept, recurse=False)
        group.set_reshard_after_backward(config.reshard == "block", recurse=False)
        if group in (embedding, head, policy):
            group.set_unshard_in_backward(False)  # gathered still, or not needed
    return policy


def unfit(config: DistConfig, where: World) -> str:
    """Why weights cannot be cut over these ranks as the recipe says, or ""."""
    if not config.fsdp:
        return ""
    if where.mesh is None:
        return "dist.fsdp: needs several ranks; start with --gpus N, or set dist.fsdp=false"
    each, over = divmod(where.size, config.replicate)
    if over or each < 2:
        return (
            f"dist.replicate: {where.size} ranks cannot be {config.replicate} groups of two or more that are equally large; set it to the "
            "number of machines"
        )
    return ""


def is_sharded(policy: nn.Module) -> bool:
    """True when `shard` has been applied."""
    return isinstance(policy, FSDPModule)


def reduce_next(policy: Policy, *, tower: bool, last: bool) -> None:
    """Before a backward pass, of the vision tower or of all but it: whether it is the last one of an optimizer step there, behind which
    gradients are summed over all ranks. A no-op where the recipe has them summed behind every pass."""
    if not is_sharded(policy):
        return
    config, visual = policy.travel.config, policy.base.model.visual
    within = {id(module) for module in visual.modules()}
    for group in policy.travel.groups:
        if (id(group) in within) == tower:
            if config.reduce == "step":
                group.set_requires_gradient_sync(last, recurse=False)
            elif config.replicate > 1:  # between machines only once; what a machine has summed is no more than the gradient itself
                group.set_requires_all_reduce(last, recurse=False)


def settle(policy: Policy) -> None:
    """Back to sharded weights, whatever a pass has left gathered; no rank waits for another."""
    if is_sharded(policy):
        for group in policy.travel.groups:
            group.reshard()


@contextlib.contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """Whole weights on every rank, so that each may decode a number of steps of its own; a no-op where nothing is sharded, and inside
    another `gathered`. Every rank calls, whatever it then has to do."""
    if not is_sharded(policy) or not isinstance(next(policy.base.model.visual.parameters()), DTensor):
        yield
        return
    travel = policy.travel
    for group in travel.groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in travel.groups:
            group.reshard()
            group.set_reshard_after_forward(group not in travel.kept, recurse=False)


def recover(policy: Policy) -> None:
    """After an exception inside a forward pass, which FSDP2 still takes for the running one: back to sharded weights. Every rank calls."""
    if isinstance(policy, FSDPModule):
        if not hasattr(policy, "reset_iter_state"):
            raise Agreed("a pass failed, and this PyTorch (before 2.13) cannot go on with sharded weights after that")
        policy.reset_iter_state()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the pass held when memory ran out
