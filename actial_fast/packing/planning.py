"""What a plan of micro-batches is, and the Python twin of the extension's planner (csrc/planner.cpp).

The twin is the readable specification, the oracle of the extension's tests, and its stand-in where it was not built. The two agree to the
last bit. A group is one prefix and N suffixes; a group without suffixes is a plain sequence.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

BALANCED = 1e-4  # ranks closer than this, relative to the most loaded one, are left as they are
SWAPS_PER_RANK = 16
BUCKETS = 1 << 16
PIECE = np.dtype({"names": ["group", "first", "end", "tokens", "patches", "cost"], "formats": ["i8", "i4", "i4", "i4", "i4", "f8"]})
Piece = tuple[int, int, int, int, int, float]  # the fields of PIECE


@dataclass(frozen=True)
class Capacity:
    """What one micro-batch holds at most: LM tokens and vision patches, each 1 to 2**31 - 1."""

    tokens: int
    patches: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 1 <= value < 2**31:
                raise ValueError(f"capacity.{name}: expected 1 to 2**31 - 1, got {value}")


@dataclass(frozen=True)
class Costs:
    """Cost of a micro-batch: linear * tokens + quadratic * attention pairs + vision * patches + constant, in any one unit.

    Pairs: Lp**2 / 2 of a prefix, n**2 / 2 + n * Lp of a suffix after it. The defaults are forward FLOPs of Qwen2.5-VL-7B in units of one
    token through the decoder's weights, 2 * 6.53e9: 4 * 3584 * 28 a pair and 2 * 6.4e8 a patch through a tower that trains with it.
    `python -m bench.step.costs` measures them.
    """

    linear: float = 1.0
    """Cost of a token through the decoder's weights; the unit of the others when it is 1."""
    quadratic: float = 3.1e-5
    """Cost of a pair of tokens of which one attends to the other, over all layers."""
    vision: float = 0.098
    """Cost of an image patch through the vision tower."""
    constant: float = 0.0
    """Cost of a forward and backward pass however little is in it."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"costs.{name}: expected a finite number of at least 0, got {value}")


@dataclass(frozen=True)
class Plan:
    """Micro-batches per rank, the same number on every rank; on ranks with less work the last ones are empty.

    pieces (K,) of dtype PIECE: suffixes first to end - 1 of a group, after its prefix, and their tokens, patches and cost; (group, 0, 0)
    is a plain sequence. offsets (ranks * per_rank + 1,) int64: micro-batch i of rank r holds pieces offsets[r * per_rank + i] to
    offsets[r * per_rank + i + 1] - 1, in the order of their groups.
    """

    ranks: int
    per_rank: int
    pieces: np.ndarray
    offsets: np.ndarray
    costs: Costs

    def micro_batch(self, rank: int, index: int) -> list[tuple[int, int, int]]:
        """(group, first suffix, end suffix) of each piece of one micro-batch."""
        begin, end = self.offsets[rank * self.per_rank + index :][:2]
        return [(int(p["group"]), int(p["first"]), int(p["end"])) for p in self.pieces[begin:end]]

    def totals(self, what: str) -> np.ndarray:
        """The sum of `what` ("tokens", "patches" or "cost") per micro-batch, (ranks, per_rank); an empty one costs the constant."""
        owner = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        sums = np.bincount(owner, self.pieces[what], len(self.offsets) - 1).reshape(self.ranks, self.per_rank)
        return sums + self.costs.constant if what == "cost" else sums.astype(np.int64)


def plan_python(
    prefix: np.ndarray,
    suffix: np.ndarray,
    offsets: np.ndarray,
    patches: np.ndarray,
    capacity: Capacity,
    costs: Costs,
    ranks: int,
    seed: int,
    names: Sequence[str] | None,
) -> tuple[int, np.ndarray, np.ndarray]:
    """(micro-batches per rank, pieces, offsets); arguments as native.plan's, the suffix lengths flat between offsets (n + 1,)."""
    if ranks < 1:
        raise ValueError("ranks: expected at least 1")
    if not prefix.ndim == suffix.ndim == offsets.ndim == patches.ndim == 1 or len(patches) != len(prefix):
        raise ValueError("prefix, suffix, offsets and patches: expected one dimension, and as many patches as prefixes")
    if len(offsets) != len(prefix) + 1 or offsets[0] != 0 or offsets[-1] != len(suffix) or (np.diff(offsets) < 0).any():
        raise ValueError("offsets: expected one more than groups, rising from 0 to the number of suffixes")
    suffixes = [suffix[a:b].tolist() for a, b in pairwise(offsets)]
    cut = [_cut(g, *row, capacity, costs, names) for g, row in enumerate(zip(prefix.tolist(), suffixes, patches.tolist(), strict=True))]
    packed = [_pack(groups, cut, capacity) for groups in _balance(_shuffled(len(cut), seed), cut, ranks)]
    per_rank = max(map(len, packed))
    flat = [pieces for bins in packed for pieces in bins + [[]] * (per_rank - len(bins))]
    ends = np.cumsum([0, *map(len, flat)], dtype=np.int64)
    return per_rank, np.array([piece for pieces in flat for piece in pieces], PIECE), ends


def _shuffled(count: int, seed: int) -> list[int]:
    """0 to count - 1 in an order that the seed decides: the order of groups of equal size, as every sort below is stable."""
    out = list(range(count))
    for i in range(count - 1, 0, -1):
        j = _mixed(seed, i) % (i + 1)
        out[i], out[j] = out[j], out[i]
    return out


def _mixed(seed: int, position: int) -> int:
    mask = 2**64 - 1
    x = (seed + 0x9E3779B97F4A7C15 * position) & mask
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
    return x ^ x >> 31


def _cut(
    g: int, prefix: int, suffixes: list[int], patches: int, capacity: Capacity, costs: Costs, names: Sequence[str] | None
) -> list[Piece]:
    """The pieces of one group: as many suffixes, in order, as fit after the prefix."""
    name, limit = f"row {g}" if names is None else str(names[g]), capacity.tokens
    if prefix < 1:
        raise ValueError(f"{name}: no tokens; leave the row out")
    if patches < 0:
        raise ValueError(f"{name}: a negative number of patches")
    if prefix > limit:
        raise ValueError(f"{name}: {prefix} tokens do not fit into a micro-batch of {limit}; raise the token capacity or leave the row out")
    if patches > capacity.patches:
        raise ValueError(
            f"{name}: {patches} vision patches do not fit into a micro-batch of {capacity.patches}; raise the patch capacity, shrink the "
            "images or leave the row out"
        )
    pieces, first, tokens = [], 0, prefix
    for s, n in enumerate(suffixes):
        if n < 1:
            raise ValueError(f"{name}: suffix {s} has no tokens; leave it out")
        if n > limit - prefix:
            raise ValueError(
                f"{name}: suffix {s} of {n} tokens does not fit after its prefix of {prefix} into a micro-batch of {limit}; raise the "
                "token capacity or leave the row out"
            )
        if tokens + n > limit:
            pieces.append((first, s))
            first, tokens = s, prefix
        tokens += n
    return [_piece(g, a, b, prefix, suffixes[a:b], patches, costs) for a, b in [*pieces, (first, len(suffixes))]]


def _piece(g: int, first: int, end: int, prefix: int, suffixes: list[int], patches: int, costs: Costs) -> Piece:
    pairs = (prefix**2 + sum(n * (n + 2 * prefix) for n in suffixes)) / 2
    tokens = prefix + sum(suffixes)
    return g, first, end, tokens, patches, costs.linear * tokens + costs.quadratic * pairs + costs.vision * patches


def _cost(pieces: list[Piece]) -> float:
    total = 0.0  # not sum(), which compensates rounding from Python 3.12 on
    for piece in pieces:
        total += piece[5]
    return total


def _balance(groups: list[int], cut: list[list[Piece]], ranks: int) -> list[list[int]]:
    """Groups per rank: largest cost first to the least loaded rank, then swaps between the most and the least loaded."""
    if ranks == 1:
        return [groups]
    cost = [_cost(pieces) for pieces in cut]
    order = sorted(groups, key=lambda g: -cost[g])
    size = [cost[g] for g in order]
    places: list[list[int]] = [[] for _ in range(ranks)]
    loads, heap = [0.0] * ranks, [(0.0, r) for r in range(ranks)]
    for place, c in enumerate(size):
        load, rank = heap[0]
        places[rank].append(place)
        loads[rank] = load + c
        heapq.heapreplace(heap, (loads[rank], rank))
    for _ in range(SWAPS_PER_RANK * ranks):
        high, low = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[high] - loads[low]
        found = None if gap <= BALANCED * loads[high] else _best_swap(size, places[high], places[low], gap)
        if found is None:
            break
        there, back = found
        places[high].remove(there)
        if back is not None:
            places[low].remove(back)
            insort(places[high], back)
        insort(places[low], there)
        returned = 0.0 if back is None else size[back]
        loads[high] = loads[high] - size[there] + returned
        loads[low] = loads[low] + size[there] - returned
    return [[order[place] for place in share] for share in places]


def _best_swap(size: list[float], high: list[int], low: list[int], gap: float) -> tuple[int, int | None] | None:
    """The exchange (there, back or None) that brings two loads closest together, or None when none brings them closer."""
    best, found, half, falling = gap / 2, None, gap / 2, [-size[place] for place in low]
    for there in high:
        at = bisect_left(falling, -(size[there] - half))
        for back in [*low[max(at - 1, 0) : at + 1], None]:
            error = abs(size[there] - (0.0 if back is None else size[back]) - half)
            if error < best:
                best, found = error, (there, back)
    return found


def _pack(groups: list[int], cut: list[list[Piece]], capacity: Capacity) -> list[list[Piece]]:
    """The micro-batches of one rank: a group that was cut opens one per piece, the others go where the fewest tokens are left."""

    def shares(g: int) -> int:
        return cut[g][0][3] * capacity.patches + cut[g][0][4] * capacity.tokens

    order = sorted(groups, key=lambda g: -shares(g))
    chains = [[[piece] for piece in cut[g]] for g in order if len(cut[g]) > 1]
    bins = [pieces for chain in chains for pieces in chain]
    unit = capacity.tokens // BUCKETS + 1
    buckets: dict[int, list[tuple[int, int, int]]] = {}  # tokens left // unit -> (patches left, tokens left, -bin) of each

    def file(b: int) -> None:
        tokens = capacity.tokens - sum(piece[3] for piece in bins[b])
        patches = capacity.patches - sum(piece[4] for piece in bins[b])
        if tokens > 0:
            buckets.setdefault(tokens // unit, []).append((patches, tokens, -b))

    for b in range(len(bins)):
        file(b)
    for g in order:
        if len(cut[g]) > 1:
            continue
        piece = cut[g][0]
        for bucket in sorted(b for b in buckets if b >= piece[3] // unit):
            top = max(buckets[bucket])
            if top[0] >= piece[4] and top[1] >= piece[3]:
                buckets[bucket].remove(top)
                if not buckets[bucket]:
                    del buckets[bucket]
                b = -top[2]
                bins[b].append(piece)
                break
        else:
            b = len(bins)
            bins.append([piece])
            chains.append([bins[b]])
        file(b)
    for pieces in bins:
        pieces.sort()
    chains.sort(key=lambda chain: -max(map(_cost, chain)))
    return [pieces for chain in chains for pieces in chain]
