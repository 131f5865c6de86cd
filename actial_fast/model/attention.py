"""Attention over packed rows in which a prompt is computed once and serves all of its suffixes, exactly.

A packed micro-batch holds rows of segments: [prefixes that have suffixes | their suffixes | plain sequences]. Per layer
    (a)  every segment attends to itself, causally,                             out_a, lse_a
    (b)  the suffix rows of a group attend to all rows of its prefix,           out_b, lse_b
    lse = log(exp(lse_a) + exp(lse_b)),   out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b
which is the attention of every suffix behind its own copy of the prefix. Backward needs of the softmax only P = exp(S - lse) and
rowsum(grad * out), so each part's flash backward, handed the global out and lse, gives its exact share: the gradient of a suffix's
queries is the sum of two shares, that of a prefix's keys and values the sum over itself and its suffixes. No keys are copied.

CUDA (fp16, bf16): PyTorch's varlen flash attention, with fewer KV heads natively; `use_flash` picks its generation. CPU (fp16, bf16,
fp32, fp64): PyTorch's CPU flash attention, segments of one length in one call. `use_packed_attention` puts both the language model and
the vision tower of an unmodified transformers model on it. L rows, H query heads, K key-value heads (K divides H), D head dimension.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from actial_fast.ops.library import current_device
from actial_fast.ops.ranges import named
from actial_fast.packing.batch import Segments

# transformers hands a vision tower's cu_seqlens only to implementations with "flash" in their name; others loop over the windows
IMPLEMENTATION = "actial_flash"
_LENGTHS = WeakTensorKeyDictionary()  # of segments on the CPU, by their bounds


def prompt_once(q: Tensor, k: Tensor, v: Tensor, packed: Any, scale: float | None = None) -> Tensor:
    """Attention of a packed micro-batch's rows, differentiable once in q, k and v.

    q (L, H, D), k and v (L, K, D) of one dtype: fp16 or bf16 on CUDA with D a multiple of 8 up to 256; any floating dtype on the CPU.
    packed: a PackedBatch; of it are read `segments` (all L rows), `prefix_rows` P and `suffix_rows` S (rows [0, P) are the prefixes
    whose suffixes have rows, [P, P + S) these), `cross_q` and `cross_k` (a segment per such prefix: its suffixes' rows within S, its own
    within P; not read when S is 0). scale: of the scores, default D ** -0.5. Returns (L, H, D). No host sync; on the CPU the result
    does not depend on timing. ValueError for arguments that do not fit together, and for fp32 on CUDA, where flash kernels are 16-bit.
    """
    _check(q, k, v, packed.segments)
    if packed.suffix_rows:
        _check_cross(packed, len(q))
    cross = packed if packed.suffix_rows else None
    return _Attention.apply(q, k, v, packed.segments, cross, True, q.shape[-1] ** -0.5 if scale is None else scale)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, scale: float | None = None) -> Tensor:
    """Attention of every segment to itself, causal or full; else as `prompt_once`."""
    _check(q, k, v, segments)
    return _Attention.apply(q, k, v, segments, None, causal, q.shape[-1] ** -0.5 if scale is None else scale)


class Keeping:
    """Outputs and log-sum-exps of the attention in one stretch of code, which takes them over when it runs a second time.

    pack: what is kept in a tensor's place; unpack: the tensor again.
    """

    _current: ContextVar[tuple[Keeping, bool] | None] = ContextVar("keeping", default=None)

    def __init__(self, pack: Callable[[Tensor], Any] = Tensor.detach, unpack: Callable[[Any], Tensor] = Tensor.detach):
        self._pack, self._unpack = pack, unpack
        self._kept: list[tuple[Any, Any]] = []
        self._taken = 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """The first time."""
        token = Keeping._current.set((self, False))
        try:
            yield
        finally:
            Keeping._current.reset(token)

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """A further time, maybe in another thread."""
        token, self._taken = Keeping._current.set((self, True)), 0
        try:
            yield
        finally:
            Keeping._current.reset(token)

    @staticmethod
    def of(compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What `compute` gives, or gave the first time."""
        if (current := Keeping._current.get()) is None:
            return compute()
        keeping, again = current
        if again:
            keeping._taken += 1
            out, lse = keeping._kept[keeping._taken - 1]
            return keeping._unpack(out), keeping._unpack(lse)
        out, lse = compute()
        keeping._kept.append((keeping._pack(out), keeping._pack(lse)))
        return out, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, cross: Any, causal: bool, scale: float) -> Tensor:
        with named("attention"):
            out, lse = Keeping.of(lambda: _merged(q, k, v, segments, cross, causal, scale))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.cross, ctx.causal, ctx.scale = segments, cross, causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with named("attention backward"):
            return *_gradients(ctx, grad), None, None, None, None


def _merged(q: Tensor, k: Tensor, v: Tensor, segments: Segments, cross: Any, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _forward(q, k, v, segments, segments, causal, scale)
    if cross is not None:
        prefix, suffix = slice(cross.prefix_rows), slice(cross.prefix_rows, cross.prefix_rows + cross.suffix_rows)
        part = _forward(q[suffix], k[prefix], v[prefix], cross.cross_q, cross.cross_k, False, scale)
        with named("attention merge"):
            merge(out[suffix], lse[:, suffix], *part)
    return out, lse


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = ctx.saved_tensors
    grad, cross = grad.contiguous(), ctx.cross
    dq, dk, dv = _backward(grad, q, k, v, out, lse, ctx.segments, ctx.segments, ctx.causal, ctx.scale)
    if cross is not None:
        prefix, suffix = slice(cross.prefix_rows), slice(cross.prefix_rows, cross.prefix_rows + cross.suffix_rows)
        seen = (q[suffix], k[prefix], v[prefix], out[suffix], lse[:, suffix].contiguous())
        parts = _backward(grad[suffix], *seen, cross.cross_q, cross.cross_k, False, ctx.scale)
        for total, rows, part in zip((dq, dk, dv), (suffix, prefix, prefix), parts, strict=True):
            total[rows].add_(part)  # += would copy the sum onto itself
    return dq, dk, dv


def _forward(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Each segment of queries over that of keys: out (Lq, H, D) and lse (H, Lq), fp32 or fp64, over the keys."""
    if q.is_cuda:
        longest = max(queries.longest, 2)  # 1 would switch the kernel to its decoding layout
        result = torch.ops.aten._flash_attention_forward(
            q, k, v, queries.cu, keys.cu, longest, keys.longest, 0.0, causal, False, scale=scale
        )
        return result[0], result[1]
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[1::-1], dtype=torch.promote_types(q.dtype, torch.float32))
    share = q.shape[1] // k.shape[1]
    for n, rows, columns in _calls(queries.lengths, keys.lengths):
        batch = _batched(q[rows], n, share), _shared(k[columns], n, share), _shared(v[columns], n, share)
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*batch, 0.0, causal, scale=scale)
        out[rows] = _unbatched(part, n)
        lse[:, rows] = part_lse.unflatten(0, (n, -1)).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    return out, lse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    queries: Segments,
    keys: Segments,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The share of these keys in the gradients of q, k and v, where out and lse may be over more keys than these."""
    if q.is_cuda:
        no_state = lse.new_empty(0)  # of the random numbers, which only dropout reads
        sizes = queries.cu, keys.cu, queries.longest, keys.longest
        return torch.ops.aten._flash_attention_backward(grad, q, k, v, out, lse, *sizes, 0.0, causal, no_state, no_state, scale=scale)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    share = q.shape[1] // k.shape[1]
    for n, rows, columns in _calls(queries.lengths, keys.lengths):
        batch = _batched(grad[rows], n, share), _batched(q[rows], n, share), _shared(k[columns], n, share), _shared(v[columns], n, share)
        mine = lse[:, rows].unflatten(1, (n, -1)).unflatten(0, (-1, share)).permute(2, 0, 1, 3).flatten(0, 1)
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *batch, _batched(out[rows], n, share), mine, 0.0, causal, scale=scale
        )
        dq[rows] = _unbatched(results[0], n)
        for total, part in zip((dk, dv), results[1:], strict=True):
            total[columns] = _unbatched(part.sum(1, keepdim=True), n)
    return dq, dk, dv


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Folds part (S, H, D), part_lse (H, S) into out (S, H, D), lse (H, S), in place."""
    if out.is_cuda:
        from actial_fast.kernels.merge import merge_

        with current_device(out):
            return merge_(out, lse, part, part_lse)
    weight, part_weight = (torch.sigmoid(x).T[..., None] for x in (lse - part_lse, part_lse - lse))
    out.copy_(weight * out + part_weight * part)
    lse.copy_(torch.logaddexp(lse, part_lse))


@lru_cache(maxsize=8)  # a model's layers ask for the same two or three
def _calls(queries: tuple[int, ...], keys: tuple[int, ...]) -> list[tuple[int, slice | Tensor, slice | Tensor]]:
    """The calls of the CPU op that cover all segments: (number of segments, their query rows, their key rows). Segments of equal lengths
    share one call; their rows are a slice where they adjoin."""
    starts = [list(itertools.accumulate(lengths, initial=0)) for lengths in (queries, keys)]
    alike: dict[Any, list[int]] = {}
    for i, lengths in enumerate(zip(queries, keys, strict=True)):
        alike.setdefault(lengths, []).append(i)
    return [(len(found), _rows(found, starts[0]), _rows(found, starts[1])) for found in alike.values()]


def _rows(found: list[int], starts: list[int]) -> slice | Tensor:
    if found[-1] - found[0] == len(found) - 1:
        return slice(starts[found[0]], starts[found[-1] + 1])
    return torch.cat([torch.arange(starts[i], starts[i + 1]) for i in found])


def _batched(x: Tensor, n: int, share: int) -> Tensor:
    """(n * rows, H, D) -> (n * K, share, rows, D): `share` query heads beside the KV head that they share. A view for n = 1."""
    return x.unflatten(0, (n, -1)).unflatten(2, (-1, share)).permute(0, 2, 3, 1, 4).flatten(0, 1)


def _shared(x: Tensor, n: int, share: int) -> Tensor:
    """Keys or values (n * rows, K, D) as `_batched` has queries: heads of the same KV head see the same memory."""
    return x.unflatten(0, (n, -1)).transpose(1, 2).flatten(0, 1)[:, None].expand(-1, share, -1, -1)


def _unbatched(x: Tensor, n: int) -> Tensor:
    """(n * K, share, rows, D) -> (n * rows, K * share, D)."""
    return x.unflatten(0, (n, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _check(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> None:
    if q.ndim != 3 or k.shape != v.shape or k.shape[::2] != q.shape[::2] or q.shape[1] % k.shape[1]:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"{shapes}: expected (rows, heads, dim), k and v with rows and dim of q and a number of heads that divides q's")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: one floating dtype is needed")
    if q.is_cuda and q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"q {q.dtype}: flash attention on CUDA takes float16 or bfloat16; run under torch.autocast or load the model in bf16"
        )
    if q.is_cuda and (q.shape[2] % 8 or q.shape[2] > 256):
        raise ValueError(f"q {tuple(q.shape)}: flash attention on CUDA takes head dimensions that are multiples of 8, up to 256")
    if segments.lengths and (sum(segments.lengths) != len(q) or min(segments.lengths) < 1):
        raise ValueError(f"segments: they cover {sum(segments.lengths)} rows, q has {len(q)}; the shortest has {min(segments.lengths)}")


def _check_cross(packed: Any, rows: int) -> None:
    have = packed.prefix_rows, packed.suffix_rows, len(packed.cross_k.lengths)
    told = sum(packed.cross_k.lengths), sum(packed.cross_q.lengths), len(packed.cross_q.lengths)
    if have != told or packed.prefix_rows + packed.suffix_rows > rows:
        raise ValueError(
            f"packed: {rows} rows with {have[0]} of prefixes and {have[1]} of suffixes; cross_k covers {told[0]} in {have[2]} groups, "
            f"cross_q {told[1]} in {told[2]}"
        )


def remember(segments: Segments) -> None:
    """Have the segments' lengths known wherever their bounds turn up, so that a tower's layers on the CPU need not ask the bounds."""
    _LENGTHS[segments.cu] = segments.lengths


def use_flash(name: str) -> None:
    """Which flash kernels CUDA runs on, in this process and in all of PyTorch's attention: "FA2", compiled into PyTorch and the default;
    "FA3" (Hopper; package flash-attn-3) or "FA4" (Hopper, Blackwell; package flash-attn-4), through PyTorch's own adapters.

    ValueError for an unknown name or a package that is not installed.
    """
    from torch.nn import attention

    if name == "FA2":
        if attention.current_flash_attention_impl() is not None:
            attention.restore_flash_attention_impl()
        return
    try:
        attention.activate_flash_attention_impl(name)
    except ImportError as error:
        raise ValueError(f"flash attention {name}: {error}; install flash-attn-{name[-1]} or stay with FA2") from None


def use_packed_attention(model: nn.Module) -> Callable[[], None]:
    """Puts a transformers Qwen2-VL, Qwen2.5-VL or Qwen3-VL (or a wrapper that holds one) on this module's attention; no code is touched.

    A forward pass with `packed=batch` (batch of one row of L tokens, attention_mask=None, use_cache=False, position_ids (3, 1, L))
    then runs `prompt_once` in every decoder layer; without it, the layers do what `sdpa` does, with masks and caches, so that
    sampling works on the same model. The vision tower's windows and images run as one varlen call per layer either way; on CUDA it
    must so be in 16 bit or under autocast, and finds its segments without a sync only if handed transformers' precomputed arguments
    (image_cu_seqlens, image_max_seqlen and their like).

    The towers get configs of their own, with this attention's name: the caller's stay as they are, so that models can be made from them,
    and what is changed in them later no longer reaches the towers. Returns a function that puts back what was there.

    ValueError where the model has no exchangeable attention, or layers with a sliding window.
    """
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not models or not all(module._supports_attention_backend for module in models):
        raise ValueError(f"model: {type(model).__name__} has no attention that transformers lets others replace; load it with transformers")
    configs = {id(config): config for module in models for config in _tree(module.config)}.values()
    if any("sliding_attention" in (getattr(config, "layer_types", None) or ()) for config in configs):
        raise ValueError("model: packed attention has no sliding window; set use_sliding_window to false in its text config")
    before = [(module, module.config) for module in _dispatching(model)]
    marked: dict[int, PreTrainedConfig] = {}
    for module, config in before:
        if id(config) not in marked:
            marked[id(config)] = copy.copy(config)
            # the public setter takes "flash" in the name for a kernel of the Hub and looks for it, as does a model's constructor
            marked[id(config)]._attn_implementation_internal = IMPLEMENTATION
        module.config = marked[id(config)]

    def restore() -> None:
        for module, config in before:
            module.config = config

    return restore


def is_packed(model: nn.Module) -> bool:
    """Whether `use_packed_attention` serves the model."""
    return any(isinstance(module, PreTrainedModel) and module.config._attn_implementation == IMPLEMENTATION for module in model.modules())


def _dispatching(model: nn.Module) -> list[Any]:
    """The modules whose config chooses the attention: the innermost models of transformers and what is in them."""
    inner = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and not any(isinstance(x, PreTrainedModel) for x in module.modules() if x is not module)
    ]
    return [x for tower in inner for x in tower.modules() if isinstance(getattr(x, "config", None), PreTrainedConfig)]


def _tree(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        if (child := getattr(config, name, None)) is not None:
            yield from _tree(child)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    packed: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: query (B, H, L, D), key and value (B, K, L, D) -> (B, L, H, D), None.

    With cu_seq_lens_q (from a vision tower) segments attend to themselves, with `packed` it is `prompt_once`, B being 1 in both; with
    neither, transformers' own sdpa function. Under autocast the inputs are cast as F.scaled_dot_product_attention would cast them.
    """
    if packed is None and cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    if attention_mask is not None or dropout or len(query) != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            "packed attention: pass one row of tokens, attention_mask=None and use_cache=False, and no attention dropout; got "
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, dropout {dropout}, {'a' if attention_mask is not None else 'no'} mask"
        )
    if torch.is_autocast_enabled(query.device.type):
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(low), key.to(low), value.to(low)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if cu_seq_lens_q is None:
        return prompt_once(q, k, v, packed, scaling)[None], None
    lengths = () if query.is_cuda else _LENGTHS.get(cu_seq_lens_q) or tuple(cu_seq_lens_q.diff().tolist())
    longest = max_length_q if query.is_cuda else max(lengths)
    assert longest is not None, "transformers hands it over with cu_seq_lens_q"
    segments = Segments(cu_seq_lens_q, lengths, longest)
    causal = bool(module.is_causal if is_causal is None else is_causal)
    return varlen_attention(q, k, v, segments, causal=causal, scale=scaling)[None], None
