"""Sequences and padded batches: what the model's forward pass takes, built on the host.

B sequences, L longest length, T rows that carry loss (the positions whose NEXT token is trained), P vision patches, I images.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequence:
    """One tokenised conversation with its images.

    ids (L,) int64; trained (L,) bool, True where the token is a target; positions (3, L) int64, M-RoPE's time, height and width rows;
    patches: per image (patches, 3 * frames * p * p) float32; grids: per image (frames, rows, columns) in patches.
    """

    ids: np.ndarray
    trained: np.ndarray
    positions: np.ndarray
    patches: tuple[np.ndarray, ...] = ()
    grids: tuple[tuple[int, int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

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

    input_ids, attention_mask (B, L) int64; position_ids (3, B, L) int64; pixel_values (P, D) float32 and image_grid_thw (I, 3) int64, or
    None without images; loss_rows (T,) int64, indices into the flattened (B * L) hidden states; targets (T,) int64, the token each of
    them predicts; owner (T,) int64, the sequence each belongs to. Rows are ordered by sequence, then by position.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    loss_rows: Tensor
    targets: Tensor
    owner: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: None if v is None else v.to(device, non_blocking=True) for k, v in moved.items()})

    def model_inputs(self) -> dict[str, Tensor | None]:
        """Keyword arguments of the model's forward pass."""
        names = ("input_ids", "attention_mask", "position_ids", "pixel_values", "image_grid_thw")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Segments:
    """Consecutive segments of rows. cu (segments + 1,) int32 on the rows' device, from 0; lengths the same on the host, all positive
    (those of a vision tower on CUDA are not known there: empty); longest the largest of them."""

    cu: Tensor
    lengths: tuple[int, ...]
    longest: int


def mrope_positions(ids: np.ndarray, grids: Many[tuple[int, int, int]], image_token: int, merge: int) -> np.ndarray:
    """M-RoPE positions of one sequence: (L,) ids and per-image grids in patches -> (3, L) int64.

    Text counts up in all three rows; an image's tokens share one time and carry their row and column; what follows continues after the
    image's longer side. As transformers' Qwen2.5-VL `get_rope_index`, without its walk over every token. The number of image tokens
    and the grids must agree (AssertionError: the tokens were expanded from the grids).
    """
    out = np.empty((3, len(ids)), np.int64)
    starts = np.flatnonzero(ids == image_token)
    at, position = 0, 0
    for frames, rows, cols in grids:
        h, w = rows // merge, cols // merge
        first = int(starts[np.searchsorted(starts, at)])
        length = frames * h * w
        assert (ids[first : first + length] == image_token).all(), "image tokens and grids disagree"
        out[:, at:first] = position + np.arange(first - at)
        position += first - at
        out[:, first : first + length] = position + np.indices((frames, h, w)).reshape(3, -1)
        position += max(h, w)
        at = first + length
    assert np.searchsorted(starts, at) == len(starts), "more image tokens than grids"
    out[:, at:] = position + np.arange(len(ids) - at)
    return out


def collate(sequences: Many[Sequence], pad: int, *, left: bool = False) -> Batch:
    """One padded batch of at least one sequence, padded with token `pad` on the right, or on the left for sampling."""
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
    patches = [p for s in sequences for p in s.patches]
    grids = [g for s in sequences for g in s.grids]
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions),
        pixel_values=torch.from_numpy(np.concatenate(patches)) if patches else None,
        image_grid_thw=torch.tensor(grids, dtype=torch.int64) if grids else None,
        loss_rows=torch.from_numpy(np.concatenate(loss_rows).astype(np.int64)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        owner=torch.from_numpy(np.concatenate(owner).astype(np.int64)),
    )


def micro_batches(lengths: Many[int], size: int) -> list[list[int]]:
    """Indices in groups of at most `size`, sequences of similar length together so that little is padded; deterministic."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[i : i + size] for i in range(0, len(order), size)]
