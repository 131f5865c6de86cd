"""Seconds of a step, as ranges: what must be computed, read and sent, over the rates of the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from actial_fast.budget.phases import Case, Phase
from actial_fast.budget.rates import Rates
from actial_fast.model.flops import Work, minimum
from actial_fast.rollout.embedded import MOST_ROWS
from actial_fast.rollout.memory import kv_shape
from actial_fast.settings.recipe import GRPORecipe

LAYER_SECONDS = 30e-6, 120e-6  # assumed: what the host and launches cost a layer of a decoded token, recorded as a graph or not
DISK, PCIE = (1e9, 5e9), (12e9, 25e9)  # assumed: bytes a second of a disk, and between a GPU and its host
UNPACKED = 2.0 + 2.0  # bytes that a number in NF4 is written and read again as, beside its own


@dataclass(frozen=True)
class Range:
    """Seconds, at best and at worst."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, times: float) -> Range:
        return Range(times * self.low, times * self.high)


def seconds_of(case: Case, phases: list[Phase], rates: Rates) -> dict[str, Range]:
    """Of a step's phases, on one rank of a machine whose ranks are balanced. `step`: their sum; load, save: once, and every save.every;
    eval: every eval.every, where it is known how many rows there are."""
    recipe, numel = case.recipe, case.shapes.numel
    out: dict[str, Range] = {}
    stored = 2.0 * numel
    out["load"] = _over(stored, DISK)
    kv = {phase.name: phase.kv_tokens or 0 for phase in phases}
    if isinstance(recipe, GRPORecipe):
        if recipe.rollout.engine == "vllm":
            out["sync"] = _over(2.0 * numel, (rates.link / 4, rates.link))
        out["sample"] = sampling(case, recipe, kv["sample"], rates)
    out["update"] = _update(case, rates)
    steps = Range(0, 0)
    for name in ("sync", "sample", "update"):
        steps += out.get(name, Range(0, 0))
    out["step"] = steps
    if "eval" in kv and case.workload.evaluated:
        config = recipe.eval
        out["eval"] = drawing(case, case.workload.evaluated / case.machine.count, 1, config.max_new_tokens, kv["eval"], rates)
    out["save"] = _over(sum(next(p for p in phases if p.name == "save").host.values()) or case.shares.checkpoint, DISK)
    return out


def _over(amount: float, rates: tuple[float, float]) -> Range:
    return Range(amount / rates[1], amount / rates[0])


def _update(case: Case, rates: Rates) -> Range:
    flops = update_flops(case)
    computed = _over(flops, rates.tflops)
    moved = sent(case) / rates.link
    # messages run beside the passes at best, and not at all at worst
    moving = Range(max(0.0, moved - computed.low), moved)
    if case.recipe.optim.offload == "always":
        steps = case.recipe.prompts // case.recipe.minibatch if isinstance(case.recipe, GRPORecipe) else 1
        moving += _over(2 * steps * case.shares.moments, PCIE)
    return computed + moving


def update_flops(case: Case) -> float:
    """Executed FLOPs of a step's passes on one rank: the least, and what checkpoints compute again."""
    recipe, load, model = case.recipe, case.workload, case.shapes.model
    ranks, patches = case.machine.count, 4 * load.images
    grpo = recipe if isinstance(recipe, GRPORecipe) else None
    rows = (grpo.prompts if grpo else recipe.batch_size) / ranks  # type: ignore[union-attr]
    n = grpo.sampling.n if grpo else 1
    copies = 1 if recipe.packing == "packed" else n  # of a prompt
    tokens = rows * (copies * load.prompt + n * load.reply)
    pairs = rows * (copies * load.prompt**2 / 2 + n * load.reply * (load.prompt + load.reply / 2))
    side = max(2, 2 * round((patches / 2) ** 0.5 / 2)) if patches else 0  # two square images
    images = {str(i): (1, side, side) for i in range(round(2 * rows * copies))} if patches else {}
    work = Work(round(tokens), round(pairs), round(rows * n * load.reply), round(tokens), images)
    parts = minimum(model, work, backward=True)
    total = float(sum(parts.values()))
    if recipe.model.checkpointing != "none":
        again = parts["language_forward"]
        if recipe.model.checkpointing == "selective":
            text = case.shapes.config.text_config
            again -= 4 * text.num_attention_heads * kv_shape(text)[2] * work.pairs * text.num_hidden_layers
        total += max(0.0, again)
    if recipe.model.tower_checkpointing == "full":
        total += parts["vision_forward"] * (parts["vision_backward"] > 0)
    if grpo:
        alone = sum(minimum(model, work, backward=False).values())
        late = 1 - grpo.minibatch / grpo.prompts if grpo.skip_old_logp else 1.0
        referred = grpo.loss.beta > 0 or not grpo.skip_reference
        total += alone * (late + referred)
    return total


def micro_batches(case: Case) -> float:
    """Forward and backward passes of a step on one rank."""
    recipe, load = case.recipe, case.workload
    grpo = recipe if isinstance(recipe, GRPORecipe) else None
    rows = (grpo.prompts if grpo else recipe.batch_size) / case.machine.count  # type: ignore[union-attr]
    n = grpo.sampling.n if grpo else 1
    if recipe.packing == "plain":
        return max(1.0, rows * n / recipe.micro_batch)
    steps = grpo.prompts // grpo.minibatch if grpo else 1
    return max(float(steps), rows * (load.prompt + n * load.reply) / recipe.pack_tokens, 4 * rows * load.images / recipe.pack_patches)


def sent(case: Case) -> float:
    """Bytes that a rank sends in a step's update: gathered weights and summed gradients, or, of whole copies, gradients alone."""
    recipe, ranks = case.recipe, case.machine.count
    if ranks == 1:
        return 0.0
    steps = recipe.prompts // recipe.minibatch if isinstance(recipe, GRPORecipe) else 1
    parts = max(1, ranks // recipe.dist.replicate)
    share = (parts - 1) / parts
    trained, numel = case.shapes.trained, case.shapes.numel
    if not recipe.dist.fsdp:
        return steps * 2.0 * (ranks - 1) / ranks * 4.0 * trained
    passes = micro_batches(case)
    gathered = 2.0 * numel * (steps if recipe.dist.reshard == "step" else 2 * passes)
    extra = isinstance(recipe, GRPORecipe) and (recipe.loss.beta > 0) * 2.0 * numel * passes
    reduced = 4.0 * trained * (steps if recipe.dist.reduce == "step" else passes)
    across = steps * 4.0 * trained / parts if recipe.dist.replicate > 1 else 0.0
    return share * (gathered + extra + reduced) + across


def sampling(case: Case, recipe: GRPORecipe, kv_tokens: int, rates: Rates) -> Range:
    """Drawing a step's replies."""
    replies = recipe.prompts * max(1.0, recipe.sampling.oversample) * recipe.sampling.n / case.machine.count
    return drawing(case, replies, recipe.sampling.n, recipe.sampling.max_new_tokens, kv_tokens, rates)


def drawing(case: Case, replies: float, n: int, longest: int, kv_tokens: int, rates: Rates) -> Range:
    """Decoding a rank's replies, n to a prompt, none longer than `longest`: every token of a row reads the weights once for all rows, and
    its own keys and values."""
    load, text = case.workload, case.shapes.config.text_config
    reply = min(load.reply, float(longest))
    held = reply / 2 + load.prompt / n
    rows = max(1.0, min(replies, float(MOST_ROWS), kv_tokens / held))
    tail = min(longest, 4 * reply)  # the longest replies, alone at the end
    steps = replies * reply / rows + tail
    nf4 = case.recipe.model.quantize == "nf4"
    stored = sum(w.numel * (0.5 + UNPACKED if nf4 and w.linear and not w.trained else 2.0) for w in case.shapes.weights)
    read = stored + rows * held * 2.0 * case.shapes.kv_elements
    flops = 2.0 * case.shapes.numel * rows
    at = [steps * (max(read / rates.bandwidth[k], flops / rates.tflops[k]) + text.num_hidden_layers * LAYER_SECONDS[1 - k]) for k in (0, 1)]
    prompts = 2.0 * case.shapes.numel * replies / n * load.prompt
    return Range(at[1], at[0]) + _over(prompts, rates.tflops)
