"""Stochastic rounding: a float32 becomes one of its two neighbours of 16 bits, the nearer one more often, so that its mean is the value.

Weights of bfloat16 have 8 significant bits, and a step at a small learning rate is far below the last of them: rounded to nearest it is
lost every time, rounded like this it is made in the mean. The random bits are a function of (key, step, place), nothing is drawn from a
generator: a run that goes on rounds as the interrupted one would have, and however a tensor is cut over ranks, each of its elements is
rounded alike. CUDA tensors go to the Triton kernel, which gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actial_fast.ops.library import current_device, on_gpu

MASK = 0xFFFFFFFF
MULTIPLIERS = 0x7FEB352D, 0x846CA68B  # of a 32-bit mixer with little bias: https://nullprogram.com/blog/2018/07/31/
GOLDEN = 0x9E3779B9  # the golden ratio's bits, so that the two words differ
AT_ONCE = 1 << 20  # elements whose int64 temporaries are held on a CPU


def round_stochastic_(out: Tensor, value: Tensor, *, key: int, step: Tensor, first: int) -> None:
    """Fill `out` (n,) bfloat16 with `value` (n,) float32, rounded up or down at random, in proportion to the distance.

    key: 64 bits that tell this use of random numbers from others; step: a scalar on the device, the same for all elements, which is not
    waited for; first: the place of element 0 in whatever it is cut from. What bfloat16 can hold is kept as it is, and so are NaN and
    infinity. ValueError for other dtypes or shapes.
    """
    if out.dtype != torch.bfloat16 or value.dtype != torch.float32 or out.shape != value.shape or out.ndim != 1:
        raise ValueError(
            f"out, value: expected (n,) bfloat16 and float32, got {out.dtype} {tuple(out.shape)} and {value.dtype} {tuple(value.shape)}"
        )
    if on_gpu(out) and len(out):
        from actial_fast.kernels.rounding import round_stochastic_ as run

        with current_device(out):
            run(out, value, key, step, first)
        return
    for at in range(0, len(out), AT_ONCE):
        part = value[at : at + AT_ONCE]
        bits = part.view(torch.int32).to(torch.int64) & MASK
        place = torch.arange(first + at, first + at + len(part), device=out.device)
        rounded = (bits + (random_bits(key, step, place) >> 16)) & 0xFFFF0000
        kept = torch.where(part.isfinite(), rounded, bits)
        out[at : at + AT_ONCE] = (kept - (kept >> 31 << 32)).to(torch.int32).view(torch.float32)  # the upper half is exact in bfloat16


def random_bits(key: int, step: Tensor, place: Tensor) -> Tensor:
    """32 random bits for each place, int64: the place mixed twice, each time with a word made of key and step."""
    first = _mixed(_mixed(step.to(torch.int64) ^ (key & MASK)) ^ (key >> 32 & MASK))
    second = _mixed(first ^ GOLDEN)
    return _mixed(_mixed((place & MASK) ^ first) ^ (place >> 32) ^ second)


def _mixed(x: Tensor) -> Tensor:
    """A permutation of 32 bits in which each bit that comes in turns about half of those that go out."""
    x = (x ^ (x >> 16)) * MULTIPLIERS[0] & MASK
    x = (x ^ (x >> 15)) * MULTIPLIERS[1] & MASK
    return x ^ (x >> 16)
