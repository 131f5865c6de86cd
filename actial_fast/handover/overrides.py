"""A GRPO recipe in the words of verl 0.9.1's configuration: overrides for Hydra, each beside the fields of the recipe that it says."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actial_fast.settings.recipe import GRPORecipe

NEVER = 1e9  # a bound that nothing reaches: ratios stop at exp(20), which is 5e8
TINY = 1e-9  # and a ratio's lower one
AGGREGATIONS = {
    "token": "token-mean",
    "sequence": "seq-mean-token-mean",
    "sequence_sum": "seq-mean-token-sum",
    "constant": "seq-mean-token-sum-norm",
}
KL = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}
OPTIMIZERS = {
    "adamw": ("torch.optim", "AdamW"),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "paged_adamw8bit": ("bitsandbytes.optim", "PagedAdamW8bit"),
}
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
ACTOR, ROLLOUT, REF, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "ref", "model"))
PLAIN = re.compile(r"[A-Za-z][\w./-]*")


@dataclass(frozen=True)
class Beside:
    """A file beside the script that names it."""

    name: str


@dataclass(frozen=True)
class Override:
    """key=value for Hydra; `why`: the fields of the recipe that it says, or why it is said."""

    key: str
    value: Any
    why: str = ""


def overrides(recipe: GRPORecipe, train: list[str], validation: str, pixels: tuple[int, int]) -> list[Override]:
    """Everything of the recipe that verl's trainer is told; the recipe is one that verl can run (refusals.py).

    train, validation: names of the files with its rows, the latter '' where nothing is evaluated; pixels: fewest and most of an image."""
    return [
        *_objective(recipe),
        *_optimizer(recipe),
        *_model(recipe),
        *_sampling(recipe),
        *_data(recipe, train, validation, pixels),
        *_trainer(recipe),
    ]


def _objective(recipe: GRPORecipe) -> Iterator[Override]:
    spec, advantages = recipe.loss, recipe.advantages
    out = advantages.baseline == "leave_one_out"
    yield Override("algorithm.adv_estimator", "rloo" if out else "grpo", "advantages.baseline")
    yield Override("algorithm.norm_adv_by_std_in_grpo", advantages.scale == "std", "advantages.scale")
    yield Override("algorithm.use_kl_in_reward", False, "the penalty is a term of the loss")
    yield Override(f"{ACTOR}.policy_loss.loss_mode", loss_mode(recipe), "loss.objective, loss.ratio")
    low, high = (spec.clip_low, spec.clip_high) if spec.objective == "clip" else (1.0, spec.clip_high)
    if spec.objective != "sapo":
        yield Override(f"{ACTOR}.clip_ratio", low, "loss.clip_low")
        yield Override(f"{ACTOR}.clip_ratio_low", low, "loss.clip_low" if spec.objective == "clip" else "no bound below")
        yield Override(f"{ACTOR}.clip_ratio_high", high, "loss.clip_high")
    yield Override(f"{ACTOR}.clip_ratio_c", spec.dual_clip or NEVER, "loss.dual_clip")
    yield Override(f"{ACTOR}.tau_pos", spec.sapo_temperature_pos, "loss.sapo_temperature_pos")
    yield Override(f"{ACTOR}.tau_neg", spec.sapo_temperature_neg, "loss.sapo_temperature_neg")
    yield Override(f"{ACTOR}.loss_agg_mode", AGGREGATIONS[spec.aggregation], "loss.aggregation")
    longest = recipe.sampling.max_new_tokens
    yield Override(f"{ACTOR}.loss_scale_factor", longest if spec.aggregation == "constant" else None, "loss.aggregation")
    yield Override(f"{ACTOR}.use_kl_loss", spec.beta > 0 or not recipe.skip_reference, "loss.beta, skip_reference")
    yield Override(f"{ACTOR}.kl_loss_coef", spec.beta, "loss.beta")
    yield Override(f"{ACTOR}.kl_loss_type", KL[spec.kl], "loss.kl")
    yield Override(f"{ACTOR}.entropy_coeff", spec.entropy_coef, "loss.entropy_coef")
    yield Override(f"{ACTOR}.ppo_mini_batch_size", recipe.minibatch, "minibatch")
    yield Override(f"{ACTOR}.ppo_epochs", 1, "each reply is learned from once")
    correction = "algorithm.rollout_correction"
    if recipe.importance_correction == "off":
        yield Override(f"{correction}.rollout_is", None, "importance_correction")
        return
    level, _, kind = spec.importance.partition("_")
    most = spec.importance_max
    yield Override(f"{correction}.rollout_is", level, "loss.importance")
    bound = f"{spec.importance_min or TINY}_{most}" if kind == "mask" else most
    yield Override(f"{correction}.rollout_is_threshold", bound, "loss.importance_min, loss.importance_max")
    yield Override(f"{correction}.rollout_is_batch_normalize", False, "weights stay as they are")
    yield Override(f"{correction}.bypass_mode", False, "old log-probs are the policy's own")


def loss_mode(recipe: GRPORecipe) -> str:
    """verl's name of the policy loss."""
    spec = recipe.loss
    return spec.objective if spec.objective != "clip" else "gspo" if spec.ratio == "sequence" else "vanilla"


def _optimizer(recipe: GRPORecipe) -> Iterator[Override]:
    optim, place = recipe.optim, f"{ACTOR}.optim"
    module, name = OPTIMIZERS[optim.kind]
    yield Override(f"{place}.optimizer_impl", module, "optim.kind")
    yield Override(f"{place}.optimizer", name, "optim.kind")
    yield Override(f"{place}.lr", optim.lr, "optim.lr")
    yield Override(f"{place}.betas", list(optim.betas), "optim.betas")
    yield Override(f"{place}.override_optimizer_config", {"eps": optim.eps}, "optim.eps")
    yield Override(f"{place}.weight_decay", optim.weight_decay, "optim.weight_decay")
    yield Override(f"{place}.lr_warmup_steps", optim.warmup_steps, "optim.warmup_steps")
    yield Override(f"{place}.lr_scheduler_type", optim.schedule, "optim.schedule")
    yield Override(f"{place}.min_lr_ratio", optim.min_lr_ratio, "optim.min_lr_ratio")
    yield Override(f"{place}.clip_grad", optim.clip_norm or NEVER, "optim.clip_norm")
    yield Override(f"{ACTOR}.fsdp_config.optimizer_offload", optim.offload != "none", "optim.offload")
    yield Override(f"{REF}.fsdp_config.param_offload", optim.offload != "none", "optim.offload")


def _model(recipe: GRPORecipe) -> Iterator[Override]:
    model, lora = recipe.model, recipe.model.lora
    yield Override(f"{MODEL}.path", place_of(model.path), "model.path")
    yield Override(f"{ACTOR}.strategy", "fsdp2", "as here")
    held = "float32" if recipe.optim.master else model.dtype  # verl's float32 weights are the masters of bf16 passes
    yield Override(f"{ACTOR}.fsdp_config.model_dtype", DTYPES[held], "model.dtype, optim.master")
    yield Override(f"{REF}.fsdp_config.model_dtype", DTYPES[model.frozen_dtype], "model.frozen_dtype")
    again = model.checkpointing != "none" or model.tower_checkpointing != "none"
    yield Override(f"{MODEL}.enable_gradient_checkpointing", again, "model.checkpointing, model.tower_checkpointing")
    yield Override(f"{MODEL}.enable_activation_offload", model.offload_activations, "model.offload_activations")
    yield Override(f"{MODEL}.use_liger", model.liger == "on", "model.liger")
    yield Override(f"{MODEL}.lora_rank", lora.rank, "model.lora.rank")
    if lora.rank:
        yield Override(f"{MODEL}.lora_alpha", int(lora.alpha), "model.lora.alpha")
        yield Override(f"{MODEL}.target_modules", list(lora.targets), "model.lora.targets")
        yield Override(f"{MODEL}.exclude_modules", ".*visual.*", "model.lora.tower, model.lora.merger")
        yield Override(f"{ROLLOUT}.load_format", "safetensors", "vLLM reads the base itself, and is given the adapters")
    packed = recipe.packing == "packed"
    yield Override(f"{ACTOR}.use_dynamic_bsz", packed, "packing")
    if packed:
        yield Override(f"{ACTOR}.ppo_max_token_len_per_gpu", recipe.pack_tokens, "pack_tokens")
    else:
        yield Override(f"{ACTOR}.ppo_micro_batch_size_per_gpu", recipe.micro_batch, "micro_batch")
        for part in (REF, ROLLOUT):
            yield Override(f"{part}.log_prob_micro_batch_size_per_gpu", recipe.micro_batch, "micro_batch")


def place_of(model: str) -> str:
    """A hub name as it is, a folder from the root on: the script is run from elsewhere."""
    path = Path(model).expanduser()
    hub = not path.exists() and model.count("/") == 1 and not path.parent.is_dir()
    return model if hub else str(path.resolve())


def _sampling(recipe: GRPORecipe) -> Iterator[Override]:
    sampling, rollout = recipe.sampling, recipe.rollout
    yield Override(f"{ROLLOUT}.name", "vllm", "rollout.engine")
    yield Override(f"{ROLLOUT}.n", sampling.n, "sampling.n")
    yield Override(f"{ROLLOUT}.temperature", sampling.temperature, "sampling.temperature")
    yield Override(f"{ROLLOUT}.top_p", 1.0, "nothing is cut off")
    yield Override(f"{ROLLOUT}.top_k", -1, "nothing is cut off")
    yield Override(f"{ROLLOUT}.seed", recipe.seed, "seed")
    yield Override(f"{ROLLOUT}.tensor_model_parallel_size", rollout.tensor_parallel, "rollout.tensor_parallel")
    yield Override(f"{ROLLOUT}.gpu_memory_utilization", rollout.gpu_memory, "rollout.gpu_memory")
    looks = recipe.eval
    yield Override(f"{ROLLOUT}.val_kwargs.do_sample", looks.temperature > 0, "eval.temperature")
    yield Override(f"{ROLLOUT}.val_kwargs.temperature", looks.temperature, "eval.temperature")
    if sampling.oversample:
        yield Override("algorithm.filter_groups.enable", True, "sampling.oversample")
        yield Override("algorithm.filter_groups.metric", "reward", "sampling.oversample")
        batches = max(1, math.ceil(sampling.oversample))
        yield Override("algorithm.filter_groups.max_inflight_gen_batches", batches, "sampling.oversample")
    yield Override("reward.custom_reward_function.path", Beside("reward.py"), "rewards")
    yield Override("reward.custom_reward_function.name", "compute_score", "rewards")
    if recipe.overlong.buffer:
        place = "+reward.reward_kwargs"
        fine = {"enable": True, "len": recipe.overlong.buffer, "penalty_factor": recipe.overlong.penalty, "log": True}
        yield Override("reward.reward_manager.name", "dapo", "overlong")
        yield Override(f"{place}.overlong_buffer_cfg", fine, "overlong.buffer, overlong.penalty")
        yield Override(f"{place}.max_resp_len", sampling.max_new_tokens, "sampling.max_new_tokens")


def _data(recipe: GRPORecipe, train: list[str], validation: str, pixels: tuple[int, int]) -> Iterator[Override]:
    data = recipe.data
    yield Override("data.train_files", [Beside(name) for name in train], "data.sources")
    yield Override("data.val_files", [Beside(validation or train[0])], "eval.sources")
    yield Override("data.train_batch_size", recipe.prompts, "prompts")
    yield Override("data.max_prompt_length", data.max_prompt_tokens, "data.max_prompt_tokens")
    yield Override("data.max_response_length", recipe.sampling.max_new_tokens, "sampling.max_new_tokens")
    yield Override("data.filter_overlong_prompts", data.on_bad_row == "skip", "data.on_bad_row")
    yield Override("data.truncation", "error", "data.max_prompt_tokens")
    yield Override("data.shuffle", True, "the stream's order is drawn by its seed")
    yield Override("data.seed", recipe.seed, "seed")
    limits = dict(zip(("min_pixels", "max_pixels"), pixels, strict=True))
    for name, value in limits.items():
        yield Override(f"+data.mm_processor_kwargs.{name}", value, f"model.{name}")


def _trainer(recipe: GRPORecipe) -> Iterator[Override]:
    looks, save = recipe.eval, recipe.save
    yield Override("trainer.total_training_steps", recipe.steps, "steps")
    yield Override("trainer.total_epochs", recipe.steps, "the steps end it")
    yield Override("trainer.val_before_train", bool(looks.sources), "eval.sources")
    yield Override("trainer.test_freq", (looks.every or recipe.steps) if looks.sources else -1, "eval.every")
    yield Override("trainer.save_freq", save.every or recipe.steps, "save.every")
    yield Override("trainer.max_actor_ckpt_to_keep", save.keep, "save.keep")
    loggers = ["console", *(["tensorboard"] if save.tensorboard else []), *(["wandb"] if save.wandb else [])]
    yield Override("trainer.logger", loggers, "save.tensorboard, save.wandb")
    yield Override("trainer.project_name", save.wandb or Path(recipe.run).name, "save.wandb, run")
    yield Override("trainer.experiment_name", recipe.name, "name")
    yield Override("trainer.default_local_dir", Beside("checkpoints"), "run")


def hydra(value: Any) -> str:
    """A value in Hydra's grammar of overrides; of a file beside the script, $here is left to the shell."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Beside):
        return f"'$here/{value.name}'"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(hydra, value)) + "]"
    if isinstance(value, str):
        word = PLAIN.fullmatch(value) and value.lower() not in ("null", "true", "false", "nan", "inf")
        return value if word else "'" + value.replace("'", "\\'") + "'"
    return repr(value)
