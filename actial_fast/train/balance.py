"""Moving whole groups between ranks before a step's passes, so that all ranks have the same cost to compute.

A group is a list of things that share a prompt and images and stay together on one rank. Every rank learns all sizes, which is little, and
computes the same assignment: the planner's shares, each given to the rank where most of it lies already. Then only what changes its rank
is sent. Nothing returns: what a new rank computes for a group belongs to it from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
import torch.distributed as dist

from actial_fast.packing.native import plan
from actial_fast.packing.planning import Capacity, Costs
from actial_fast.train.dist import World

T = TypeVar("T")
SLACK = 0.01  # nothing moves while the most loaded rank is within this share of what the planner would reach
UNBOUNDED = Capacity(2**31 - 1, 2**31 - 1)


@dataclass(frozen=True)
class Size:
    """What a group has to compute: LM tokens of its prefix, of each suffix after it (none: a plain sequence), and vision patches."""

    prefix: int
    suffixes: tuple[int, ...] = ()
    patches: int = 0


def exchange(groups: list[list[T]], sizes: Sequence[Size], where: World, costs: Costs) -> list[list[T]]:
    """This rank's groups once the cost is balanced over ranks, ordered by the rank they come from, then as they were there. Every rank must
    call, with the same costs.

    groups: of objects that can be pickled, any number on each rank, none too; sizes: one for each. The same list for a single rank. Objects
    travel through torch.distributed's object collectives, so through the device with NCCL. ValueError, on every rank, naming the group and
    its first rank when it has a prefix or suffix of no tokens.
    """
    assert len(groups) == len(sizes), f"{len(groups)} groups, but {len(sizes)} sizes"
    if where.mesh is None:
        return groups
    told = where.gather([list(sizes)])
    counts = list(map(len, told))
    home = np.repeat(np.arange(where.size), counts)
    target = assign(list(chain(*told)), home, where.size, costs)
    mine = dict(enumerate(groups, start=sum(counts[: where.rank])))
    for source in range(where.size):
        leaving = np.flatnonzero((home == source) & (target != source)).tolist()
        if not leaving:
            continue
        parcels: list[dict[int, list[T]]] | None = None
        received: list[dict[int, list[T]]] = [{}]
        if source == where.rank:
            parcels = [{g: mine[g] for g in leaving if target[g] == rank} for rank in range(where.size)]
            mine = {g: group for g, group in mine.items() if target[g] == source}
        dist.scatter_object_list(received, parcels, src=source)
        mine |= received[0]
    return [mine[g] for g in sorted(mine)]


def assign(sizes: Sequence[Size], home: np.ndarray, ranks: int, costs: Costs) -> np.ndarray:
    """The rank of each group, (n,) int64: the planner's balanced shares, named so that the most cost stays where it is.

    home (n,) int64, ascending: where each group is now, and the answer where that is as good within SLACK. A function of its arguments
    alone. ValueError naming the group, numbered as on its rank, for a prefix or suffix of no tokens.
    """
    if not sizes:
        return home
    names = [f"group {i} of rank {rank}" for i, rank in zip(np.arange(len(home)) - np.searchsorted(home, home), home, strict=True)]
    made = plan(*lengths_of(sizes), capacity=UNBOUNDED, costs=costs, ranks=ranks, names=names)
    share = np.zeros(len(sizes), np.int64)
    share[made.pieces["group"]] = np.repeat(np.arange(len(made.offsets) - 1) // made.per_rank, np.diff(made.offsets))
    cost = np.bincount(made.pieces["group"], made.pieces["cost"], len(sizes))
    heaviest, planned = (np.bincount(owner, cost, ranks).max() for owner in (home, share))
    if heaviest <= (1 + SLACK) * planned:
        return home
    return ranks_of_shares(np.bincount(share * ranks + home, cost, ranks**2).reshape(ranks, ranks))[share]


def lengths_of(sizes: Sequence[Size]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The sizes as native.plan takes them: prefix tokens (n,), suffix tokens, suffix offsets (n + 1,) and patches (n,), all int64."""
    return (
        np.array([s.prefix for s in sizes], np.int64),
        np.array([n for s in sizes for n in s.suffixes], np.int64),
        np.cumsum([0, *(len(s.suffixes) for s in sizes)], dtype=np.int64),
        np.array([s.patches for s in sizes], np.int64),
    )


def ranks_of_shares(kept: np.ndarray) -> np.ndarray:
    """The rank for each share, (n,) int64: the permutation with the largest sum of kept[share, rank], kept (n, n) float64.

    Kuhn's assignment by shortest augmenting paths (Jonker and Volgenant 1987): n**3 operations, of which n**2 are Python's.
    """
    n = len(kept)
    price = kept.max() - kept
    of_share, of_rank = np.zeros(n), np.zeros(n)  # dual prices: price - of_share - of_rank >= 0, and 0 where assigned
    holder = np.full(n, -1)  # the share that each rank has
    for new in range(n):
        slack, before, seen = np.full(n, np.inf), np.full(n, -1), np.zeros(n, bool)
        share, rank = new, -1
        while share >= 0:
            open_ranks = np.flatnonzero(~seen)
            reduced = price[share, open_ranks] - of_share[share] - of_rank[open_ranks]
            nearer = reduced < slack[open_ranks]
            slack[open_ranks[nearer]], before[open_ranks[nearer]] = reduced[nearer], rank
            rank = int(open_ranks[slack[open_ranks].argmin()])
            step = slack[rank]
            of_share[[new, *holder[seen]]] += step
            of_rank[seen] -= step
            slack[~seen] -= step
            seen[rank] = True
            share = holder[rank]
        while rank >= 0:  # along the path, each rank takes over the share of the one before it
            previous = before[rank]
            holder[rank] = new if previous < 0 else holder[previous]
            rank = previous
    return np.argsort(holder)
