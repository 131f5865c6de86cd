"""Row chunks under a memory budget, and the gradients that add up over them.

T rows, H hidden size, V vocabulary. The workspace of a chunk is all that an op allocates beside its inputs, outputs and float32 sums.
"""

from __future__ import annotations

import itertools

import torch
import triton
from torch import Tensor

from actial_fast.kernels.head import Head, tile_for
from actial_fast.kernels.head_grad import SPLIT, Gradients
from actial_fast.kernels.truncated import padded_vocab


def row_bytes(head: Head, gradients: bool) -> int:
    """Bytes of workspace that one row of a chunk takes, without gradients or with them."""
    vocab, width = head.largest, head.weight.shape[1]
    tile, size = tile_for(head.hidden.dtype), head.hidden.element_size()
    parts = 12 * triton.cdiv(vocab, tile.n // tile.parts) + 64  # peak, total, moment; the row's own numbers
    if head.kept:
        parts = 4 * padded_vocab(vocab) + 64
    if head.targets.ndim == 2:  # logits, log-probs, coefficients, indices
        parts += 40 * head.targets.shape[1]
    if not gradients:
        return parts
    dx = 0 if head.kept and size == 4 else stride_of(vocab) * size  # which may lie where the logits were
    return parts + dx + width * (size + 4 * SPLIT)


def stride_of(vocab: int) -> int:
    """Elements from row to row of the workspace: rows start at multiples of 16 bytes in any dtype, and Triton can see it."""
    return triton.cdiv(vocab, 64) * 64


def cut(head: Head, gradients: bool, workspace_mb: float) -> list[tuple[int, int]]:
    """The chunks [start, stop) of the head's T rows that fit workspace_mb. Raises ValueError naming the workspace that one row needs."""
    return _pieces(0, head.hidden.shape[0], _fitting(head, gradients, workspace_mb))


def cut_sequences(head: Head, gradients: bool, workspace_mb: float, cu_seqlens: Tensor | None) -> list[list[tuple[int, int]]]:
    """Chunks as of `cut`, in groups that no sequence of cu_seqlens (S + 1,), on the CPU, leaves: one chunk of as many whole sequences as
    fit, or the chunks of a sequence that is longer than one. Without cu_seqlens each chunk is a group."""
    if cu_seqlens is None:
        return [[chunk] for chunk in cut(head, gradients, workspace_mb)]
    limit, ends = _fitting(head, gradients, workspace_mb), cu_seqlens.tolist()
    cuts = [0]
    for end, following in zip(ends[1:], [*ends[2:], None], strict=False):
        if following is None or following - cuts[-1] > limit:
            cuts.append(end)
    return [_pieces(a, b, limit) for a, b in itertools.pairwise(cuts) if b > a]


def _fitting(head: Head, gradients: bool, workspace_mb: float) -> int:
    """Rows of a chunk: whole tiles, where more than one fits."""
    unit, block = row_bytes(head, gradients), tile_for(head.hidden.dtype).m
    limit = int(workspace_mb * 2**20) // unit
    if limit < 1:
        raise ValueError(f"workspace_mb: {workspace_mb} holds no row; one takes {unit / 2**20:.2f} MiB")
    if gradients and limit < head.unit:
        raise ValueError(f"workspace_mb: {workspace_mb} holds {limit} rows; quack takes {head.unit}, {head.unit * unit / 2**20:.2f} MiB")
    return limit // block * block if limit > block else limit


def _pieces(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(a, min(a + size, stop)) for a in range(start, stop, size)]


class Sums:
    """The gradients of hidden, weight and bias, filled in chunk by chunk; those not wanted are None.

    The weight's accumulates in float32, in `weight_grad` (V, H) where given. float16 keeps its hidden gradient in float32 until the
    upstream gradient, which may carry a loss scale, is known.
    """

    def __init__(self, head: Head, wanted: tuple[bool, bool, bool], weight_grad: Tensor | None = None):
        (rows, width), vocab, device = head.hidden.shape, head.weight.shape[0], head.hidden.device
        kept = torch.float32 if head.hidden.dtype == torch.float16 else head.hidden.dtype
        self.dhidden = torch.zeros((rows, width), dtype=kept, device=device) if wanted[0] else None
        self.given = weight_grad
        self.dweight, self.dbias = None, torch.zeros(vocab, device=device) if wanted[2] else None
        # else hidden and weight are padded copies, or the buffer begins where TMA cannot reach
        self.add = weight_grad is not None and weight_grad.shape[1] == width and weight_grad.data_ptr() % 16 == 0
        if wanted[1]:
            self.dweight = weight_grad if self.add else torch.empty((vocab, width), dtype=torch.float32, device=device)

    def chunk(self, start: int, stop: int) -> Gradients:
        """Where rows [start, stop) put theirs; to be taken once per chunk, in order."""
        out = Gradients(None if self.dhidden is None else self.dhidden[start:stop], self.dweight, self.dbias, self.add)
        self.add = True
        return out

    def results(self, width: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden, weight (None when it went to weight_grad) and bias, cut to the caller's width."""
        dhidden = None if self.dhidden is None else self.dhidden[:, :width].contiguous()
        dweight = self.dweight
        if dweight is not None and not self.add:  # no chunk at all
            dweight.zero_()
        if self.given is not None and dweight is not None:
            if dweight is not self.given:
                self.given += dweight[:, :width]
            return dhidden, None, self.dbias
        return dhidden, None if dweight is None else dweight[:, :width].contiguous(), self.dbias
