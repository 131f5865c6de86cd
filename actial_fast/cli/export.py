"""`actial export`: a checkpoint of a run as folders that transformers and PEFT open; `actial export verl`: a recipe as files for verl."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from actial_fast.cli.parser import Parser
from actial_fast.cli.shared import Commands, add_overrides, progress


def add(commands: Commands) -> None:
    """The commands of this group."""
    export = commands.add_parser(
        "export",
        help="a Hugging Face folder (and PEFT adapter) from a checkpoint of a run; `export verl`: a recipe for verl",
        epilog="actial export verl RECIPE -o DIR: a GRPO recipe for verl; its own help says more",
    )
    export.add_argument("checkpoint", type=Path, help="RUN/STAGE for its newest checkpoint, or RUN/STAGE/step-000100")
    export.add_argument("-o", "--out", type=Path, required=True, help="folder to write; adapters go into its subfolder adapter/")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="",
        help="of the weights (default: as trained, and float32 where adapters are merged into them)",
    )
    export.add_argument(
        "--base",
        choices=("trained", "original"),
        default="trained",
        help="what adapters are merged into: the weights as they were in training, rounded to model.frozen_dtype and NF4, which gives the "
        "model that was trained; or those of model.path (default: trained)",
    )
    export.set_defaults(run=_export)


def below(line: Sequence[str]) -> tuple[Parser, list[str]] | None:
    """The parser of `export verl`, where a command line begins so, and the words behind; None for other lines."""
    if line[:2] != ["export", "verl"]:
        return None
    about = (
        "A GRPO recipe for verl 0.9.1, for when one node is outgrown: its rows as parquet, its reward, and a script with its settings. "
        "What verl cannot do is refused, what it does otherwise is told."
    )
    parser = Parser(prog="actial export verl", description=about)
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML recipe of kind grpo")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder to write, new or empty")
    add_overrides(parser)
    parser.set_defaults(run=_verl)
    return parser, list(line[2:])


def _verl(args: argparse.Namespace) -> int:
    from actial_fast.handover.folder import hand_over
    from actial_fast.settings.config import load_recipe
    from actial_fast.settings.recipe import GRPORecipe

    recipe = load_recipe(args.recipe, args.overrides)
    if not isinstance(recipe, GRPORecipe):
        hint = (
            "a run keeps the recipe of each stage, RUN/grpo/recipe.yaml" if recipe.kind == "quickstart" else "SFT stays with `actial sft`"
        )
        raise ValueError(f"{args.recipe}: a recipe of kind grpo is handed over, and this is {recipe.kind}; {hint}")
    done = hand_over(recipe, args.recipe, args.out, *([] if os.environ.get("ACTIAL_QUIET") else [progress]))
    for name, what in done.files.items():
        print(f"{args.out / name}: {what}")
    print("verl does otherwise than `actial grpo`:")
    for line in done.told:
        print(f"  {line}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from actial_fast.cli.shared import settle
    from actial_fast.train.checkpoint import newest
    from actial_fast.train.export import export_to

    settle()
    source = newest(args.checkpoint)
    done = export_to(source, args.out, dtype=args.dtype, base=args.base)
    print(f"{args.out}: {source} in {done.dtype}, for from_pretrained")
    if done.rounding is not None:
        print(f"{args.out / 'adapter'}: its adapters, for PEFT; in the folder above they are merged")
    if done.held:
        what = "the base in NF4, as it was trained" if args.base == "trained" else "the original base, which they were not trained on"
        print(f"merged into {what}; {done.held} of its weights were held in 4 bits (see adapter/README.md)")
    if done.rounding:
        print(
            f"rounding to {done.dtype} changed the merged weights by {done.rounding:.2g} of what the adapters changed"
            + ("; use --dtype float32, or the adapters" if done.rounding > 0.05 else "")
        )
    return 0
