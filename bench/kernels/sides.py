"""Every side of every comparison: ours, torch, torch.compile and the peers of bench/kernels/peers.py, op by op.

A side is prepared with the inputs and gives the call that is timed: values and, where the op has them, gradients, all of them returned.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actial_fast import ops
from actial_fast.ops import reference
from actial_fast.ops.spec import GRPOSpec
from bench.harness.timing import CUDA
from bench.kernels import peers
from bench.kernels.peers import Outputs
from bench.kernels.problems import ADVANTAGES, NO_KL, SPEC, Expected, Head, Rewards

LogProb = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
BY_QUACK: dict[str, Any] = {"needs": "quack", "gpu": True, "majors": (9, 10)}  # our ops with head="quack"


@dataclass(frozen=True)
class Side:
    """One way to compute an op. `prepare(inputs)` gives the call, or the call and what restores its inputs afterwards."""

    name: str
    prepare: Callable[[Any], Any]
    expect: Callable[[Any], dict[str, Expected]]
    needs: str = ""  # the module that it is installed as, or torch.module.name
    gpu: bool = False
    capability: tuple[int, int] = (0, 0)
    majors: tuple[int, ...] = ()  # major compute capabilities that it is for; all that are new enough
    compiled: bool = False
    gemms: float | None = None  # where the floor is not the op's

    def unavailable(self) -> str | None:
        """Why it cannot run here; None = it can."""
        if self.needs.startswith("torch."):
            module, name = self.needs.rsplit(".", 1)
            if not hasattr(importlib.import_module(module), name):
                return f"torch {torch.__version__} does not have it"
        elif self.needs and importlib.util.find_spec(self.needs) is None:
            return "not installed"
        if self.gpu and not CUDA:
            return "needs a GPU"
        if CUDA and torch.cuda.get_device_capability() < self.capability:
            return f"needs sm_{self.capability[0]}{self.capability[1]}"
        if CUDA and self.majors and torch.cuda.get_device_capability()[0] not in self.majors:
            return f"needs {' or '.join(f'sm_{major}0' for major in self.majors)}"
        return None


def linear_logprob(gradients: bool) -> list[Side]:
    """Values only, or with the gradients of the mean log-prob."""

    def side(name: str, function: LogProb, **more: Any) -> Side:
        def prepare(p: Head) -> Callable[[], Outputs]:
            run = _compiled(function, **more)

            def call() -> Outputs:
                with torch.set_grad_enabled(gradients):
                    logp, entropy = run(p.hidden, p.weight, p.targets)
                outputs = {"logp": logp, "entropy": entropy}
                return _with_gradients(outputs, p.hidden, p.weight, of=logp.mean()) if gradients else outputs

            return call

        return Side(name, prepare, lambda p: p.logprob(gradients), **more)

    return [
        side("ours", ops.linear_logprob),
        side("torch", peers.torch_logprob),
        side("torch.compile", peers.torch_logprob, compiled=True),
        side("TRL", peers.trl_logprob, needs="trl"),
        side("Liger ScaledCE", peers.scaled_ce_logprob, needs="liger_kernel"),
        side("ours, by quack", functools.partial(ops.linear_logprob, head="quack"), **BY_QUACK),
    ]


def selected_logprob() -> list[Side]:
    """Values for 64 targets a row, as distillation from a teacher's top tokens takes them."""

    def side(name: str, function: LogProb, **more: Any) -> Side:
        def prepare(p: Head) -> Callable[[], Outputs]:
            run = _compiled(function, **more)

            def call() -> Outputs:
                with torch.no_grad():
                    return dict(zip(("logp", "entropy"), run(p.hidden, p.weight, p.several), strict=True))

            return call

        return Side(name, prepare, Head.selected_logprob, **more)

    def torch_selected(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return reference.logprob_from_logits(hidden @ weight.T, targets)

    return [
        side("ours", ops.linear_logprob),
        side("torch", torch_selected),
        side("torch.compile", torch_selected, compiled=True),
    ]


def linear_grpo_loss(frozen: bool) -> list[Side]:
    """Forward and backward; ours with two budgets, by quack's products and, head trainable, with a buffer for the head's gradient."""

    def expect(p: Head) -> dict[str, Expected]:
        return p.grpo(SPEC, p.advantages, frozen)

    def side(name: str, loss: Callable[[Head, Tensor], Outputs], **more: Any) -> Side:
        def prepare(p: Head) -> Callable[[], Outputs]:
            run, weight = _compiled(loss, **more), p.frozen if frozen else p.weight
            return lambda: _with_gradients(run(p, weight), p.hidden, *(() if frozen else (weight,)))

        return Side(name, prepare, expect, **more)

    def into_buffer(p: Head) -> tuple[Callable[[], Outputs], Callable[[], object]]:
        """The head's gradient goes where a training step wants it: added, in float32, to the parameter's gradient buffer."""
        buffer = torch.zeros_like(p.weight, dtype=torch.float32)
        loss = _ours(SPEC, weight_grad=buffer)
        return lambda: _with_gradients(loss(p, p.weight), p.hidden) | {"grad_weight": buffer}, buffer.zero_

    return [
        side("ours", _ours(SPEC)),
        *([] if frozen else [Side("ours, weight_grad", into_buffer, expect)]),
        side("ours, 700 MB", _ours(SPEC, workspace_mb=700)),
        side("torch", _loss_of(peers.torch_logprob)),
        side("torch.compile", _loss_of(peers.torch_logprob), compiled=True),
        side("TRL", _loss_of(peers.trl_logprob), needs="trl"),
        side("Liger GRPO", peers.liger_grpo, needs="liger_kernel"),
        side("Liger ScaledCE", _loss_of(peers.scaled_ce_logprob), needs="liger_kernel"),
        side("ours, by quack", _ours(SPEC, head="quack"), **BY_QUACK),
    ]


def zero_rows() -> list[Side]:
    """Ours where all, half and none of the rows have a gradient (the others: advantage 0, on policy, no KL); TRL for comparison."""

    def advantages(p: Head, share: float) -> Tensor:
        sequence = torch.arange(len(p.targets), device=p.hidden.device) // p.length
        return torch.where(sequence % 2 < 2 * share, p.advantages, 0)  # share 0, 0.5, 1: none, every other sequence, all

    def side(name: str, share: float, loss: Callable[[Head, Tensor, Tensor], Outputs], **more: Any) -> Side:
        def prepare(p: Head) -> Callable[[], Outputs]:
            given = advantages(p, share)
            return lambda: _with_gradients(loss(p, p.weight, given), p.hidden, p.weight)

        return Side(name, prepare, lambda p: p.grpo(NO_KL, advantages(p, share)), gemms=1 + 2 * share, **more)

    sides = [side(f"ours, {share:.0%} of the rows", share, _ours(NO_KL)) for share in (1.0, 0.5, 0.0)]
    return [*sides, side("TRL, 50% of the rows", 0.5, _loss_of(peers.trl_logprob, NO_KL), needs="trl")]


def linear_cross_entropy() -> list[Side]:
    """Mean over the rows, forward and backward."""

    def side(name: str, loss: Callable[[Tensor, Tensor, Tensor], Tensor], **more: Any) -> Side:
        def prepare(p: Head) -> Callable[[], Outputs]:
            run = _compiled(loss, **more)
            return lambda: _with_gradients({"loss": run(p.hidden, p.weight, p.targets)}, p.hidden, p.weight)

        return Side(name, prepare, Head.cross_entropy, **more)

    def ours(hidden: Tensor, weight: Tensor, targets: Tensor, head: str = "triton") -> Tensor:
        mean = torch.full_like(targets, 1 / len(targets), dtype=torch.float32)
        return ops.linear_cross_entropy(hidden, weight, targets, mean, head=head)

    def mean_of(logprob: LogProb) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda hidden, weight, targets: -logprob(hidden, weight, targets)[0].mean()

    return [
        side("ours", ours),
        side("torch", peers.torch_cross_entropy),
        side("torch.compile", peers.torch_cross_entropy, compiled=True),
        side("F.linear_cross_entropy", peers.chunked_cross_entropy, needs="torch.nn.functional.linear_cross_entropy"),
        side("Liger FLCE", peers.liger_cross_entropy, needs="liger_kernel", gpu=True),
        side("Liger FLCE, CuTe DSL", peers.liger_cute_cross_entropy, needs="cutlass", gpu=True, capability=(10, 0)),
        side("Liger ScaledCE", mean_of(peers.scaled_ce_logprob), needs="liger_kernel"),
        side("TRL", mean_of(peers.trl_logprob), needs="trl"),
        side("cut-cross-entropy", peers.cut_cross_entropy, needs="cut_cross_entropy", gpu=True),
        side("quack", peers.quack_cross_entropy, needs="quack", gpu=True, capability=(9, 0)),
        side("quack scaled exp", peers.quack_scaled_cross_entropy, needs="quack", gpu=True, capability=(9, 0)),
        side("ours, by quack", functools.partial(ours, head="quack"), **BY_QUACK),
    ]


def linear_kl(gradients: bool) -> list[Side]:
    """Of the policy to a reference model: values only, or with the gradients of its mean for the policy."""

    def side(name: str, kl: Callable[..., Tensor], output: str = "kl", **more: Any) -> Side:
        def prepare(p: Head) -> Callable[[], Outputs]:
            run, given = _compiled(kl, **more), (p.hidden, p.weight, *p.reference_model)

            def call() -> Outputs:
                with torch.set_grad_enabled(gradients):
                    value = run(*given)
                return _with_gradients({output: value}, p.hidden, p.weight, of=value.mean()) if gradients else {output: value}

            return call

        return Side(name, prepare, lambda p: p.kl(gradients), **more)

    return [
        side("ours", ops.linear_kl),
        side("torch", peers.torch_kl),
        side("torch.compile", peers.torch_kl, compiled=True),
        side("TRL", peers.trl_kl, needs="trl"),
        *([side("Liger JSD", peers.liger_kl, "mean", needs="liger_kernel", gpu=True)] if gradients else []),  # gives no values
    ]


def logprob_from_logits() -> list[Side]:
    """Without gradients."""

    def side(name: str, function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], **more: Any) -> Side:
        def prepare(p: Head) -> Callable[[], Outputs]:
            run, logits = _compiled(function, **more), p.logits

            @torch.no_grad()
            def call() -> Outputs:
                return dict(zip(("logp", "entropy"), run(logits, p.targets), strict=True))

            return call

        return Side(name, prepare, lambda p: p.from_logits(loss=False), **more)

    return [
        side("ours", ops.logprob_from_logits),
        side("torch", peers.torch_rows),
        side("torch.compile", peers.torch_rows, compiled=True),
        side("TRL", peers.trl_rows, needs="trl", gpu=True),
    ]


def grpo_loss_from_logits() -> list[Side]:
    """Forward and backward; in place, the gradient overwrites the logits."""

    def expect(p: Head) -> dict[str, Expected]:
        return p.from_logits(loss=True)

    def ours(p: Head, logits: Tensor, inplace: bool = False) -> Tensor:
        rows = (p.targets, p.advantages, p.old_logp, p.ref_logp)
        return ops.grpo_loss_from_logits(logits, *rows, SPEC, token_weight=p.token_weight, inplace=inplace).loss

    def side(name: str, loss: Callable[..., Tensor], inplace: bool = False, **more: Any) -> Side:
        def prepare(p: Head) -> Any:
            run, logits = _compiled(loss, **more), (p.logits.clone() if inplace else p.logits.detach()).requires_grad_()

            def call() -> Outputs:
                value = run(p, logits, inplace=True) if inplace else run(p, logits)
                return {"loss": value.detach(), "grad_logits": torch.autograd.grad(value, logits)[0]}

            return (call, lambda: logits.detach().copy_(p.logits)) if inplace else call

        return Side(name, prepare, expect, **more)

    return [
        side("ours", ours),
        side("ours, in place", ours, inplace=True),
        side("torch", peers.torch_logits_grpo),
        side("torch.compile", peers.torch_logits_grpo, compiled=True),
        Side("Liger Triton GRPO, in place", peers.liger_logits_grpo, expect, needs="liger_kernel", gpu=True),
    ]


def group_advantages() -> list[Side]:
    """Standardised in groups of 16."""

    def call(p: Rewards, function: Callable[..., Tensor]) -> Outputs:
        return {"advantages": function(p.rewards, p.groups, ADVANTAGES)}

    return _row_sides(ops.group_advantages, reference.group_advantages, call, Rewards.advantages)


def token_kl() -> list[Side]:
    """The k3 estimate, without gradients."""
    return _row_sides(ops.token_kl, reference.token_kl, lambda p, kl: {"kl": kl(p.logp, p.ref_logp, "k3")}, Rewards.kl)


def _row_sides(ours: Any, plain: Any, call: Callable[[Rewards, Any], Outputs], expect: Callable[[Rewards], Any]) -> list[Side]:
    def side(name: str, function: Any, **more: Any) -> Side:
        def prepare(p: Rewards) -> Callable[[], Outputs]:
            run = _compiled(function, **more)
            return lambda: call(p, run)

        return Side(name, prepare, expect, **more)

    return [side("ours", ours), side("torch", plain), side("torch.compile", plain, compiled=True)]


def _ours(spec: GRPOSpec, workspace_mb: float = 700, **more: Any) -> Callable[..., Outputs]:
    def loss(p: Head, weight: Tensor, advantages: Tensor | None = None) -> Outputs:
        rows = (p.targets, p.advantages if advantages is None else advantages, *p.others(spec))
        out = ops.linear_grpo_loss(p.hidden, weight, *rows, spec, token_weight=p.token_weight, workspace_mb=workspace_mb, **more)
        return {"loss": out.loss, "logp": out.logp, "entropy": out.entropy}

    return loss


def _loss_of(logprob: LogProb, spec: GRPOSpec = SPEC) -> Callable[..., Outputs]:
    """The loss in torch from a peer's log-probs."""

    def loss(p: Head, weight: Tensor, advantages: Tensor | None = None) -> Outputs:
        logp, entropy = logprob(p.hidden, weight, p.targets)
        given = (p.advantages if advantages is None else advantages, *p.others(spec))
        total, _ = reference.grpo_terms(logp, entropy.detach(), *given, spec, token_weight=p.token_weight)
        return {"loss": total, "logp": logp, "entropy": entropy}

    return loss


def _compiled(function: Any, compiled: bool = False, **_: Any) -> Any:
    """Compiled for the shapes at hand where the side says so."""
    return torch.compile(function, dynamic=False) if compiled else function


def _with_gradients(outputs: Outputs, hidden: Tensor, *weight: Tensor, of: Tensor | None = None) -> Outputs:
    loss = outputs["loss"] if of is None else of
    names = ("grad_hidden", "grad_weight")[: 1 + len(weight)]
    values = {name: x.detach() for name, x in outputs.items()}
    return values | dict(zip(names, torch.autograd.grad(loss, (hidden, *weight)), strict=True))
