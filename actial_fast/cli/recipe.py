"""`actial recipe`: those that ship, and what one says."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import MISSING
from pathlib import Path

from actial_fast.cli.shared import Commands, add_overrides


def add(commands: Commands) -> None:
    """The commands of this group."""
    recipe = commands.add_parser("recipe", help="the recipes that ship, copies of them, and what they say", bare=True).add_subparsers(
        required=True, metavar="COMMAND"
    )
    recipe.add_parser("list", help="the recipes that ship, a line each").set_defaults(run=_list)

    init = recipe.add_parser("init", help="copy a recipe that ships, to change it")
    init.add_argument("name", help="its name, as `actial recipe list` prints it")
    init.add_argument("-o", "--out", type=Path, help="the file to write (default: NAME.yaml here)")
    init.set_defaults(run=_init)

    show = recipe.add_parser("show", help="print every field with its value, default and meaning")
    show.add_argument("recipe", help="a YAML recipe")
    add_overrides(show)
    show.set_defaults(run=_show)


SHIPPED = Path(__file__).parents[1] / "recipes"


def _list(args: argparse.Namespace) -> int:
    for path in sorted(SHIPPED.glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        kind = next(line.split()[1] for line in lines if line.startswith("kind:"))
        print(f"{path.stem:18}{kind:12}{lines[0].lstrip('# ')}")
    return 0


def _init(args: argparse.Namespace) -> int:
    source, out = SHIPPED / f"{args.name.removesuffix('.yaml')}.yaml", args.out or Path(f"{args.name.removesuffix('.yaml')}.yaml")
    if not source.exists():
        raise ValueError(f"{args.name}: no such recipe; those that ship: {', '.join(sorted(path.stem for path in SHIPPED.glob('*.yaml')))}")
    if out.exists():
        raise ValueError(f"{out} is there already; give another name with -o")
    shutil.copyfile(source, out)
    print(out)
    return 0


def _show(args: argparse.Namespace) -> int:
    from actial_fast.settings.config import describe, load_recipe, to_yaml

    recipe = load_recipe(args.recipe, args.overrides)
    print(f"# {args.recipe}: {' '.join((type(recipe).__doc__ or '').split())}")
    for key, value, default, meaning in describe(recipe):
        note = "" if value == default else "   # no default" if default is MISSING else f"   # default: {to_yaml(default)}"
        print(f"{key}={to_yaml(value)}{note}\n    {meaning}")
    return 0
