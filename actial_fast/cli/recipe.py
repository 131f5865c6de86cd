"""`actial recipe`: what a recipe says."""

from __future__ import annotations

import argparse
from dataclasses import MISSING

from actial_fast.cli.shared import Commands, add_overrides


def add(commands: Commands) -> None:
    """The commands of this group."""
    recipe = commands.add_parser("recipe", help="look at recipes").add_subparsers(required=True, metavar="COMMAND")
    show = recipe.add_parser("show", help="print every field with its value, default and meaning")
    show.add_argument("recipe", help="a YAML recipe")
    add_overrides(show)
    show.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> int:
    from actial_fast.settings.config import describe, load_recipe, to_yaml

    recipe = load_recipe(args.recipe, args.overrides)
    print(f"# {args.recipe}: {' '.join((type(recipe).__doc__ or '').split())}")
    for key, value, default, meaning in describe(recipe):
        note = "" if value == default else "   # no default" if default is MISSING else f"   # default: {to_yaml(default)}"
        print(f"{key}={to_yaml(value)}{note}\n    {meaning}")
    return 0
