"""Keys that a recipe sets and that do nothing in it, because of what other keys say."""

from __future__ import annotations

from collections.abc import Iterator

from actial_fast.settings.config import describe
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe


def idle(recipe: SFTRecipe | GRPORecipe) -> Iterator[str]:
    """One line for each key that is not at its default and has no effect, with the reason, and for a learning rate that leaves none."""
    if not recipe.optim.lr:
        yield "optim.lr = 0 moves no weight: nothing will be learned"
    causes = list(_causes(recipe))
    for key, value, default, _ in describe(recipe):
        if value != default:
            for names, why in causes:
                if key.startswith(names):
                    yield f"{key} = {value} has no effect: {why}"
                    break


def _causes(recipe: SFTRecipe | GRPORecipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """(beginnings of keys, why they have no effect)."""
    engine = recipe.rollout.engine
    if recipe.packing == "packed":
        yield ("micro_batch",), "packing is packed, where pack_tokens and pack_patches decide"
    else:
        yield ("pack_tokens", "pack_patches", "costs."), "packing is plain"
    if not recipe.model.lora.rank:
        yield ("model.lora.alpha", "model.lora.dropout", "model.lora.targets"), "model.lora.rank is 0"
    if len(recipe.data.sources) == 1:
        yield ("data.sources.0.weight",), "there is one source"
    if not recipe.eval.sources:
        drawing = tuple(f"eval.{name}" for name in ("temperature", "max_new_tokens", "strict", "kv_tokens"))
        yield drawing if recipe.eval.loss_sources else ("eval.",), "eval.sources is empty"
    elif all(source.task for source in recipe.eval.sources):
        yield ("eval.strict",), "every source of it has a task, whose metric says what is right"
    if recipe.optim.schedule == "constant":
        yield ("optim.min_lr_ratio",), "optim.schedule is constant"
    if engine != "vllm":
        names = ("tensor_parallel", "gpu_memory", "max_images", "offload")
        yield tuple(f"rollout.{name}" for name in names), f"rollout.engine is {engine}"
    if engine != "server":
        yield ("rollout.url", "rollout.model", "rollout.workers"), f"rollout.engine is {engine}"
    if isinstance(recipe, SFTRecipe):
        if recipe.steps:
            yield ("epochs",), "steps is given"
        if not recipe.stop_accuracy:
            yield ("stop_steps",), "stop_accuracy is 0"
        return
    if not recipe.sampling.oversample:
        yield ("sampling.max_draws",), "sampling.oversample is 0"
    if not recipe.sampling.gate.on:
        yield ("sampling.gate.",), "the gate closes no source"
    if not recipe.overlong.buffer:
        yield ("overlong.penalty",), "overlong.buffer is 0"
    if recipe.loss.beta:
        yield ("skip_reference",), "loss.beta needs the reference"
