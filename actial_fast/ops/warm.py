"""Compiling the kernels of a head before the first step needs them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from actial_fast.ops import api, library
from actial_fast.ops.spec import GRPOSpec

# chunks that begin at multiples of 16, of 4 and of 1 rows: compiled kernels tell apart how rows of bool and of float32 are aligned
CHUNKS = (0, 52, 115, 178)
ROWS = CHUNKS[-1]
OPTIONAL = ("old_logp", "ref_logp", "sampler_logp", "policy_mask", "entropy_weight")


def warm_up(
    weight: Tensor,
    spec: GRPOSpec | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    weight_grad: Tensor | None = None,
    given: Collection[str] = ("old_logp",),
) -> None:
    """Compiles the kernels that training this head takes, so that no step of a run waits for a compiler. Nothing is changed.

    weight (V, H), bias (V,), softcap and weight_grad as in `linear_grpo_loss`, those of the run: what needs a gradient there must need one
    here. Runs `linear_logprob` without gradients, and with them `linear_grpo_loss` of `spec` or, without one, `linear_cross_entropy`, on a
    few rows of zeros. temperature: a number, or any tensor where the run has one for each row. given: which of the rows old_logp, ref_logp,
    sampler_logp, policy_mask and entropy_weight the run passes, in float32; ref_logp is added where the spec needs it, cu_seqlens as int32.
    Kernels depend on nothing else of a call, on no number of rows above all; what has been compiled once is found on disk by other
    processes. Takes about as long as the first step would have waited, and the memory of one call. On a CPU there is nothing to compile.
    ValueError for unknown names in `given`, and for what the ops themselves refuse.
    """
    if unknown := set(given) - set(OPTIONAL):
        raise ValueError(f"given: unknown {', '.join(sorted(unknown))}; expected names out of {', '.join(OPTIONAL)}")
    if not library.on_gpu(weight):
        return
    device = weight.device
    hidden = torch.zeros(ROWS, weight.shape[1], dtype=weight.dtype, device=device)
    targets = torch.zeros(ROWS, dtype=torch.int64, device=device)
    numbers, half = torch.zeros(ROWS, device=device), torch.full((ROWS,), 0.5, device=device)
    scaling: dict[str, Any] = {"bias": bias, "softcap": softcap}
    row_temperature = half if isinstance(temperature, Tensor) else temperature
    total = None if weight_grad is None else torch.zeros_like(weight_grad)
    with torch.no_grad():
        api.linear_logprob(hidden, weight, targets, **scaling, temperature=row_temperature)
    hidden.requires_grad_()
    learns = [x for x in (weight if weight_grad is None else None, bias) if x is not None and x.requires_grad]
    # several chunks, of less than two sequences each: the first sets the head's gradient and the others add to it
    (vocab, width), size = weight.shape, weight.element_size()
    row_bytes = (vocab + 64) * (size + 0.25) + width * (size + 16) + 128
    more: dict[str, Any] = scaling | {"weight_grad": total, "workspace_mb": 64 * row_bytes / 2**20}
    if spec is None:
        loss = api.linear_cross_entropy(hidden, weight, targets, half, **more)
    else:
        names = {*given, *(("ref_logp",) if spec.beta > 0 else ())}
        rows: dict[str, Any] = {name: numbers if name in names else None for name in OPTIONAL}
        if "policy_mask" in names:
            rows["policy_mask"] = numbers == 0
        if spec.needs_sequences("sampler_logp" in names):
            rows["cu_seqlens"] = torch.tensor(CHUNKS, dtype=torch.int32)
        old, reference = rows.pop("old_logp"), rows.pop("ref_logp")
        more |= {"temperature": row_temperature, "token_weight": half}
        loss = api.linear_grpo_loss(hidden, weight, targets, half, old, reference, spec, **rows, **more).loss
    torch.autograd.grad(loss, [hidden, *learns])
