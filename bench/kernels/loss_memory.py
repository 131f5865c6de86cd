"""Peak memory of a GRPO loss and its gradients on a CPU: ours beside TRL's two ways to the log-probs.

    python -m bench.kernels.loss_memory [--json FILE] [--rows 4096 --vocabulary 152064 --hidden 64] [--sides ours chunked ...]

Every side gets the same hidden states (T, H), trainable head (V, H), targets, advantages, old and reference log-probs in float32 and makes
the loss (token mean, beta 0.04) and both gradients. Sides:

ours            linear_grpo_loss with its default workspace
ours, logprob   actial_fast.integrations.trl.LogProbFunction, the loss in torch on (T,) vectors
chunked         trl.kernels.ChunkedLogProbFunction as the trainer calls it, the loss likewise
materialised    logits (T, V) and trl.trainer.utils.selective_log_softmax_and_entropy, the loss likewise

Each side runs once in a process of its own. Its figure is the largest resident set (VmHWM, Linux) above what was held with the inputs in
place; the gradients are in it, 4 * (T + V) * H bytes. Losses and gradients must agree within 1e-4 before a figure is told.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actial_fast import ops
from actial_fast.ops import reference
from actial_fast.ops.spec import GRPOSpec
from bench.harness.timing import machine

SPEC = GRPOSpec.named("dapo", beta=0.04)
LENGTH = 256  # rows of a completion
AGREES = 1e-4


class Problem:
    """The inputs of one loss, the same for the same sizes: T rows, H hidden, V vocabulary."""

    def __init__(self, rows: int, hidden: int, vocabulary: int):
        g = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(rows, hidden, generator=g).requires_grad_()
        self.weight = torch.randn(vocabulary, hidden, generator=g).mul_(hidden**-0.5).requires_grad_()
        self.targets = torch.randint(0, vocabulary, (rows,), generator=g)
        self.cu_seqlens = torch.tensor([*range(0, rows, LENGTH), rows])
        self.advantages = torch.randn(len(self.cu_seqlens) - 1, generator=g).repeat_interleave(self.cu_seqlens.diff())
        with torch.no_grad():
            logp, _ = ops.linear_logprob(self.hidden, self.weight, self.targets, workspace_mb=100)
        self.old_logp = logp + 0.15 * torch.randn(rows, generator=g)
        self.ref_logp = logp + 0.3 * torch.randn(rows, generator=g)
        self.token_weight = torch.full((rows,), 1 / rows)

    def loss_of(self, logp: Tensor, entropy: Tensor) -> Tensor:
        rows = self.advantages, self.old_logp, self.ref_logp
        return reference.grpo_terms(logp, entropy.detach(), *rows, SPEC, token_weight=self.token_weight)[0]


def ours(p: Problem) -> Tensor:
    """The fused loss."""
    rows = p.targets, p.advantages, p.old_logp, p.ref_logp
    return ops.linear_grpo_loss(p.hidden, p.weight, *rows, SPEC, token_weight=p.token_weight).loss


def ours_logprob(p: Problem) -> Tensor:
    """Our function in the place of TRL's chunked one."""
    from actial_fast.integrations.trl import LogProbFunction

    return p.loss_of(*LogProbFunction.apply(p.hidden, p.weight, None, p.targets, 1.0, 0, None, 1.0, ("entropy",))[:2])


def chunked(p: Problem) -> Tensor:
    """TRL's chunked function with the trainer's chunks."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    settings = 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", "entropy")
    return p.loss_of(*_ChunkedLogProbFunction.apply(p.hidden, p.weight, None, p.targets, *settings)[:2])


def materialised(p: Problem) -> Tensor:
    """The logits in full, and TRL's functions on them."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return p.loss_of(*selective_log_softmax_and_entropy(p.hidden @ p.weight.T, p.targets, entropy_requires_grad=False))


SIDES: dict[str, Callable[[Problem], Tensor]] = {
    "ours": ours,
    "ours, logprob": ours_logprob,
    "chunked": chunked,
    "materialised": materialised,
}


def measure(name: str, rows: int, hidden: int, vocabulary: int, threads: int) -> dict[str, Any]:
    """One side in this process: peak and time, and what must agree with the other sides."""
    torch.set_num_threads(threads)
    SIDES[name](Problem(2, 4, 8)).backward()  # imports what it needs
    problem = Problem(rows, hidden, vocabulary)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    held, began = _status("VmRSS"), time.perf_counter()
    loss = SIDES[name](problem)
    loss.backward()
    seconds, peak = time.perf_counter() - began, _status("VmHWM") - held
    gradients = [problem.hidden.grad.numpy(), problem.weight.grad.numpy()]
    return {"loss": loss.item(), "gradients": gradients, "row": {"side": name, "peak_mib": round(peak, 1), "seconds": round(seconds, 2)}}


def compare(results: list[dict[str, Any]]) -> float:
    """How far the sides are from the first, relative, in loss and gradients; AssertionError where they do not compute the same thing."""
    first, worst = results[0], 0.0
    for other in results[1:]:
        pairs = [(first["loss"], other["loss"]), *zip(first["gradients"], other["gradients"], strict=True)]
        for a, b in pairs:
            a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
            assert b.norm() > 0, "a value of zero compares with anything"
            worst = max(worst, float((a - b).norm() / b.norm()))
    assert worst <= AGREES, f"the sides are apart by {worst:.1e}: not the same loss"
    return worst


def measured(sides: list[str], rows: int, hidden: int, vocabulary: int, threads: int) -> dict[str, Any]:
    """The result as it goes into the JSON."""
    about, results = machine(), []
    for name in sides:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            results.append(pool.submit(measure, name, rows, hidden, vocabulary, threads).result())
    return {
        "schema": 1,
        "machine": about,
        "settings": {"rows": rows, "hidden": hidden, "vocabulary": vocabulary, "threads": threads, "dtype": "float32"},
        "gradients_mib": round(4 * (rows + vocabulary) * hidden / 2**20, 1),
        "difference": compare(results),
        "sides": [result["row"] for result in results],
    }


def _status(field: str) -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.loss_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to this file")
    parser.add_argument("--rows", type=int, default=4096, help="T (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=64, help="H (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=152064, help="V (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=list(SIDES), help="default: all")
    args = parser.parse_args(argv)
    if min(args.rows, args.hidden, args.vocabulary, args.threads) < 1:
        parser.error("every size must be at least 1")
    result = measured(args.sides, args.rows, args.hidden, args.vocabulary, args.threads)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"T {args.rows:,}, H {args.hidden:,}, V {args.vocabulary:,}, float32; gradients {result['gradients_mib']} MiB of each peak")
    for row in result["sides"]:
        print(f"{row['side']:<14} peak {row['peak_mib']:9,.0f} MiB  {row['seconds']:8.1f} s")


if __name__ == "__main__":
    main()
