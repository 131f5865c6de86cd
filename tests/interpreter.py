"""Triton's interpreter, in which the kernels run where there is no GPU, made right for bfloat16 and harder on kernels that are wrong.

Triton 3.6 keeps bfloat16 as bit patterns: tl.dot multiplies the patterns, and a store cuts digits off where a GPU rounds. Here products are
those of the values, conversions round to nearest, ties to even, and arithmetic on patterns is an error. Programs of a grid run in another
order with every launch, since on a GPU none is promised. And CPU tensors get products of 16-bit matrices into float32, as CUDA has.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

BUILDER = interpreter.InterpreterBuilder
CAST, DOT, BINARY, UNARY, SET_GRID = BUILDER.cast_impl, BUILDER.create_dot, BUILDER.binary_op, BUILDER.unary_op, BUILDER.set_grid_dim
SET_INDEX = BUILDER.set_grid_idx
_order = np.random.default_rng(0)


def repair() -> None:
    """For the time of the process; before the first launch."""
    BUILDER.cast_impl, BUILDER.create_dot = _cast, _dot
    BUILDER.binary_op, BUILDER.unary_op = _refusing(BINARY), _refusing(UNARY)
    BUILDER.set_grid_dim, BUILDER.set_grid_idx = _set_grid_dim, _set_grid_idx
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", _mm, "CPU")
    library.impl("addmm.dtype_out", _addmm, "CPU")
    _LIBRARIES.append(library)  # what it registers ends with it


_LIBRARIES: list[torch.library.Library] = []


def _values(x: interpreter.TensorHandle) -> np.ndarray:
    """In float32, of bfloat16 exactly."""
    return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data.astype(np.float32)


def _patterns(x: np.ndarray) -> np.ndarray:
    """The bfloat16 nearest to each float32, as uint16."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)


def _cast(self, source, target_type):
    target = target_type.scalar
    if source.dtype.scalar == target or tl.bfloat16 not in (source.dtype.scalar, target):
        return CAST(self, source, target_type)
    x = _values(source)
    return interpreter.TensorHandle(_patterns(x) if target == tl.bfloat16 else x.astype(interpreter._get_np_dtype(target)), target)


def _dot(self, a, b, *rest):
    wide = (interpreter.TensorHandle(_values(x), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return DOT(self, *wide, *rest)


def _refusing(operation):
    def run(self, *handles_and_op):
        *handles, _ = handles_and_op
        assert not any(x.dtype.scalar == tl.bfloat16 for x in handles), "arithmetic in bfloat16: convert to float32 first"
        return operation(self, *handles_and_op)

    return run


def _set_grid_dim(self, *grid):
    SET_GRID(self, *grid)
    self.grid, self.order = grid, _order.permutation(math.prod(grid))


def _set_grid_idx(self, x, y, z):
    _, ny, nz = self.grid
    program = self.order[(x * ny + y) * nz + z]
    SET_INDEX(self, *(int(i) for i in np.unravel_index(program, self.grid)))


def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return torch.mm(a.to(out_dtype), b.to(out_dtype), out=out)


def _addmm(x: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor) -> Tensor:
    return torch.addmm(x, a.to(out_dtype), b.to(out_dtype), beta=beta, alpha=alpha, out=out)
