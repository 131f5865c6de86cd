"""`actial data jigsaw`, `sparkle` and `boxes`: rows for the tasks that ship, made from nothing or from pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from actial_fast.cli.shared import Commands, add_overrides


def add(data: Commands) -> None:
    """The commands, as parts of `actial data`."""
    for name, config, text in (
        ("jigsaw", "JigsawConfig", "pictures cut into pieces and shuffled, with their order, and the same solved in turns"),
        ("sparkle", "SparkleConfig", "directions, distances and places of marks on a plane"),
        ("boxes", "BoxesConfig", "pictures with blocks to find, with their boxes"),
    ):
        made = data.add_parser(name, help=f"{text}; for task: {name}", fields=f"actial_fast.data.made.{name}:{config}")
        made.add_argument("-o", "--out", type=Path, required=True, help="folder for train.jsonl, test.jsonl and the pictures")
        if name == "jigsaw":
            made.add_argument("--pictures", type=Path, help="folder of your own pictures (default: landscapes are drawn)")
        add_overrides(made, "train=1000", "the end of this help")
        made.set_defaults(run=globals()[f"_{name}"])


def _jigsaw(args: argparse.Namespace) -> int:
    from actial_fast.data.made.jigsaw import JigsawConfig, write_jigsaw

    if args.pictures and not args.pictures.is_dir():
        raise ValueError(f"--pictures {args.pictures}: no such folder")
    return _told(args, write_jigsaw(args.out, _config(JigsawConfig, args), args.pictures))


def _sparkle(args: argparse.Namespace) -> int:
    from actial_fast.data.made.sparkle import SparkleConfig, write_sparkle

    return _told(args, write_sparkle(args.out, _config(SparkleConfig, args)))


def _boxes(args: argparse.Namespace) -> int:
    from actial_fast.data.made.boxes import BoxesConfig, write_boxes

    return _told(args, write_boxes(args.out, _config(BoxesConfig, args)))


def _config(cls: type, args: argparse.Namespace) -> Any:
    from actial_fast.settings.config import config_from

    return config_from(cls, args.overrides)


def _told(args: argparse.Namespace, done: dict[str, int]) -> int:
    for split, rows in done.items():
        print(f"{args.out / split}.jsonl: {rows} rows")
    return 0
