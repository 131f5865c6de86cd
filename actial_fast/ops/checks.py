"""What the door checks: each function returns its arguments as the ops take them, or raises a ValueError that names the argument, what
was expected, what came, and what to do. Values are looked at only where that waits for no device and stops no compiler.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from typing import Any

import torch
from torch import Tensor

from actial_fast.ops import reference
from actial_fast.ops.chunked_logits import compute_dtype
from actial_fast.ops.library import capability
from actial_fast.ops.parallel import VocabParallel
from actial_fast.ops.spec import GRPOSpec, Kept

QUACK_PART = 128  # columns of the vocabulary that quack's epilogue finishes together
TEMPERATURES = 1e-30, 1e30  # lowest and highest: float32 holds logits of up to 1e8 divided by the one, and 1 divided by the other


def head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    workspace_mb: float,
    names: tuple[str, str] = ("hidden", "weight"),
    parallel: VocabParallel | None = None,
    several: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden, weight and bias, checked, in the dtype of an enclosing autocast. several: a row may have more than one target."""
    h, w = names
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(f"{h}: expected (T, H) floating point, got {text(hidden)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"{w}: expected (V, {hidden.shape[1]}) to fit {h}, got {tuple(weight.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"{w}: expected V >= 1 and H >= 1, got {tuple(weight.shape)}")
    _device(h, hidden)
    match(w, weight, h, hidden, dtype=False)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = _cast(hidden, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)
    match(w, weight, h, hidden)
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(f"{w}: its rows must be contiguous, got strides {weight.stride()}; pass {w}.contiguous()")
    if bias is not None:
        if bias.shape != weight.shape[:1] or not bias.is_floating_point():
            raise ValueError(f"bias: expected ({len(weight)},) floating point to fit {w}, got {text(bias)}")
        match("bias", bias, h, hidden)
    if targets is not None:
        _targets(targets, hidden, several)
    if parallel and parallel.rows != len(weight):
        raise ValueError(f"vocab_parallel: made of {parallel.rows} rows, but {w} has {len(weight)}; make it anew with VocabParallel.of")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: must be > 0 and finite, got {softcap}; None = no cap")
    if not 0 < workspace_mb < math.inf:
        raise ValueError(f"workspace_mb: must be > 0 and finite, got {workspace_mb}")
    if not torch.is_grad_enabled():  # an autograd.Function cannot tell: its inputs still ask for gradients
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return hidden.contiguous(), weight, bias


def path(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    parallel: VocabParallel | None,
    targets: Tensor | None = None,
    kept: Any = None,
) -> str:
    """The argument `head` of an op, for arguments that are checked: whose products, where those can be made here."""
    if name not in ("triton", "quack"):
        raise ValueError(f"head: expected 'triton' or 'quack', got {name!r}")
    if name == "triton":
        return name
    if torch.compiler.is_compiling():
        raise ValueError("head: not 'quack' under torch.compile, whose operators have our kernels; call the op outside of it")
    ours = "head='triton' has it"
    for option, given in (("bias", bias), ("softcap", softcap), ("vocab_parallel", parallel), ("top_k, top_p, min_p", kept)):
        if given is not None:
            raise ValueError(f"{option}: not with head='quack'; {ours}")
    if targets is not None and targets.ndim == 2:
        raise ValueError(f"targets: head='quack' takes (T,), got {tuple(targets.shape)}; {ours}")
    if hidden.dtype != torch.bfloat16:
        raise ValueError(f"hidden: head='quack' takes bfloat16, got {hidden.dtype}; {ours}")
    if len(weight) % QUACK_PART:
        raise ValueError(
            f"weight: head='quack' takes a vocabulary in whole parts of {QUACK_PART}, got {len(weight)} rows; pad it, or take head='triton'"
        )
    if capability(hidden)[0] not in (9, 10):
        chip = "sm_{}{}".format(*capability(hidden)) if hidden.is_cuda else str(hidden.device)
        raise ValueError(f"head: 'quack' has kernels for sm_90 and sm_100, hidden is on {chip}; {ours}")
    version = _quack_version()
    if version is None:
        raise ValueError("head: 'quack' is not installed; pip install 'actial-fast[quack]'")
    if not (version.startswith("0.6.") and version.split(".")[2].isdigit() and int(version.split(".")[2]) >= 5):
        raise ValueError(f"head: 'quack' takes quack-kernels 0.6.5 or a later 0.6, found {version}; pip install 'actial-fast[quack]'")
    return name


@functools.cache
def _quack_version() -> str | None:
    try:
        return importlib.metadata.version("quack-kernels")
    except importlib.metadata.PackageNotFoundError:
        return None


def grpo_rows(
    like: Tensor,
    advantages: Tensor,
    spec: GRPOSpec,
    token_weight: Tensor | None,
    cu_seqlens: Tensor | None,
    policy_mask: Tensor | None,
    ignored: Tensor,
    **rows: Tensor | None,
) -> dict[str, Any]:
    """The arguments of `reference.grpo_terms`, checked and filled in: rows that are `ignored`, (T,) bool, have weight 0. cu_seqlens stays
    where rows depend on their sequence."""
    count, device = len(like), like.device
    _cu_seqlens(cu_seqlens, count, device)
    if advantages.ndim == 1 and cu_seqlens is not None and len(advantages) == len(cu_seqlens) - 1 != count:
        match("advantages", advantages, "hidden", like, dtype=False)
        advantages = advantages[reference.sequence_of_rows(cu_seqlens.to(device, non_blocking=True), count)]
    if token_weight is None:
        if spec.aggregation == "constant":
            raise ValueError("token_weight: needed for aggregation='constant'; pass token_weights(spec, cu_seqlens, max_length=...)")
        if spec.aggregation != "token" and cu_seqlens is None:
            raise ValueError(f"cu_seqlens: needed for aggregation={spec.aggregation!r}; pass it, or token_weight (T,)")
        one = (
            torch.arange(2, device=device) * count if cu_seqlens is None else cu_seqlens
        )  # [0, T]; tensor() would fix T in a compiled graph
        token_weight = reference.token_weights(spec, one, mask=~ignored)
    rows = {name: None if x is None else row(name, x, like) for name, x in rows.items()}
    advantages, token_weight = row("advantages", advantages, like), row("token_weight", token_weight, like).masked_fill(ignored, 0)
    if spec.beta > 0 and rows["ref_logp"] is None:
        raise ValueError(f"ref_logp: needed for beta={spec.beta}; pass the reference's log-probs (T,) or set beta to 0")
    if _readable(like) and (~advantages.isfinite() & (token_weight != 0)).any():
        what = "NaN" if (advantages.isnan() & (token_weight != 0)).any() else "infinite"
        raise ValueError(f"advantages: {what} in rows that count; give unscorable samples 0 (as group_advantages does) or mask their rows")
    if policy_mask is not None:
        if policy_mask.shape != (count,) or policy_mask.dtype != torch.bool:
            raise ValueError(f"policy_mask: expected ({count},) bool, got {text(policy_mask)}")
        match("policy_mask", policy_mask, "hidden", like, dtype=False)
    needed = spec.needs_sequences(rows["sampler_logp"] is not None)
    if needed and (cu_seqlens is None or cu_seqlens.is_cuda):
        got = "None" if cu_seqlens is None else f"a tensor on {cu_seqlens.device}"
        raise ValueError(f"cu_seqlens: this spec's rows depend on their sequence; pass it on the CPU, (S + 1,) int32 or int64, got {got}")
    rows |= {"advantages": advantages, "token_weight": token_weight}
    return {**rows, "policy_mask": policy_mask, "cu_seqlens": cu_seqlens if needed else None}


def row(name: str, x: Tensor, like: Tensor) -> Tensor:
    """x (T,) without gradient, in the dtype that is computed in."""
    if x.shape != like.shape[:1] or not x.is_floating_point() or x.device != like.device:
        raise ValueError(f"{name}: expected ({len(like)},) floating point on {like.device}, got {text(x)} on {x.device}")
    if x.requires_grad:
        raise ValueError(f"{name}: requires a gradient, but gets none here; pass {name}.detach()")
    return x.to(compute_dtype(like))


def temperature(x: float | Tensor, like: Tensor) -> float | Tensor:
    """A temperature for all rows, or one for each of the rows of `like`."""
    lowest = highest = x
    if isinstance(x, Tensor):
        x = row("temperature", x, like)
        lowest, highest = (float(y) for y in x.aminmax()) if len(like) and _readable(like) else (1.0, 1.0)
    if not lowest > 0:
        raise ValueError(f"temperature: must be > 0, got {lowest}")
    for wrong in (lowest, highest):
        if not TEMPERATURES[0] <= wrong <= TEMPERATURES[1]:
            raise ValueError(f"temperature: must be in [{TEMPERATURES[0]}, {TEMPERATURES[1]}], where float32 holds the logits, got {wrong}")
    return x


def kept(top_k: int | None, top_p: float, min_p: float, vocabulary: int, parallel: VocabParallel | None) -> Kept | None:
    """What a sampler keeps of the vocabulary; None where it keeps everything."""
    for name, x, wanted in (("top_k", top_k, "a whole number"), ("top_p", top_p, "a number"), ("min_p", min_p, "a number")):
        if isinstance(x, Tensor):
            raise ValueError(f"{name}: expected {wanted} for all rows, got a tensor; call once for the rows of each")
    if top_k is not None and (int(top_k) != top_k or top_k < -1):
        raise ValueError(f"top_k: must be a whole number >= 1, got {top_k}; None, 0 or -1 = all tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: must be in (0, 1], got {top_p}; 1 = all tokens")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p: must be in [0, 1], got {min_p}; 0 = all tokens")
    count = 0 if top_k is None or top_k < 1 or top_k >= vocabulary else int(top_k)
    out = Kept(count, float(top_p), float(min_p))
    if out == Kept():
        return None
    if parallel:
        raise ValueError(
            "vocab_parallel: not with top_k, top_p or min_p, which need a row's logits in one place; gather the head, or pass the ids "
            "that the sampler kept as targets (T, K)"
        )
    return out


def _targets(targets: Tensor, like: Tensor, several: bool = False) -> None:
    shaped = targets.shape == like.shape[:1] or (several and targets.ndim == 2 and len(targets) == len(like) and targets.shape[1] > 0)
    if not shaped or targets.dtype != torch.int64:
        more = f" or ({len(like)}, K) with K >= 1," if several else ""
        raise ValueError(f"targets: expected ({len(like)},){more} int64, got {text(targets)}")
    match("targets", targets, "hidden", like, dtype=False)


def in_vocabulary(targets: Tensor, vocabulary: int, token_weight: Tensor | None = None) -> None:
    """Checks the range of the targets of all rows or, given token_weight, of those that count; -100 has become a token before."""
    if not _readable(targets):
        return
    wrong = (targets < 0) | (targets >= vocabulary)
    if token_weight is not None:
        wrong &= token_weight != 0
    if wrong.any():
        example = int(targets[wrong][0])
        hint = "a row without a target has -100" + ("" if token_weight is None else ", or token_weight 0")
        if targets.ndim == 2:
            hint = "fill up a row of fewer targets with -100"
        raise ValueError(f"targets: expected ids in [0, {vocabulary}), got {example}; {hint}")


def logits(x: Tensor, targets: Tensor) -> Tensor:
    """Logits (T, V) and their targets, checked."""
    if x.ndim != 2 or not x.is_floating_point() or not x.shape[1]:
        raise ValueError(f"logits: expected (T, V) floating point with V >= 1, got {text(x)}")
    _device("logits", x)
    _targets(targets, x)
    return x if torch.is_grad_enabled() else x.detach()


def _cu_seqlens(cu_seqlens: Tensor | None, rows: int, device: torch.device) -> None:
    if cu_seqlens is None:
        return
    if cu_seqlens.ndim != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: expected (S + 1,) int32 or int64, got {text(cu_seqlens)}")
    if cu_seqlens.is_cpu:
        if _readable(cu_seqlens) and (cu_seqlens[0] != 0 or cu_seqlens[-1] != rows or (cu_seqlens.diff() < 0).any()):
            raise ValueError(f"cu_seqlens: must start at 0, never fall and end at T = {rows}, got {cu_seqlens.tolist()}")
    elif cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: on {cu_seqlens.device}; pass it on the CPU")


def weight_grad(x: Tensor | None, weight: Tensor) -> Tensor | None:
    """The buffer that weight's gradient is added to."""
    if x is None:
        return None
    dtype = compute_dtype(weight)
    if x.shape != weight.shape or x.dtype != dtype or not x.is_contiguous():
        raise ValueError(f"weight_grad: expected {tuple(weight.shape)} {dtype}, contiguous, got {text(x)} with strides {x.stride()}")
    match("weight_grad", x, "weight", weight, dtype=False)
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError("weight_grad: weight does not require a gradient, so nothing would be added; leave it out for a frozen head")
    return x


def rewards(x: Tensor) -> Tensor:
    """Rewards (N,) or (N, R), without gradient."""
    if x.ndim not in (1, 2) or not x.is_floating_point():
        raise ValueError(f"rewards: expected (N,) or (N, R) floating point, got {text(x)}")
    if _readable(x) and x.isinf().any():
        raise ValueError("rewards: infinite; a mean and a deviation need finite ones, and NaN says that a sample could not be scored")
    return x.detach()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(dtype)


def _readable(x: Tensor) -> bool:
    return not x.is_cuda and not torch.compiler.is_compiling()


def _device(name: str, x: Tensor) -> None:
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: on {x.device}; these ops run on cpu and cuda")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) and not (x.dtype == torch.float64 and x.is_cpu):
        raise ValueError(f"{name}: {x.dtype} on {x.device}; cast to float32, bfloat16 or float16 (float64 runs on the CPU)")


def match(name: str, x: Tensor, other_name: str, other: Tensor, dtype: bool = True) -> None:
    """x on the device, and of the dtype, of another tensor."""
    if x.device != other.device:
        hint = "it was never loaded" if x.is_meta else f"move it with .to({other.device.type!r})"
        raise ValueError(f"{name}: on {x.device} but {other_name} is on {other.device}; {hint}")
    if dtype and x.dtype != other.dtype:
        raise ValueError(f"{name}: {x.dtype} but {other_name} is {other.dtype}; cast one of them, as with {name}.to({other.dtype})")


def text(x: Tensor) -> str:
    """Shape and dtype, for messages."""
    return f"{tuple(x.shape)} {x.dtype}"
