"""What the tests of the loops and of their passes call: one pass over sequences, or one mini-batch's gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actial_fast import grpo
from actial_fast.data.sources.stream import Example
from actial_fast.model.policy import Policy
from actial_fast.model.processor import Processor
from actial_fast.packing.batch import Sequence
from actial_fast.rollout.embedded import Embedded
from actial_fast.rollout.groups import Groups
from actial_fast.rollout.kept import Kept
from actial_fast.rollout.protocol import Draw, Reply, Watch, awake
from actial_fast.settings.recipe import GRPORecipe
from actial_fast.tasks.rewards import Scorer
from actial_fast.train import forward
from actial_fast.train.dist import World
from actial_fast.train.rounds import Pass, Round, passes
from actial_fast.train.samples import Sample

Key = tuple[int, ...]
ALONE = World(0, 1, torch.device("cpu"))


def rounds(sequences: list[Sequence], recipe: GRPORecipe, policy: Policy, processor: Processor, *, trained: bool = False) -> list[Round]:
    """The rounds of one pass; what they hold of the tower's is not to be used."""
    return list(passes([Pass(policy, sequences, trained)], recipe, processor, ALONE)[0])


def log_probs(policy: Policy, processor: Processor, sequences: list[Sequence], recipe: GRPORecipe) -> list[np.ndarray]:
    """Of each sequence's trained tokens, in eval mode."""
    (rounds,) = passes([Pass(policy, sequences, False)], recipe, processor, ALONE)
    return forward.log_probs(policy, sequences, rounds, temperature=recipe.sampling.temperature)


def accumulate(policy: Policy, processor: Processor, samples: list[Sample], recipe: GRPORecipe) -> Tensor:
    """Gradients of all samples as one mini-batch, and its statistics. Their old and reference log-probs are taken as they are."""
    kept = grpo._kept(samples, recipe)
    (each,) = passes([Pass(policy, [s.sequence for s in kept], True)], recipe, processor, ALONE)
    return grpo._accumulate(policy, kept, (sum(map(len, samples)), len(samples)), each, recipe, ALONE)


def sampled(policy: Policy, processor: Processor, examples: list[Example], recipe: GRPORecipe, replies: Kept | None = None) -> list[Sample]:
    """The samples of a step of which these are the prompts, from the embedded engine."""
    stream: Any = SimpleNamespace(position=0, next_batch=lambda n, admit: examples)
    with Scorer(recipe.rewards) as scorer:
        return Groups(Embedded(policy, processor), processor, stream, recipe, ALONE, scorer, replies=replies).of(1).samples


def generate(
    policy: Policy,
    processor: Processor,
    prompts: list[Sequence],
    n: int,
    *,
    keys: list[Key] | tuple[Key, ...] = (),
    temperature: float = 1.0,
    max_new_tokens: int,
    kv_tokens: int = 0,
    **watched: Any,
) -> list[list[Reply]]:
    """Replies of the embedded engine."""
    with awake(Embedded(policy, processor), 0) as engine:
        return engine.generate(prompts, Draw(n, temperature, max_new_tokens, kv_tokens), keys, Watch(**watched))
