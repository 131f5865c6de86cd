"""Keys and values in blocks, and attention of single new tokens over them, in which the replies to a prompt read its blocks together.

    (a)  a row attends to its own reply's tokens, the new one among them,       out_a, lse_a
    (b)  the rows of a prompt's replies attend to the prompt,                   out_b, lse_b
and the two are merged as in attention.py. CUDA: kernels/decode.py, which reads each item's blocks once for all its rows. CPU in float32:
the C++ extension (csrc/decode.cpp); without it, and in other dtypes, blocks are gathered for PyTorch's flash attention.
R rows, H query heads, K key-value heads, D head dimension, S tokens a block.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from actial_fast.model.attention import merge
from actial_fast.ops.library import current_device
from actial_fast.packing import native


@dataclass(frozen=True)
class Reads:
    """Which rows read which blocks. N items of up to M rows: rows (N, M) int32, -1 where an item has fewer; table (N, C) int32, an item's
    blocks in order, anything after its last; tokens (N,) int32, how many of their tokens it reads, at least 1; place (R,) int64, where in
    the flattened `rows` each row stands."""

    rows: Tensor
    table: Tensor
    tokens: Tensor
    place: Tensor


@dataclass(frozen=True)
class Pages:
    """Keys and values of all layers, each (layers, blocks, S, K, D), zeros at first, and what the forward pass under way does with them.

    slots (L,) int64: block * S + place, where its L tokens' keys and values go; those of block 0 are nobody's. cos, sin (L, D): of their
    positions. own, prefix: what its rows read, when each is the next token of a reply; None when whole sequences are read. row (L,) int64:
    a slot's row, where replies that are the same so far share one; None where each has its own.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    cos: Tensor
    sin: Tensor
    own: Reads | None = None
    prefix: Reads | None = None
    row: Tensor | None = None

    @staticmethod
    def empty(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> Pages:
        """Memory of this shape, for passes to come."""
        nothing = torch.empty(0)
        if device.type == "cpu" and dtype == torch.float32:  # memory that is never touched costs nothing
            keys, values = (torch.from_numpy(np.zeros(shape, np.float32)) for _ in range(2))
        else:
            keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return Pages(keys, values, nothing, nothing, nothing)

    def at(
        self,
        slots: Tensor,
        cos: Tensor,
        sin: Tensor,
        own: Reads | None = None,
        prefix: Reads | None = None,
        row: Tensor | None = None,
    ) -> Pages:
        """The same memory, for another pass."""
        return Pages(self.keys, self.values, slots, cos, sin, own, prefix, row)

    def heads(self, qkv: Many[Tensor]) -> list[Tensor]:
        """Queries (L, H, D), keys and values (L, K, D) from their products (L, heads * D), in three tensors or side by side in one."""
        kv_heads, dim = self.keys.shape[3:]
        if len(qkv) == 1:
            width = kv_heads * dim
            qkv = qkv[0].split_with_sizes((qkv[0].shape[1] - 2 * width, width, width), 1)
        return [x.view(x.shape[0], -1, dim) for x in qkv]

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep keys and values (rows, K, D) of this pass's tokens, the keys turned."""
        for held, new in ((self.keys, k), (self.values, v)):
            new = new if self.row is None else new[self.row]
            held[layer].flatten(0, 1).index_copy_(0, self.slots, new.to(held.dtype))

    def step(self, layer: int, qkv: Many[Tensor], scale: float) -> Tensor:
        """Attention (R, H * D) of the next tokens of R replies, whose keys and values are kept: qkv as `heads` takes them."""
        own, prefix = self.own, self.prefix
        assert own is not None and prefix is not None, "rows of whole sequences attend to each other"
        if on_host(qkv[0]):
            held_keys, held_values, cos, sin, *reads = self._arrays
            x = qkv[0] if len(qkv) == 1 else torch.cat(list(qkv), 1)
            return torch.from_numpy(native.decode_step(x.numpy(), cos, sin, held_keys[layer], held_values[layer], *reads, scale=scale))
        keys, values = self.keys[layer], self.values[layer]
        q, k, v = self.heads(qkv)
        q, k = (turned(y, self.cos, self.sin).to(v.dtype) for y in (q, k))
        self.write(layer, k, v)
        out, lse = _read(q, keys, values, own, scale)
        merge(out, lse, *_read(q, keys, values, prefix, scale))
        return out.flatten(1)

    @cached_property
    def _arrays(self) -> list[np.ndarray]:
        """What csrc/decode.h asks for beside a layer's own, the same for all of them."""
        own, prefix = self.own, self.prefix
        assert own is not None and prefix is not None
        row = torch.arange(len(self.slots)) if self.row is None else self.row
        reads = own.table, own.tokens, prefix.rows, prefix.table, prefix.tokens
        return [x.numpy() for x in (self.keys, self.values, self.cos, self.sin, self.slots, row, *reads)]


def on_host(x: Tensor) -> bool:
    """Whether the C++ extension takes it: float32 on the CPU, and the extension is there."""
    return native.AVAILABLE and x.dtype == torch.float32 and x.device.type == "cpu"


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (L, heads, D) turned by their positions' cosines and sines (L, D), in their own dtype."""
    first, second = x.chunk(2, -1)
    return (x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]).to(x.dtype)


def _read(q: Tensor, keys: Tensor, values: Tensor, reads: Reads, scale: float) -> tuple[Tensor, Tensor]:
    """out (R, H, D) and lse (H, R) of one part."""
    if q.is_cuda:
        from actial_fast.kernels.decode import decode

        with current_device(q):
            return decode(q, keys, values, reads.rows, reads.table, reads.tokens, scale)
    (items, members), heads = reads.rows.shape, keys.shape[2]
    share = q.shape[1] // heads
    k, v = (x[reads.table].flatten(1, 2).transpose(1, 2) for x in (keys, values))  # (N, K, C * S, D)
    length = k.shape[2]
    mask = torch.zeros(items, 1, 1, length, dtype=q.dtype).masked_fill_(
        (torch.arange(length) >= reads.tokens[:, None])[:, None, None], -torch.inf
    )
    # rows that an item lacks read what row 0 asks: nobody takes it
    x = q[reads.rows.clamp(min=0)].unflatten(2, (heads, share)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # (N, K, M * share, D)
    part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, k, v, 0.0, False, attn_mask=mask, scale=scale)
    out = part.unflatten(2, (members, share)).permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)[reads.place]
    lse = lse.unflatten(2, (members, share)).permute(1, 3, 0, 2).flatten(0, 1).flatten(1)[:, reads.place]
    return out, lse
