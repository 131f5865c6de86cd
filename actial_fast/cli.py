"""The `actial` command. Each subcommand imports what it runs, so that help and errors come at once."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

OVERRIDES = "key=value ... changes a field, for example optim.lr=1e-5 (values are YAML); `actial recipe show` lists them"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    The user's mistakes end in one line on stderr and status 2, without a traceback (ACTIAL_TRACEBACK=1 shows it).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads are ruinous where other programs run too
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse gives an optional list of words up as soon as an option follows the words before it, so it leaves `... -o OUT key=value`
    if rest and not (hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    try:
        return args.run(args) or 0
    except BrokenPipeError:  # `actial ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("actial: interrupted; the same command goes on from where it was", file=sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("ACTIAL_TRACEBACK") or (isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("actial_fast")):
            raise
        print(f"actial: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"this command needs {error.name}, which is not installed: pip install 'actial-fast[train]'"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError):
        return str(error).strip().split("\n")[0]  # transformers appends paragraphs of advice
    return " ".join(str(error).split())


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
    _format(test)
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
    viewpoint.add_argument("captures", type=Path, help="folder of captures")
    viewpoint.add_argument("-o", "--out", type=Path, required=True, help="folder for train.jsonl, test.jsonl and build.json")
    _overrides(viewpoint)
    viewpoint.set_defaults(run=_viewpoint)

    spatial = data.add_parser("spatial", help="other spatial questions from captures, in SAT's parquet rows")
    spatial.add_argument("captures", type=Path, help="folder of captures")
    spatial.add_argument("-o", "--out", type=Path, required=True, help="folder for train.parquet and test.parquet")
    spatial.add_argument(
        "--test-objects", type=Path, required=True, help="test.jsonl of a viewpoint build: its objects are held out here too"
    )
    _overrides(spatial)
    spatial.set_defaults(run=_spatial)

    cot = data.add_parser("cot", help="pseudo chains of thought for the cold start, checked against the truth")
    cot.add_argument("source", help="rows with a truth")
    _format(cot)
    cot.add_argument("-o", "--out", type=Path, required=True, help="JSONL to write or to go on with")
    cot.add_argument("--endpoint", default="", help="an OpenAI-compatible base URL, for example http://localhost:8000/v1; "
                     "without it, chains of thought are written from the rows' poses")  # fmt: skip
    cot.add_argument("--model", default="", help="the model that the endpoint serves")
    cot.add_argument("--template", type=Path, help="a file with an example that a person has corrected")
    cot.add_argument("--style", choices=("full", "short"), default="full", help="how much is written from poses")
    cot.add_argument("--count", type=int, default=0, help="rows drawn from the source (default: all; the paper uses about 1000)")
    cot.add_argument("--workers", type=int, default=8, help="requests at a time (default: %(default)s)")
    cot.add_argument("--seed", type=int, default=0, help="seed of which rows are drawn and of the wordings")
    cot.set_defaults(run=_cot)

    inspect = data.add_parser("inspect", help="draw rows as a contact sheet: images, question, answer, top-down sketch")
    inspect.add_argument("source", help="JSONL, ShareGPT JSON, SAT or verl parquet")
    _format(inspect)
    inspect.add_argument("-o", "--out", type=Path, default=Path("sheet.png"), help="PNG to write (default: %(default)s)")
    inspect.add_argument("--rows", type=int, default=6, help="rows drawn at random (default: %(default)s)")
    inspect.add_argument("--kind", action="append", default=[], help="only rows of this question type (repeatable)")
    inspect.add_argument("--seed", type=int, default=0, help="seed of which rows are drawn")
    inspect.set_defaults(run=_inspect)

    check = data.add_parser("check", help="read every row and image of a source and count what is wrong")
    check.add_argument("source", help="JSONL, ShareGPT JSON, SAT or verl parquet")
    _format(check)
    check.add_argument("--show", type=int, default=20, help="bad rows to name; 0 names all (default: %(default)s)")
    check.set_defaults(run=_check)


def _format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", default="auto", help="jsonl, sharegpt, sat or verl (default: what the file looks like)")


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
    from actial_fast.data.source import SourceConfig, open_source
    from actial_fast.recipe import EvalConfig

    config = EvalConfig(
        sources=tuple(SourceConfig(path, args.format, system=args.system) for path in args.source),
        limit=args.limit,
        batch_size=args.batch_size,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
    )
    # before the model is loaded and the replies are made, which takes long
    for source in config.sources:
        open_source(source)
    # a hub name has one slash and nothing local before it; asking the hub for a mistyped path would take a minute
    if not Path(args.model).exists() and (args.model.count("/") != 1 or Path(args.model).parent.is_dir()):
        raise ValueError(
            f"model {args.model}: no such folder (looked from {Path.cwd()}), nor a hub name such as Qwen/Qwen2.5-VL-7B-Instruct"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)

    from actial_fast.evaluate import evaluate_checkpoint
    from actial_fast.statistics import render_table

    _settle()
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
    from actial_fast.config import describe, load_recipe, to_yaml

    recipe = load_recipe(args.recipe, args.overrides)
    print(f"# {args.recipe}: {' '.join((type(recipe).__doc__ or '').split())}")
    for key, value, default, meaning in describe(recipe):
        note = "" if value == default else "   # no default" if default is MISSING else f"   # default: {to_yaml(default)}"
        print(f"{key}={to_yaml(value)}{note}\n    {meaning}")
    return 0


def _render(args: argparse.Namespace) -> int:
    from actial_fast.data.render import RenderConfig, render

    extra = [f"meshes={json.dumps(args.meshes)}"] if args.meshes else []
    done = render(args.out, _config(RenderConfig, [*args.overrides, *extra]))
    print(f"{args.out}: {done['captures']} captures, {done['images']} images")
    if done["skipped"]:
        print(f"{done['skipped']} captures were there already")
    if done["rendered"]:
        print(f"{done['rendered']} captures rendered in {_speed(done, 'images')}")
    return 0


def _viewpoint(args: argparse.Namespace) -> int:
    from actial_fast.data.viewpoint import ViewpointConfig, build

    done = build(args.captures, args.out, _config(ViewpointConfig, args.overrides))
    for split, rows in done["examples"].items():
        asked = done["examples_asked"][split]
        short = f" ({asked} were asked for: more captures or pairs per object are needed)" if asked and rows < asked else ""
        print(f"{args.out / split}.jsonl: {rows} rows, {done['pairs'][split]} pairs, {_objects(done['objects'][split])}{short}")
    _rejected(done["rejected"], f"; each is named in {args.out / 'build.json'}")
    print(f"{sum(done['examples'].values())} rows in {_speed(done, 'examples')}")
    return 0


def _spatial(args: argparse.Namespace) -> int:
    from actial_fast.data.spatial import SpatialConfig, spatial_questions, viewpoint_test_objects

    try:
        held_out = viewpoint_test_objects(args.test_objects)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"--test-objects {args.test_objects}: not the test.jsonl of a viewpoint build ({error!r})") from None
    done = spatial_questions(args.captures, args.out, _config(SpatialConfig, args.overrides), held_out)
    for split in ("train", "test"):
        kinds = ", ".join(f"{kind} {rows}" for kind, rows in done[split].items())
        print(f"{args.out / split}.parquet: {sum(done[split].values())} rows ({kinds}), {_objects(done['objects'][split])}")
    _rejected(done["rejected"])
    return 0


def _cot(args: argparse.Namespace) -> int:
    from actial_fast.data.cot import geometric_cot, write_cot

    if args.endpoint:
        from actial_fast.data.endpoint import EndpointWriter

        if not args.model:
            raise ValueError("--model: the name of the model that the endpoint serves is needed")
        extra = {"template": args.template.read_text()} if args.template else {}
        writer = EndpointWriter(args.endpoint, args.model, **extra)
    else:

        def writer(row, rng):
            return geometric_cot(row, rng, style=args.style)

    source = _source(args)
    with _progress("chains of thought", args.count or len(source)) as advance:
        done = write_cot(
            source,
            args.out,
            writer,
            seed=args.seed,
            count=args.count,
            workers=args.workers if args.endpoint else 1,
            progress=lambda number, total: advance(number),
        )
    there = f" ({done.kept} were there already)" if done.kept else ""
    print(f"{args.out}: {done.written} rows written{there}, {sum(done.rejected.values())} rejected")
    for reason, count in done.rejected.items():
        print(f"  {count:6}  {reason}")
    if done.rejected:
        print(f"each is kept with its reason in {args.out.with_suffix('.rejects.jsonl')}; the same command tries them again")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from actial_fast.data.sheet import contact_sheet

    source = _source(args, kinds=tuple(args.kind))
    chosen = sorted(random.Random(args.seed).sample(range(len(source)), min(args.rows, len(source))))
    print(contact_sheet([source[i] for i in chosen], args.out, title=args.source))
    return 0


def _check(args: argparse.Namespace) -> int:
    from actial_fast.data.source import scan

    source = _source(args)
    with _progress("rows", len(source)) as advance:
        found = scan(source, progress=advance)
    print(f"{args.source}: {found.rows} rows, {len(found.bad)} bad\ngood rows by question type:")
    for kind, rows in sorted(found.kinds.items()):
        print(f"  {rows:8}  {kind or '(none)'}")
    if found.bad:
        print("why rows are bad:")
        for reason, rows in found.reasons.items():
            print(f"  {rows:8}  {reason}")
        shown = found.bad[: args.show or None]
        print("bad rows:" if len(shown) == len(found.bad) else f"the first {len(shown)} bad rows (--show 0 names all):")
        for error in shown:
            print(f"  {_one_line(error)}")
    return 1 if found.bad else 0


def _source(args: argparse.Namespace, **filters: Any) -> Any:
    from actial_fast.data.source import SourceConfig, open_source

    return open_source(SourceConfig(args.source, args.format, **filters))


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, and a function that takes the number done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def _speed(done: Mapping[str, Any], what: str) -> str:
    return f"{done['seconds']:.1f} s ({done[f'{what}_per_second']:,.0f} {what}/s)"


def _objects(count: int) -> str:
    return f"from {count} object{'s' * (count != 1)}"


def _rejected(reasons: Mapping[str, int], where: str = "") -> None:
    if reasons:
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        print(f"captures left out: {told}{where}")


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
