"""A pass without gradients: what the model gives the tokens that stand in sequences."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from actial_fast import ops
from actial_fast.model.policy import Policy
from actial_fast.packing.batch import Sequence
from actial_fast.train.rounds import Round
from actial_fast.train.sharding import is_sharded
from actial_fast.train.shortage import over
from actial_fast.train.stopping import NEVER, Stop


@torch.no_grad()
def log_probs(
    policy: Policy, sequences: Many[Sequence], rounds: Iterator[Round], *, temperature: float = 1.0, stop: Stop = NEVER
) -> list[Tensor]:
    """Log-probs of each sequence's trained tokens, (n,) float32 each, on the device, in eval mode. rounds: of one pass over the sequences
    (rounds.passes). Every rank calls. Raises GivenUp on every rank once `stop` is asked."""
    was_training = policy.training
    policy.eval()
    out: list[Tensor] = [torch.empty(0)] * len(sequences)
    try:
        for each in stop.until(rounds, together=is_sharded(policy)):
            with over(each.told):
                logp = policy(
                    each.batch,
                    lambda hidden, head, b=each.batch: ops.linear_logprob(
                        hidden, head, b.targets, temperature=temperature, return_entropy=False
                    )[0],
                )
            sizes = [int(sequences[k].trained[1:].sum()) for k in each.members]
            for k, part in zip(each.members, logp.split([*sizes, each.idle]), strict=False):
                out[k] = part
    finally:
        policy.train(was_training)
    stop.leave()
    return out
