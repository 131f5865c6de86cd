"""AdamW's moments in 8 bits, by bitsandbytes: each block of values is a largest magnitude and, for each value, one of 256 shares of it.

Blocks never reach over a row's end, so a tensor that is cut by rows over any number of ranks has the same blocks, and ranks that share a
model have bit for bit the moments that one would have. Where a row is a multiple of 256 values, as in nearly all of Qwen2.5-VL, the blocks
are those of bitsandbytes' own optimizers; the last block of another row is shorter.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256  # values, as in bitsandbytes' optimizers
LEAST = 64  # bitsandbytes' smallest block, for short rows
SMALLEST = 4096  # a smaller tensor is kept in float32, as by bitsandbytes
SHORTEST = 16  # a shorter row would need as much for its largest magnitude as for its values
PAGED = 100_000  # values; a smaller tensor stays on the device, as by bitsandbytes


def problem(kind: str, device: torch.device) -> str | None:
    """Why states of this kind (optim.kind) cannot be had on a device, in words for the user; None where they can."""
    if kind == "adamw":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        return f"optim.kind: {kind} needs bitsandbytes, which is not installed; pip install 'actial-fast[budget]', or set it to adamw"
    if kind == "paged_adamw8bit" and device.type != "cuda":
        return f"optim.kind: paged_adamw8bit needs CUDA's paged memory, and this is {device.type}; set it to adamw8bit"
    return None


def fits(shape: torch.Size) -> bool:
    """Whether a parameter of this whole shape has moments in 8 bits: a function of nothing else, so that all ranks have the same."""
    return len(shape) > 1 and math.prod(shape) >= SMALLEST and math.prod(shape[1:]) >= SHORTEST


def block_of(columns: int) -> int:
    """Values in a block of rows of this length."""
    return next((size for size in (LEAST, 2 * LEAST) if columns <= size), BLOCK)


def blocks_of(columns: int) -> int:
    """Blocks in a row."""
    return -(-columns // block_of(columns))


def load(values: Tensor, largest: Tensor, *, signed: bool) -> Tensor:
    """Moments in float32, (rows, columns), from values (rows, columns) uint8 and largest (rows, blocks) float32."""
    columns, size = values.shape[1], block_of(values.shape[1])
    padded = _padded(values, size)
    out = _bitsandbytes().dequantize_blockwise(padded.view(-1), absmax=largest.view(-1), code=_code(signed, values.device), blocksize=size)
    return out.view(padded.shape)[:, :columns].contiguous()


def store(moments: Tensor, values: Tensor, largest: Tensor, *, signed: bool, unless: Tensor | None) -> None:
    """Put moments (rows, columns) float32 into what `load` takes, unless the scalar `unless` says 1: then both stay as they are, which the
    host does not learn."""
    size = block_of(moments.shape[1])
    padded = _padded(moments, size)
    new, state = _bitsandbytes().quantize_blockwise(padded.view(-1), code=_code(signed, moments.device), blocksize=size)
    for held, fresh in ((values, new.view(padded.shape)[:, : moments.shape[1]]), (largest, state.absmax.view(largest.shape))):
        held.copy_(fresh if unless is None else torch.where(unless.bool(), held, fresh))


def paged(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Zeros (uint8) in memory that the driver moves between the device and the host, as either needs it; never freed, as in
    bitsandbytes."""
    functional = _bitsandbytes()
    memory = functional.get_paged(*shape, dtype=torch.uint8, device=device)
    out = torch.as_tensor(_Interface(memory), device=device)  # bitsandbytes hands it out as a tensor of the host
    out.is_paged, out.page_deviceid = True, memory.page_deviceid  # type: ignore[attr-defined]  # by which it knows them again
    return out.zero_()


def prefetch(states: Tensor) -> None:
    """Have paged memory on the device before it is asked for."""
    if getattr(states, "is_paged", False):
        _bitsandbytes().prefetch_tensor(states)


class _Interface:
    """Memory that the device can reach, described for torch.as_tensor."""

    def __init__(self, memory: Tensor):
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": tuple(memory.shape),
            "typestr": "|u1",
            "data": (memory.data_ptr(), False),
            "version": 3,
        }


def _padded(x: Tensor, size: int) -> Tensor:
    """With rows of whole blocks, contiguous."""
    missing = -x.shape[1] % size
    return F.pad(x, (0, missing)) if missing else x.contiguous()


@functools.cache
def _code(signed: bool, device: torch.device) -> Tensor:
    """The 256 shares, ascending."""
    return _bitsandbytes().create_dynamic_map(signed=signed).to(device, non_blocking=True)


@functools.cache
def _bitsandbytes() -> Any:
    """Its functions, imported when they are first needed: that takes seconds."""
    import bitsandbytes.functional

    return bitsandbytes.functional
