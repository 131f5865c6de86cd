"""`actial plan`: what a recipe takes on some GPUs, before anything is downloaded or started."""

from __future__ import annotations

import argparse

from actial_fast.cli.shared import Commands, add_overrides


def add(commands: Commands) -> None:
    """The commands of this group."""
    plan = commands.add_parser("plan", help="whether a recipe fits some GPUs, phase by phase, how long a step takes, and what to change")
    plan.add_argument("recipe", help="a YAML recipe of kind sft or grpo")
    plan.add_argument("--gpus", metavar="8x80", help="how many and their memory in GB, or their name, like 8xH100 (default: those found)")
    plan.add_argument("--host", type=float, metavar="GB", help="host memory (default: this machine's, where its GPUs are planned for)")
    plan.add_argument("--model", default="", metavar="7b", help="widths of 3b, 7b, 32b, 72b, qwen3-vl-8b, .. (default: the checkpoint's)")
    plan.add_argument("--prompt", type=float, metavar="TOKENS", help="mean of a prompt with its images (default: the data's, else 800)")
    plan.add_argument("--images", type=float, metavar="TOKENS", help="those of its images (default: the data's, else 640)")
    plan.add_argument("--reply", type=float, metavar="TOKENS", help="mean of a reply (default: the data's answers; GRPO: 300)")
    plan.add_argument("--rates", default="", metavar="FILE", help="speeds that `python -m bench.step.costs --rates` measured")
    add_overrides(plan)
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    from actial_fast.budget import gpus, models, rates, said
    from actial_fast.budget.plan import plan
    from actial_fast.budget.workload import assumed, known
    from actial_fast.cli.shared import settle
    from actial_fast.settings.config import load_recipe
    from actial_fast.settings.recipe import GRPORecipe, SFTRecipe
    from actial_fast.train.preflight import available_memory

    recipe = load_recipe(args.recipe, args.overrides)
    if not isinstance(recipe, SFTRecipe | GRPORecipe):
        raise ValueError(f"{args.recipe}: a recipe of kind {recipe.kind}; plan one of kind sft or grpo")
    machine = gpus.parse(args.gpus) if args.gpus else gpus.found()
    if machine is None:
        raise ValueError(f"{gpus.HOW}; this machine has none that PyTorch finds")
    if args.host is None and not args.gpus:
        args.host = available_memory() / gpus.GB
    machine = gpus.with_host(machine, args.host)
    settle()
    config = models.config_of(recipe.model.path, args.model)
    given = (args.prompt, args.images, args.reply)
    workload = (None if any(x is not None for x in given) else known(recipe)) or assumed(recipe, *given)
    made = plan(recipe, config, machine, workload, rates.rates_of(machine, args.rates))
    print(said.text(made, args.recipe))
    return 0 if made.fits else 1
