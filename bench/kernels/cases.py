"""The launches that the resource guard compiles: every op at the recipe's sizes (Qwen2.5-VL-7B), on meta tensors.

Nothing here says what a launcher compiles: that follows from its own choices for these arguments. A case that adds no compiled kernel is
not worth its time; a constexpr or a branch of a launcher that no case reaches is not guarded.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actial_fast.kernels import (
    advantages,
    decode,
    embedding,
    linear_grpo,
    linear_kl,
    linear_logprob,
    logits,
    merge,
    patchify,
    rounding,
    token_kl,
)
from actial_fast.ops.spec import AdvantageSpec, GRPOSpec, Kept

T, H, V = 8192, 3584, 152064  # rows that carry loss, hidden size, vocabulary
WORKSPACE = 700.0  # MiB, the ops' default where a card is small
CU_SEQLENS = torch.linspace(0, T, 62).to(torch.int32)  # 61 sequences of 134 or 135 rows: chunks start and end at odd rows
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One call of a launcher. label tells cases of an op apart; dtype is that of the activations: bf16, fp16 or fp32."""

    op: str
    label: str
    dtype: str
    call: Callable[[], object]


def meta(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def token_kls() -> Iterator[Case]:
    def call(dtype: torch.dtype, kind: str, reference_grad: bool, one_grad: bool) -> None:
        kl = token_kl.token_kl(meta(T, dtype=dtype, grad=True), meta(T, dtype=dtype, grad=reference_grad), kind)
        kl.sum().backward() if one_grad else kl.backward(meta(T))

    for name, dtype in DTYPES.items():
        yield Case("token_kl", "k3", name, lambda dtype=dtype: call(dtype, "k3", False, True))
    for kind in ("k1", "k2"):
        yield Case("token_kl", kind, "bf16", lambda kind=kind: call(torch.bfloat16, kind, True, False))


def group_advantages() -> Iterator[Case]:
    def call(rewards: Tensor, spec: AdvantageSpec, **more: Tensor) -> None:
        advantages.group_advantages(rewards, meta(T, dtype=torch.int64), spec, **more)

    specs = {
        "grpo": AdvantageSpec(),
        "leave one out": AdvantageSpec(baseline="leave_one_out", scale="none"),
        "batch std": AdvantageSpec(scale="batch_std"),
    }
    for label, spec in specs.items():
        yield Case("group_advantages", label, "fp32", lambda spec=spec: call(meta(T), spec))
    several = AdvantageSpec(combine="normalize_then_sum")
    for name in ("bf16", "fp32"):
        rewards = meta(T, 3, dtype=DTYPES[name])
        yield Case("group_advantages", "3 rewards", name, lambda rewards=rewards: call(rewards, several, weights=meta(3)))


def linear_kls() -> Iterator[Case]:
    def call(dtype: torch.dtype, reference: torch.dtype, both: bool) -> None:
        policy = meta(T, H, dtype=dtype, grad=True), meta(V, H, dtype=dtype, grad=True)
        linear_kl.linear_kl(*policy, meta(T, H, dtype=reference, grad=both), meta(V, H, dtype=reference)).backward(meta(T))

    for name, dtype in DTYPES.items():
        yield Case("linear_kl", "frozen reference", name, lambda dtype=dtype: call(dtype, dtype, False))
    yield Case("linear_kl", "both learn", "bf16", lambda: call(torch.bfloat16, torch.bfloat16, True))
    yield Case("linear_kl", "both learn, mixed", "fp32", lambda: call(torch.float32, torch.bfloat16, True))


def logprobs(dtype: torch.dtype, grad: bool, targets: tuple[int, ...] = (T,), **more: Any) -> None:
    hidden, weight = meta(T, H, dtype=dtype, grad=grad), meta(V, H, dtype=dtype, grad=grad)
    options = {"bias": None, "temperature": 1.0, "softcap": None, "workspace_mb": WORKSPACE} | more
    outputs = linear_logprob.linear_logprob(hidden, weight, meta(*targets, dtype=torch.int64), **options)
    if grad:
        torch.autograd.backward(outputs, (meta(*targets), meta(T)))


def linear_logprobs() -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        yield Case("linear_logprob", "no grad", name, lambda dtype=dtype: logprobs(dtype, False))
        yield Case("linear_logprob", "trainable", name, lambda dtype=dtype: logprobs(dtype, True))


def selected_logprobs() -> Iterator[Case]:
    """After all others: what they launch too is told under their names."""
    for name, dtype in DTYPES.items():
        yield Case("linear_logprob", "64 targets", name, lambda dtype=dtype: logprobs(dtype, True, (T, 64)))
        yield Case("linear_logprob", "top_p", name, lambda dtype=dtype: logprobs(dtype, True, kept=Kept(top_p=0.95)))
    everything = {"bias": meta(V, dtype=torch.bfloat16, grad=True), "temperature": meta(T), "softcap": 30.0}
    yield Case("linear_logprob", "64 targets, all", "bf16", lambda: logprobs(torch.bfloat16, True, (T, 64), **everything))
    yield Case("linear_logprob", "top_k", "bf16", lambda: logprobs(torch.bfloat16, False, kept=Kept(top_k=50)))
    yield Case("linear_logprob", "top_k, all", "bf16", lambda: logprobs(torch.bfloat16, True, kept=Kept(50, 0.95, 0.01), **everything))


SPECS: dict[str, GRPOSpec] = {name: GRPOSpec.named(name) for name in ("grpo", "dapo", "gspo", "cispo", "sapo", "vespo")} | {
    "all options": GRPOSpec(clip_delta=3.0, dual_clip=3.0, kl="k2", kl_bias_correction=True, entropy_coef=0.01, importance="token_mask"),
    "all, sequences": GRPOSpec(ratio="sequence", kl="k1", kl_bias_correction=True, importance="sequence_truncate", top_entropy=0.2),
}


def objective_arguments(label: str) -> dict[str, Any]:
    """What the GRPO losses take beside the log-probs; all vectors are given where the label says so."""
    spec, everything = SPECS[label], label.startswith("all")
    return {
        "advantages": meta(T),
        "old_logp": None if label == "dapo" else meta(T),
        "ref_logp": meta(T) if spec.beta > 0 else None,
        "spec": spec,
        "token_weight": meta(T),
        "sampler_logp": meta(T) if everything else None,
        "policy_mask": meta(T, dtype=torch.bool) if everything else None,
        "entropy_weight": meta(T) if spec.entropy_coef else None,
        "cu_seqlens": CU_SEQLENS if spec.needs_sequences(everything) else None,
    }


def linear_grpo_losses() -> Iterator[Case]:
    def call(label: str, dtype: torch.dtype, frozen: bool = False, **options: Any) -> None:
        hidden, weight = meta(T, H, dtype=dtype, grad=True), meta(V, H, dtype=dtype, grad=not frozen)
        options = {"bias": None, "temperature": 0.9, "softcap": None, "weight_grad": None} | options
        arguments = objective_arguments(label) | options | {"skip_zero_rows": True, "workspace_mb": WORKSPACE}
        linear_grpo.linear_grpo_loss(hidden, weight, meta(T, dtype=torch.int64), **arguments)[0].backward()

    for name, dtype in DTYPES.items():
        yield Case("linear_grpo_loss", "grpo", name, lambda dtype=dtype: call("grpo", dtype))
    yield Case("linear_grpo_loss", "grpo, frozen head", "bf16", lambda: call("grpo", torch.bfloat16, frozen=True))
    yield Case("linear_grpo_loss", "grpo, weight_grad", "bf16", lambda: call("grpo", torch.bfloat16, weight_grad=meta(V, H)))
    for label in (name for name in SPECS if name not in ("grpo", "all options")):
        yield Case("linear_grpo_loss", label, "bf16", lambda label=label: call(label, torch.bfloat16))
    options = {"bias": meta(V, dtype=torch.bfloat16, grad=True), "temperature": meta(T), "softcap": 30.0}
    yield Case("linear_grpo_loss", "all options", "bf16", lambda: call("all options", torch.bfloat16, **options))


def linear_cross_entropies() -> Iterator[Case]:
    def call(dtype: torch.dtype, head: str = "triton") -> None:
        hidden, weight = meta(T, H, dtype=dtype, grad=True), meta(V, H, dtype=dtype, grad=True)
        options = {"bias": None, "softcap": None, "weight_grad": None, "workspace_mb": WORKSPACE, "head": head}
        linear_grpo.linear_cross_entropy(hidden, weight, meta(T, dtype=torch.int64), meta(T), **options).backward()

    def around_quack() -> None:
        """What is ours beside quack's products, which Triton does not compile (bench/evidence/quack.py does)."""
        gemms = types.ModuleType("actial_fast.kernels.quack_gemms")
        gemms.__dict__.update(dict.fromkeys(("logits", "dhidden", "dweight"), lambda *_, **__: None), PART=128)
        before = sys.modules.get(gemms.__name__)
        sys.modules[gemms.__name__] = gemms
        try:
            call(torch.bfloat16, "quack")
        finally:
            del sys.modules[gemms.__name__]
            if before is not None:
                sys.modules[gemms.__name__] = before

    yield Case("linear_cross_entropy", "trainable", "bf16", lambda: call(torch.bfloat16))
    yield Case("linear_cross_entropy", "by quack", "bf16", around_quack)


def from_logits() -> Iterator[Case]:
    def logprob(dtype: torch.dtype, temperature: float | Tensor) -> None:
        outputs = logits.logprob_from_logits(meta(T, V, dtype=dtype, grad=True), meta(T, dtype=torch.int64), temperature=temperature)
        torch.autograd.backward(outputs, (meta(T), meta(T)))

    def loss(label: str, dtype: torch.dtype) -> None:
        arguments = objective_arguments(label) | {"temperature": 0.9}
        logits.grpo_loss_from_logits(meta(T, V, dtype=dtype, grad=True), meta(T, dtype=torch.int64), **arguments)[0].backward()

    for name, dtype in DTYPES.items():
        yield Case("logprob_from_logits", "", name, lambda dtype=dtype: logprob(dtype, 1.0))
        yield Case("grpo_loss_from_logits", "grpo", name, lambda dtype=dtype: loss("grpo", dtype))
    yield Case("logprob_from_logits", "row temperature", "bf16", lambda: logprob(torch.bfloat16, meta(T)))
    for label in ("all options", "all, sequences"):
        yield Case("grpo_loss_from_logits", label, "bf16", lambda label=label: loss(label, torch.bfloat16))


def merges() -> Iterator[Case]:
    heads, width = 28, 128
    for name, dtype in DTYPES.items():
        out, lse = meta(T, heads, width, dtype=dtype), meta(heads, T)
        yield Case("merge_", "", name, lambda out=out, lse=lse: merge.merge_(out, lse, out, lse))


def decodes() -> Iterator[Case]:
    def call(dtype: torch.dtype, items: int, members: int) -> None:
        rows, heads, kv_heads, width, block = 1024, 28, 4, 128, 16
        held = meta(50_000, block, kv_heads, width, dtype=dtype)
        table = meta(items, 64, dtype=torch.int32)
        reads = meta(items, members, dtype=torch.int32), table, meta(items, dtype=torch.int32)
        decode.decode(meta(rows, heads, width, dtype=dtype), held, held, *reads, width**-0.5)

    for name, dtype in DTYPES.items():
        yield Case("decode", "replies' own", name, lambda dtype=dtype: call(dtype, 1024, 1))
        yield Case("decode", "prompts", name, lambda dtype=dtype: call(dtype, 64, 16))


def patchifies() -> Iterator[Case]:
    def call(dtype: torch.dtype, patch: int) -> None:
        images, tokens = 16, 16 * 320
        pixels, table = meta(tokens * 3 * (2 * patch) ** 2, dtype=torch.uint8), meta(3, images, dtype=torch.int64)
        sizes = {"patch": patch, "merge": 2, "frames": 2, "scale": (0.1, 0.2, 0.3), "shift": (0.1, 0.2, 0.3)}
        patchify.patchify(pixels, table, tokens, **sizes, dtype=dtype)

    for name, dtype in DTYPES.items():
        yield Case("patchify", "patch 14", name, lambda dtype=dtype: call(dtype, 14))
    yield Case("patchify", "patch 16", "bf16", lambda: call(torch.bfloat16, 16))


def embeds() -> Iterator[Case]:
    def call(dtype: torch.dtype, features: torch.dtype) -> None:
        index, image = meta(T, dtype=torch.int64), meta(T // 2, dtype=torch.int64)
        inputs = index, meta(V, H, dtype=dtype), meta(T // 2, H, dtype=features, grad=True), image, image
        embedding.embed(*inputs).backward(meta(T, H, dtype=dtype))

    for name, dtype in DTYPES.items():
        yield Case("embed", "", name, lambda dtype=dtype: call(dtype, dtype))
    yield Case("embed", "features in bf16", "fp32", lambda: call(torch.float32, torch.bfloat16))


def rounds() -> Iterator[Case]:
    def call() -> None:
        rounding.round_stochastic_(meta(T * H, dtype=torch.bfloat16), meta(T * H), 1, meta(), 0)

    yield Case("round_stochastic", "", "bf16", call)


CASES: list[Case] = [
    *linear_logprobs(),
    *linear_grpo_losses(),
    *linear_cross_entropies(),
    *from_logits(),
    *linear_kls(),
    *token_kls(),
    *group_advantages(),
    *merges(),
    *decodes(),
    *patchifies(),
    *embeds(),
    *rounds(),
    *selected_logprobs(),
]
