"""The `actial` command. Each subcommand imports what it runs, so that help and errors come at once."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

OVERRIDES = "key=value ... changes a field, for example optim.lr=1e-5 (values are YAML); `actial recipe show` lists them"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. The user's mistakes end in one line, without a traceback."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except ValueError as error:
        print(f"actial: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `actial ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("actial: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="actial", description="Two-stage viewpoint training for Qwen2.5-VL: data, SFT, GRPO, evaluation.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    quick = commands.add_parser("quickstart", help="the whole job from nothing, on a CPU: data, SFT, GRPO, evaluation, report")
    quick.add_argument("--recipe", default="recipes/quickstart.yaml", help="recipe of kind quickstart (default: %(default)s)")
    _overrides(quick)
    quick.set_defaults(run=_quickstart)

    for kind, text in (("sft", "supervised fine-tuning"), ("grpo", "reinforcement with verifiable rewards")):
        train = commands.add_parser(kind, help=f"{text}; run it again to go on from the last checkpoint")
        train.add_argument("recipe", help=f"a YAML recipe, for example recipes/actial-7b-{kind}.yaml")
        train.add_argument("--on-bad-row", choices=("error", "skip"), help="what a malformed row does (data.on_bad_row)")
        _overrides(train)
        train.set_defaults(run=_train, kind=kind)

    test = commands.add_parser("eval", help="accuracy of a checkpoint per question type, beside chance and the majority answer")
    test.add_argument("model", help="a checkpoint folder or hub name")
    test.add_argument("source", nargs="+", help="rows with a truth: JSONL, ShareGPT JSON, SAT or verl parquet")
    test.add_argument("--system", default="", help="system prompt for every row")
    test.add_argument("--limit", type=int, default=0, help="first rows of each source (default: all)")
    test.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    test.add_argument("--max-new-tokens", type=int, default=1024, help="longest reply (default: %(default)s)")
    test.add_argument("--batch-size", type=int, default=64, help="prompts decoded together (default: %(default)s)")
    test.add_argument("--seed", type=int, default=0, help="seed of sampling")
    test.add_argument("--json", type=Path, help="also write the figures to this file")
    test.set_defaults(run=_eval)

    report = commands.add_parser("report", help="write RUN/report.html")
    report.add_argument("folder", type=Path, metavar="RUN")
    report.set_defaults(run=_report)

    doctor = commands.add_parser("doctor", help="which backends work here, and why the others do not")
    doctor.set_defaults(run=_doctor)

    recipe = commands.add_parser("recipe", help="look at recipes").add_subparsers(required=True, metavar="COMMAND")
    show = recipe.add_parser("show", help="print every field with its value, default and meaning")
    show.add_argument("recipe", help="a YAML recipe")
    _overrides(show)
    show.set_defaults(run=_show)

    _data_commands(commands.add_parser("data", help="make, look at and check data").add_subparsers(required=True, metavar="COMMAND"))
    return parser


def _data_commands(data: Any) -> None:
    render = data.add_parser("render", help="captures (images and COLMAP models) from procedural objects or your own meshes")
    render.add_argument("-o", "--out", type=Path, required=True, help="folder for the captures")
    render.add_argument("--meshes", default="", help="folder of OBJ, glTF, GLB or PLY files; without it, box-built families")
    _overrides(render)
    render.set_defaults(run=_render)

    viewpoint = data.add_parser("viewpoint", help="viewpoint questions from captures (per object images/ and sparse/0)")
    viewpoint.add_argument("captures", type=Path)
    viewpoint.add_argument("-o", "--out", type=Path, required=True, help="folder for train.jsonl, test.jsonl and build.json")
    _overrides(viewpoint)
    viewpoint.set_defaults(run=_viewpoint)

    spatial = data.add_parser("spatial", help="other spatial questions from captures, in SAT's parquet rows")
    spatial.add_argument("captures", type=Path)
    spatial.add_argument("-o", "--out", type=Path, required=True, help="folder for train.parquet and test.parquet")
    spatial.add_argument(
        "--test-objects", type=Path, required=True, help="test.jsonl of a viewpoint build: its objects are held out here too"
    )
    _overrides(spatial)
    spatial.set_defaults(run=_spatial)

    cot = data.add_parser("cot", help="pseudo chains of thought for the cold start, checked against the truth")
    cot.add_argument("source", help="rows with a truth")
    cot.add_argument("-o", "--out", type=Path, required=True, help="JSONL to write or to go on with")
    cot.add_argument("--endpoint", default="", help="an OpenAI-compatible base URL, for example http://localhost:8000/v1; "
                     "without it, chains of thought are written from the rows' poses")  # fmt: skip
    cot.add_argument("--model", default="", help="the model that the endpoint serves")
    cot.add_argument("--template", type=Path, help="a file with an example that a person has corrected")
    cot.add_argument("--style", choices=("full", "short"), default="full", help="how much is written from poses")
    cot.add_argument("--count", type=int, default=0, help="rows drawn from the source (default: all; the paper uses about 1000)")
    cot.add_argument("--workers", type=int, default=8, help="requests at a time (default: %(default)s)")
    cot.add_argument("--seed", type=int, default=0)
    cot.set_defaults(run=_cot)

    inspect = data.add_parser("inspect", help="draw rows as a contact sheet: images, question, answer, top-down sketch")
    inspect.add_argument("source")
    inspect.add_argument("-o", "--out", type=Path, default=Path("sheet.png"), help="PNG to write (default: %(default)s)")
    inspect.add_argument("--rows", type=int, default=6, help="rows drawn at random (default: %(default)s)")
    inspect.add_argument("--kind", action="append", default=[], help="only rows of this question type (repeatable)")
    inspect.add_argument("--seed", type=int, default=0)
    inspect.set_defaults(run=_inspect)

    check = data.add_parser("check", help="read every row and image of a source and count what is wrong")
    check.add_argument("source")
    check.set_defaults(run=_check)


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)


def _quickstart(args: argparse.Namespace) -> int:
    from actial_fast.config import load_recipe
    from actial_fast.quickstart import run

    _settle()
    summary = run(load_recipe(args.recipe, args.overrides))
    print(json.dumps(summary, indent=1))
    return 0


def _train(args: argparse.Namespace) -> int:
    import importlib

    from actial_fast.config import load_recipe

    extra = [f"data.on_bad_row={args.on_bad_row}"] if args.on_bad_row else []
    recipe = load_recipe(args.recipe, [*args.overrides, *extra])
    if recipe.kind != args.kind:
        raise ValueError(f"{args.recipe} is a recipe for `actial {recipe.kind}`, not for `actial {args.kind}`")
    _settle()
    final = importlib.import_module(f"actial_fast.{args.kind}").train(recipe)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"finished: {final}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from actial_fast.config import EvalConfig
    from actial_fast.data.source import SourceConfig
    from actial_fast.evaluate import evaluate_checkpoint
    from actial_fast.statistics import render_table

    _settle()
    config = EvalConfig(
        sources=tuple(SourceConfig(path, system=args.system) for path in args.source),
        limit=args.limit,
        batch_size=args.batch_size,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
    )
    results = evaluate_checkpoint(args.model, config, args.seed)
    if int(os.environ.get("RANK", 0)) == 0:
        for name, table in results.items():
            print(render_table(table, name))
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    return 0


def _report(args: argparse.Namespace) -> int:
    from actial_fast.report import write_report

    print(write_report(args.folder))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from actial_fast.doctor import main as run

    return run()


def _show(args: argparse.Namespace) -> int:
    from actial_fast.config import describe, load_recipe

    for key, value, default, meaning in describe(load_recipe(args.recipe, args.overrides)):
        changed = "" if value == default else f"   (default: {default})"
        print(f"{key} = {value}{changed}\n    {meaning}")
    return 0


def _render(args: argparse.Namespace) -> int:
    from actial_fast.data.render import RenderConfig, render

    extra = [f"meshes={json.dumps(args.meshes)}"] if args.meshes else []
    print(json.dumps(render(args.out, _config(RenderConfig, [*args.overrides, *extra])), indent=1))
    return 0


def _viewpoint(args: argparse.Namespace) -> int:
    from actial_fast.data.viewpoint import ViewpointConfig, build

    print(json.dumps(build(args.captures, args.out, _config(ViewpointConfig, args.overrides)), indent=1))
    return 0


def _spatial(args: argparse.Namespace) -> int:
    from actial_fast.data.spatial import SpatialConfig, spatial_questions, viewpoint_test_objects

    config = _config(SpatialConfig, args.overrides)
    print(json.dumps(spatial_questions(args.captures, args.out, config, viewpoint_test_objects(args.test_objects)), indent=1))
    return 0


def _cot(args: argparse.Namespace) -> int:
    from actial_fast.data.cot import geometric_cot, write_cot
    from actial_fast.data.source import SourceConfig, open_source

    if args.endpoint:
        from actial_fast.data.endpoint import EndpointWriter

        if not args.model:
            raise ValueError("--model: the name of the model that the endpoint serves is needed")
        extra = {"template": args.template.read_text()} if args.template else {}
        writer = EndpointWriter(args.endpoint, args.model, **extra)
    else:

        def writer(row, rng):
            return geometric_cot(row, rng, style=args.style)

    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("chains of thought", total=None)
        summary = write_cot(
            open_source(SourceConfig(args.source)),
            args.out,
            writer,
            seed=args.seed,
            count=args.count,
            workers=args.workers if args.endpoint else 1,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(json.dumps(asdict(summary), indent=1))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from actial_fast.data.sheet import contact_sheet
    from actial_fast.data.source import SourceConfig, open_source

    source = open_source(SourceConfig(args.source, kinds=tuple(args.kind)))
    chosen = sorted(random.Random(args.seed).sample(range(len(source)), min(args.rows, len(source))))
    print(contact_sheet([source[i] for i in chosen], args.out, title=args.source))
    return 0


def _check(args: argparse.Namespace) -> int:
    from actial_fast.data.source import SourceConfig, open_source, scan

    found = scan(open_source(SourceConfig(args.source)))
    print(json.dumps(asdict(found), indent=1, default=str))
    return 1 if found.bad else 0


def _config(cls: type, overrides: Sequence[str]) -> Any:
    from actial_fast.config import config_from

    return config_from(cls, overrides)


def _settle() -> None:
    """Quiet libraries, and threads for the cores that this rank may use."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


if __name__ == "__main__":
    sys.exit(main())
