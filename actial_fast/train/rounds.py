"""How the passes of a step are cut into forward passes: packed, with every image through the vision tower once, or padded and plain."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
from torch import Tensor

from actial_fast.model.features import Features
from actial_fast.model.policy import ImageBatch, Policy
from actial_fast.model.processor import Processor, dummy
from actial_fast.packing.batch import Batch, Group, PackedBatch, Sequence, collate, micro_batches, pack, share
from actial_fast.packing.native import plan
from actial_fast.packing.packed_ops import collect
from actial_fast.packing.planning import Capacity
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe
from actial_fast.train.balance import Size, exchange, lengths_of
from actial_fast.train.dist import World
from actial_fast.train.nodes import carry
from actial_fast.train.sharding import is_sharded, reduce_next, settle
from actial_fast.train.shortage import batch_of, over

T = TypeVar("T")
Recipe = SFTRecipe | GRPORecipe
Pieces = list[tuple[Group, int, int]]  # of one micro-batch: a group, and from which to before which of its members


@dataclass(frozen=True)
class Pass:
    """Sequences that pass through a policy once. trained: with gradients; phase: what its time counts as; adapters: on, where there are
    any."""

    policy: Policy
    sequences: Many[Sequence]
    trained: bool
    phase: str = "update"
    adapters: bool = True

    @cached_property
    def groups(self) -> list[Group]:
        """The sequences in groups that begin alike."""
        return share(self.sequences, self.policy.base.config.image_token_id)


@dataclass(frozen=True)
class Round:
    """One forward pass: a batch on the device, the sequences in the order of its loss rows, how many rows at its end do not count, and the
    batch in words."""

    batch: Batch | PackedBatch
    members: list[int]
    idle: int
    told: Callable[[], str]


def passes(wanted: Many[Pass], recipe: Recipe, processor: Processor, where: World) -> list[Iterator[Round]]:
    """The passes of one step, to be run in this order; each goes over its sequences once. Forward and backward of a round are the caller's
    and come before the next round is asked for.

    Packed, the tower sees an image once a pass, or, while no weight of it is trained, once for all passes: then their towers must be the
    same. Sharded ranks make the same number of rounds and of the tower's calls, so that none waits for another. ValueError naming the
    sequence when one alone exceeds recipe.pack_tokens or recipe.pack_patches.
    """
    if recipe.packing == "plain":
        return [_plain(each, recipe, processor, where) for each in wanted]
    cut = [_cut(each, recipe, processor, where) for each in wanted]
    lifetimes = [[k] for k in range(len(wanted))]
    if wanted and not wanted[-1].policy.trains_tower:
        lifetimes = [list(range(len(wanted)))]
    out: list[Iterator[Round]] = []
    for indices in lifetimes:
        images = [_images(pieces, wanted[k].sequences) for k in indices for pieces in cut[k]]
        policy = wanted[indices[-1]].policy
        used = _in_step(images, where) if is_sharded(policy) else images
        features = Features(_tower(policy, processor, where), used, trained=wanted[indices[-1]].trained and policy.trains_tower)
        ahead = iter(used)
        for k in indices:
            mine = [next(ahead) for _ in cut[k]]
            out.append(_packed(wanted[k], cut[k], mine, features, processor, where, last=k == indices[-1]))
    return out


def balanced(items: list[T], sequence: Callable[[T], Sequence], recipe: Recipe, processor: Processor, where: World) -> list[T]:
    """This rank's share of all ranks' items, once those that share a beginning have moved together so that every rank has as much to
    compute, by recipe.costs. Every rank calls. As they are for a single rank, and on the plain path."""
    if where.mesh is None or recipe.packing == "plain":
        return items
    sequences = [sequence(item) for item in items]
    groups = share(sequences, processor.image_token)
    moved = exchange([[items[i] for i in g.members] for g in groups], _sizes(groups, sequences), where, recipe.costs)
    mine = [item for group in moved for item in group]
    carry((key for item in mine for key in sequence(item).images), processor.store, where)
    return mine


def _sizes(groups: Many[Group], sequences: Many[Sequence]) -> list[Size]:
    tails = [tuple(len(sequences[i]) - g.prefix for i in g.members) if len(g.members) > 1 else () for g in groups]
    return [Size(g.prefix, tail, sequences[g.members[0]].patches) for g, tail in zip(groups, tails, strict=True)]


def _plain(each: Pass, recipe: Recipe, processor: Processor, where: World) -> Iterator[Round]:
    sharded = is_sharded(each.policy)
    groups = micro_batches([len(s) for s in each.sequences], recipe.micro_batch)
    groups += [[]] * _missing(len(groups), sharded, where)
    for k, members in enumerate(groups):
        chosen, idle = [each.sequences[i] for i in members], 0
        if sharded and not any(s.images for s in chosen):
            extra = dummy(processor)
            chosen, idle = [*chosen, extra], int(extra.trained[1:].sum())
        for tower in (False, True):
            reduce_next(each.policy, tower=tower, last=k + 1 == len(groups))
        about = functools.partial(batch_of, chosen, padded=True)
        with over(about):
            batch = collate(chosen, processor.pad, processor.store).to(where.device)
        yield Round(batch, members, idle, about)
    settle(each.policy)


def _cut(each: Pass, recipe: Recipe, processor: Processor, where: World) -> list[Pieces]:
    """What each micro-batch of a pass holds; nothing, for those by which another sharded rank has more."""
    sequences, groups = each.sequences, each.groups
    made = plan(
        *lengths_of(_sizes(groups, sequences)),
        capacity=Capacity(recipe.pack_tokens, recipe.pack_patches),
        costs=recipe.costs,
        names=[f"sequence {g.members[0]}" for g in groups],
    )
    cut = [
        [(groups[g], first, end) if len(groups[g].members) > 1 else (groups[g], 0, 1) for g, first, end in made.micro_batch(0, k)]
        for k in range(made.per_rank)
    ]
    return cut + [[] for _ in range(_missing(len(cut), is_sharded(each.policy), where))]


def _packed(
    each: Pass, cut: list[Pieces], images: list[list[Hashable]], features: Features, processor: Processor, where: World, *, last: bool
) -> Iterator[Round]:
    seen = max((k for k, keys in enumerate(images) if keys), default=-1)  # behind it comes the tower's last backward pass
    with features if last else contextlib.nullcontext():
        for k, (pieces, keys) in enumerate(zip(cut, images, strict=True)):
            sequences, idle = list(each.sequences), 0
            if not pieces:
                extra = dummy(processor, image=False)
                pieces, idle = [(Group((len(sequences),), len(extra)), 0, 1)], int(extra.trained[1:].sum())
                sequences.append(extra)
            batch, order = pack(sequences, pieces, processor.image_token, processor.merge)
            assert tuple(keys[: len(batch.images)]) == batch.images, "the layout has the images in another order"
            members = [i for i in order if i < len(each.sequences)]
            about = functools.partial(batch_of, [each.sequences[i] for i in members])
            with over(about), features.of(keys) as found:  # on the way in and out the vision tower's own passes
                reduce_next(each.policy, tower=False, last=k + 1 == len(cut))
                yield Round(replace(batch.to(where.device), features=found), members, idle, about)
                reduce_next(each.policy, tower=True, last=k == seen)
    settle(each.policy)


def _images(pieces: Pieces, sequences: Many[Sequence]) -> list[Hashable]:
    """Keys of the distinct images of a micro-batch, in order of appearance."""
    return list(dict.fromkeys(key for group, first, _ in pieces for key in sequences[group.members[first]].images))


def _tower(policy: Policy, processor: Processor, where: World) -> Callable[[Many[Hashable]], Many[Tensor]]:
    """What gives the features of images by their keys; for a key that is not a store's, those of a smallest image."""

    def run(keys: Many[Hashable]) -> Many[Tensor]:
        stored = [key if isinstance(key, str) else dummy(processor).images[0] for key in keys]
        batch = collect(processor.store, stored, pin=where.device.type == "cuda")
        images = ImageBatch.of(batch, policy.base.config.vision_config).to(where.device)
        return policy(images).split(images.arguments.rows)  # here: FSDP2 may not return views

    return run


def _in_step(images: list[list[Hashable]], where: World) -> list[list[Hashable]]:
    """The images of each micro-batch, with idle ones where this rank would call the sharded tower, or end a call, at another than the rest.

    A call's backward pass follows the last use of its images. Its idle image is used at the call and where the last rank ends it.
    """
    out, ends = [list(keys) for keys in images], [-1] * len(images)
    call: dict[Hashable, int] = {}
    for k, keys in enumerate(images):
        for key in keys:
            ends[call.setdefault(key, k)] = k
    agreed = np.max(where.gather([ends]), axis=0, initial=-1)
    for first, (mine, end) in enumerate(zip(ends, agreed.tolist(), strict=True)):
        if end > mine:
            for k in {first, end}:
                out[k].append(("idle", first))
    return out


def _missing(made: int, sharded: bool, where: World) -> int:
    """Empty rounds that keep this rank in step with the others."""
    return int(where.max(made)) - made if sharded else 0
