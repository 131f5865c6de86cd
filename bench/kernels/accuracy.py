"""How far log-probs, entropies and gradients are from float64: ours, eager torch, TRL and Liger on logits of several sizes.

    python -m bench.kernels.accuracy [--json FILE] [--markdown FILE]

Every implementation gets the same inputs, rounded to the dtype first, and the same loss: the mean negative log-prob, which is also the
on-policy GRPO loss with advantages of 1. Errors of log-prob and entropy are in nats; those of d hidden and d weight are in units of the
exact gradient's largest entry (max) and of its root mean square (rms). The seed fixes the numbers on a given machine. What cannot run here
is listed with the reason. Exits with 1 when ours is the worst of a column by more than a tenth (less is the luck of rounding) or more than
twice as far off as torch in the same dtype.

T rows, H hidden, V vocabulary, S sequences of equal length.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":  # before Triton is imported: the kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from actial_fast import ops  # noqa: E402
from actial_fast.ops import reference  # noqa: E402
from actial_fast.ops.spec import GRPOSpec  # noqa: E402

QUANTITIES = ("logp", "entropy", "dhidden", "dweight")
TITLES = {"logp": "log-prob", "entropy": "entropy", "dhidden": "d hidden", "dweight": "d weight"}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SIZES = {"cpu": (96, 64, 1031, 4), "cuda": (2048, 3584, 152064, 8)}  # T, H, V, S
SPEC = GRPOSpec(aggregation="token", beta=0.0)
OFFSET = (128.0, -78.0)  # exact in bfloat16: adds -9984 to every logit
DOMINANT = (8.0, 5.0)  # adds 40 to one token's logit


@dataclass(frozen=True)
class Inputs:
    """hidden (T, H), weight (V, H) of the dtype, targets (T,), and the exact answers in float64."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    sequences: int
    exact: dict[str, Tensor]
    largest_logit: float


Answers = dict[str, Tensor | None]


@contextlib.contextmanager
def as_if_on_a_gpu() -> Iterator[None]:
    """Inside, tensors say that they are on CUDA, so that the ops take the way they take there: Triton's interpreter runs the kernels.

    int32 tensors stay on the CPU: that is where the ops want cu_seqlens.
    """
    torch.Tensor.is_cuda = property(lambda x: x.dtype != torch.int32)
    try:
        yield
    finally:
        del torch.Tensor.is_cuda  # what remains is the base class's own


# ---- the inputs


def _normal(T: int, H: int, V: int, g: torch.Generator, scale: float) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(T, H, generator=g, dtype=torch.float64)
    return hidden, torch.randn(V, H, generator=g, dtype=torch.float64) * scale / math.sqrt(H)


def _negative(*sizes: Any) -> tuple[Tensor, Tensor]:
    hidden, weight = _normal(*sizes, scale=4)
    hidden[:, 0], weight[:, 0] = OFFSET
    return hidden, weight


def _dominant(*sizes: Any) -> tuple[Tensor, Tensor]:
    hidden, weight = _normal(*sizes, scale=4)
    hidden[:, 0], weight[:, 0] = DOMINANT[0], 0.0
    weight[7, 0] = DOMINANT[1]
    return hidden, weight


CASES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "scale 1": lambda *sizes: _normal(*sizes, scale=1),
    "scale 4": lambda *sizes: _normal(*sizes, scale=4),
    "scale 16": lambda *sizes: _normal(*sizes, scale=16),
    "all near -10^4": _negative,
    "one dominant token": _dominant,
}


def make(case: str, dtype: torch.dtype, sizes: tuple[int, int, int, int], seed: int) -> Inputs:
    """The case's inputs; a third of the targets is drawn from the policy, the others uniformly."""
    T, H, V, S = sizes
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (x.to(DEVICE, dtype) for x in CASES[case](T, H, V, g))
    targets = torch.randint(0, V, (T,), generator=g).to(DEVICE)
    exact_hidden, exact_weight = (x.double().requires_grad_() for x in (hidden, weight))
    logits = exact_hidden @ exact_weight.T
    noise = torch.rand(T, generator=g, dtype=torch.float64).to(DEVICE)
    drawn = (logits.detach().softmax(-1).cumsum(-1) < noise[:, None]).sum(-1).clamp(max=V - 1)
    targets[::3] = drawn[::3]
    logp, entropy = reference.logprob_from_logits(logits, targets)
    dhidden, dweight = torch.autograd.grad(-logp.mean(), (exact_hidden, exact_weight))
    exact = {"logp": logp.detach(), "entropy": entropy.detach(), "dhidden": dhidden, "dweight": dweight}
    return Inputs(hidden, weight, targets, S, exact, float(logits.detach().abs().max()))


# ---- the implementations: each answers what it can of QUANTITIES


def _through_logprob(logprob: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[[Inputs], Answers]:
    def run(x: Inputs) -> Answers:
        hidden, weight = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
        logp, entropy = logprob(hidden, weight, x.targets)
        dhidden, dweight = torch.autograd.grad(-logp.mean(), (hidden, weight))
        return {"logp": logp.detach(), "entropy": entropy.detach(), "dhidden": dhidden, "dweight": dweight}

    return run


def _through_grpo(grpo: Callable[..., Any]) -> Callable[[Inputs], Answers]:
    def run(x: Inputs) -> Answers:
        hidden, weight = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
        ones = torch.ones(len(x.targets), device=DEVICE)
        out = grpo(hidden, weight, x.targets, ones, None, None, SPEC, token_weight=ones / len(ones))
        dhidden, dweight = torch.autograd.grad(out.loss, (hidden, weight))
        return {"logp": out.logp, "entropy": out.entropy, "dhidden": dhidden, "dweight": dweight}

    return run


def _trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8192, None, 1.0, ("entropy",))[:2]


def _liger_grpo(x: Inputs) -> Answers:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, weight = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
    loss_of = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo")
    shape = (x.sequences, -1)
    mask = torch.ones_like(x.targets).view(shape)
    ones = torch.ones(x.sequences, device=DEVICE)
    loss, _ = loss_of(hidden.view(*shape, hidden.shape[1]), weight, x.targets.view(shape), mask, ones)
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    return {"logp": None, "entropy": None, "dhidden": dhidden, "dweight": dweight}


def _liger_scaled(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets, return_entropy=True)
    return -nll, entropy


def _liger_cross_entropy(x: Inputs) -> Answers:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    hidden, weight = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
    dhidden, dweight = torch.autograd.grad(LigerFusedLinearCrossEntropyLoss()(weight, hidden, x.targets), (hidden, weight))
    return {"logp": None, "entropy": None, "dhidden": dhidden, "dweight": dweight}


@dataclass(frozen=True)
class Implementation:
    """name as in the table; ours or a peer's; package: what must be installed; where and in which dtypes it runs."""

    name: str
    run: Callable[[Inputs], Answers]
    ours: bool = False
    package: str = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = tuple(DTYPES)

    def missing(self, dtype: str) -> str | None:
        """Why it cannot run here, or None."""
        if importlib.util.find_spec(self.package) is None:
            return "not installed"
        if DEVICE not in self.devices:
            return "needs a GPU" if DEVICE == "cpu" else "runs on CPU only"
        return None if dtype in self.dtypes else "needs a GPU in this dtype"


def _on_kernels(run: Callable[[Inputs], Answers]) -> Callable[[Inputs], Answers]:
    def run_on_kernels(x: Inputs) -> Answers:
        with as_if_on_a_gpu() if DEVICE == "cpu" else contextlib.nullcontext():
            return run(x)

    return run_on_kernels


TORCH = "torch eager"
_LOGPROB, _GRPO = _through_logprob(ops.linear_logprob), _through_grpo(ops.linear_grpo_loss)
TRITON, TRITON_DTYPES = ("Triton", tuple(DTYPES)) if DEVICE == "cuda" else ("Triton interpreted", ("float32",))  # its bf16 dots are wrong
IMPLEMENTATIONS = (
    Implementation("linear_logprob, CPU", _LOGPROB, ours=True, devices=("cpu",)),
    Implementation("linear_grpo_loss, CPU", _GRPO, ours=True, devices=("cpu",)),
    Implementation(f"linear_logprob, {TRITON}", _on_kernels(_LOGPROB), ours=True, dtypes=TRITON_DTYPES),
    Implementation(f"linear_grpo_loss, {TRITON}", _on_kernels(_GRPO), ours=True, dtypes=TRITON_DTYPES),
    Implementation(TORCH, _through_logprob(reference.linear_logprob)),
    Implementation("TRL chunked log-prob", _through_logprob(_trl), package="trl"),
    Implementation("Liger fused linear GRPO", _liger_grpo, package="liger_kernel"),
    Implementation("Liger fused linear scaled cross-entropy", _through_logprob(_liger_scaled), package="liger_kernel"),
    Implementation("Liger fused linear cross-entropy", _liger_cross_entropy, package="liger_kernel", devices=("cuda",)),
)


# ---- errors


def errors(answers: Answers, exact: dict[str, Tensor]) -> dict[str, float | None]:
    """{quantity_max, quantity_rms}: absolute for log-prob and entropy, relative for gradients; None for what is not answered."""
    out: dict[str, float | None] = {}
    for name in QUANTITIES:
        got = answers[name]
        if got is None:
            out |= {f"{name}_max": None, f"{name}_rms": None}
            continue
        gap, want = got.double() - exact[name], exact[name]
        relative = name.startswith("d")
        unit_max, unit_rms = (float(want.abs().max()), float(want.square().mean().sqrt())) if relative else (1.0, 1.0)
        largest, rms = float(gap.abs().max()) / unit_max, float(gap.square().mean().sqrt()) / unit_rms
        out |= {f"{name}_max": largest if math.isfinite(largest) else math.inf, f"{name}_rms": rms if math.isfinite(rms) else math.inf}
    return out


def floor(quantity: str, dtype: str, largest_logit: float) -> float:
    """The error that rounding alone leaves: of float32 logits for log-prob and entropy, of the gradient's own dtype for gradients."""
    if quantity.startswith("d"):
        return torch.finfo(DTYPES[dtype]).eps
    return torch.finfo(torch.float32).eps * max(largest_logit, 1.0)


def measure(
    sizes: tuple[int, int, int, int],
    seed: int = 0,
    cases: Iterable[str] = tuple(CASES),
    after: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """One row per dtype, case and implementation: its errors, or the reason in `missing`. `after` gets all rows so far with every case."""
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        for case in cases:
            inputs = make(case, DTYPES[dtype], sizes, seed)
            for peer in IMPLEMENTATIONS:
                row = {"dtype": dtype, "case": case, "implementation": peer.name, "ours": peer.ours, "missing": peer.missing(dtype)}
                if row["missing"] is None:
                    row |= errors(peer.run(inputs), inputs.exact) | {"largest_logit": round(inputs.largest_logit, 3)}
                rows.append(row)
            after(rows)
    return rows


def findings(rows: list[dict[str, Any]]) -> list[str]:
    """Where ours is the worst of all that ran, or further off than twice eager torch in the same dtype plus the floor."""
    out = []
    ran = [row for row in rows if row["missing"] is None]
    for row in (row for row in ran if row["ours"]):
        rivals = [other for other in ran if not other["ours"] and (other["dtype"], other["case"]) == (row["dtype"], row["case"])]
        (torch_row,) = [other for other in rivals if other["implementation"] == TORCH]
        for column in (f"{quantity}_{kind}" for quantity in QUANTITIES for kind in ("max", "rms")):
            least = floor(column, row["dtype"], row["largest_logit"])
            worst = max(other[column] for other in rivals if other[column] is not None)
            where = f"{row['dtype']}, {row['case']}, {row['implementation']}, {column}: {row[column]:.2e}"
            if not row[column] <= 2 * torch_row[column] + least:
                out.append(f"{where} is more than twice torch's {torch_row[column]:.2e}")
            if not row[column] <= 1.1 * max(worst, least):
                out.append(f"{where} is the worst; the next is {worst:.2e}")
    return out


# ---- telling it


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table per dtype and quantity: a row per implementation, a column per case, cells `max / rms`, the smallest maximum in bold."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    out = []
    for dtype in DTYPES:
        for quantity in QUANTITIES:
            here = [row for row in rows if row["dtype"] == dtype]
            best = {
                case: min(row[f"{quantity}_max"] for row in here if row["case"] == case and row.get(f"{quantity}_max") is not None)
                for case in cases
            }
            unit = "relative" if quantity.startswith("d") else "nats"
            out += [f"**{TITLES[quantity]}, {dtype}** (max / rms error, {unit})", "", "| | " + " | ".join(cases) + " |"]
            out.append("|---|" + "---|" * len(cases))
            for name in dict.fromkeys(row["implementation"] for row in here):
                cells = [_cell(row, quantity, best[row["case"]]) for row in here if row["implementation"] == name]
                out.append(f"| {name} | " + " | ".join(cells) + " |")
            out.append("")
    return "\n".join(out)


def _cell(row: dict[str, Any], quantity: str, best: float) -> str:
    if row["missing"]:
        return row["missing"]
    largest, rms = row[f"{quantity}_max"], row[f"{quantity}_rms"]
    if largest is None:
        return "not given"
    text = f"{largest:.1e} / {rms:.1e}"
    return f"**{text}**" if largest == best else text


def _versions() -> dict[str, str]:
    out = {}
    for package in ("torch", "triton", "trl", "liger-kernel"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "not installed"
    return out


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write the files asked for; 1 when there are findings."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    args = parser.parse_args(argv)
    sizes = SIZES[DEVICE]
    torch.set_num_threads(1)  # the order of sums, and so the last digits, then depends on nothing but the seed
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine()
    about = {"device": device, "versions": _versions(), "sizes": dict(zip("THVS", sizes, strict=True)), "seed": args.seed}

    def after(rows: list[dict[str, Any]]) -> None:
        if args.json:  # after every case: a run that is cut off leaves what it has
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(about | {"rows": rows, "findings": findings(rows)}, indent=1) + "\n")

    rows = measure(sizes, args.seed, after=after)
    found = findings(rows)
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    print(markdown(rows))
    print("\n".join(found) or "ours is never the worst, and within twice torch in the same dtype")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
