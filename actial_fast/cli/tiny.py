"""`actial tiny`: a model small enough to try a task on."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from actial_fast.cli.shared import Commands, add_format, add_overrides, settle


def add(commands: Commands) -> None:
    """The commands of this group."""
    tiny = commands.add_parser(
        "tiny",
        help="a tiny Qwen2.5-VL with random weights, whose tokens are the phrases of your rows",
        fields="actial_fast.model.tiny:TinyConfig",
    )
    tiny.add_argument("source", nargs="+", help="rows to be trained on, of any format")
    add_format(tiny)
    tiny.add_argument("-o", "--out", type=Path, required=True, help="checkpoint folder to write")
    tiny.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    add_overrides(tiny, "image_size=56", "the end of this help")
    tiny.set_defaults(run=_tiny)


def _tiny(args: argparse.Namespace) -> int:
    paths = [word for word in args.source if "=" not in word or Path(word).exists()]  # argparse takes the words behind them for more
    overrides = [*(word for word in args.source if word not in paths), *args.overrides]
    if not paths:
        raise ValueError("no source: give the rows that the model will be trained on")
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"{args.out} is not empty; name another folder")
    settle()

    from actial_fast.model.tiny import TinyConfig, create
    from actial_fast.settings.config import config_from

    create(args.out, _texts(paths, args.format, args.task), config_from(TinyConfig, overrides), args.seed)
    size = sum(file.stat().st_size for file in args.out.glob("*.safetensors"))
    print(f"{args.out}: {size / 1e6:.1f} MB of weights")
    return 0


def _texts(paths: list[str], form: str, task: str) -> Iterator[str]:
    """What stands in the rows, without their images' places."""
    from actial_fast.data.sources.row import IMAGE_TAG
    from actial_fast.data.sources.source import SourceConfig, open_source

    for path in paths:
        rows = open_source(SourceConfig(path, form, task=task))
        for index in range(len(rows)):
            for turn in rows[index].turns:
                yield turn.content.replace(IMAGE_TAG, "")
