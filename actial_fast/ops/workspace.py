"""How much memory an op may hold above its inputs and outputs where the caller does not say.

A chunk's part of the head's gradient is added to what others have left: 8 V H bytes of memory traffic a chunk, beside 6 C V H operations of
its three products, for C rows. The share is 4 / 3 * rate / bandwidth / C, whatever the head: at 700 TFLOP/s, below 5% from 5,600 rows on an
H100 and from 3,900 on an H200. The share of a card below gives a 7B head (V = 152,064, H = 3,584) 6,600 rows on 80 GB: 4%. Where memory is
left over more rows gain nothing that counts.

Only the card's total memory is asked for, and nothing that differs from call to call: where chunks end decides the order of float32 sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actial_fast.ops.parallel import VocabParallel

LEAST, MOST = 700.0, 2800.0  # MiB; the first on the CPU, too
SHARE = 0.03  # of the card's memory


def workspace(workspace_mb: float | None, hidden: Tensor, parallel: VocabParallel | None = None) -> float:
    """MiB that an op may hold: what the caller says, else a share of the card that hidden is on.

    The ranks of a vocabulary wait for each other at every chunk, and their cards may differ: LEAST, of which a part of it has more rows.
    """
    if workspace_mb is not None:
        return workspace_mb
    if parallel or not hidden.is_cuda:
        return LEAST
    return share_of(_total_mb(hidden.device.index))


def share_of(total_mb: float) -> float:
    """The default on a card with that much memory."""
    return min(max(LEAST, SHARE * total_mb), MOST)


def _total_mb(index: int | None) -> int:
    """The card's memory in MiB; 0 for one that only fake tensors are on."""
    if not torch.cuda.device_count():
        return 0
    return int(torch.cuda.get_device_properties(index).total_memory) >> 20


# a constant to torch.compile: what torch.compiler.assume_constant_result does, which imports the compiler, and Triton with it
_total_mb.__dict__["_dynamo_marked_constant"] = True
