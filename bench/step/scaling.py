"""How much of 1, 2, 4 and 8 GPUs a GRPO step of Qwen2.5-VL-7B would use: a prediction from measured parts, with what is assumed beside it.

    python -m bench.step.scaling [--recipe recipes/actial-7b-grpo.yaml] [--gpu H100] [--steps 4] [--json FILE]

The same step on any number of GPUs: the recipe's prompts, of lengths as bench.host.planner draws them (two images, 16 completions,
lognormal with mean 300, 40 to 1,000), so that n GPUs have 1/n of it each. Measured here: how even the ranks are, by the planner that the
loop balances with, mini-batch by mini-batch, and by the replies that each rank has to draw; and the bytes that a rank sends, counted on the
real policy by bench.step.comm. Computed: FLOPs that are executed, of the update and of drawing replies (actial_fast.budget.seconds).
Assumed: the GPU's speed by its datasheet, and what of the messages the passes do not hide: none of them at best, half of them at worst.
Efficiency is the seconds of one GPU that had the room, over n times those of n; the goal is 92% at 8 GPUs. Drawing replies scales worse
than the update, since each GPU reads all weights for every token, for as long as its longest reply takes. No GPU was there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from actial_fast.budget import gpus
from actial_fast.budget.models import config_of
from actial_fast.budget.phases import Case
from actial_fast.budget.plan import plan
from actial_fast.budget.rates import rates_of
from actial_fast.budget.seconds import micro_batches, sampling, update_flops
from actial_fast.budget.workload import Workload
from actial_fast.packing import native
from actial_fast.settings.config import load_recipe
from actial_fast.settings.recipe import GRPORecipe
from actial_fast.train.balance import UNBOUNDED
from bench.harness.timing import machine
from bench.host.planner import rollouts
from bench.step.comm import row

GPUS = 1, 2, 4, 8
EXPOSED = 0.5  # assumed: share of the messages' time that passes do not hide, at worst
GOAL = 0.92


def balance(recipe: GRPORecipe, ranks: int, steps: int) -> tuple[float, float]:
    """How much longer the most loaded rank takes than the mean, in the update by the planner's cost and in drawing replies by its slots'
    tokens, as the mean over some steps."""
    rng, update, drawing = np.random.default_rng(0), [], []
    for _ in range(steps):
        heaviest = mean = 0.0
        drawn = np.zeros(ranks)
        for _ in range(recipe.prompts // recipe.minibatch):
            prefix, suffix, offsets, patches = rollouts(rng, recipe.minibatch)
            cost = native.plan(prefix, suffix, offsets, patches, capacity=UNBOUNDED, costs=recipe.costs, ranks=ranks).totals("cost").sum(1)
            heaviest, mean = heaviest + cost.max(), mean + cost.mean()
            drawn += suffix.reshape(recipe.minibatch, -1).sum(1).reshape(ranks, -1).sum(1)  # a rank draws for prompts as they come
        update.append(heaviest / mean)
        drawing.append(drawn.max() / drawn.mean())
    return statistics.mean(update), statistics.mean(drawing)


def lengths(recipe: GRPORecipe) -> Workload:
    """Means of the lengths that are drawn."""
    prefix, suffix, _, patches = rollouts(np.random.default_rng(0), 4096)
    return Workload(float(prefix.mean()), float(patches.mean()) / 4, float(suffix.mean()))


def counted(recipe: GRPORecipe) -> Callable[[int, float], float]:
    """Bytes that each of so many ranks sends in a step whose updates have so many micro-batches: its updates, and passes without gradients
    for old and reference log-probs. Counted for the most ranks and for one and two micro-batches, in which it is a line."""
    most, updates = max(GPUS), recipe.prompts // recipe.minibatch
    one, two, look = (
        1e9 * sum(row("7b", 0, recipe.dist, most, passes, update=update)["sent_gb"].values())
        for passes, update in ((1, True), (2, True), (1, False))
    )
    more = (recipe.loss.beta > 0) * updates + (updates - recipe.skip_old_logp)

    def sent(ranks: int, passes: float) -> float:
        ring = (ranks - 1) / ranks / ((most - 1) / most)
        return ring * (updates * (one + (two - one) * (passes - 1)) + more * look * passes)

    return sent


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The result as it goes into the JSON."""
    recipe = load_recipe(args.recipe, args.overrides)
    if not isinstance(recipe, GRPORecipe):
        raise ValueError(f"{args.recipe}: a recipe of kind {recipe.kind}; scaling is told of a GRPO step, so give a grpo one")
    config, load, rows, sends = config_of("", "7b"), lengths(recipe), [], counted(recipe)
    for count in GPUS:
        on = gpus.parse(f"{count}x{args.gpu}")
        rates = rates_of(on)
        assert rates is not None
        sized = recipe if count > 1 else replace(recipe, dist=replace(recipe.dist, fsdp=False))
        made = plan(sized, config, on, load, rates)
        room = plan(recipe, config, gpus.parse(f"{max(GPUS)}x{args.gpu}"), load, rates)
        kv = {p.name: p for p in room.phases}["sample"].kv_tokens  # the same room for replies, whatever else one GPU would lack
        phases = [replace(p, kv_tokens=kv) if p.name == "sample" else p for p in made.phases]
        seconds = _seconds(made.case, phases, rates)
        update, drawing = balance(recipe, count, args.steps)
        sent = sends(count, micro_batches(made.case) / (recipe.prompts // recipe.minibatch))
        link = sent / rates.link
        rows.append(
            {
                "gpus": count,
                "computed": {"sample": seconds["sample"], "update": seconds["update"]},
                "update_flops": update_flops(made.case),
                "heaviest_over_mean": {"update": round(update, 4), "sample": round(drawing, 4)},
                "sent_gb": round(sent / 1e9, 1),
                "message_seconds": round(link, 2),
            }
        )
    about = {"recipe": args.recipe, "overrides": args.overrides, "gpu": args.gpu, "steps": args.steps, "exposed": EXPOSED, "goal": GOAL}
    return {
        "schema": 1,
        "machine": machine(),
        "settings": about,
        "rates": rates.about,
        "workload": load.about,
        "rows": [each | efficiency(rows[0], each) for each in rows],
    }


def efficiency(alone: dict[str, Any], of: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of one GPU over n times those of n, of the update and of the whole step, each at the least and at the most: a fast GPU, half
    of whose messages nothing hides, is the least efficient, a slow one that hides all of them the most."""

    def took(each: dict[str, Any], names: tuple[str, ...], speed: int) -> float:
        return sum(each["heaviest_over_mean"][name] * each["computed"][name][speed] for name in names)

    out = {}
    for name, parts in (("update", ("update",)), ("step", ("sample", "update"))):
        exposed = EXPOSED * of["message_seconds"]
        shares = (took(alone, parts, 0) / (took(of, parts, 0) + exposed), took(alone, parts, 1) / took(of, parts, 1))
        out[f"{name}_efficiency"] = sorted(round(share / of["gpus"], 4) for share in shares)
    return out


def _seconds(case: Case, phases: list[Any], rates: Any) -> dict[str, tuple[float, float]]:
    """Of sampling and of the update's arithmetic alone, fastest and slowest."""
    recipe = case.recipe
    assert isinstance(recipe, GRPORecipe)
    sample = sampling(case, recipe, next(p for p in phases if p.name == "sample").kv_tokens, rates)
    flops = update_flops(case)
    return {"sample": (sample.low, sample.high), "update": (flops / rates.tflops[1], flops / rates.tflops[0])}


def told(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [f"{result['rates']}; {result['workload']}", ""]
    head = (
        "GPUs",
        "sample, s",
        "update, s",
        "heaviest rank over mean: sample, update",
        "sent by a rank",
        "efficiency: update",
        "whole step",
    )
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for each in result["rows"]:
        sample, update = (" to ".join(f"{x:.0f}" for x in each["computed"][name]) for name in ("sample", "update"))
        over = ", ".join(f"{each['heaviest_over_mean'][name]:.3f}" for name in ("sample", "update"))
        shares = " | ".join("{:.0%} to {:.0%}".format(*each[f"{name}_efficiency"]) for name in ("update", "step"))
        lines.append(f"| {each['gpus']} | {sample} | {update} | {over} | {each['sent_gb']:,.0f} GB | {shares} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Compute, print, and write the JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe")
    parser.add_argument("--recipe", default="recipes/actial-7b-grpo.yaml", help="default: %(default)s")
    parser.add_argument("--gpu", default="H100", help="by its name in actial_fast.budget.gpus (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps whose balance is averaged (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    result = measured(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(told(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
