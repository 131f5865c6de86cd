"""What of a GRPO recipe verl 0.9.1 cannot do, which refuses it, and what it does otherwise, which is told: nothing is dropped unsaid."""

from __future__ import annotations

from collections.abc import Iterator

from actial_fast.data.sources.task import find_task
from actial_fast.settings.config import describe
from actial_fast.settings.recipe import GRPORecipe
from actial_fast.tasks.named import SHIPPED

RUNNING = (  # beginnings of keys that say how this project's own code does the work, and nothing of what is learned
    "model.attention",
    "data.workers",
    "data.together",
    "data.image_cache",
    "sampling.kv_tokens",
    "sampling.max_draws",
    "rollout.max_images",
    "rollout.url",
    "rollout.model",
    "rollout.workers",
    "optim.max_skipped",
    "eval.before",
    "eval.kv_tokens",
    "eval.fatal",
    "dist.",
    "profile.",
    "pack_patches",
    "costs.",
    "skip_zero_variance",
    "skip_old_logp",
    "log_rollouts",
)


class Refused(ValueError):
    """A recipe that verl cannot run as it is. problems: one line each."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


def check(recipe: GRPORecipe) -> None:
    """Refused, with every reason, where verl's result would not be the recipe's."""
    if problems := list(_problems(recipe)):
        raise Refused([f"verl 0.9.1 cannot do this: {problem}" for problem in problems])


def _problems(recipe: GRPORecipe) -> Iterator[str]:
    yield from _of_objective(recipe)
    yield from _of_rewards(recipe)
    yield from _of_model(recipe)
    yield from _of_sampling(recipe)
    if recipe.optim.schedule == "linear":
        yield "optim.schedule: its schedules are constant and cosine, not linear"
    if not recipe.data.sources:
        yield "data.sources: there are none, so there is nothing to hand over"
    for where, sources in (("data", recipe.data.sources), ("eval", recipe.eval.sources)):
        for number, source in enumerate(sources):
            if find_task(source.task).environment is not None:
                yield f"{where}.sources.{number}.task: {source.task} is answered in turns, for which verl wants an agent loop of its own"
    if recipe.prompts % recipe.minibatch:
        yield f"minibatch: prompts ({recipe.prompts}) must be a multiple of it, got {recipe.minibatch}"
    longest = recipe.data.max_prompt_tokens + recipe.sampling.max_new_tokens
    if recipe.packing == "packed" and recipe.pack_tokens < longest:
        yield f"pack_tokens: a prompt and its reply may have {longest} tokens and must fit, got {recipe.pack_tokens}"


def _of_objective(recipe: GRPORecipe) -> Iterator[str]:
    spec, advantages = recipe.loss, recipe.advantages
    if advantages.baseline == "leave_one_out" and advantages.scale != "none":
        yield "advantages.scale: with baseline leave_one_out it divides by nothing; set scale to none"
    if advantages.scale == "batch_std":
        yield "advantages.scale: it knows the group's deviation and none, not batch_std"
    if advantages.scale == "std" and advantages.epsilon != 1e-6:
        yield f"advantages.epsilon: it adds 1e-6, not {advantages.epsilon:g}"
    if advantages.combine != "sum_then_normalize":
        yield "advantages.combine: its GDPO whitens over tokens, ours over replies; set combine to sum_then_normalize"
    if spec.objective == "vespo":
        yield "loss.objective: it has no vespo"
    if spec.objective == "sapo" and spec.aggregation != "sequence":
        yield f"loss.aggregation: its sapo takes the mean of sequences' means, not {spec.aggregation}; set aggregation to sequence"
    if spec.objective in ("sapo", "cispo") and spec.ratio == "sequence":
        yield f"loss.ratio: its {spec.objective} takes the ratio of tokens"
    gspo = spec.objective == "clip" and spec.ratio == "sequence"
    if gspo and recipe.importance_correction != "off" and spec.importance.startswith("token"):
        yield "loss.importance: its gspo weighs each token's own gradient, not the sequence's; set it to sequence_truncate or sequence_mask"
    if spec.clip_delta is not None:
        yield "loss.clip_delta: it has no bound on the unclipped ratio"
    if gspo and spec.dual_clip is not None:
        yield "loss.dual_clip: its loss of sequence ratios, gspo, has none"
    if spec.kl_bias_correction:
        yield "loss.kl_bias_correction: its penalty is not weighted by the ratio"
    if spec.top_entropy < 1:
        yield "loss.top_entropy: every token of a reply carries its loss"
    if recipe.importance_correction != "off" and spec.importance.endswith("truncate") and spec.importance_min:
        yield "loss.importance_min: its truncated weights have no lower bound; set it to 0"
    if recipe.importance_correction != "off" and spec.importance_max <= 0:
        yield "loss.importance_max: must be above 0 there"


def _of_rewards(recipe: GRPORecipe) -> Iterator[str]:
    for number, reward in enumerate(recipe.rewards):
        if reward.call == "group":
            yield f"rewards.{number}.call: {reward.name} is called with all replies to a prompt, and verl scores one at a time"
        if reward.on_error == "nan":
            yield f"rewards.{number}.on_error: a reply cannot go without a reward there; set it to error"
    if recipe.overlong.mask:
        yield "overlong.mask: replies that the length limit cut stay in its loss; set it to false, or fine them with overlong.buffer"


def _of_model(recipe: GRPORecipe) -> Iterator[str]:
    model, lora = recipe.model, recipe.model.lora
    if not model.path:
        yield "model.path: needed, the weights to start from"
    if model.freeze:
        yield f"model.freeze: it trains all of the model or adapters ({', '.join(model.freeze)} would be trained)"
    if model.quantize != "none":
        yield f"model.quantize: its base under adapters is not held in {model.quantize}; set it to none"
    for name in ("dropout", "tower", "merger", "rslora", "dora"):
        if getattr(lora, name):
            yield f"model.lora.{name}: its adapters are plain ones of the language model, without dropout"
    if lora.rank and lora.alpha != int(lora.alpha):
        yield f"model.lora.alpha: it takes whole numbers, not {lora.alpha:g}"


def _of_sampling(recipe: GRPORecipe) -> Iterator[str]:
    if recipe.sampling.gate.on:
        yield "sampling.gate: its sources cannot be closed by their pass rate"
    if recipe.rollout.ahead:
        yield "rollout.ahead: its asynchronous trainers draw by rules of their own; set it to 0, and see trainer.v1.trainer_mode"


def told(recipe: GRPORecipe) -> list[str]:
    """What verl does otherwise with this recipe, a line each."""
    return [*_differences(recipe), *_left_out(recipe)]


def _differences(recipe: GRPORecipe) -> Iterator[str]:
    spec, optim, model = recipe.loss, recipe.optim, recipe.model
    yield "prompts come in an order of its own; groups, steps and mini-batches are of the same sizes"
    yield "vLLM draws, whatever rollout.engine says; a reply may hold vision tokens, which are never drawn here"
    if recipe.importance_correction == "auto" and recipe.rollout.engine == "embedded":
        yield "importance_correction: auto is on, since vLLM draws"
    if recipe.advantages.scale == "std":
        yield "groups of equal rewards have advantage 0 here; there what rounding leaves of their mean is divided by 1e-6"
    if spec.beta and spec.kl == "k3":
        yield "loss.kl: k3 of a token stops at 10 and has no gradient beyond, where reference and policy are a factor of 14 apart"
    if optim.warmup_steps:
        yield "optim.warmup_steps: the rise begins at 0: each of its steps has the rate that the step before it has here"
    if optim.weight_decay:
        yield "optim.weight_decay: vectors (norms, biases) decay as well, here matrices alone"
    if model.dtype == "bfloat16" and not optim.master:
        yield "model.dtype: bfloat16 weights are rounded to the nearest, not stochastically: small steps are lost; optim.master avoids that"
    if model.lora.rank and model.frozen_dtype != "float32" and model.dtype == "float32":
        yield f"model.frozen_dtype: the base under adapters is held in float32 as they are, not in {model.frozen_dtype}"
    if {model.checkpointing, model.tower_checkpointing} not in ({"none"}, {"full"}):
        yield "model.checkpointing, model.tower_checkpointing: all layers of both are computed again"
    if recipe.sampling.oversample:
        yield "sampling.oversample: groups that differ are taken as they end, not in the stream's order; it draws until there are enough"
    if recipe.eval.loss_sources:
        yield "eval.loss_sources: losses of held-out rows are not measured"
    if recipe.eval.sources and recipe.eval.max_new_tokens != recipe.sampling.max_new_tokens:
        here, there = recipe.eval.max_new_tokens, recipe.sampling.max_new_tokens
        yield f"eval.max_new_tokens: replies of evaluations may have {there} tokens, as those of training, not {here}"
    if own := [reward.name for reward in recipe.rewards if reward.name not in SHIPPED]:
        yield f"rewards: {', '.join(own)} must be importable where verl scores (PYTHONPATH), and see rows without images"
        yield f"rewards: of some replies to a prompt that {' or '.join(own)} gives None for, the term is the others' mean here, and 0 there"
    if any(reward.workers and reward.name not in SHIPPED for reward in recipe.rewards):
        yield "rewards.workers: verl's reward workers (reward.num_workers) and their threads make the calls, each one at a time"
    if tasks := sorted({s.task for s in (*recipe.data.sources, *recipe.eval.sources) if ":" in s.task}):
        yield f"data.sources.task: {', '.join(tasks)} must be importable where verl scores (PYTHONPATH)"


def _left_out(recipe: GRPORecipe) -> Iterator[str]:
    """Keys that are set and have no counterpart, because they say how this project runs."""
    if keys := [key for key, value, default, _ in describe(recipe) if value != default and key.startswith(RUNNING)]:
        yield f"not handed over, since they say how this project runs: {', '.join(keys)}"
