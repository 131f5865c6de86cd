"""The language-model head: one product of T x H x V, with the softmax done on its fp32 accumulators.

T rows (a chunk of them), H hidden size, V vocabulary, P parts of PART vocabulary columns each.

x = hidden @ weight.T + bias;  z = softcap * tanh(x / softcap) / temperature  (x / temperature without a softcap)
lse = log sum_v exp(z_v);  logp = z_target - lse;  entropy = lse - sum_v p_v z_v,  p = exp(z - lse)

`logits_kernel` leaves per row and part the peak m, s = sum exp(z - m), u = sum exp(z - m) * log2 exp(z - m), the target's z, and, where a
gradient will follow (head_grad.py), exp(z - m) in the inputs' dtype: an exponential scaled by its part's peak keeps the RELATIVE error of
p at the dtype's rounding, where a bf16 logit of 16 would be off by up to 1/16. `row_stats_kernel` joins the parts. A target outside [0, V)
is never read: its log-prob is NaN. (quack.epilogue.scaled_exp stores the same
exponential for its cross-entropy on sm_90.)

Bytes beside the product, 16-bit inputs: T V 2 written when a gradient will follow, T V / PART * 24 for the parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad
from triton.tools.tensor_descriptor import TensorDescriptor

from actial_fast.kernels import common
from actial_fast.kernels.blocks import column_part, load_block, store_block, tile_place

KIND = {"logits_kernel": "matrix", "row_stats_kernel": "small"}


@dataclass(frozen=True)
class Tile:
    """Launch configuration of a product: block sizes of its rows, columns and inner dimension, the column parts that its accumulators are
    finished in, warps, pipeline stages, whether blocks travel by TMA, and whether warps of their own load and issue the products: then a
    tile's inner loop stays one, else it is made one with the loop over tiles, so that the next one's loads begin in the epilogue."""

    m: int
    n: int
    k: int
    parts: int
    warps: int
    stages: int
    tma: bool
    specialize: bool = False


# by major compute capability; chosen by registers, shared memory and instruction mix at compile time (bench/kernels/resources.py)
HALF_TILES = {
    8: Tile(128, 128, 64, parts=1, warps=8, stages=3, tma=False),
    9: Tile(128, 256, 64, parts=2, warps=8, stages=3, tma=True),
    10: Tile(128, 128, 64, parts=1, warps=8, stages=4, tma=True, specialize=True),
    12: Tile(128, 128, 64, parts=1, warps=8, stages=3, tma=False),  # 99 KiB of shared memory, as sm_86 and sm_89, and no wgmma
}
FLOAT_TILE = Tile(64, 64, 32, parts=1, warps=4, stages=3, tma=False)


L2_SHARE = 0.6  # of the L2 cache for hidden states; weights and what is written need the rest


def row_group(tile: Tile, width: int, size: int) -> int:
    """Tiles of rows whose hidden states, `width` elements of `size` bytes a row, stay in the L2 cache together."""
    return max(1, int(L2_SHARE * common.l2_bytes()) // (tile.m * width * size))


def tile_for(dtype: torch.dtype) -> Tile:
    """The launch configuration of the products for inputs of this dtype on the current device. ValueError for a device too old for it."""
    if dtype == torch.float32:
        return FLOAT_TILE
    major, minor = common.capability()
    if major < min(HALF_TILES):
        raise ValueError(
            f"hidden: {dtype} on {common.device_name()}, compute capability {major}.{minor}; 16-bit inputs need 8.0 (Ampere) or newer: "
            "older chips have no bfloat16 tensor cores and no asynchronous copies to shared memory; pass float32 there"
        )
    return HALF_TILES[max(known for known in HALF_TILES if known <= major)]


# chunks of any number of rows, whose views start anywhere, run one compiled kernel; what is 16 bytes wide is known by its stride
VECTORS = ["inverse_temperature", "targets", "sums", "peak", "total", "moment", "chosen", "top", "log_total", "logp", "entropy"]


@triton.jit(do_not_specialize=["rows", "group"], do_not_specialize_on_alignment=VECTORS)
def logits_kernel(
    # inputs
    hidden,  # (T, H), blocks (BLOCK_M, BLOCK_K); this, weight and scaled are descriptors with TMA, else pointers
    weight,  # (V, H), blocks (BLOCK_N, BLOCK_K)
    bias,  # (V,) or None
    inverse_temperature,  # (T,) float32, or a number
    targets,  # (T,) int64
    # outputs
    scaled,  # (T, V), blocks (BLOCK_M, PART): exp(z - peak); or None
    sums,  # (3, P, T) float32: peak, total, moment
    chosen,  # (T,) float32: the target's z
    # sizes
    rows,
    vocab,
    width,
    hidden_stride,
    weight_stride,
    scaled_stride,
    softcap,
    group,  # tiles of rows that share a pass over the vocabulary
    # constants
    HAS_CAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    STORE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(vocab, BLOCK_N)
    tiles = tiles_m * tiles_n
    m, n = tile_place(tl.program_id(0), tiles_m, tiles_n, group)
    target, inverse = _load_rows(targets, inverse_temperature, m, rows, ROW_TEMPERATURE, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=not SPECIALIZE):
        m, n = tile_place(tile, tiles_m, tiles_n, group)
        m0 = m * BLOCK_M
        n0 = n * BLOCK_N
        x = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in tl.range(0, width, BLOCK_K, warp_specialize=SPECIALIZE):
            a = load_block(hidden, m0, k0, rows, width, hidden_stride, TMA, BLOCK_M, BLOCK_K)
            b = load_block(weight, n0, k0, vocab, width, weight_stride, TMA, BLOCK_N, BLOCK_K)
            x = tl.dot(a, b.T, x, input_precision=PRECISION)
        here = tl.where((target >= n0) & (target < tl.minimum(n0 + BLOCK_N, vocab)), target, -1).to(tl.int32)
        found = tl.max(here, 0) >= 0
        for part in tl.static_range(PARTS):
            _softmax_part(
                column_part(x, part, PARTS),
                m0,
                n0 + part * (BLOCK_N // PARTS),
                bias,
                inverse,
                here,
                found,
                scaled,
                sums,
                chosen,
                rows,
                vocab,
                scaled_stride,
                softcap,
                HAS_CAP,
                ROW_TEMPERATURE,
                STORE,
                TMA,
                BLOCK_M,
                BLOCK_N // PARTS,
            )
        # those of the next tile: its products hide how long they take
        m, n = tile_place(tile + tl.num_programs(0), tiles_m, tiles_n, group)
        target, inverse = _load_rows(targets, inverse_temperature, m, rows, ROW_TEMPERATURE, BLOCK_M)


@triton.jit
def _load_rows(targets, inverse_temperature, m, rows, ROW_TEMPERATURE: tl.constexpr, BLOCK_M: tl.constexpr):
    """Targets and inverse temperatures of the m-th BLOCK_M rows."""
    row = m * BLOCK_M + tl.arange(0, BLOCK_M)
    if ROW_TEMPERATURE:
        inverse = tl.load(inverse_temperature + row, row < rows, 1.0)
    else:
        inverse = inverse_temperature
    return tl.load(targets + row, row < rows, -1), inverse


@triton.jit
def _softmax_part(
    x,
    m0,
    n0,
    bias,
    inverse,
    target,
    found,
    scaled,
    sums,
    chosen,
    rows,
    vocab,
    scaled_stride,
    softcap,
    HAS_CAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    STORE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PART: tl.constexpr,
):
    """The softmax of PART columns of BLOCK_M rows, from their fp32 products x. target: a row's column if it is in this tile, else -1."""
    row = m0 + tl.arange(0, BLOCK_M)
    column = n0 + tl.arange(0, PART)
    if bias is not None:
        x += tl.load(bias + column, column < vocab, 0.0).to(tl.float32)[None, :]
    if HAS_CAP:
        x = softcap * tanh(x * (1.0 / softcap))
    if n0 + PART > vocab:
        x = tl.where(column[None, :] < vocab, x, float("-inf"))
    step = inverse * common.LOG2E
    if found:
        x_target = tl.sum(tl.where(column[None, :] == target[:, None], x, 0.0), 1)
        tl.store(chosen + row, x_target * inverse, (target >= n0) & (target < n0 + PART))
    top, e, s, u = common.softmax_tile(x, step[:, None] if ROW_TEMPERATURE else step, 1)
    at = (n0 // PART).to(tl.int64) * rows + row
    inside = (row < rows) & (n0 < vocab)
    # one store: each would take its numbers through shared memory, behind two barriers
    numbers = tl.reshape(tl.join(tl.join(top * inverse, u), tl.join(s, s)), (BLOCK_M, 4))
    which = tl.arange(0, 4)[None, :]
    plane = tl.cdiv(vocab, PART).to(tl.int64) * rows
    tl.store(sums + which * plane + at[:, None], numbers, inside[:, None] & (which < 3))
    if STORE:
        value = e.to(scaled.dtype if TMA else scaled.dtype.element_ty)
        store_block(scaled, value, m0, n0, rows, vocab, scaled_stride, TMA, BLOCK_M, PART)


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=VECTORS)
def row_stats_kernel(peak, total, moment, chosen, top, log_total, logp, entropy, rows, parts, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr):
    """Joins the parts of each row: (P, T) partial softmaxes -> top = max z, log_total = lse - top, logp, entropy (T,)."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.full((BLOCK_P, BLOCK_R), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    u = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    for p0 in range(0, parts, BLOCK_P):
        part = p0 + tl.arange(0, BLOCK_P)
        at = part.to(tl.int64)[:, None] * rows + row[None, :]
        mask = (part[:, None] < parts) & (row[None, :] < rows)
        m2 = tl.load(peak + at, mask, float("-inf"))
        s2 = tl.load(total + at, mask, 0.0)
        u2 = tl.load(moment + at, mask, 0.0)
        m, s, u = common.softmax_merge(m, s, u, m2, s2, u2, common.LOG2E)
    m, s, u = common.softmax_join(m, s, u, common.LOG2E, 0)
    log_s = tl.log(s)
    z = tl.load(chosen + row, row < rows, 0.0)
    # centred on the peak first: exact for a dominant target, whose log-prob is -log(s)
    tl.store(logp + row, tl.minimum((z - m) - log_s, 0.0, propagate_nan=tl.PropagateNan.ALL), row < rows)
    # not their sum: at logits of -1e4 a float32 lse has lost three digits of p
    tl.store(top + row, m, row < rows)
    tl.store(log_total + row, log_s, row < rows)
    tl.store(entropy + row, tl.maximum(log_s - common.LN2 * u / s, 0.0, propagate_nan=tl.PropagateNan.ALL), row < rows)


@dataclass(frozen=True)
class Head:
    """The checked arguments of an op that starts from hidden states.

    hidden (T, H), weight (V, H), bias (V,) or None of one dtype, float32, bfloat16 or float16; targets (T,) int64; inverse_temperature a
    number or (T,) float32; softcap a number or None. Rows of hidden and weight start at multiples of 16 bytes. parallel: the ranks that
    have the rest of the vocabulary (`ops.parallel`), where targets that are not here are -1. For log-probs alone targets may be (T, K),
    and kept (`ops.spec.Kept`) says to what the distribution is cut. quack: its products instead of ours (quack_head.py), which takes
    bfloat16, V in whole parts, targets (T,) and none of bias, softcap, parallel and kept; strips: the gradient's too.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    inverse_temperature: float | Tensor
    softcap: float | None
    parallel: Any = None
    kept: Any = None
    quack: bool = False
    strips: bool = False

    @property
    def unit(self) -> int:
        """Rows that a chunk's workspace is rounded up to a multiple of."""
        return 128 if self.strips else 1

    @property
    def largest(self) -> int:
        """Rows of the head, on the rank that has most of them: all cut the same chunks."""
        return self.parallel.largest if self.parallel else self.weight.shape[0]

    @property
    def precision(self) -> str:
        """How fp32 operands are multiplied: PyTorch's own switch decides."""
        return "tf32" if self.hidden.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"

    def rows(self, start: int, stop: int) -> Head:
        """Rows [start, stop) of it."""
        inverse = self.inverse_temperature
        inverse = inverse[start:stop] if isinstance(inverse, Tensor) else inverse
        return replace(self, hidden=self.hidden[start:stop], targets=self.targets[start:stop], inverse_temperature=inverse)


def make_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    parallel: Any = None,
    kept: Any = None,
    path: str = "triton",
    by_logp: bool = False,
) -> Head:
    """The arguments of an op as its kernels take them. Rows that do not start at multiples of 16 bytes are copied, padded with zeros.

    path: whose products, "triton" or "quack"; by_logp: the gradient, if any, is one of log-probs alone and of most rows.
    """
    if not (_is_aligned(hidden) and _is_aligned(weight)):
        missing = -hidden.shape[1] % (16 // hidden.element_size())
        hidden, weight = pad(hidden, (0, missing)).contiguous(), pad(weight, (0, missing)).contiguous()
    quack = path == "quack"
    strips = quack and by_logp and common.capability()[0] == 9
    return Head(hidden, weight, targets, bias, 1.0 / temperature, softcap, parallel, kept, quack, strips)


def _is_aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(1) == 1


class Softmax(NamedTuple):
    """What the gradient of T rows needs: each part's peak (P, T); the row's own, log of its sum of exp(z - top) and the target's z (T,),
    all float32; and exp(z - peak) (T, V) of the inputs' dtype, or None."""

    peak: Tensor
    top: Tensor
    log_total: Tensor
    chosen: Tensor
    scaled: Tensor | None


def forward(head: Head, scaled: Tensor | None) -> tuple[Softmax, Tensor, Tensor]:
    """One product: the softmax in parts, and logp and entropy (T,) float32. `scaled` (>= T, V), where given, receives exp(z - peak)."""
    (rows, width), vocab = head.hidden.shape, head.weight.shape[0]
    tile, device = tile_for(head.hidden.dtype), head.hidden.device
    part = tile.n // tile.parts
    parts = triton.cdiv(vocab, part)
    peak, total, moment = sums = torch.empty((3, parts, rows), dtype=torch.float32, device=device)
    chosen = torch.full((rows,), torch.nan, device=device)
    top, log_total, logp, entropy = torch.empty((4, rows), dtype=torch.float32, device=device)
    tiles = triton.cdiv(rows, tile.m) * triton.cdiv(vocab, tile.n)
    row_temperature = isinstance(head.inverse_temperature, Tensor)
    logits_kernel[(min(tiles, common.sm_count()),)](
        hidden=block_argument(head.hidden, tile.m, tile.k, tile.tma),
        weight=block_argument(head.weight, tile.n, tile.k, tile.tma),
        bias=head.bias,
        inverse_temperature=head.inverse_temperature if row_temperature else float(head.inverse_temperature),
        targets=head.targets,
        scaled=None if scaled is None else block_argument(scaled[:rows], tile.m, part, tile.tma),
        sums=sums,
        chosen=chosen,
        rows=rows,
        vocab=vocab,
        width=width,
        hidden_stride=head.hidden.stride(0),
        weight_stride=head.weight.stride(0),
        scaled_stride=0 if scaled is None else scaled.stride(0),
        softcap=float(head.softcap or 0.0),
        group=row_group(tile, width, head.hidden.element_size()),
        HAS_CAP=head.softcap is not None,
        ROW_TEMPERATURE=row_temperature,
        STORE=scaled is not None,
        PRECISION=head.precision,
        TMA=tile.tma,
        SPECIALIZE=tile.specialize,
        PARTS=tile.parts,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    row_stats_kernel[(triton.cdiv(rows, 16),)](
        peak, total, moment, chosen, top, log_total, logp, entropy, rows, parts, BLOCK_R=16, BLOCK_P=64, num_warps=4
    )
    if head.parallel:
        here = head.targets >= 0
        top, log_total, logp, entropy = head.parallel.merge(top, log_total, entropy, chosen, here)
        chosen = torch.where(here | logp.isnan(), chosen, 0.0)  # stays NaN, for the gradient to see, where no rank has the target
    return Softmax(peak, top, log_total, chosen, None if scaled is None else scaled[:rows]), logp, entropy


def block_argument(x: Tensor, rows: int, columns: int, tma: bool) -> TensorDescriptor | Tensor:
    """What `load_block` and `store_block` take for a matrix with blocks of (rows, columns)."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns]) if tma else x
