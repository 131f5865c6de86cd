"""Byte ledger: the 32-byte sectors that a kernel touches, counted in Triton's interpreter, over the least that its task takes.

Sectors are the unit of DRAM and L2 traffic. `touched` counts each sector once, as a cache that keeps all would; `asked` counts every
access. A kernel that reads a row twice on purpose, the second time from L2, asks for more than it touches. Minima are those of the kernels'
docstrings, without what is smaller by a whole dimension (a number a row). The interpreter must be on before the kernels are imported.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from actial_fast.kernels import embedding, linear_grpo, linear_kl, logits, merge, patchify, scale, token_kl
from actial_fast.ops.spec import GRPOSpec

SECTOR = 32  # bytes


@dataclass
class Traffic:
    """What one kernel has asked for, all launches together; sectors by their number."""

    asked: int = 0
    loaded: list[np.ndarray] = field(default_factory=list)
    stored: list[np.ndarray] = field(default_factory=list)

    @property
    def touched(self) -> int:
        """Bytes of the sectors loaded and of those stored."""
        return sum(SECTOR * len(np.unique(np.concatenate(some))) for some in (self.loaded, self.stored) if some)


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, Traffic]]:
    """Inside, every interpreted load and store is counted under its kernel's name."""
    traffic: dict[str, Traffic] = defaultdict(Traffic)
    running: list[str] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def note(pointers: Any, mask: Any, stored: bool) -> None:
        size = max(1, pointers.dtype.scalar.element_ty.primitive_bitwidth // 8)
        addresses, given = np.broadcast_arrays(np.asarray(pointers.data), np.asarray(mask.data).astype(bool))
        addresses = addresses[given]
        one = traffic[running[-1]]
        one.asked += addresses.size * size
        sectors = np.unique(np.concatenate([addresses // SECTOR, (addresses + size - 1) // SECTOR]))
        (one.stored if stored else one.loaded).append(sectors)

    def noted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        note(pointers, mask, False)
        return load(self, pointers, mask, *rest, **more)

    def noted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        note(pointers, mask, True)
        return store(self, pointers, value, mask, *rest, **more)

    def noted_call(self: Any, *given: Any, **more: Any) -> Any:
        running.append(self.fn.__name__)
        try:
            return call(self, *given, **more)
        finally:
            running.pop()

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = noted_load, noted_store, noted_call
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = load, store, call


@dataclass(frozen=True)
class Entry:
    """One op at a size that the interpreter manages, and the least bytes of its streaming kernels."""

    name: str
    call: Callable[[], object]
    least: dict[str, int]


T, H, V = 32, 512, 4096


def _logprobs() -> Entry:
    z = torch.randn(T, V).half().requires_grad_()

    def call() -> None:
        logp, entropy = logits.logprob_from_logits(z, torch.randint(0, V, (T,)))
        (logp.sum() + entropy.sum()).backward()

    return Entry("logprob_from_logits, fp16", call, {"logprob_kernel": 2 * T * V, "gradient_kernel": 4 * T * V})


def _loss_from_logits() -> Entry:
    z = torch.randn(T, V, requires_grad=True)
    rows = {"token_weight": torch.full((T,), 1 / T)}

    def call() -> None:
        given = torch.randint(0, V, (T,)), torch.randn(T), torch.randn(T) - 8, None, GRPOSpec(beta=0.0)
        logits.grpo_loss_from_logits(z, *given, **rows)[0].backward()

    return Entry("grpo_loss_from_logits, fp32", call, {"grpo_logits_kernel": 8 * T * V})


def _token_kl() -> Entry:
    n = 1 << 15
    a, b = torch.randn(n).half().requires_grad_(), torch.randn(n).half()
    least = {"token_kl_forward_kernel": 8 * n, "token_kl_backward_kernel": 6 * n}
    return Entry("token_kl, fp16", lambda: token_kl.token_kl(a, b).sum().backward(), least)


def _linear_kl() -> Entry:
    hidden, weight = torch.randn(T, 64), torch.randn(V, 64) / 8
    reference = torch.randn(T, 64), torch.randn(V, 64) / 8

    def call() -> None:
        kl, stats = linear_kl.forward(hidden, weight, *reference, torch.ones(T), 700.0)
        grads = (True, True, False, False)
        linear_kl.backward(hidden, weight, *reference, torch.ones(T), kl, stats, torch.ones(T), grads, 700.0)

    return Entry("linear_kl, fp32, frozen reference", call, {"kl_forward_kernel": 8 * T * V, "kl_backward_kernel": 12 * T * V})


def _linear_grpo() -> Entry:
    rows = 128  # half of them fill a block of the inner dimension
    hidden, weight = torch.randn(rows, H).half().requires_grad_(), (torch.randn(V, H) / 16).half().requires_grad_()
    advantages, active, part = torch.randn(rows), rows // 2, 128
    advantages[::2] = 0

    def call() -> None:
        names = ("cu_seqlens", "sampler_logp", "policy_mask", "entropy_weight", "bias", "softcap", "weight_grad")
        options: dict[str, Any] = dict.fromkeys(names) | {"temperature": 1.0, "skip_zero_rows": True, "workspace_mb": 700.0}
        given = (torch.randint(0, V, (rows,)), advantages, None, None, GRPOSpec(beta=0.0))
        loss = linear_grpo.linear_grpo_loss(hidden, weight, *given, token_weight=torch.full((rows,), 1 / rows), **options)[0]
        assert isinstance(loss, Tensor)
        loss.backward()

    least = {
        "dlogits_kernel": 4 * active * V + 4 * rows * V // part,
        "gather_kernel": 4 * active * H,
        "combine_kernel": (4 * 4 + 4) * active * H,  # float16 keeps its hidden gradient in float32
    }
    return Entry("linear_grpo_loss, fp16, half of the rows without a gradient", call, least)


def _merge() -> Entry:
    S, heads, width = 64, 4, 128
    out, part = torch.randn(S, heads, width).half(), torch.randn(S, heads, width).half()
    lse, part_lse = torch.randn(heads, S), torch.randn(heads, S)
    return Entry("merge_, fp16", lambda: merge.merge_(out, lse, part, part_lse), {"merge_kernel": S * heads * (6 * width + 12)})


def _patchify() -> Entry:
    pixels = 2 * 56 * 84
    images = torch.randint(0, 255, (3 * pixels,), dtype=torch.uint8)
    table = torch.tensor([[0, 6], [0, 56 * 84 * 3], [3, 3]])
    sizes: dict[str, Any] = {"patch": 14, "merge": 2, "frames": 2, "scale": (0.1, 0.1, 0.1), "shift": (0.0, 0.0, 0.0)}
    least = {"patchify_kernel": pixels * (3 + 3 * 2 * 2)}
    return Entry("patchify, fp16", lambda: patchify.patchify(images, table, 12, **sizes, dtype=torch.float16), least)


def _embed() -> Entry:
    images, slots = 64, torch.arange(0, 128, 2)  # every second of the first 128 rows is an image's
    ids, table = torch.randperm(500)[:256], torch.randn(500, H).half()
    features = torch.randn(images, H).half().requires_grad_()

    def call() -> None:
        embedding.embed(ids, table, features, slots, torch.arange(images)).backward(torch.randn(256, H).half())

    return Entry("embed, fp16", call, {"embed_kernel": 2 * 2 * H * 256, "features_grad_kernel": 2 * 2 * H * images})


def _scale() -> Entry:
    x = torch.randn(1 << 16)
    return Entry("scale_, fp32", lambda: scale.scale_(x, torch.tensor(2.0)), {"scale_kernel": 8 * x.numel()})


ENTRIES = (_logprobs, _loss_from_logits, _token_kl, _linear_kl, _linear_grpo, _merge, _patchify, _embed, _scale)


def measure(seed: int = 0) -> list[dict[str, Any]]:
    """A record for each streaming kernel: least, touched and asked bytes, and their ratios."""
    found = []
    for make in ENTRIES:
        torch.manual_seed(seed)
        entry = make()
        with recorded() as traffic, np.errstate(all="ignore"):
            entry.call()
        for kernel, least in entry.least.items():
            one = traffic[kernel]
            ratios = {"touched_over_least": round(one.touched / least, 4), "asked_over_least": round(one.asked / least, 4)}
            found.append({"op": entry.name, "kernel": kernel, "least": least, "touched": one.touched, "asked": one.asked} | ratios)
    return found
