"""For Liger's users: our loss behind the interface of Liger 0.8.5's, and, the other way round, Liger's layers in our model.

    from actial_fast.integrations.liger import FusedLinearGRPOLoss   # in the place of liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss
    from actial_fast.integrations.liger import apply_liger; apply_liger(model)   # a Qwen2-VL, 2.5-VL or 3-VL, on CUDA

The loss needs no Liger; the layers do. B (or S) sequences, L the longest one, T packed rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actial_fast import ops
from actial_fast.ops import reference
from actial_fast.ops.reference import MAX_LOG_RATIO, MIN_LOG_RATIO_VESPO
from actial_fast.ops.spec import NAMED, GRPOSpec

# ---- the loss

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence")
GLOBAL_MEAN = ("dapo", "cispo", "vespo")
"""Loss types whose token mean spans all processes, or `num_items_in_batch`; that of bnpo spans the call."""
CISPO_CAP = (
    "epsilon_high: cispo caps the ratio itself at it, and at {} every token of an unmoved policy is beyond the cap; the paper has 5.0"
)
OURS = {"clip_low": "epsilon_low", "clip_high": "epsilon_high", "clip_delta": "delta"}


class FusedLinearGRPOLoss(nn.Module):
    """`LigerFusedLinearGRPOLoss` of liger-kernel 0.8.5, computed by `linear_grpo_loss`: its constructor, arguments and results.

    `compiled` and `chunk_size` are taken and change nothing: rows go through the head in chunks that fit `workspace_mb` MiB. Constructor
    and forward raise ValueError for what is not supported, and name what is; forward for a ratio of the sequence with cispo, sapo and
    vespo, as Liger's does. A selected token of -100 counts as masked. Beyond Liger's rules: delta must be > 1 + epsilon_high;
    beta >= 0. cispo caps the ratio at epsilon_high; below 1 the constructor warns. Every option is an attribute of its name, as on
    Liger's class, and is read at each call: code that anneals `loss.epsilon_high` does so here too.

    Where Liger's class differs, this one computes what the papers and TRL 1.16 have:
    - luspo: the mean over sequences of each one's sum over its unmasked tokens. Liger sums over padding too, and weighs a sequence by the
      share of the batch's width that it fills; both are one with importance_sampling_level="sequence" and beta 0, or without padding.
    - vespo: importance ratios of masked tokens do not count; log-ratios beyond 20 are held there in every loss (expm1 and exp overflow).
    - The log-softmax and its gradient are taken from fp32 accumulators; head and reference gradients of masked rows are exactly 0. In
      16 bits old_ and ref_per_token_logps of a head that rounds its logits are off by that rounding, and so are ratio, clip and KL: score
      them with `ops.linear_logprob` (ref_input and ref_weight are), or leave old_per_token_logps out where the policy has not moved.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        *,
        workspace_mb: float | None = None,
    ):
        super().__init__()
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg
        self.workspace_mb = workspace_mb
        if _spec_of(self).objective == "cispo" and epsilon_high < 1:
            warnings.warn(CISPO_CAP.format(epsilon_high), stacklevel=2)

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, scalar float32, differentiable in _input, lin_weight and bias; and metrics: the mean KL where beta is not 0, and the
        share of clipped tokens, both over the unmasked tokens, scalars without gradient.

        _input (B, L, H) and, of its dtype or cast to it, lin_weight (V, H); bias (V,); selected_token_ids (B, L) int; attention_mask
        (B, L), tokens count where it is not 0; advantages (B,); old_ and ref_per_token_logps (B, L), old None: on policy; vllm_is_ratio
        (B, L), (B, 1) or (B,), >= 0. Without ref_per_token_logps the reference is ref_input (B, L, G), ref_weight (V, G), ref_bias (V,).
        num_items_in_batch: unmasked tokens of the whole generation batch over all ranks (dapo, cispo, vespo); None: those of this call,
        summed over ranks by an all-reduce.

        Packed: with cu_seqlens (S + 1,) int on the CPU, where sequences begin and end, every (B, L) above is (T,), rows of all sequences
        one behind the other, advantages are (S,), and vllm_is_ratio is (T,) or (S, 1).
        """
        packed = cu_seqlens is not None
        shape = _input.shape[:-1]
        if len(shape) != (1 if packed else 2):
            raise ValueError(f"_input: expected {'(T, H) with' if packed else '(B, L, H) without'} cu_seqlens, got {tuple(_input.shape)}")
        rows: dict[str, Tensor | None] = {"selected_token_ids": selected_token_ids, "attention_mask": attention_mask}
        rows |= {"ref_per_token_logps": ref_per_token_logps, "old_per_token_logps": old_per_token_logps}
        for name, x in rows.items():
            if x is not None and x.shape != shape:
                raise ValueError(f"{name}: expected {tuple(shape)} to fit _input, got {tuple(x.shape)}")
        if cu_seqlens is None:
            cu_seqlens = shape[1] * torch.arange(shape[0] + 1, dtype=torch.int32, device="cpu")
        if advantages.shape != (len(cu_seqlens) - 1,):
            raise ValueError(f"advantages: expected one per sequence, ({len(cu_seqlens) - 1},), got {tuple(advantages.shape)}")
        spec = _spec_of(self)
        if spec.ratio == "sequence" and spec.objective != "clip":  # where Liger's class raises it, whose options may change until then
            raise ValueError(
                "importance_sampling_level: Sequence-level importance sampling is not supported for loss_type "
                f"{self.loss_type!r}, in Liger either; pass 'token'"
            )
        hidden, weight = _input.flatten(0, -2), lin_weight.to(_input.dtype)
        ids = selected_token_ids.flatten().long()
        mask = (attention_mask.flatten() != 0) & (ids != reference.IGNORED)
        targets = torch.where(mask, ids, 0)  # padding may hold any id
        head: dict[str, Any] = {"bias": bias, "temperature": self.temperature, "workspace_mb": self.workspace_mb}
        old = None if old_per_token_logps is None else old_per_token_logps.flatten().detach()
        owner = reference.sequence_of_rows(cu_seqlens.to(hidden.device, non_blocking=True), len(hidden))
        advantage, sampler, policy_mask = advantages.detach()[owner], None, None
        if vllm_is_ratio is not None:
            ratio, per_token = _ratio(vllm_is_ratio.detach(), shape, len(advantages), owner)
            if spec.objective == "vespo":  # it enters the sequence's weight
                if old is None:
                    with torch.no_grad():
                        old, _ = ops.linear_logprob(hidden, weight, targets, **head, return_entropy=False)
                log_ratio = ratio.log().clamp(MIN_LOG_RATIO_VESPO, MAX_LOG_RATIO)
                if not per_token:  # one ratio for the sequence, whose rows' logarithms are added
                    log_ratio = (
                        log_ratio / log_ratio.new_zeros(len(advantages)).index_add_(0, owner, mask.to(log_ratio)).clamp(min=1)[owner]
                    )
                sampler = old - log_ratio
            else:  # a factor of the policy term; where it is 0 the advantage keeps its sign, by which clipped tokens are counted
                advantage, policy_mask = advantage * torch.where(ratio == 0, 1, ratio), ratio != 0
        token_weight = ops.token_weights(
            spec,
            cu_seqlens,
            mask=mask,
            tokens=_tokens(mask, num_items_in_batch) if self.loss_type in GLOBAL_MEAN else None,
            max_length=self.max_completion_length,
        )
        loss, stats, _, _ = ops.linear_grpo_loss(
            hidden,
            weight,
            targets,
            advantage,
            old,
            self._reference(spec, targets, ref_per_token_logps, ref_input, ref_weight, ref_bias),
            spec,
            token_weight=token_weight,
            cu_seqlens=cu_seqlens,
            sampler_logp=sampler,
            policy_mask=policy_mask,
            skip_zero_rows=True,  # padding leaves the backward products
            **head,
        )
        mean = dict(zip(ops.STATS, stats / stats[0].clamp(min=1), strict=True))
        return loss, (*((mean["kl"],) if self.beta else ()), mean["clip_low"] + mean["clip_high"])

    def _reference(
        self, spec: GRPOSpec, targets: Tensor, logps: Tensor | None, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor | None:
        """The reference's log-probs (T,), where the loss has a KL term."""
        if not spec.beta:
            return None
        if logps is not None:
            if hidden is not None:
                warnings.warn("Both ref_per_token_logps and ref_input are provided. Using ref_per_token_logps.", stacklevel=5)
            return logps.flatten().detach()
        if hidden is None or weight is None:
            raise ValueError(
                f"ref_per_token_logps: needed for beta={self.beta}; pass it, or ref_input and ref_weight, or use_ref_model=False"
            )
        with torch.no_grad():
            weight = weight.to(hidden.dtype)
            scaling: dict[str, Any] = {"temperature": self.temperature, "workspace_mb": self.workspace_mb}
            return ops.linear_logprob(hidden.flatten(0, -2), weight, targets, bias=bias, **scaling, return_entropy=False)[0]


def _spec_of(loss: FusedLinearGRPOLoss) -> GRPOSpec:
    """What the options of the loss mean in our terms. ValueError, in Liger's names, for what is not supported."""
    if loss.loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type: {loss.loss_type!r} is not supported; supported are {', '.join(LOSS_TYPES)}")
    level, named = loss.importance_sampling_level, NAMED[loss.loss_type]
    if level not in LEVELS:
        raise ValueError(f"importance_sampling_level: {level!r} is not supported; supported are {', '.join(LEVELS)}")
    objective = named.get("objective", "clip")
    if loss.loss_type == "dr_grpo" and loss.max_completion_length is None:
        raise ValueError("max_completion_length: needed for loss_type 'dr_grpo'; pass the generation limit in tokens")
    try:
        return GRPOSpec(
            objective=objective,
            ratio="sequence" if level == "sequence" else "token",
            clip_low=loss.epsilon_low,
            clip_high=loss.epsilon_high - 1 if objective == "cispo" else loss.epsilon_high,
            clip_delta=loss.delta if objective == "clip" else None,
            sapo_temperature_pos=loss.sapo_temperature_pos,
            sapo_temperature_neg=loss.sapo_temperature_neg,
            vespo_k_pos=loss.vespo_k_pos,
            vespo_lambda_pos=loss.vespo_lambda_pos,
            vespo_k_neg=loss.vespo_k_neg,
            vespo_lambda_neg=loss.vespo_lambda_neg,
            beta=loss.beta if loss.use_ref_model else 0.0,  # without a reference Liger takes the policy itself: neither value nor gradient
            kl_bias_correction=loss.use_bias_correction_kl,
            importance_max=math.exp(MAX_LOG_RATIO),
            aggregation=named["aggregation"],
        )
    except ValueError as error:
        message = str(error)
        for name, theirs in OURS.items():
            message = message.replace(name, theirs)
        raise ValueError(message) from None


def _ratio(ratio: Tensor, shape: torch.Size, sequences: int, owner: Tensor) -> tuple[Tensor, bool]:
    """The importance ratio of each row, and whether it was given per token."""
    if ratio.shape == shape:
        return ratio.flatten(), True
    if ratio.shape == (sequences, 1) or (len(shape) == 2 and ratio.shape == (sequences,)):
        return ratio.flatten()[owner], False
    expected = "(B, L), (B, 1) or (B,)" if len(shape) == 2 else "(T,) or (S, 1)"
    raise ValueError(f"vllm_is_ratio: expected {expected} to fit {tuple(shape)}, got {tuple(ratio.shape)}")


def _tokens(mask: Tensor, num_items: float | Tensor | None) -> Tensor:
    """Unmasked tokens for each rank, by which its loss is divided: DDP averages gradients over ranks. Scalar float32."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_items is not None:
        tokens = torch.as_tensor(num_items, dtype=torch.float32, device=mask.device)
    else:
        tokens = mask.sum(dtype=torch.float32)
        if ranks > 1:
            dist.all_reduce(tokens)
    return (tokens / ranks).clamp(min=1)


# ---- the layers

LAYERS = {  # transformers' classes of each family, and the kernel that takes their place
    "qwen2_vl": {"Qwen2VLAttention": "rope", "Qwen2VLRMSNorm": "rms_norm", "Qwen2MLP": "swiglu"},
    "qwen2_5_vl": {"Qwen2_5_VLAttention": "rope", "Qwen2_5_VLRMSNorm": "rms_norm", "Qwen2MLP": "swiglu", "Qwen2_5_VLMLP": "swiglu"},
    "qwen3_vl": {"Qwen3VLTextAttention": "rope", "Qwen3VLTextRMSNorm": "rms_norm", "Qwen3VLTextMLP": "swiglu"},
}


def apply_liger(model: nn.Module, *, rope: bool = True, rms_norm: bool = True, swiglu: bool = True) -> dict[str, int]:
    """Puts Liger's RMSNorm, SwiGLU and rotary kernels into a loaded Qwen2-VL, Qwen2.5-VL or Qwen3-VL of transformers 5.17 to 5.23: in the
    language model, norms of queries and keys included, and in Qwen2.5-VL's vision tower (whose rotary embedding stays; the others' towers
    have none of these layers), of this instance alone, which keeps its weights, names and classes.

    model: one of these models or a PEFT model around one, on CUDA when it runs; before it is sharded. Returns how many modules got which
    kernel. M-RoPE: these transformers merge the three sections into cos and sin before the layers, so Liger's plain rotary kernel is
    the one that fits. Liger 0.8.5's own function for this model looks for names that transformers dropped before 5.17, and raises. The
    kernels' backward passes overwrite what they no longer need: no second backward through the same graph. Losses stay as they are.

    ValueError for another model or activation; ImportError without liger-kernel. Source: arXiv 2410.10989.
    """
    unwrap = getattr(model, "get_base_model", None)
    base = model if unwrap is None else unwrap()
    kind = getattr(getattr(base, "config", None), "model_type", type(base).__name__)
    names = next((names for family, names in LAYERS.items() if kind in (family, f"{family}_text", f"{family}_vision")), None)
    if names is None:
        raise ValueError(f"model: expected a Qwen2-VL, Qwen2.5-VL or Qwen3-VL of transformers, or a PEFT model around one, got {kind}")
    try:
        from liger_kernel.transformers.functional import liger_rms_norm, liger_rope, liger_swiglu
    except ImportError as error:
        raise ImportError("apply_liger needs Liger's kernels: pip install liger-kernel==0.8.5") from error

    def norm(self: Any, hidden_states: Tensor) -> Tensor:
        return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def mlp(self: Any, hidden_state: Tensor) -> Tensor:
        return self.down_proj(liger_swiglu(self.gate_proj(hidden_state), self.up_proj(hidden_state)))

    wanted = {"rope": rope, "rms_norm": rms_norm, "swiglu": swiglu}
    counts = {kernel: 0 for kernel, on in wanted.items() if on}
    for module in base.modules():
        kernel = names.get(type(module).__name__)
        if kernel not in counts:
            continue
        if kernel == "swiglu" and type(module.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
            raise ValueError(f"model: its MLP's activation is {type(module.act_fn).__name__}, the kernel's is SiLU; pass swiglu=False")
        forward = _with_rope(type(module).forward, liger_rope) if kernel == "rope" else norm if kernel == "rms_norm" else mlp
        module.forward = MethodType(forward, module)
        counts[kernel] += 1
    missing = [kernel for kernel, count in counts.items() if not count]
    if missing:
        raise ValueError(f"model: no module for {', '.join(missing)}; known are {', '.join(names)} of transformers 5.17 to 5.23")
    return counts


def _with_rope(forward: Callable[..., Any], rope: Callable[..., Any]) -> FunctionType:
    """An attention's forward that finds another rotary function: it calls a global of its module, which other instances share."""
    function = inspect.unwrap(forward)
    name = "apply_rotary_pos_emb"
    if name not in function.__code__.co_names:
        raise ValueError(f"model: its attention does not call {name}, as in transformers 5.17 to 5.23; pass rope=False")
    namespace = {**function.__globals__, name: rope}
    copy = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
