"""How the CPU path cuts rows into chunks, and the vocabulary into blocks, so that what is held fits the workspace."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from actial_fast.ops.chunked_logits import BUFFERS, compute_dtype
from actial_fast.ops.parallel import VocabParallel
from actial_fast.ops.spec import Kept

SORTING = 7  # as BUFFERS, while top_p sorts: logits, these in order, indices of 8 bytes, what the sort takes itself


def blocks(weight: Tensor, size: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight, `size` rows at a time, in a dtype: which rows, and they."""
    for start in range(0, len(weight), size):
        part = slice(start, start + size)
        yield part, weight[part].to(dtype)


def plan(
    hidden: Tensor,
    weight: Tensor,
    workspace_mb: float,
    cu_seqlens: Tensor | None = None,
    parallel: VocabParallel | None = None,
    targets: int = 1,
    kept: Kept | None = None,
) -> tuple[list[list[slice]], int]:
    """Chunks of rows that fit the workspace, and the size of a block of the vocabulary. The chunks come in groups that no sequence
    leaves: one of as many whole sequences as fit, or those of a longer one; without sequences, each alone. targets: of each row; kept: to
    what its distribution is cut.

    ValueError when not one row fits.
    """
    (rows, width), vocabulary, dtype = hidden.shape, parallel.largest if parallel else len(weight), compute_dtype(hidden)
    buffers = BUFFERS if kept is None else SORTING if kept.top_p < 1 else BUFFERS + 1  # a mask
    row = dtype.itemsize * (buffers * vocabulary + 3 * width)  # and the chunk's hidden states, those selected, and their gradient
    row += (targets - 1) * (5 * dtype.itemsize + 12)  # logits, log-probs, coefficients and columns of targets beyond the first
    share = 1.0 if weight.dtype == dtype else 0.75  # the rest is for the block of weights that is upcast
    block = vocabulary if share == 1 else max(1, min(vocabulary, int((1 - share) * workspace_mb * 2**20 / (dtype.itemsize * width))))
    fit = int(share * workspace_mb * 2**20 / row)
    if rows and fit < 1:
        need = math.ceil(row / share / 2**20 * 100) / 100
        raise ValueError(f"workspace_mb: {workspace_mb} is too small for one row; with V={vocabulary} it takes workspace_mb={need:g}")
    stops = cu_seqlens[1:].tolist() if cu_seqlens is not None else [*range(fit, rows, fit), rows] if rows else []
    groups, start, end = [], 0, 0
    for stop in stops:
        if stop - start > fit and end > start:
            groups.append((start, end))
            start = end
        end = stop
    groups += [(start, end)] * (end > start)
    return [[slice(x, min(x + fit, b)) for x in range(a, b, fit)] for a, b in groups], block
