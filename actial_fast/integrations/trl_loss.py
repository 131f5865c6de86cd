"""What `integrations.trl` puts in the place of GRPOTrainer's loss: its options as a GRPOSpec, the head's part of the model's forward, the
trainer's part around it, and what the trainer logs.

B sequences, C the longest completion, T rows that carry loss, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypedDict, overload

import torch
from torch import Tensor

from actial_fast import ops
from actial_fast.ops.spec import NAMED, GRPOSpec

SUPPORTED_TRL = ("1.15", "1.16")


def check_version() -> None:
    """ImportError where TRL is missing, or of a release whose trainer ours was not compared with."""
    wanted = f"actial_fast.integrations.trl takes the place of code of TRL {' and '.join(SUPPORTED_TRL)}: pip install trl==1.16.0"
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"trl: not installed; {wanted}") from None
    if ".".join(version.split(".")[:2]) not in SUPPORTED_TRL:
        raise ImportError(f"trl: version {version} is installed; {wanted}")


check_version()
import trl.trainer.utils  # noqa: E402  a release that is not known may lack what follows

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
GLOBAL_MEAN = ("dapo", "cispo", "vespo")
CISPO_CAP = (
    "epsilon_high: cispo caps the ratio itself at it, and at {} every token of an unmoved policy is beyond the cap; the paper has 5.0"
)
"""Loss types whose token mean spans all processes and accumulation steps; the others' spans the micro-batch."""
DISTRIBUTED = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP2")
SUPPORTED = (
    f"supported: TRL {', '.join(SUPPORTED_TRL)}; loss_type {', '.join(LOSS_TYPES)}; importance_sampling_level token, sequence; "
    "one process, DDP or FSDP2, not compiled; full weights or PEFT adapters outside of the head; heads with final_logit_softcapping or a "
    "positive logit_scale"
)
MODEL_INPUTS = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes"),
    *("token_type_ids", "mm_token_type_ids", "image_position_ids"),
)


# ---- what is computed


def spec_of(args: Any) -> GRPOSpec:
    """The GRPOSpec of a TRL GRPOConfig: what its loss_type and the options of the loss mean in our terms.

    The normaliser is not in it (`GLOBAL_MEAN`), nor off_policy_mask_threshold, which depends on the log-probs. ValueError for an unknown
    loss_type, level or mode, and for a value that would make another loss of it. Source: GRPOConfig of TRL 1.15 and 1.16.
    """
    if args.loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type: {args.loss_type!r} is not supported; {SUPPORTED}")
    named = NAMED[args.loss_type]
    objective, high = named.get("objective", "clip"), args.epsilon if args.epsilon_high is None else args.epsilon_high
    if objective == "cispo" and high < 1:
        warnings.warn(CISPO_CAP.format(high), stacklevel=2)
    low, top = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    low, top = 0.0 if low is None else low, torch.inf if top is None else top
    if objective == "vespo" and not low <= 1 <= top:
        raise ValueError(f"vllm_importance_sampling_clip_min, _max: vespo needs 1 between them (TRL counts padding as 1), got {low}, {top}")
    return GRPOSpec(
        objective=objective,
        aggregation=named["aggregation"],
        ratio=args.importance_sampling_level,
        clip_low=args.epsilon,
        clip_high=high - 1 if objective == "cispo" else high,
        clip_delta=args.delta if objective == "clip" else None,
        beta=args.beta,
        kl_bias_correction=args.use_bias_correction_kl,
        entropy_coef=args.entropy_coef,
        importance=args.vllm_importance_sampling_mode,
        importance_min=low,
        importance_max=top,
        top_entropy=args.top_entropy_quantile,
        **{f"sapo_temperature_{sign}": getattr(args, f"sapo_temperature_{sign}") for sign in ("pos", "neg")},
        **{f"vespo_{name}_{sign}": getattr(args, f"vespo_{name}_{sign}") for name in ("k", "lambda") for sign in ("pos", "neg")},
    )


# ---- the head's part


def add_head(model: Any, temperature: float, cast_lm_head_to_fp32: bool, workspace_mb: Callable[[], float | None]) -> None:
    """Give a transformers model's forward the keywords `policy_loss` and `fused_lm_head`; without them the forward is as before.

    model(..., labels=labels, policy_loss=f) with labels (B, L) int64 calls f(hidden, weight, targets, bias=, temperature=, softcap=) with
    the hidden states (T, H) whose next label is not -100, in order; f returns a GRPOLoss. fused_lm_head=True is what TRL scores old and
    reference log-probs with: the same head, so that a ratio of equal weights is 1, within workspace_mb() MiB. The forward returns loss,
    differentiable (of fused_lm_head: -log-prob, a mean over the labels); log_probs and entropy (B, L - 1), 0 elsewhere; aux_loss of a
    mixture of experts where router logits are asked for. It happens inside of the forward so that autocast, PEFT and DDP see the head
    used. ValueError for a head whose scaling we do not know.
    """
    original, config = model.forward, model.config.get_text_config()
    if model.base_model is model:
        raise ValueError(f"model: {type(model).__name__} has no trunk apart from its head; {SUPPORTED}")
    for name in ("output_multiplier", "lm_head_multiplier", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1):
            raise ValueError(f"model: its logits are scaled by {name} = {getattr(config, name)}; {SUPPORTED}")
    scale = getattr(config, "logit_scale", None)
    scaling = head_scaling(temperature, getattr(config, "final_logit_softcapping", None), 1.0 if scale is None else scale)

    def scored(hidden: Tensor, weight: Tensor, targets: Tensor, **scaling: Any) -> ops.GRPOLoss:
        logp, entropy = ops.linear_logprob(hidden, weight, targets, **scaling, workspace_mb=workspace_mb())
        assert entropy is not None
        return ops.GRPOLoss(-logp.sum() / max(len(targets), 1), logp.new_empty(0), logp, entropy)

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(
        self: Any, *args: Any, policy_loss: Callable[..., ops.GRPOLoss] | None = None, fused_lm_head: bool = False, **kwargs: Any
    ) -> Any:
        if policy_loss is None and not fused_lm_head:
            return original(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        out = self.base_model(*args, use_cache=False, **kwargs)
        head, chosen = self.get_output_embeddings(), labels != -100

        def rows(hidden: Tensor) -> ops.GRPOLoss:
            refuse_partitioned(head.weight)
            as_is: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
            if cast_lm_head_to_fp32:
                hidden, as_is = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
            with as_is:
                weight, bias = like(hidden, head.weight), like(hidden, getattr(head, "bias", None))
                return (policy_loss or scored)(hidden, weight, labels[chosen], bias=bias, **scaling)

        loss, _, *values = _as_forward(head, rows, out.last_hidden_state[:, :-1][chosen])  # (T, H)
        logp, entropy = (torch.zeros(labels.shape, device=x.device).masked_scatter(chosen, x.float()) for x in values)
        aux_loss = _aux_loss(config, out, kwargs)
        return trl.trainer.utils.FusedCausalLMOutput(loss=loss.float(), log_probs=logp, entropy=entropy, aux_loss=aux_loss)

    model.forward = types.MethodType(forward, model)


def _as_forward(head: Any, f: Callable[[Tensor], ops.GRPOLoss], hidden: Tensor) -> ops.GRPOLoss:
    """f(hidden) as the head's own forward pass, around which those that keep its weights elsewhere, such as FSDP2, have their hooks: they
    gather them for it and reduce their gradients behind its backward pass."""
    own = head.__dict__.get("forward")
    head.forward = f
    try:
        return head(hidden)
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def _aux_loss(config: Any, out: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The load-balancing loss of a mixture of experts, scalar, where its router logits were asked for."""
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(out.router_logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask"))


class Scaling(TypedDict):
    """The arguments of our ops that scale the logits."""

    temperature: float
    softcap: float | None


def head_scaling(temperature: float, softcap: float | None, logit_scale: float) -> Scaling:
    """softcap * tanh(logit_scale * x / softcap) / temperature as our ops write it, with the scale in the other two."""
    if not logit_scale > 0:
        raise ValueError(f"logit_scale: must be > 0, got {logit_scale}; {SUPPORTED}")
    return {"temperature": temperature / logit_scale, "softcap": None if softcap is None else softcap / logit_scale}


@overload
def like(hidden: Tensor, x: Tensor) -> Tensor: ...
@overload
def like(hidden: Tensor, x: None) -> None: ...
def like(hidden: Tensor, x: Tensor | None) -> Tensor | None:
    """A head's parameter in the dtype of the hidden states, in which TRL multiplies; under autocast the op casts both."""
    return x if x is None or torch.is_autocast_enabled(hidden.device.type) else x.to(hidden.dtype)


def refuse_partitioned(weight: Tensor) -> None:
    if hasattr(weight, "ds_id"):
        raise ValueError(f"lm_head: DeepSpeed has partitioned its weight, which would be gone in the backward pass; {SUPPORTED}")


# ---- the trainer's part


def keep_outputs(accelerator: Any) -> None:
    """Before models are wrapped: leave what they return in its dtype. accelerate has FSDP2 round all of it to that of the computation, and
    under bf16 that would be the log-probs, whose differences are the ratios, and the loss."""
    policy: Any = getattr(getattr(accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) in (torch.bfloat16, torch.float16):
        accelerator.state.fsdp_plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def prepare(trainer: Any, workspace_mb: float | None) -> None:
    """Check that our loss serves this trainer, and give its models the head's part; a second time only the workspace changes."""
    spec_of(_current(trainer))
    distributed = trainer.accelerator.distributed_type.name
    if distributed == "FSDP":
        distributed += str(trainer.accelerator.state.fsdp_plugin.fsdp_version)
    if distributed not in DISTRIBUTED:
        way = "set accelerate's fsdp_version to 2, launch with its multi_gpu (DDP), keep trl.GRPOTrainer, or take `actial grpo`"
        raise ValueError(f"distributed_type: {distributed} is not supported: {way}; {SUPPORTED}")
    if trainer.args.torch_compile:
        raise ValueError(f"torch_compile: would compile the loss anew at every step, set it to False; {SUPPORTED}")
    if not hasattr(trainer, "workspace_mb"):
        inner = trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model
        for model in (inner, trainer.ref_model):
            if model is not None:
                add_head(model, trainer.temperature, trainer.args.cast_lm_head_to_fp32, lambda: trainer.workspace_mb)
    trainer.workspace_mb = workspace_mb


def _current(trainer: Any) -> types.SimpleNamespace:
    """The trainer's options of the loss as they are now: it keeps its own copy of some, which callbacks may change."""
    modes = [f"vllm_importance_sampling_{name}" for name in ("mode", "clip_min", "clip_max")]
    own = ["loss_type", "importance_sampling_level", "beta", "epsilon_high", "top_entropy_quantile", "entropy_coef", *modes]
    kept = {name: getattr(trainer, name) for name in own}
    return types.SimpleNamespace(**vars(trainer.args) | kept | {"epsilon": trainer.epsilon_low})


def compute_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """GRPOTrainer._compute_loss: the loss, scalar, of B completions as its _prepare_inputs gives them; logs what it logs."""
    if not hasattr(trainer, "workspace_mb"):
        raise ValueError("trainer: made before patch_trl() was called; patch first, then make the trainer")
    training = trainer.model.training
    steps = trainer.current_gradient_accumulation_steps if training else 1
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)  # (B, C)
    spec = spec_of(_current(trainer))
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        spec = replace(spec, entropy_coef=0.0)
    kept = mask.bool()
    losses: list[Tensor] = []

    def head(hidden: Tensor, weight: Tensor, targets: Tensor, **scaling: Any) -> ops.GRPOLoss:
        nonlocal kept
        scaling["workspace_mb"] = trainer.workspace_mb
        rows = mask.bool()
        policy = None
        if spec.top_entropy < 1 or trainer.off_policy_mask_threshold is not None:
            with torch.no_grad():
                logp, entropy = ops.linear_logprob(hidden, weight, targets, **scaling)
            assert entropy is not None
            kept, policy = _chosen(trainer, inputs, mask, spec, _grid(rows, logp), _grid(rows, entropy))
            policy = policy[rows]
        bonus = kept[rows].float() / (kept.sum().clamp(min=1) * steps) if spec.entropy_coef else None
        given = _rows(trainer, inputs, rows, spec, steps, training)
        return ops.linear_grpo_loss(hidden, weight, targets, spec=spec, **given, policy_mask=policy, entropy_weight=bonus, **scaling)

    def score(labels: Tensor, fused_lm_head: bool, **model_inputs: Any) -> types.SimpleNamespace:
        prompt = torch.zeros(len(mask), labels.shape[1] - mask.shape[1], dtype=torch.bool, device=mask.device)
        labels = labels.masked_fill(~torch.cat([prompt, mask.bool()], 1), -100)
        out = model(**model_inputs, labels=labels, policy_loss=head)
        losses.append(out.loss)
        return out

    # TRL's own function makes the model's inputs; in the place of the model it calls `score`, for the whole batch at once
    ids, attention = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask"))
    shown = {name: inputs.get(name) for name in MODEL_INPUTS}
    flags = {"compute_entropy": True, "compute_aux_loss": trainer.aux_loss_enabled}
    logp, entropy, aux = trainer._get_per_token_logps_and_entropies(score, ids, attention, mask.shape[1], **flags, **shown)

    (loss,), mode = losses, "train" if training else "eval"
    if trainer._entropy_bonus_enabled:
        _log_entropy_bonus(trainer, mode, loss.detach(), entropy.detach(), kept, spec, steps)
    if trainer.aux_loss_enabled:
        loss = loss + trainer.router_aux_loss_coef * aux / steps
        trainer._metrics[mode]["aux_loss"].append(trainer.accelerator.gather_for_metrics(aux).mean().item())
    _log(trainer, mode, inputs, mask, spec, logp.detach(), entropy.detach())
    return loss


def _rows(trainer: Any, inputs: dict[str, Any], rows: Tensor, spec: GRPOSpec, steps: int, training: bool) -> dict[str, Any]:
    """The arguments of `ops.linear_grpo_loss` that are (T,), for the rows (B, C) bool that carry loss, and cu_seqlens."""
    lengths = rows.sum(1).cpu()
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    tokens: float | Tensor = max(int(cu_seqlens[-1]), 1) * steps
    if trainer.loss_type in GLOBAL_MEAN:  # TRL counts the tokens of the generation batch, of which this optimizer step is a part
        share = steps / trainer.args.steps_per_generation if training else 1.0
        tokens = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes * share
    ones = torch.ones(int(cu_seqlens[-1]), dtype=torch.bool, device=rows.device)
    sizes = {"tokens": tokens, "sequences": len(rows) * steps, "max_length": trainer.max_completion_length}
    advantages = inputs["advantages"].reshape(len(rows), -1).expand(rows.shape)
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    named = {
        "advantages": advantages,
        "old_logp": inputs.get("old_per_token_logps"),
        "ref_logp": inputs["ref_per_token_logps"] if spec.beta else None,
        "sampler_logp": inputs["sampling_per_token_logps"] if corrected else None,
    }
    given = {name: None if x is None else x[rows] for name, x in named.items()}
    return given | {"token_weight": ops.token_weights(spec, cu_seqlens, mask=ones, **sizes), "cu_seqlens": cu_seqlens}


def _chosen(trainer: Any, inputs: dict[str, Any], mask: Tensor, spec: GRPOSpec, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """Where the entropies are high, and where the policy term counts: there, less sequences too far off policy; (B, C) bool."""
    kept = mask.bool()
    if spec.top_entropy < 1:
        kept = trainer.get_high_entropy_mask(entropy, mask, 1 - spec.top_entropy)  # over all processes
    if trainer.off_policy_mask_threshold is None:
        return kept, kept
    old = inputs.get("old_per_token_logps", logp)
    sampled = inputs.get("sampling_per_token_logps", old)
    advantages = inputs["advantages"].reshape(len(mask), -1)
    near = trainer.get_off_policy_mask(advantages, logp, sampled, mask, trainer.off_policy_mask_threshold)
    return kept, kept & near.bool()


def _grid(rows: Tensor, x: Tensor) -> Tensor:
    """(T,) back at its rows (B, C), 0 elsewhere."""
    return torch.zeros(rows.shape, device=x.device).masked_scatter(rows, x.float())


# ---- what TRL logs, in its order: the collectives must meet those of the other processes


def _log_entropy_bonus(trainer: Any, mode: str, loss: Tensor, entropy: Tensor, kept: Tensor, spec: GRPOSpec, steps: int) -> None:
    """The loss without its entropy bonus and the bonus's coefficient, which is controlled here where it is adaptive."""
    metrics, args = trainer._metrics[mode], trainer.args
    sums = torch.stack([(entropy * kept).sum(), kept.sum()])
    policy = loss + spec.entropy_coef * sums[0] / sums[1].clamp(min=1) / steps
    policy = policy if trainer.loss_type in GLOBAL_MEAN else policy * steps
    metrics["policy_loss"].append(trainer.accelerator.gather(policy).nanmean().item())
    if mode != "train":
        return
    if trainer.use_adaptive_entropy:
        window = trainer._entropy_window_stats
        trainer._entropy_window_stats = sums if window is None else window + sums
    if not trainer.accelerator.sync_gradients:
        return
    if trainer.use_adaptive_entropy:
        total, count = trainer.accelerator.reduce(trainer._entropy_window_stats, reduction="sum")
        world = (total / count.clamp(min=1)).item()
        change = args.entropy_coef_delta if world <= args.entropy_target else -args.entropy_coef_delta
        trainer.entropy_coef = min(max(trainer.entropy_coef + change, args.entropy_coef_min), args.entropy_coef_max)
        trainer._last_world_entropy, trainer._entropy_window_stats = world, None
    metrics["entropy_coef"].append(trainer.entropy_coef)


def _log(trainer: Any, mode: str, inputs: dict[str, Any], mask: Tensor, spec: GRPOSpec, logp: Tensor, entropy: Tensor) -> None:
    """KL, entropy and shares of clipped ratios from log-probs and entropies (B, C): a sequence's ratio (B, 1) counts once, TRL's way."""
    metrics, counted = trainer._metrics[mode], mask.bool()
    advantages = inputs["advantages"].reshape(len(mask), -1)
    log_ratio = torch.where(counted, logp - inputs.get("old_per_token_logps", logp), 0)
    log_weight = log_ratio
    if spec.ratio == "sequence":
        log_weight = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = log_weight.exp()

    def mean(name: str, x: Tensor) -> None:
        once = x.shape[1] == 1
        sums = torch.stack([x.sum() if once else x[counted].sum(), mask.new_tensor(len(x)) if once else mask.sum()])
        total, count = trainer.accelerator.reduce(sums, reduction="sum")
        metrics[name].append((total / count.clamp(min=1)).item())

    def extreme(name: str, x: Tensor, of: Callable[[Tensor], Tensor]) -> None:
        each = x.squeeze(1) if x.shape[1] == 1 else (x * mask).sum(1) / mask.sum(1)
        metrics[name].append(of(trainer.accelerator.gather(each)).item())

    if spec.beta:
        kl = ops.token_kl(logp[counted], inputs["ref_per_token_logps"][counted].float())
        mean("kl", _grid(counted, kl) * (ratio if spec.kl_bias_correction else 1))
    mean("entropy", entropy)
    if spec.objective == "clip":
        low = ((ratio < 1 - spec.clip_low) & (advantages < 0)).float()
        high = ((ratio > 1 + spec.clip_high) & (advantages > 0)).float()
        mean("clip_ratio/low_mean", low)
        mean("clip_ratio/high_mean", high)
        mean("clip_ratio/region_mean", low + high)
        extreme("clip_ratio/low_min", low, trl.trainer.utils.nanmin)
        extreme("clip_ratio/high_max", high, trl.trainer.utils.nanmax)
    elif spec.objective == "cispo":
        mean("cispo_clip_ratio", ((ratio > 1 + spec.clip_high) & (advantages > 0)).float())
    elif spec.objective == "vespo":
        constants = {name: getattr(spec, f"vespo_{name}") for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}
        sampled = inputs.get("importance_sampling_ratio")
        mean("vespo/phi_seq_mean", trainer.get_gamma_weights(advantages, log_ratio, mask, sampled, **constants))
