"""torch and the peers, each behind one function; the sides that are timed are put together in bench/kernels/sides.py.

What a peer does not give (TRL's function and Liger's ScaledCE have no loss) is added in torch on (T,) vectors, as its users do. Every peer
runs in its fastest setting that computes the same thing. T rows, H hidden size, V vocabulary: hidden (T, H), weight (V, H), targets (T,).
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from actial_fast.ops import reference
from bench.harness.timing import CUDA
from bench.kernels.problems import SPEC, Head

Outputs = dict[str, Any]  # tensors, or functions that give one (a view that would cost a copy)
TRL_VOCABULARY = 32768  # entries of the vocabulary at a time, as TRL's trainer has it


# ---- log-probs (T,) and entropies (T,)


def torch_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As one writes it: logits in full, statistics in float32, and the entropy, which only reports, without a gradient."""
    return torch_rows(hidden @ weight.T, targets)


def trl_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`trl.kernels.ChunkedLogProbFunction`."""
    from trl.kernels import ChunkedLogProbFunction

    _trl_utils()
    logp, entropy, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_VOCABULARY, None, 1.0, ("entropy",))
    return logp, entropy


def scaled_ce_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Liger's ScaledCE: on sm_90 CuTe DSL, whatever LIGER_KERNEL_IMPL says; its own chunked torch elsewhere."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets, return_entropy=True)
    return -nll, entropy


def torch_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """From logits (T, V)."""
    z = logits.float()
    lse = z.logsumexp(-1)
    with torch.no_grad():
        entropy = lse - (z.softmax(-1) * z).sum(-1)
    return z.gather(-1, targets[:, None]).squeeze(-1) - lse, entropy


def trl_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """From logits (T, V): TRL's Triton kernel."""
    from trl.kernels import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, targets)


# ---- GRPO losses


def liger_grpo(p: Head, weight: Tensor) -> Outputs:
    """`LigerFusedLinearGRPOLoss` with all sequences in one chunk, its fastest: it chunks rows and vocabulary inside once more."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    shape = (len(p.targets) // p.length, p.length)
    settings = {"beta": SPEC.beta, "epsilon_low": SPEC.clip_low, "epsilon_high": SPEC.clip_high, "loss_type": "dapo"}
    loss, _ = LigerFusedLinearGRPOLoss(compiled=CUDA, chunk_size=shape[0], **settings)(
        p.hidden.view(*shape, -1),
        weight,
        p.targets.view(shape),
        torch.ones(shape, device=weight.device),
        p.sequence_advantages,
        ref_per_token_logps=p.ref_logp.view(shape),
        old_per_token_logps=p.old_logp.view(shape),
    )
    return {"loss": loss}


def torch_logits_grpo(p: Head, logits: Tensor) -> Tensor:
    """From logits (T, V)."""
    logp, entropy = torch_rows(logits, p.targets)
    return reference.grpo_terms(logp, entropy, p.advantages, p.old_logp, p.ref_logp, SPEC, token_weight=p.token_weight)[0]


def liger_logits_grpo(p: Head) -> tuple[Callable[[], Outputs], Callable[[], object]]:
    """Liger's Triton GRPO loss from logits (S, L + 1, V), in place; it skips each sequence's last row. Also what restores the logits."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    shape = (len(p.targets) // p.length, p.length)
    rows = p.logits.view(*shape, -1)
    logits = torch.zeros(shape[0], shape[1] + 1, rows.shape[-1], dtype=rows.dtype, device=rows.device, requires_grad=True)
    settings = {"beta": SPEC.beta, "eps_low": SPEC.clip_low, "eps_high": SPEC.clip_high, "loss_type": "dapo", "reduce": True}

    def restore() -> None:
        logits.detach()[:, :-1].copy_(rows)

    def call() -> Outputs:
        given = (p.old_logp.view(shape), p.ref_logp.view(shape), p.targets.view(shape), p.sequence_advantages)
        value = triton_grpo_loss(logits, *given, temperature=1.0, inplace=True, **settings)[0]
        gradient = torch.autograd.grad(value, logits)[0]
        return {"loss": value, "grad_logits": lambda: gradient[:, :-1].flatten(0, 1)}

    restore()
    return call, restore


# ---- cross-entropy, mean over the rows


def torch_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As one writes it."""
    return F.cross_entropy((hidden @ weight.T).float(), targets)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own, from 2.13 on, with its default chunks."""
    return F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


def liger_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy, its head's gradient accumulated in float32 as everyone else's."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)(weight, hidden, targets)


def liger_cute_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same in CuTe DSL, which LIGER_KERNEL_IMPL=cutedsl puts in the other's place for a whole process; native on sm_100."""
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, targets, *[None] * 2, -100, 0.0, 0.0, "mean", None, False, torch.float32
    )[0]


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Apple's; it leaves out gradients smaller than the dtype can tell (`filter_eps="auto"`)."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, filter_eps="auto")


def quack_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Tri Dao's CuTe DSL one, its logits rounded and stored; by itself it takes the one below where that runs."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, targets, use_scaled_exp=False)


def quack_scaled_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Its scaled-exponential pipeline (quack.epilogue.scaled_exp, 0.6.5): sm_90, bf16, vocabularies that 128 divides."""
    from quack.linear_cross_entropy import scaled_exp_linear_cross_entropy

    return scaled_exp_linear_cross_entropy(hidden, weight, targets)


# ---- KL(policy || reference model)


def torch_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """As one writes it -> (T,)."""
    logp, logq = ((h @ w.T).float().log_softmax(-1) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    return F.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)


def trl_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """TRL's chunked divergence, which gives the student's entropy as well -> (T,)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    _trl_utils()
    return ChunkedDivergenceFunction.apply(hidden, weight, None, ref_hidden, ref_weight, None, 1.0)[0]


def liger_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """Liger's fused linear JSD at its end that is this KL -> the mean over the rows."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=1.0, accum_dtype=torch.float32)(hidden, weight, ref_hidden, ref_weight)


def _trl_utils() -> None:
    """TRL's functions import its trainer for a DeepSpeed context that does nothing here; where the trainer's own dependencies are
    missing, a stand-in lets them run."""
    name = "trl.trainer.utils"
    if name in sys.modules:
        return
    try:
        importlib.import_module(name)
    except ImportError:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()
