"""Input embeddings of packed rows: text rows from the embedding table, image rows from the vision tower's features, in one pass.

L rows, H hidden size, V vocabulary, F feature rows, M image rows: row image_slots[j] takes features[image_rows[j]], any other table[id].
    forward   out[l] = features[image_rows[j]] if l = image_slots[j] else table[input_ids[l]]
    backward  d features[f] = sum of d out[image_slots[j]] over image_rows[j] = f;  d table[v] = sum of d out[l] over text rows l of id v

Bytes: 2 C H a row forward (C bytes an element), (M + F) C H for the features' gradient. Slots ascend, so a program finds its row among
them by bisection; the features' gradient walks their uses, sorted, and adds in fp32 in a fixed order, without atomics. The table's gradient
is torch's, with image rows left out.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

KIND = {"embed_kernel": "memory", "features_grad_kernel": "memory"}
WARPS = 4


@triton.jit
def _first_not_below(ascending, count, value):
    """The first index whose entry is not below value; count where all are."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        below = tl.load(ascending + middle) < value
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _copy_row(source, out, row, known, H, stride, BLOCK: tl.constexpr):
    """A row of the source, or NaN where there is no such row."""
    for h in range(0, H, BLOCK):
        column = h + tl.arange(0, BLOCK)
        value = tl.load(source + row * stride + column, (column < H) & known, float("nan"))
        tl.store(out + column, value.to(out.dtype.element_ty), column < H)


@triton.jit(do_not_specialize=["V", "F", "M"])  # they differ in every micro-batch
def embed_kernel(
    input_ids,  # (L,) int64
    table,  # (V, H)
    features,  # (F, H)
    image_slots,  # (M,) int64, ascending
    image_rows,  # (M,) int64
    out,  # (L, H)
    V,
    F,
    M,
    H,
    stride_table,
    stride_features,
    BLOCK: tl.constexpr,
):
    l = tl.program_id(0).to(tl.int64)  # noqa: E741
    j = _first_not_below(image_slots, M, l)
    if tl.load(image_slots + j, j < M, -1) == l:
        row = tl.load(image_rows + j)
        _copy_row(features, out + l * H, row, (row >= 0) & (row < F), H, stride_features, BLOCK)
    else:
        row = tl.load(input_ids + l)
        _copy_row(table, out + l * H, row, (row >= 0) & (row < V), H, stride_table, BLOCK)


@triton.jit(do_not_specialize=["M"])
def features_grad_kernel(
    grad,  # (L, H)
    used,  # (M,) int64, feature rows ascending
    order,  # (M,) int64, where each stood
    image_slots,  # (M,) int64
    out,  # (F, H)
    M,
    H,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), ACC)
    u = _first_not_below(used, M, f)
    while tl.load(used + u, u < M, -1) == f:
        slot = tl.load(image_slots + tl.load(order + u))
        acc += tl.load(grad + slot * H + column, column < H, 0.0).to(ACC)
        u += 1
    tl.store(out + f * H + column, acc.to(out.dtype.element_ty), column < H)


def _block(tensor: Tensor) -> int:
    """Columns at a time: two 16-byte accesses a thread."""
    return min(WARPS * 32 * 32 // tensor.element_size(), triton.next_power_of_2(tensor.shape[1]))


def embed_forward(input_ids: Tensor, table: Tensor, features: Tensor, image_slots: Tensor, image_rows: Tensor) -> Tensor:
    """(L, H) in the table's dtype; arguments as embed's."""
    out = torch.empty(len(input_ids), table.shape[1], dtype=table.dtype, device=table.device)
    if len(input_ids):
        embed_kernel[(len(input_ids),)](
            input_ids,
            table,
            features,
            image_slots,
            image_rows,
            out,
            V=len(table),
            F=len(features),
            M=len(image_slots),
            H=table.shape[1],
            stride_table=table.stride(0),
            stride_features=features.stride(0),
            BLOCK=_block(out),
            num_warps=WARPS,
        )
    return out


def features_grad(grad: Tensor, image_slots: Tensor, image_rows: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """The gradient (rows, H) of the features in dtype, from that of the output, (L, H) contiguous: 0 for a row that is not used."""
    out = torch.empty(rows, grad.shape[1], dtype=dtype, device=grad.device)
    if rows:
        used, order = torch.sort(image_rows, stable=True)
        block = _block(grad)
        features_grad_kernel[(rows, triton.cdiv(grad.shape[1], block))](
            grad,
            used,
            order,
            image_slots,
            out,
            M=len(image_rows),
            H=grad.shape[1],
            ACC=tl.float64 if grad.dtype == torch.float64 else tl.float32,
            BLOCK=block,
            num_warps=WARPS,
        )
    return out


def table_grad(grad: Tensor, input_ids: Tensor, image_slots: Tensor, rows: int) -> Tensor:
    """The gradient (rows, H) of the table: image rows and ids out of range count for a row behind the last, which is cut off."""
    ids = torch.where((input_ids >= 0) & (input_ids < rows), input_ids, rows).index_fill(0, image_slots, rows)
    return torch.ops.aten.embedding_dense_backward(grad, ids, rows + 1, rows, False)[:rows]


class Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, table: Tensor, features: Tensor, image_slots: Tensor, image_rows: Tensor) -> Tensor:
        ctx.save_for_backward(input_ids, image_slots, image_rows)
        ctx.table_rows, ctx.feature_rows, ctx.feature_dtype = len(table), len(features), features.dtype
        return embed_forward(input_ids, table, features, image_slots, image_rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (input_ids, image_slots, image_rows), grad = ctx.saved_tensors, grad.contiguous()
        table = features = None
        if ctx.needs_input_grad[1]:
            table = table_grad(grad, input_ids, image_slots, ctx.table_rows)
        if ctx.needs_input_grad[2]:
            features = features_grad(grad, image_slots, image_rows, ctx.feature_rows, ctx.feature_dtype)
        return None, table, features, None, None


def embed(input_ids: Tensor, table: Tensor, features: Tensor, image_slots: Tensor, image_rows: Tensor) -> Tensor:
    """input_ids (L,), table (V, H), features (F, H), image_slots and image_rows (M,) -> (L, H) in the table's dtype.

    Ids, slots and rows contiguous int64, slots ascending; table and features with contiguous rows. Differentiable once in table and
    features; one that needs no gradient costs nothing. An id or feature row out of range gives a row of NaN. Assumes checked inputs.
    """
    return Embed.apply(input_ids, table, features, image_slots, image_rows)
