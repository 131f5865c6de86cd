"""`actial eval`: how good a checkpoint is."""

from __future__ import annotations

import argparse
import os

from actial_fast.cli.shared import Commands, add_format, add_json, check_model, settle, text_or_file, write_json


def add(commands: Commands) -> None:
    """The commands of this group."""
    test = commands.add_parser("eval", help="accuracy of a checkpoint per question type, beside chance and the majority answer")
    test.add_argument("model", help="a checkpoint folder or hub name; with --server, the name that it knows the model by")
    test.add_argument("source", nargs="+", help="rows with a truth: JSONL, ShareGPT JSON, SAT or verl parquet")
    add_format(test)
    test.add_argument("--system", default="", help="system prompt for every row, or @FILE with it")
    test.add_argument("--limit", type=int, default=0, help="first rows of each source (default: all)")
    test.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    test.add_argument("--max-new-tokens", type=int, default=1024, help="longest reply (default: %(default)s)")
    test.add_argument("--kv-tokens", type=int, default=0, help="most tokens whose keys and values are held (default: what fits)")
    test.add_argument("--strict", action="store_true", help="an answer is right only if its text is the truth up to case, as in the paper")
    test.add_argument("--server", default="", metavar="URL", help="ask the model that is served at this OpenAI-compatible base URL, for "
                      "example http://localhost:8000/v1")  # fmt: skip
    test.add_argument("--workers", type=int, default=32, help="with --server: requests at a time (default: %(default)s)")
    test.add_argument("--seed", type=int, default=0, help="seed of sampling")
    add_json(test)
    test.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    from actial_fast.data.sources.source import SourceConfig, open_source
    from actial_fast.data.sources.told import told
    from actial_fast.settings.recipe import EvalConfig, RolloutConfig

    system = text_or_file(args.system)
    config = EvalConfig(
        sources=tuple(SourceConfig(path, args.format, split=args.split, task=args.task, system=system) for path in args.source),
        limit=args.limit,
        strict=args.strict,
        kv_tokens=args.kv_tokens,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
    )
    # before the model is loaded and the replies are made, which takes long
    for source in config.sources:
        open_source(source)
    if not args.server:
        check_model(args.model)
    from actial_fast.evaluation.evaluate import evaluate_checkpoint, evaluate_server
    from actial_fast.evaluation.statistics import render_table

    settle()
    if args.server:
        results = evaluate_server(
            RolloutConfig(engine="server", url=args.server, model=args.model, workers=args.workers), config, args.seed
        )
    else:
        results = evaluate_checkpoint(args.model, config, args.seed)
    told.close()
    if int(os.environ.get("RANK", 0)) == 0:
        if args.json != "-":
            for name, table in results.items():
                print(render_table(table, name))
        if args.json:
            write_json({name: {key: table[key] for key in ("kinds", "overall")} for name, table in results.items()}, args.json)
    return 0
