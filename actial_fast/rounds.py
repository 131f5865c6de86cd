"""How a pass over sequences is cut into forward passes: packed, or padded and plain."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np

from actial_fast.dist import World, is_sharded
from actial_fast.model import Policy
from actial_fast.native import plan
from actial_fast.packing import Batch, Group, PackedBatch, Sequence, collate, micro_batches, pack, share
from actial_fast.planning import Capacity, Costs
from actial_fast.processor import Processor, dummy, in_step
from actial_fast.recipe import GRPORecipe, SFTRecipe

Recipe = SFTRecipe | GRPORecipe


@dataclass(frozen=True)
class Round:
    """One forward pass: a batch on the device, the sequences in the order of its loss rows, and how many rows at its end do not count."""

    batch: Batch | PackedBatch
    members: list[int]
    idle: int


def rounds(sequences: Many[Sequence], recipe: Recipe, policy: Policy, processor: Processor, where: World) -> Iterator[Round]:
    """Every sequence once. Sharded ranks make the same number of passes, with a dummy image where one has none, so that none waits.

    ValueError naming the sequence when one alone exceeds recipe.pack_tokens or recipe.pack_patches.
    """
    yield from (_packed if recipe.packing == "packed" else _plain)(sequences, recipe, policy, processor, where)


def _plain(sequences: Many[Sequence], recipe: Recipe, policy: Policy, processor: Processor, where: World) -> Iterator[Round]:
    groups = micro_batches([len(s) for s in sequences], recipe.micro_batch)
    for members in groups + [[]] * _missing(len(groups), policy, where):
        chosen, idle = in_step([sequences[i] for i in members], processor, is_sharded(policy))
        yield Round(collate(chosen, processor.pad).to(where.device), members, idle)


def _packed(sequences: Many[Sequence], recipe: Recipe, policy: Policy, processor: Processor, where: World) -> Iterator[Round]:
    groups = share(sequences, processor.image_token)
    suffixes = [[len(sequences[i]) - g.prefix for i in g.members] if len(g.members) > 1 else [] for g in groups]
    made = plan(
        np.array([g.prefix for g in groups], np.int64),
        np.array([n for lengths in suffixes for n in lengths], np.int64),
        np.cumsum([0, *map(len, suffixes)], dtype=np.int64),
        np.array([sum(map(len, sequences[g.members[0]].patches)) for g in groups], np.int64),
        capacity=Capacity(recipe.pack_tokens, recipe.pack_patches),
        costs=Costs(),
        names=[f"sequence {g.members[0]}" for g in groups],
    )
    for k in range(made.per_rank + _missing(made.per_rank, policy, where)):
        pieces = [(groups[g], first, end) for g, first, end in (made.micro_batch(0, k) if k < made.per_rank else [])]
        pieces = [(group, 0, 1) if len(group.members) == 1 else (group, first, end) for group, first, end in pieces]
        chosen, idle = list(sequences), 0
        if is_sharded(policy) and not any(sequences[group.members[0]].patches for group, _, _ in pieces):
            extra = dummy(processor)
            pieces.append((Group((len(chosen),), len(extra)), 0, 1))
            chosen, idle = [*chosen, extra], int(extra.trained[1:].sum())
        batch, order = pack(chosen, pieces, processor.image_token, processor.image_processor.merge_size)
        yield Round(batch.to(where.device), [i for i in order if i < len(sequences)], idle)


def _missing(made: int, policy: Policy, where: World) -> int:
    """Empty passes that keep this rank in step with the others."""
    return int(where.max(made)) - made if is_sharded(policy) else 0
