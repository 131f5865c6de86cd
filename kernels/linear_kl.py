"""Exact KL(p || q) per row over the whole vocabulary, between two pairs of hidden states and head.

T rows, H and G hidden sizes of the two models, V vocabulary, C rows of a chunk.

z_p = hidden @ weight.T / temperature, z_q = ref_hidden @ ref_weight.T / temperature, p = softmax(z_p), q = softmax(z_q)
KL = sum_v p_v (log p_v - log q_v)
dKL/dz_p = p ((log p - log q) - KL), dKL/dz_q = q - p

With peaks m, sums s and w = sum exp(z_p - m_p) ((z_p - m_p) - (z_q - m_q)):  KL = w / s_p + log(s_q / s_p). Each term of w is as small as
the models differ there, so that large logits do not cancel; identical models give exactly 0.

cuBLAS multiplies in chunks of rows into a float32 workspace of two (C, V); one kernel reads both once. The backward multiplies again and
writes dKL/dz in the inputs' dtype over the logits it has read. Bytes beside the products: T V 8 read forward; backward T V 8 read and, for
each model that learns, T V times the inputs' size written. Products: 2 forward; backward 2 and one for each gradient, those of the heads
accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from actial_fast.kernels import common
from actial_fast.kernels.chunks import stride_of

KIND = {"kl_forward_kernel": "memory", "kl_backward_kernel": "memory"}

LANES, DEPTH, FORWARD_WARPS = 1024, 4, 8  # a lane is a column residue with a softmax of its own; DEPTH of its logits are folded in at once
BLOCK, BACKWARD_WARPS = 2048, 8
ROW_UNIT = 128  # rows of a chunk: whole tiles for the products


@triton.jit
def kl_forward_kernel(
    # inputs
    logits_p,  # (C, stride) float32, the first V columns of each row
    logits_q,
    inverse_temperature,  # (C,) float32
    # outputs
    kl,  # (C,) float32
    stats,  # (C, 4) float32: m_p, log s_p, m_q, log s_q
    # sizes
    vocab,
    stride,
    # constants
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(inverse_temperature + row)
    m_p = tl.full((LANES,), float("-inf"), tl.float32)
    s_p = tl.zeros((LANES,), tl.float32)
    w = tl.zeros((LANES,), tl.float32)
    m_q = tl.full((LANES,), float("-inf"), tl.float32)
    s_q = tl.zeros((LANES,), tl.float32)
    for start in range(0, vocab, DEPTH * LANES):
        column = start + tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        # any vocabulary moves 16 bytes at a time: the row's padding is read and written, whatever it holds, but not used
        z_p = tl.load(logits_p + row * stride + column, column < stride, 0.0) * scale
        z_q = tl.load(logits_q + row * stride + column, column < stride, 0.0) * scale
        z_p = tl.where(column < vocab, z_p, float("-inf"))
        z_q = tl.where(column < vocab, z_q, float("-inf"))
        tile_m_p, e, tile_s_p, _ = common.softmax_tile(z_p, common.LOG2E, 0)
        tile_m_q, _, tile_s_q, _ = common.softmax_tile(z_q, common.LOG2E, 0)
        gap = (z_p - tile_m_p[None, :]) - (z_q - tile_m_q[None, :])
        tile_w = tl.sum(tl.where(e > 0, e * gap, 0.0), 0)
        peak_p, peak_q = tl.maximum(m_p, tile_m_p), tl.maximum(m_q, tile_m_q)
        s_p, w, s_q = _rebase(m_p, s_p, w, m_q, s_q, peak_p, peak_q)
        tile_s_p, tile_w, tile_s_q = _rebase(tile_m_p, tile_s_p, tile_w, tile_m_q, tile_s_q, peak_p, peak_q)
        m_p, s_p, w, m_q, s_q = peak_p, s_p + tile_s_p, w + tile_w, peak_q, s_q + tile_s_q
    peak_p, peak_q = tl.max(m_p, 0), tl.max(m_q, 0)
    s_p, w, s_q = _rebase(m_p, s_p, w, m_q, s_q, peak_p, peak_q)
    total_p, total_q = tl.sum(s_p, 0), tl.sum(s_q, 0)
    value = tl.sum(w, 0) / total_p + tl.log(total_q / total_p)
    tl.store(kl + row, tl.where(value < 0, 0.0, value))  # below 0 by rounding only; NaN stays NaN
    tl.store(stats + row * 4, peak_p)
    tl.store(stats + row * 4 + 1, tl.log(total_p))
    tl.store(stats + row * 4 + 2, peak_q)
    tl.store(stats + row * 4 + 3, tl.log(total_q))


@triton.jit
def _rebase(m_p, s_p, w, m_q, s_q, peak_p, peak_q):
    """The sums s_p, w and s_q, taken about the peaks m, as taken about peak_p and peak_q. An empty part (m = -inf) has sums of 0."""
    a = tl.where(m_p == float("-inf"), 0.0, m_p - peak_p)
    b = tl.where(m_q == float("-inf"), 0.0, m_q - peak_q)
    scale = tl.exp(a)
    return scale * s_p, scale * (w + (a - b) * s_p), tl.exp(b) * s_q


@triton.jit
def kl_backward_kernel(
    # inputs
    logits_p,  # (C, stride) float32
    logits_q,
    inverse_temperature,  # (C,) float32
    kl,  # (C,) float32
    stats,  # (C, 4) float32
    grad,  # (C,) float32: of the loss by the KL
    # outputs, in the same memory as the logits: row r of a gradient lies at the beginning of row r of the logits
    grad_p,
    grad_q,
    # sizes
    vocab,
    stride,  # of the logits, in float32
    # constants
    WIDTH_P: tl.constexpr,  # elements of grad_p that take the place of one of logits_p; 0: not wanted
    WIDTH_Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(inverse_temperature + row)
    divergence = tl.load(kl + row)
    m_p = tl.load(stats + row * 4)
    log_s_p = tl.load(stats + row * 4 + 1)
    m_q = tl.load(stats + row * 4 + 2)
    log_s_q = tl.load(stats + row * 4 + 3)
    g = tl.load(grad + row)
    factor = g * scale
    # one program has the whole row and goes through it in order: a narrower gradient never gets ahead of what has been read
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        centred_p = tl.load(logits_p + row * stride + column, column < stride, 0.0) * scale - m_p
        centred_q = tl.load(logits_q + row * stride + column, column < stride, 0.0) * scale - m_q
        tl.debug_barrier()  # every warp has its logits before any overwrites its neighbours'
        p = tl.exp(centred_p - log_s_p)
        if WIDTH_P > 0:
            log_ratio = (centred_p - centred_q) - (log_s_p - log_s_q)
            value = tl.where(g == 0, 0.0, factor * p * (log_ratio - divergence))  # 0 whatever the row holds, NaN included
            tl.store(grad_p + row * stride * WIDTH_P + column, value.to(grad_p.dtype.element_ty), column < stride)
        if WIDTH_Q > 0:
            value = tl.where(g == 0, 0.0, factor * (tl.exp(centred_q - log_s_q) - p))
            tl.store(grad_q + row * stride * WIDTH_Q + column, value.to(grad_q.dtype.element_ty), column < stride)


def forward(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    inverse_temperature: Tensor,
    workspace_mb: float,
    parallel: Any = None,
) -> tuple[Tensor, Tensor]:
    """KL (T,) and what the backward needs of each row, stats (T, 4): m_p, log s_p, m_q, log s_q."""
    kl = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    stats = torch.empty((hidden.shape[0], 4), dtype=torch.float32, device=hidden.device)
    for rows, logits in _logits(hidden, weight, ref_hidden, ref_weight, workspace_mb, parallel):
        kl_forward_kernel[(logits.shape[1],)](
            logits_p=logits[0],
            logits_q=logits[1],
            inverse_temperature=inverse_temperature[rows],
            kl=kl[rows],
            stats=stats[rows],
            vocab=weight.shape[0],
            stride=logits.shape[2],
            LANES=LANES,
            DEPTH=DEPTH,
            num_warps=FORWARD_WARPS,
        )
        if parallel:
            kl[rows], stats[rows] = parallel.merge_kl(kl[rows], stats[rows])
    return kl, stats


def backward(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    inverse_temperature: Tensor,
    kl: Tensor,
    stats: Tensor,
    grad: Tensor,
    wanted: Sequence[bool],
    workspace_mb: float,
    parallel: Any = None,
) -> list[Tensor | None]:
    """Gradients of sum(grad * KL), grad (T,) float32, by the four inputs, None where not wanted; those of the heads are float32."""
    inputs = (hidden, weight, ref_hidden, ref_weight)
    empty = torch.empty_like if hidden.shape[0] else torch.zeros_like
    grads = [
        empty(x, dtype=torch.float32 if i % 2 else x.dtype, memory_format=torch.contiguous_format) if wanted[i] else None
        for i, x in enumerate(inputs)
    ]
    for rows, logits in _logits(*inputs, workspace_mb, parallel):
        narrow = [logits[i].view(inputs[2 * i].dtype) for i in range(2)]
        widths = [narrow[i].shape[1] // logits.shape[2] if any(wanted[2 * i : 2 * i + 2]) else 0 for i in range(2)]
        kl_backward_kernel[(logits.shape[1],)](
            logits_p=logits[0],
            logits_q=logits[1],
            inverse_temperature=inverse_temperature[rows],
            kl=kl[rows],
            stats=stats[rows],
            grad=grad[rows],
            grad_p=narrow[0],
            grad_q=narrow[1],
            vocab=weight.shape[0],
            stride=logits.shape[2],
            WIDTH_P=widths[0],
            WIDTH_Q=widths[1],
            BLOCK=BLOCK,
            num_warps=BACKWARD_WARPS,
        )
        for i in range(2):
            states, head = inputs[2 * i], inputs[2 * i + 1]
            by_states, by_head = grads[2 * i], grads[2 * i + 1]
            by_logits = narrow[i][:, : weight.shape[0]]
            if by_states is not None:
                torch.mm(by_logits, head, out=by_states[rows])
            if by_head is not None:
                counted = torch.where(grad[rows, None] != 0, states[rows], 0)  # NaN times a gradient of 0 would be NaN
                (mm_f32 if rows.start == 0 else add_mm_f32)(by_logits.T, counted, by_head)
    return grads


def _logits(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, workspace_mb: float, parallel: Any
) -> Iterator[tuple[slice, Tensor]]:
    """Chunk by chunk: its rows, and both models' logits (2, C, stride) float32 in one workspace, V columns of them in use."""
    total, vocab = hidden.shape[0], weight.shape[0]
    stride = stride_of(parallel.largest if parallel else vocab)
    unit = 2 * 4 * stride + max(x.shape[1] * x.element_size() for x in (hidden, ref_hidden))  # the states once more, where heads learn
    fitting = int(workspace_mb * 2**20) // unit
    if fitting < 1:
        raise ValueError(f"workspace_mb: {workspace_mb} holds no row; one takes {unit / 2**20:.2f} MiB")
    step = min(fitting // ROW_UNIT * ROW_UNIT or fitting, total)
    workspace = torch.empty(2 * step * stride, dtype=torch.float32, device=hidden.device)
    for start in range(0, total, max(step, 1)):
        rows = slice(start, min(start + step, total))
        count = rows.stop - start
        logits = workspace[: 2 * count * stride].view(2, count, stride)
        mm_f32(hidden[rows], weight.T, logits[0, :, :vocab])
        mm_f32(ref_hidden[rows], ref_weight.T, logits[1, :, :vocab])
        yield rows, logits


def mm_f32(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b in float32, the products of 16-bit a and b not rounded on the way."""
    if a.dtype != torch.float32 and a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:  # only CUDA has products of one dtype into another
        torch.mm(a.float(), b.float(), out=out)


def add_mm_f32(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b in float32."""
    if a.dtype != torch.float32 and a.is_cuda:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.addmm(out, a.float(), b.float(), out=out)


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, options: dict[str, Any]) -> Tensor:
        kl, stats = linear_kl_forward(hidden, weight, ref_hidden, ref_weight, **options)
        temperature = options["temperature"]
        by_row = temperature if isinstance(temperature, Tensor) else None
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, kl, stats, by_row)
        ctx.options = options if by_row is None else options | {"temperature": None}
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ref_hidden, ref_weight, kl, stats, by_row = ctx.saved_tensors
        options = ctx.options if by_row is None else ctx.options | {"temperature": by_row}
        wanted = ctx.needs_input_grad[:4]
        return *linear_kl_backward(grad, hidden, weight, ref_hidden, ref_weight, kl, stats, wanted, **options), None


def linear_kl_forward(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    temperature: float | Tensor,
    workspace_mb: float,
    vocab_parallel: Any = None,
) -> tuple[Tensor, Tensor]:
    """KL (T,) and statistics (T, 4) float32, unknown to autograd."""
    return forward(hidden, weight, ref_hidden, ref_weight, _inverse(temperature, hidden), workspace_mb, vocab_parallel)


def linear_kl_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    kl: Tensor,
    stats: Tensor,
    wanted: Sequence[bool],
    *,
    temperature: float | Tensor,
    workspace_mb: float,
    vocab_parallel: Any = None,
) -> list[Tensor | None]:
    """The gradients of sum(grad * KL) by the four inputs, where wanted and in their dtypes."""
    inputs = (hidden, weight, ref_hidden, ref_weight)
    grads = backward(*inputs, _inverse(temperature, hidden), kl, stats, grad.float().contiguous(), wanted, workspace_mb, vocab_parallel)
    return [None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]


def _inverse(temperature: float | Tensor, like: Tensor) -> Tensor:
    """1 / temperature of every row of `like`, (T,) float32."""
    return torch.ones(like.shape[0], dtype=torch.float64, device=like.device).div_(temperature).float()


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    workspace_mb: float = 700,
    vocab_parallel: Any = None,
) -> Tensor:
    """KL(p || q) per row, p from (hidden, weight) and q from (ref_hidden, ref_weight): see `reference.linear_kl`.

    hidden (T, H) and weight (V, H) of one dtype, ref_hidden (T, G) and ref_weight (V, G) of one dtype, each float32, bfloat16 or float16;
    temperature a number or (T,), which gets no gradient -> (T,) float32, differentiable (once) in all four inputs. Not more than
    workspace_mb MiB are held above inputs, outputs and the heads' gradients in float32. ValueError when that holds no row; else arguments
    are taken as checked.
    """
    options = {"temperature": temperature, "workspace_mb": workspace_mb, "vocab_parallel": vocab_parallel}
    return _LinearKL.apply(hidden, weight, ref_hidden, ref_weight, options)
