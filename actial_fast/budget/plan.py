"""The plan of a recipe on a machine, and what to change where it does not fit: each change is planned again, and told if it helps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from actial_fast.budget.gpus import Machine
from actial_fast.budget.models import shapes_of
from actial_fast.budget.phases import PAGED, Case, Phase, Recipe, Size, largest_batch, phases_of
from actial_fast.budget.rates import Rates
from actial_fast.budget.seconds import Range, seconds_of
from actial_fast.budget.workload import Workload
from actial_fast.settings.recipe import GRPORecipe

STEP = 512  # pack_tokens are told in multiples of it
HELPS = 0.01  # share of what is too much that a change must take away to be worth telling


@dataclass(frozen=True)
class Plan:
    """A case with what it takes. rates None: no seconds; known: its phases, where they are computed already."""

    case: Case
    rates: Rates | None
    known: tuple[Phase, ...] = ()

    @cached_property
    def phases(self) -> list[Phase]:
        """In the order of a run."""
        return list(self.known) or phases_of(self.case)

    @property
    def over(self) -> float:
        """Bytes that are too much, over all devices' phases and the host."""
        short = sum((p.kv_needed - p.kv_tokens) for p in self.phases if p.kv_tokens is not None and p.kv_tokens < p.kv_needed)
        return (
            sum(max(0.0, -p.spare) for p in self.phases)
            + short * self.case.width * self.case.shapes.kv_elements
            + max(0.0, -self.host_spare)
        )

    @property
    def host_spare(self) -> float:
        """Bytes of host memory that are left in the fullest phase; infinite where the host is not known, or is the device."""
        if not self.case.machine.cuda:
            return float("inf")
        return self.case.machine.host - max(sum(p.host.values()) for p in self.phases)

    @property
    def fits(self) -> bool:
        """Whether every phase fits."""
        return all(p.fits for p in self.phases) and self.host_spare >= 0

    @cached_property
    def seconds(self) -> dict[str, Range]:
        """Of a step's phases; nothing where no rates are known."""
        return seconds_of(self.case, self.phases, self.rates) if self.rates else {}

    @cached_property
    def pack_tokens(self) -> int:
        """The largest pack_tokens whose update fits, its images with it; 0 where none does, and where nothing is packed."""
        recipe = self.case.recipe
        if recipe.packing == "plain":
            return 0
        share = 4 * self.case.workload.images / self.case.workload.prompt

        def fits(tokens: int) -> bool:
            size = Size(tokens, min(recipe.pack_patches, int(share * tokens)), 0)
            return next(p for p in phases_of(self.case, size) if p.name == "update").fits

        low, high = 0, 1
        while fits(high * STEP) and high < 2048:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle * STEP) else (low, middle)
        return low * STEP


@dataclass(frozen=True)
class Change:
    """Keys and their new values, what they cost in words, the plan with them, and whether the same is trained, to the same numbers."""

    keys: dict[str, Any]
    cost: str
    plan: Plan
    same: bool


class Option(NamedTuple):
    """Keys that take memory away, what that costs, and whether the same is trained, to the same numbers but for rounding."""

    keys: dict[str, Any]
    cost: str
    same: bool = True


def plan(recipe: Recipe, config: Any, machine: Machine, workload: Workload, rates: Rates | None = None) -> Plan:
    """The plan of a recipe whose model has this configuration, on this machine, for rows of these lengths."""
    return Plan(Case(recipe, shapes_of(config, recipe.model), machine, workload), rates)


def changes(made: Plan) -> tuple[list[Change], Change | None]:
    """What makes a plan fit that does not: single changes that do, cheapest first; and several cheap ones together, where no single one
    does that trains the same. None where nothing does."""
    single = []
    for option in options(made):
        tried = _with(made, option.keys)
        if tried is not None and tried.fits:
            single.append(Change(option.keys, option.cost, tried, option.same))
    if any(each.same for each in single):
        return single, None
    together = _together(made)
    return single, together if together and len(together.keys) > 1 and together.keys not in [each.keys for each in single] else None


def _together(made: Plan) -> Change | None:
    """Cheap changes one after another for as long as each helps, without those that turn out not to be needed, the dearest first."""
    taken: list[Option] = []
    at = made
    for _ in range(2):  # a second round: some changes are possible after others only
        for number in itertools.count():
            offered = [option for option in options(at) if option.keys not in [each.keys for each in taken]]
            if number >= len(offered) or at.fits:
                break
            tried = _with(at, offered[number].keys)
            if tried is not None and (tried.fits or tried.over < (1 - HELPS) * at.over):
                taken.append(offered[number])
                at = tried
    if not at.fits:
        return None
    for each in reversed(list(taken)):
        rest = [other for other in taken if other is not each]
        without = _with(made, _joined(rest))
        if without is not None and without.fits:
            taken, at = rest, without
    return Change(_joined(taken), "; ".join(dict.fromkeys(each.cost for each in taken)), at, all(each.same for each in taken))


def _joined(taken: list[Option]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for each in taken:
        out |= each.keys
    return out


def _with(made: Plan, keys: dict[str, Any]) -> Plan | None:
    """The plan with other values of some keys; None where the recipe may not have them."""
    recipe: Any = made.case.recipe
    try:
        for key, value in keys.items():
            recipe = _changed(recipe, key.split("."), value)
        shapes = shapes_of(made.case.shapes.config, recipe.model)
    except ValueError:
        return None
    return Plan(made.case.with_recipe(recipe, shapes), made.rates)


def _changed(config: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return replace(config, **{name: _changed(getattr(config, name), rest, value) if rest else value})


def options(made: Plan) -> Iterator[Option]:
    """Changes that may take memory away, cheapest first: those that change where things lie, then what is computed again, then what is
    kept with fewer bits, then what is trained."""
    recipe, machine = made.case.recipe, made.case.machine
    model, optim, dist = recipe.model, recipe.optim, recipe.dist
    adapters = model.lora.rank > 0
    if machine.count > 1 and not dist.fsdp:
        yield Option({"dist.fsdp": True}, "weights travel between the ranks, twice a micro-batch")
    if dist.reshard == "step":
        yield Option({"dist.reshard": "block"}, "weights travel twice a micro-batch")
    if dist.reduce == "step":
        yield Option({"dist.reduce": "pass"}, "gradients travel every micro-batch")
    if model.frozen_dtype == "float32" and (adapters or model.freeze or made.case.shares.reference):
        yield Option({"model.frozen_dtype": "bfloat16"}, "frozen weights as published, in 16 bits")
    if machine.cuda and optim.offload == "none" and not adapters:
        yield Option({"optim.offload": "sampling"}, "moments go to the host and back every step")
    yield from _for_sampling(made)
    for tokens in _smaller_batches(made):
        yield Option({"pack_tokens": tokens, "pack_patches": min(recipe.pack_patches, 4 * tokens)}, "smaller micro-batches")
    if recipe.packing == "plain" and recipe.micro_batch > 1:
        yield Option({"micro_batch": 1}, "smaller micro-batches")
    if model.checkpointing == "none":
        yield Option({"model.checkpointing": "selective"}, "layers are computed again but for attention")
    if model.checkpointing != "full":
        yield Option({"model.checkpointing": "full"}, "layers are computed again")
    if model.tower_checkpointing == "none" and made.case.shapes.trains_tower:
        yield Option({"model.tower_checkpointing": "full"}, "the tower's blocks are computed again")
    if not model.offload_activations and model.checkpointing != "none" and machine.cuda:
        yield Option({"model.offload_activations": True}, "what checkpoints keep goes to the host and back")
    if machine.cuda and optim.offload != "always" and optim.kind != PAGED and not adapters:
        yield Option({"optim.offload": "always"}, "moments pass through the device every step")
    if optim.kind == "adamw" and not adapters:
        yield Option({"optim.kind": "adamw8bit"}, "moments in 8 bits", False)
    if model.dtype == "float32" and not adapters:
        yield Option({"model.dtype": "bfloat16"}, "weights in 16 bits, rounded stochastically", False)
    if not adapters:
        yield Option({"model.lora.rank": 16, "model.frozen_dtype": "bfloat16"}, "adapters are trained in place of the weights", False)
    if machine.cuda and model.quantize == "none":
        keys = {"model.lora.rank": model.lora.rank or 16, "model.quantize": "nf4", "model.frozen_dtype": "bfloat16"}
        yield Option(keys, "adapters are trained, beside a base rounded to 4 bits", False)
    prompt, reply = recipe.data.max_prompt_tokens, 0 if not isinstance(recipe, GRPORecipe) else recipe.sampling.max_new_tokens
    for divisor in (2, 4, 8):
        shorter = {"data.max_prompt_tokens": prompt // divisor}
        if reply:
            shorter["sampling.max_new_tokens"] = min(reply, max(1024, reply // divisor))
        yield Option(shorter, "longer prompts are left out, longer replies cut", False)


def _for_sampling(made: Plan) -> Iterator[Option]:
    """For phases in which replies are drawn, where one of them does not fit."""
    recipe, kv = made.case.recipe, made.case.width * made.case.shapes.kv_elements
    for phase in made.phases:
        if phase.name not in ("sample", "eval") or phase.fits:
            continue
        if "vLLM" in phase.device:
            memory = made.case.machine.memory
            if phase.spare < 0:
                less = (phase.device["vLLM"] + phase.spare) / memory
                yield from [Option({"rollout.gpu_memory": int(100 * less) / 100}, "fewer replies at once")] if less > 0.05 else []
            lacks = max(0, phase.kv_needed - (phase.kv_tokens or 0)) * kv / memory
            if 0 < lacks and recipe.rollout.gpu_memory + lacks < 0.99:
                yield Option({"rollout.gpu_memory": round(recipe.rollout.gpu_memory + lacks + 0.005, 2)}, "more of the device is vLLM's")
            yield Option({"rollout.engine": "embedded"}, "the trainer's own sampler draws, more slowly")
        elif phase.name == "sample" and (phase.kv_tokens or 0) >= phase.kv_needed:
            yield Option({"sampling.kv_tokens": phase.kv_tokens}, "fewer replies at once")


def _smaller_batches(made: Plan) -> list[int]:
    recipe = made.case.recipe
    if recipe.packing == "plain" or all(p.fits for p in made.phases if p.name == "update"):
        return []
    least = made.case.workload.longest or recipe.data.max_prompt_tokens
    least += recipe.sampling.max_new_tokens if isinstance(recipe, GRPORecipe) else 0
    smallest = [made.pack_tokens] if least <= made.pack_tokens < recipe.pack_tokens else []
    return smallest or ([-(-least // STEP) * STEP] if least < recipe.pack_tokens else [])


def batch_of(made: Plan) -> Size:
    """The micro-batch that the plan is for."""
    return largest_batch(made.case)
