"""`actial quickstart`, `actial sft`, `actial grpo`: runs of the loops."""

from __future__ import annotations

import argparse
import json
import os
import sys

from actial_fast.cli.shared import Commands, add_overrides, settle


def add(commands: Commands) -> None:
    """The commands of this group."""
    quick = commands.add_parser("quickstart", help="the whole job from nothing, on a CPU: data, SFT, GRPO, evaluation, report")
    quick.add_argument("--recipe", default="recipes/quickstart.yaml", help="recipe of kind quickstart (default: %(default)s)")
    add_overrides(quick, "sft.optim.lr=1e-4")
    quick.set_defaults(run=_quickstart)

    for kind, text in (("sft", "supervised fine-tuning"), ("grpo", "reinforcement with verifiable rewards")):
        train = commands.add_parser(kind, help=f"{text}; run it again to go on from the last checkpoint")
        train.add_argument("recipe", help=f"a YAML recipe, for example recipes/actial-7b-{kind}.yaml")
        train.add_argument("--gpus", type=int, metavar="N", help="this machine's GPUs to use, a rank each (default: one process)")
        train.add_argument("--on-bad-row", choices=("error", "skip"), help="what a malformed row does (data.on_bad_row)")
        add_overrides(train)
        train.set_defaults(run=_train, kind=kind)


def _quickstart(args: argparse.Namespace) -> int:
    from actial_fast.quickstart import run
    from actial_fast.settings.config import load_recipe

    settle()
    summary = run(load_recipe(args.recipe, args.overrides))
    print(json.dumps(summary, indent=1))
    return 0


def _train(args: argparse.Namespace) -> int:
    import importlib

    from actial_fast.settings.config import load_recipe
    from actial_fast.settings.idle import idle

    _check_gpus(args.gpus)
    extra = [f"data.on_bad_row={args.on_bad_row}"] if args.on_bad_row else []
    recipe = load_recipe(args.recipe, [*args.overrides, *extra])
    if recipe.kind != args.kind:
        raise ValueError(f"{args.recipe} is a recipe for `actial {recipe.kind}`, not for `actial {args.kind}`")
    if args.gpus not in (None, 1) and "RANK" not in os.environ:
        from actial_fast.cli.launch import launch

        return launch(args.gpus, [args.kind, args.recipe, *args.overrides, *extra])
    settle()
    if int(os.environ.get("RANK", 0)) == 0:
        for line in idle(recipe):
            print(f"note: {line}", file=sys.stderr)
    final = importlib.import_module(f"actial_fast.{args.kind}").train(recipe)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"finished: {final}")
    return 0


def _check_gpus(gpus: int | None) -> None:
    """ValueError for a number that no run can have, and, where torchrun has started this rank, for another than its."""
    if gpus is not None and gpus < 1:
        raise ValueError(f"--gpus {gpus}: give the number of GPUs to use, 1 or more; without the option there is one process")
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus is not None and "RANK" in os.environ and gpus != ranks:
        raise ValueError(f"--gpus {gpus}: another launcher has started {ranks} of this machine's ranks already; leave the option out")
