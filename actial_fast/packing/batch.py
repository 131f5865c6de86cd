"""Sequences, and the padded or packed batches that the model's forward pass takes, built on the host.

B sequences, L longest length (packed: rows), T rows that carry loss (positions whose NEXT token is trained), P vision patches, I images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence as Many
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from actial_fast.packing.layout import Part
from actial_fast.packing.layout import mrope_positions as layout_positions
from actial_fast.packing.native import layout
from actial_fast.packing.packed_ops import PixelBatch, collect, patchify

if TYPE_CHECKING:
    from actial_fast.packing.images import ImageStore


@dataclass(frozen=True)
class Sequence:
    """One tokenised conversation with its images.

    ids (L,) int64; trained (L,) bool, True where the token is a target; positions (3, L) int64, M-RoPE's time, height and width rows;
    images: per image its key in an ImageStore, equal for equal images; grids: per image (frames, rows, columns) in patches; where: the row
    it comes from, in words.
    """

    ids: np.ndarray
    trained: np.ndarray
    positions: np.ndarray
    images: tuple[str, ...] = ()
    grids: tuple[tuple[int, int, int], ...] = ()
    where: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def patches(self) -> int:
        """Patches of its images that differ."""
        return sum(math.prod(grid) for grid in dict(zip(self.images, self.grids, strict=True)).values())

    def extended(self, ids: np.ndarray) -> Sequence:
        """The sequence with trained text tokens `ids` (n,) appended: a prompt with a sampled reply."""
        start = self.positions.max() + 1 if len(self) else 0
        tail = np.broadcast_to(start + np.arange(len(ids)), (3, len(ids)))
        return replace(
            self,
            ids=np.concatenate([self.ids, ids]),
            trained=np.concatenate([self.trained, np.ones(len(ids), bool)]),
            positions=np.concatenate([self.positions, tail], axis=1),
        )


@dataclass(frozen=True)
class Batch:
    """Padded sequences as the model takes them, and the rows whose loss is wanted.

    input_ids, attention_mask (B, L) int64; position_ids (3, B, L) int64; pixels of the I images in order, each as often as it occurs, and
    image_grid_thw (I, 3) int64, or None without images; loss_rows (T,) int64, indices into the flattened (B * L) hidden states; targets
    (T,) int64, the token each of them predicts; owner (T,) int64, the sequence each belongs to. Rows are ordered by sequence, then by
    position.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    pixels: PixelBatch | None
    image_grid_thw: Tensor | None
    loss_rows: Tensor
    targets: Tensor
    owner: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`."""
        return _moved(self, device)

    def model_inputs(self) -> dict[str, Tensor | None]:
        """Keyword arguments of the model's forward pass, pixel_values (P, D) float32 among them."""
        names = ("input_ids", "attention_mask", "position_ids", "image_grid_thw")
        return {name: getattr(self, name) for name in names} | {"pixel_values": None if self.pixels is None else patchify(self.pixels)}


@dataclass(frozen=True)
class Segments:
    """Consecutive segments of rows. cu (segments + 1,) int32 on the rows' device, from 0; lengths the same on the host, all positive
    (those of a vision tower on CUDA are not known there: empty); longest the largest of them."""

    cu: Tensor
    lengths: tuple[int, ...]
    longest: int


@dataclass(frozen=True)
class PackedBatch:
    """Sequences without padding in which a shared beginning occurs once: rows are [prefixes whose suffixes have rows | these suffixes |
    plain sequences, and prefixes whose suffixes have none]. The last token of a suffix or plain sequence is a target only and has no row
    (but where it is a plain sequence's only one, or an image's), so that a suffix of one token has none.

    input_ids (L,) int64; position_ids (3, L) int64, restarting after the prefix for every suffix; segments: each prefix, suffix and plain
    sequence that has rows; prefix_rows, suffix_rows: sizes of the first two blocks; cross_q, cross_k: per group with suffix rows, these
    within the second block, and its prefix; images: keys of the distinct images; image_slots, image_rows (M,) int64: rows of image tokens,
    and the row of the images' merged features, one behind the other, that goes there; loss_rows, targets (T,) int64, the row that predicts
    (a prefix's last row predicts the first token of each of its suffixes) and the token; features (F, H): what image_rows counts in, None
    without images and until the vision tower has run, which may give several levels of H side by side; levels: (F, H) each, those behind
    the first, once `split` has parted them.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    prefix_rows: int
    suffix_rows: int
    cross_q: Segments
    cross_k: Segments
    images: tuple[str, ...]
    image_slots: Tensor
    image_rows: Tensor
    loss_rows: Tensor
    targets: Tensor
    features: Tensor | None = None
    levels: tuple[Tensor, ...] = ()

    def split(self, width: int) -> PackedBatch:
        """The batch with the levels of its features, of this width H each, apart."""
        if self.features is None or self.features.shape[1] == width:
            return self
        first, *others = self.features.split(width, 1)
        return replace(self, features=first, levels=tuple(others))

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on `device`, without a sync."""
        return _moved(self, device)


def _moved(value: Any, device: torch.device) -> Any:
    """A tensor, or a dataclass with all the tensors in it, on `device`; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value


@dataclass(frozen=True)
class Group:
    """Sequences that begin alike: the first `prefix` tokens, which hold all images, are computed once. members: indices of sequences; a
    single one is packed as it is."""

    members: tuple[int, ...]
    prefix: int


def share(sequences: Many[Sequence], image_token: int) -> list[Group]:
    """Groups of sequences with the same images whose beginnings agree, ordered by their first members; each sequence in one group.

    Exact for any sequences; it saves the more, the longer the common beginning. Sequences that part early and go on in common, such as
    replies to several questions about the same images, are grouped by question where that takes fewer rows. Sequences without images are
    grouped by what comes before the first trained token.
    """
    alike: dict[object, list[int]] = {}
    for i, s in enumerate(sequences):
        alike.setdefault(s.images or s.ids[: int(s.trained.argmax())].tobytes(), []).append(i)
    groups = [group for members in alike.values() for group in _grouped(members, sequences, image_token)]
    return sorted(groups, key=lambda group: group.members[0])


def _grouped(members: list[int], sequences: Many[Sequence], image_token: int) -> list[Group]:
    """Sequences with the same images in one group, or apart by the first token in which they differ: whatever takes fewer rows."""
    first, *others = (sequences[i] for i in members)
    if not others:
        return [Group(tuple(members), len(first))]
    prefix = min(len(sequences[i]) for i in members) - 1
    for other in others:
        same = (first.ids[:prefix] == other.ids[:prefix]) & (first.trained[:prefix] == other.trained[:prefix])
        prefix = prefix if same.all() else int(same.argmin())
    apart: dict[tuple[int, bool], list[int]] = {}
    for i in members:
        apart.setdefault((sequences[i].ids[prefix], sequences[i].trained[prefix]), []).append(i)
    parts = [[i] for i in members] if len(apart) == 1 else list(apart.values())
    groups = [group for part in parts for group in _grouped(part, sequences, image_token)]
    images_end = int(np.flatnonzero(first.ids == image_token)[-1]) + 1 if first.images else 1
    together = Group(tuple(members), prefix)
    return [together] if prefix >= images_end and _rows([together], sequences) <= _rows(groups, sequences) else groups


def _rows(groups: list[Group], sequences: Many[Sequence]) -> int:
    """Rows of the groups: every prefix once, and every member's rest but for its last token."""
    return sum(sum(len(sequences[i]) - 1 for i in g.members) - (len(g.members) - 1) * g.prefix for g in groups)


def pack(sequences: Many[Sequence], pieces: Many[tuple[Group, int, int]], image_token: int, merge: int) -> tuple[PackedBatch, list[int]]:
    """One packed batch from pieces (group, first member, end member), and the sequences in the order of their loss rows.

    Raises ValueError naming the row when images and placeholders disagree, or a suffix holds an image.
    """
    parts: list[Part] = []
    order: list[int] = []
    for group, first, end in pieces:
        members = group.members[first:end]
        one = sequences[members[0]]
        single = len(group.members) == 1
        prefix = len(one) if single else group.prefix
        parts.append(
            Part(
                name=f"sequence {members[0]}",
                ids=one.ids[:prefix],
                trained=one.trained[:prefix],
                positions=one.positions[:, :prefix],
                suffixes=() if single else tuple((sequences[i].ids[prefix:], sequences[i].trained[prefix:]) for i in members),
                images=one.images,
                grids=one.grids,
                sample=len(order),
            )
        )
        order += members
    made = layout(parts, image_token=image_token, merge=merge)
    tensor = torch.from_numpy
    batch = PackedBatch(
        input_ids=tensor(made.input_ids),
        position_ids=tensor(made.position_ids),
        segments=_segments(made.cu),
        prefix_rows=made.prefix_rows,
        suffix_rows=made.suffix_rows,
        cross_q=_segments(made.cross_q),
        cross_k=_segments(made.cross_k),
        images=cast("tuple[str, ...]", made.images),  # those of the sequences
        image_slots=tensor(made.image_slots),
        image_rows=tensor(made.image_rows),
        loss_rows=tensor(made.loss_rows),
        targets=tensor(made.targets),
    )
    return batch, [order[i] for i in made.samples]


def _segments(cu: np.ndarray) -> Segments:
    lengths = tuple(np.diff(cu).tolist())
    return Segments(torch.from_numpy(cu), lengths, max(lengths, default=0))


def mrope_positions(ids: np.ndarray, grids: Many[tuple[int, int, int]], image_token: int, merge: int) -> np.ndarray:
    """M-RoPE positions of one sequence: (L,) ids and per-image grids in patches -> (3, L) int64; see `layout.mrope_positions`.

    The number of image tokens and the grids must agree (AssertionError: the tokens were expanded from the grids).
    """
    tokens, merged = np.flatnonzero(ids == image_token), [(f, rows // merge, cols // merge) for f, rows, cols in grids]
    counts = [math.prod(grid) for grid in merged]
    assert sum(counts) == len(tokens), f"{len(tokens)} image tokens, but grids of {sum(counts)}"
    starts = [int(tokens[n]) for n in itertools.accumulate(counts[:-1], initial=0)] if counts else []
    for start, count in zip(starts, counts, strict=True):
        assert (ids[start : start + count] == image_token).all(), "image tokens and grids disagree"
    return layout_positions(len(ids), starts, merged)


def collate(sequences: Many[Sequence], pad: int, store: ImageStore, *, left: bool = False) -> Batch:
    """At least one sequence, padded with token `pad` on the right, or on the left for sampling. store: has their images."""
    shape = (len(sequences), max(map(len, sequences)))
    ids, mask = np.full(shape, pad, np.int64), np.zeros(shape, np.int64)
    positions = np.zeros((3, *shape), np.int64)
    loss_rows, targets, owner = [], [], []
    for b, sequence in enumerate(sequences):
        start = shape[1] - len(sequence) if left else 0
        span = slice(start, start + len(sequence))
        ids[b, span], mask[b, span], positions[:, b, span] = sequence.ids, 1, sequence.positions
        wanted = np.flatnonzero(sequence.trained[1:])  # hidden state i predicts token i + 1
        loss_rows.append(b * shape[1] + start + wanted)
        targets.append(sequence.ids[1:][wanted])
        owner.append(np.full(len(wanted), b))
    images = [key for s in sequences for key in s.images]
    grids = [g for s in sequences for g in s.grids]
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions),
        pixels=collect(store, images) if images else None,
        image_grid_thw=torch.tensor(grids, dtype=torch.int64) if grids else None,
        loss_rows=torch.from_numpy(np.concatenate(loss_rows).astype(np.int64)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        owner=torch.from_numpy(np.concatenate(owner).astype(np.int64)),
    )


def micro_batches(lengths: Many[int], size: int) -> list[list[int]]:
    """Indices in groups of at most `size`, sequences of similar length together so that little is padded; deterministic."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[i : i + size] for i in range(0, len(order), size)]
