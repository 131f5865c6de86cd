"""Runs every op once, forward and backward, at odd sizes and with a target out of range: what compute-sanitizer watches in `make gpu`.

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m bench.kernels.memcheck [--one]

Nothing is compared or timed here, only that no thread reads or writes where it must not; set PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that
tensors do not share an allocation. T rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from actial_fast import ops
from actial_fast.ops.spec import AdvantageSpec, GRPOSpec
from bench.harness.timing import CUDA, DEVICE

T, H, V = 37, 72, 1031
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if CUDA else (torch.float32,)


def main(argv: list[str] | None = None) -> None:
    """Every op in every dtype; the out-of-range target on a GPU only, where it is NaN and not an error."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.memcheck", description=__doc__.split("\n\n")[0])
    parser.add_argument("--one", action="store_true", help="in one dtype, the recipe's: racecheck takes minutes for all")
    dtypes = DTYPES[:1] if parser.parse_args(argv).one else DTYPES
    for dtype in dtypes:
        for frozen in (False, True):
            _head(dtype, frozen)
        _logits(dtype)
    _rows()
    if CUDA:
        torch.cuda.synchronize()
    print(f"every op ran at T={T}, H={H}, V={V} in {', '.join(str(x).removeprefix('torch.') for x in dtypes)} on {DEVICE}")


def _head(dtype: torch.dtype, frozen: bool) -> None:
    hidden, weight = _normal(T, H, dtype=dtype), _normal(V, H, dtype=dtype)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    leaves = (hidden,) if frozen else (hidden, weight)
    rows = (_targets(), *_normal(3, T))
    weights = torch.full((T,), 1 / T, device=DEVICE)
    for name in ("dapo", "gspo", "cispo"):
        spec = GRPOSpec.named(name, beta=0.04)
        cu_seqlens = torch.tensor([0, 1, 20, T]) if spec.needs_sequences() else None
        loss = ops.linear_grpo_loss(hidden, weight, *rows, spec, token_weight=weights, cu_seqlens=cu_seqlens).loss
        torch.autograd.grad(loss, leaves)
    logp, entropy = ops.linear_logprob(hidden, weight, rows[0])
    torch.autograd.grad(logp.sum() + entropy.sum(), leaves)
    torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, rows[0], weights), leaves)
    torch.autograd.grad(ops.linear_kl(hidden, weight, _normal(T, H + 8, dtype=dtype), _normal(V, H + 8, dtype=dtype)).sum(), leaves)


def _logits(dtype: torch.dtype) -> None:
    logits = _normal(T, V, dtype=dtype).requires_grad_()
    logp, entropy = ops.logprob_from_logits(logits, _targets())
    torch.autograd.grad(logp.sum() + entropy.sum(), logits)
    spec, weights = GRPOSpec.named("dapo"), torch.full((T,), 1 / T, device=DEVICE)
    loss = ops.grpo_loss_from_logits(logits, _targets(), *_normal(2, T), None, spec, token_weight=weights, inplace=True).loss
    torch.autograd.grad(loss, logits)


def _rows() -> None:
    rewards, groups = _normal(T), torch.arange(T, device=DEVICE) // 5
    ops.group_advantages(rewards, groups, AdvantageSpec())
    logp, ref_logp = _normal(2, T).requires_grad_()
    torch.autograd.grad(ops.token_kl(logp, ref_logp).sum(), (logp, ref_logp))


def _normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, device=DEVICE).to(dtype)


def _targets() -> Tensor:
    targets = torch.randint(V, (T,), device=DEVICE)
    if CUDA:
        targets[1], targets[2] = V, -1
    return targets


if __name__ == "__main__":
    main()
