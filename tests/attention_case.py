"""Packed rows for the attention tests: groups laid out as a packed batch has them, and what each row may see."""

import itertools
from dataclasses import dataclass

import pytest
import torch

from actial_fast.packing.batch import Segments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
cpu = pytest.mark.skipif(DEVICE != "cpu", reason="float32 and float64 attention is for the CPU")


@dataclass(frozen=True)
class Packed:
    """What attention reads of a packed batch, and spans: per suffix or plain sequence, the rows of its prefix and its own."""

    segments: Segments
    cross_q: Segments
    cross_k: Segments
    prefix_rows: int
    suffix_rows: int
    spans: tuple[tuple[range, range], ...]

    @property
    def rows(self) -> int:
        return sum(self.segments.lengths)

    def allowed(self) -> torch.Tensor:
        """(L, L) bool: the keys that each row may see."""
        mask = torch.zeros(self.rows, self.rows, dtype=torch.bool)
        ends = list(itertools.accumulate(self.segments.lengths, initial=0))
        for a, b in itertools.pairwise(ends):
            mask[a:b, a:b] = torch.ones(b - a, b - a).tril().bool()
        for prefix, own in self.spans:
            mask[own.start : own.stop, prefix.start : prefix.stop] = True
        return mask


def segments(lengths, device=DEVICE) -> Segments:
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return Segments(cu, tuple(lengths), max(lengths, default=0))


def pack(groups, device=DEVICE) -> Packed:
    shared = [group for group in groups if group[1]]
    plain = [prefix for prefix, suffixes in groups if not suffixes]
    prefixes, suffixes = [prefix for prefix, _ in shared], [n for _, all_of_it in shared for n in all_of_it]
    ends = list(itertools.accumulate([*prefixes, *suffixes, *plain], initial=0))
    rows = [range(a, b) for a, b in itertools.pairwise(ends)]
    owner = [i for i, (_, all_of_it) in enumerate(shared) for _ in all_of_it]
    spans = [(rows[i], rows[len(prefixes) + k]) for k, i in enumerate(owner)]
    spans += [(range(0), row) for row in rows[len(prefixes) + len(suffixes) :]]
    return Packed(
        segments([*prefixes, *suffixes, *plain], device),
        segments([sum(all_of_it) for _, all_of_it in shared], device),
        segments(prefixes, device),
        sum(prefixes),
        sum(suffixes),
        tuple(spans),
    )


def relative(x, exact) -> float:
    """|x - exact| / |exact| over all numbers."""
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()
