"""A rank of a group that shares a head, and what it finds that differs from one process with all of it.

python -m tests.ops.vocab_ranks CASE,... PATH    with torchrun's environment; CASE: see CASES; PATH: cpu or kernels (interpreted)

Prints, as JSON, the largest difference of each result and gradient from one process's, over the largest value of it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from typing import Any
from unittest import mock

if __name__ == "__main__" and sys.argv[2] == "kernels":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.distributed as dist

from actial_fast import ops
from actial_fast.ops import GRPOSpec, VocabParallel, library
from actial_fast.ops.chunked_logits import compute_dtype

T, H, V = 24, 16, 203
PARTS = {1: [203], 2: [120, 83], 4: [40, 83, 1, 79]}  # of any size
CASES = {
    "plain": {},
    "rows": {"sharded": True},
    "all": {"bias": True, "softcap": 4.0, "row_temperature": True, "entropy_coef": 0.1, "beta": 0.05},
    "sequences": {"loss": "gspo"},
    "frozen": {"frozen": True, "buffer": False, "beta": 0.05},
    "buffer": {"buffer": True},
    "half": {"dtype": "float16"},
    "banned": {"banned": True, "entropy_coef": 0.1},
    "chosen": {"top_entropy": 0.3},
}


def inputs(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    bias = draw(V).to(dtype) if case.get("bias") or case.get("banned") else None
    if case.get("banned"):
        bias[:130] = -torch.inf  # more than a whole rank's part
    return {
        "hidden": draw(T, H).to(dtype),
        "weight": (3 * draw(V, H) / math.sqrt(H)).to(dtype),
        "bias": bias,
        "ref_hidden": draw(T, H).to(dtype),
        "ref_weight": (draw(V, H) / math.sqrt(H)).to(dtype),
        "targets": torch.randint(130 if case.get("banned") else 0, V, (T,), generator=g),
        "advantages": draw(T),
        "old_logp": -draw(T).abs() - 3,
        "ref_logp": -draw(T).abs() - 3,
        "token_weight": torch.rand(T, generator=g) / T,
        "temperature": 0.5 + torch.rand(T, generator=g) if case.get("row_temperature") else 0.8,
        "several": torch.randint(130 if case.get("banned") else 0, V, (T, 5), generator=g),
        "g_several": draw(T, 5),
        "g_logp": draw(T),
        "g_entropy": draw(T),
        "cu_seqlens": torch.tensor([0, 5, 6, 15, T]),
    }


def everything(case: dict[str, Any], given: dict[str, Any], parallel: VocabParallel | None) -> dict[str, torch.Tensor]:
    """Each op's results and gradients, of this rank's part where there is one."""
    part = slice(parallel.start, parallel.start + parallel.rows) if parallel else slice(None)
    mine = slice(None)
    if parallel and parallel.sharded_rows:
        mine = slice(dist.get_rank() * T // dist.get_world_size(), (dist.get_rank() + 1) * T // dist.get_world_size())

    def leaf(name: str, rows: slice, wanted: bool = True) -> torch.Tensor | None:
        return None if given[name] is None else given[name][rows].clone().requires_grad_(wanted)

    def head() -> tuple[torch.Tensor | None, ...]:
        return leaf("hidden", mine), leaf("weight", part, not case.get("frozen")), leaf("bias", part)

    def gradients(name: str, leaves: dict[str, torch.Tensor | None]) -> None:
        found.update({f"{name}/{key}": x.grad for key, x in leaves.items() if x is not None and x.grad is not None})

    found: dict[str, torch.Tensor] = {}
    scaling = {"softcap": case.get("softcap"), "vocab_parallel": parallel, "workspace_mb": 0.05}  # some chunks
    hidden, weight, bias = head()
    options = {"bias": bias, "temperature": given["temperature"], **scaling}
    logp, entropy = ops.linear_logprob(hidden, weight, given["targets"], **options)
    ((logp * given["g_logp"]).sum() + (entropy * given["g_entropy"]).sum()).backward()
    found |= {"logprob/logp": logp.detach(), "logprob/entropy": entropy.detach()}
    gradients("logprob", {"hidden": hidden, "weight": weight, "bias": bias})

    hidden, weight, bias = head()
    logp, entropy = ops.linear_logprob(hidden, weight, given["several"], **options | {"bias": bias})
    ((logp * given["g_several"]).sum() + (entropy * given["g_entropy"]).sum()).backward()
    found |= {"several/logp": logp.detach(), "several/entropy": entropy.detach()}
    gradients("several", {"hidden": hidden, "weight": weight, "bias": bias})

    spec = {name: case[name] for name in ("beta", "entropy_coef", "top_entropy") if name in case}
    spec = GRPOSpec.named(case.get("loss", "dapo"), **spec)
    hidden, weight, bias = head()
    buffer = torch.ones(weight.shape, dtype=compute_dtype(weight)) if case.get("buffer") else None
    rows = [given[name] for name in ("targets", "advantages", "old_logp", "ref_logp")]
    more = {"token_weight": given["token_weight"], "cu_seqlens": given["cu_seqlens"], "weight_grad": buffer}
    out = ops.linear_grpo_loss(hidden, weight, *rows, spec, **more, **{**options, "bias": bias})
    out.loss.backward()
    found |= {f"grpo/{name}": getattr(out, name).detach() for name in ("loss", "stats", "logp", "entropy")}
    gradients("grpo", {"hidden": hidden, "weight": weight, "bias": bias})
    if buffer is not None:
        found["grpo/buffer"] = buffer

    hidden, weight, bias = head()
    loss = ops.linear_cross_entropy(hidden, weight, given["targets"], given["token_weight"], bias=bias, **scaling)
    (3 * loss).backward()
    found["cross_entropy/loss"] = loss.detach()
    gradients("cross_entropy", {"hidden": hidden, "weight": weight, "bias": bias})

    pairs = {name: leaf(name, part if "weight" in name else mine) for name in ("hidden", "weight", "ref_hidden", "ref_weight")}
    kl = ops.linear_kl(*pairs.values(), temperature=given["temperature"], workspace_mb=0.05, vocab_parallel=parallel)
    (kl * given["g_logp"]).sum().backward()
    found["kl/kl"] = kl.detach()
    gradients("kl", pairs)
    return found


def differences(case: dict[str, Any], kernels: bool) -> dict[str, float]:
    name = case.get("dtype", "float32" if kernels else "float64")
    given = inputs(case, getattr(torch, name))
    if name == "float64":
        given = {key: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for key, x in given.items()}
    rank, ranks = dist.get_rank(), dist.get_world_size()
    start = sum(PARTS[ranks][:rank])
    parallel = VocabParallel.of(given["weight"][start : start + PARTS[ranks][rank]], sharded_rows=bool(case.get("sharded")))
    assert (parallel.start, parallel.vocab, parallel.largest) == (start, V, max(PARTS[ranks]))
    ours, whole = everything(case, given, parallel), everything(case, given, None)
    assert ours.keys() == whole.keys() and len(ours) > 10
    found = {}
    for key, value in ours.items():
        expected = whole[key]
        size = expected[expected.isfinite()].abs().max().item() if expected.numel() else 1.0
        if value.shape != expected.shape:  # a part of the vocabulary, or of the rows
            first = start if key.endswith(("weight", "bias", "buffer")) else rank * T // ranks
            expected = expected[first : first + len(value)]
        assert value.isfinite().all() and expected.isfinite().all(), key
        found[key] = (value.double() - expected.double()).abs().max().item() / max(size, 1e-12)
    return found


def main(names: str, path: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    with mock.patch.object(library, "on_gpu", lambda x: True) if path == "kernels" else contextlib.nullcontext():
        found = {case: differences(CASES[case], path == "kernels") for case in names.split(",")}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        print(json.dumps(everyone))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
