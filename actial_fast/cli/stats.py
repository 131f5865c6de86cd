"""`actial data stats`: what a source, or the sources of a recipe, hold."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from actial_fast.cli.shared import Commands, add_format, add_json, check_model, is_recipe, progress, settle, write_json

if TYPE_CHECKING:
    from actial_fast.data.sources.row import Row
    from actial_fast.data.sources.source import SourceConfig
    from actial_fast.data.sources.stats import Lengths, Measure


def add(data: Commands) -> None:
    """The command, below `actial data`."""
    stats = data.add_parser("stats", help="what rows hold: kinds, answers, pictures, tokens, patches, angles; as text, JSON or a page")
    stats.add_argument("source", help="rows of any format; or a recipe of sft or grpo: every source of it, as its loop reads it")
    add_format(stats)
    stats.add_argument("--model", default="", help="a checkpoint folder or hub name: also tokens and patches, as it reads the rows")
    stats.add_argument("--rows", type=int, default=0, metavar="N", help="look at so many rows of a source, drawn at random; 0 is all")
    stats.add_argument("-o", "--out", type=Path, metavar="PAGE", help="an HTML page to write, with a plot of each distribution")
    add_json(stats)
    stats.set_defaults(run=_stats)


def _stats(args: argparse.Namespace) -> int:
    from actial_fast.data.sources.source import open_source
    from actial_fast.data.sources.stats import stats
    from actial_fast.data.sources.told import told
    from actial_fast.report.holdings import holdings_page, holdings_text
    from actial_fast.report.html import write

    if args.rows < 0:
        raise ValueError(f"--rows {args.rows}: how many rows to look at, 0 for all")
    figures, measure = {}, None
    for name, source, measure in _sources(args):
        rows = open_source(source)
        chosen = sorted(random.Random(0).sample(range(len(rows)), args.rows)) if 0 < args.rows < len(rows) else range(len(rows))
        with progress("rows", len(chosen)) as advance:
            figures[name] = stats(rows, chosen, measure, progress=advance)
        if args.json != "-":
            print(holdings_text(name, figures[name]))
    if args.json != "-" and measure is None:
        print("without --model, tokens and patches were not counted")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write(args.out, holdings_page(figures))
        if args.json != "-":
            print(args.out)
    if args.json:
        write_json(figures, args.json)
    told.close()
    return 0


def _sources(args: argparse.Namespace) -> Iterator[tuple[str, SourceConfig, Measure | None]]:
    """Each source by its name, and how long its rows become: as a recipe's loop, or a model's preprocessing, makes them."""
    from actial_fast.data.sources.source import SourceConfig

    if not is_recipe(args.source) and not args.model:
        yield args.source, SourceConfig(args.source, args.format, split=args.split, task=args.task), None
        return
    from actial_fast.data.sources.stream import Example
    from actial_fast.model.processor import Processor

    settle()
    if not is_recipe(args.source):
        check_model(args.model)
        processor = Processor.load(args.model)
        given = SourceConfig(args.source, args.format, split=args.split, task=args.task)
        yield args.source, given, lambda row, index: processor.measure(Example(row, index), row.turns)
        return
    from actial_fast.settings.config import load_recipe
    from actial_fast.train.preflight import processor_of

    recipe = load_recipe(args.source, [f"model.path={json.dumps(args.model)}"] if args.model else [])
    if recipe.kind not in ("sft", "grpo"):
        raise ValueError(f"{args.source} is a recipe of kind {recipe.kind}; those of sft and grpo have sources")
    check_model(recipe.model.path)
    processor = processor_of(recipe)
    for part, sources, whole in (("data", recipe.data.sources, recipe.kind == "sft"), ("eval", recipe.eval.sources, False)):
        for k, source in enumerate(sources):

            def measure(row: Row, index: int, whole: bool = whole) -> Lengths:
                return processor.measure(Example(row, index), row.turns if whole else row.prompt)

            yield f"{part}.sources.{k} {source.path}", source, measure
