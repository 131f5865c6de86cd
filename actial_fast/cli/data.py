"""`actial data`: make, look at and check rows."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actial_fast.cli import cot, made, reconstruct, stats
from actial_fast.cli.shared import Commands, add_format, add_overrides, check_model, is_recipe, one_line, progress, rows_of, settle

if TYPE_CHECKING:
    from actial_fast.data.sources.row import Row
    from actial_fast.data.sources.source import SourceConfig


def add(commands: Commands) -> None:
    """The commands of this group."""
    data = commands.add_parser("data", help="make, look at and check data", bare=True).add_subparsers(required=True, metavar="COMMAND")
    captures, below = "actial_fast.data.captures", "the end of this help"
    render = data.add_parser(
        "render",
        help="captures (images and COLMAP models) from procedural objects or your own meshes",
        fields=f"{captures}.render:RenderConfig",
    )
    render.add_argument("-o", "--out", type=Path, required=True, help="folder for the captures")
    render.add_argument("--meshes", default="", help="folder of OBJ, glTF, GLB or PLY files; without it, box-built families")
    add_overrides(render, "objects=100", below)
    render.set_defaults(run=_render)

    reconstruct.add(data)

    viewpoint = data.add_parser(
        "viewpoint",
        help="viewpoint questions from captures (COLMAP, MVImgNet, nerfstudio, DL3DV, CO3D)",
        fields=f"{captures}.viewpoint:ViewpointConfig",
    )
    viewpoint.add_argument("captures", type=Path, help="folder of captures")
    viewpoint.add_argument("-o", "--out", type=Path, required=True, help="folder for train.jsonl, test.jsonl and build.json")
    add_overrides(viewpoint, "seed=1", below)
    viewpoint.set_defaults(run=_viewpoint)

    spatial = data.add_parser(
        "spatial", help="other spatial questions from captures, in SAT's parquet rows", fields=f"{captures}.spatial:SpatialConfig"
    )
    spatial.add_argument("captures", type=Path, help="folder of captures")
    spatial.add_argument("-o", "--out", type=Path, required=True, help="folder for train.parquet and test.parquet")
    spatial.add_argument(
        "--test-objects", type=Path, required=True, help="test.jsonl of a viewpoint build: its objects are held out here too"
    )
    spatial.add_argument(
        "--validation-objects", type=Path, help="its validation.jsonl, for validation_per_kind questions about those objects"
    )
    add_overrides(spatial, "seed=1", below)
    spatial.set_defaults(run=_spatial)

    cot.add(data)

    inspect = data.add_parser("inspect", help="draw rows as a contact sheet: images, question, answer, top-down sketch")
    inspect.add_argument("source", help="JSONL, ShareGPT JSON, SAT or verl parquet")
    add_format(inspect)
    inspect.add_argument("-o", "--out", type=Path, default=Path("sheet.png"), help="PNG to write (default: %(default)s)")
    inspect.add_argument("--rows", type=int, default=6, help="rows drawn at random (default: %(default)s)")
    inspect.add_argument("--kind", action="append", default=[], help="only rows of this question type (repeatable)")
    inspect.add_argument("--seed", type=int, default=0, help="seed of which rows are drawn")
    inspect.set_defaults(run=_inspect)

    check = data.add_parser("check", help="read every row and image of a source and count what is wrong")
    check.add_argument("source", help="rows of any format; or a recipe of sft or grpo: every source of it, as its loop reads it")
    add_format(check)
    check.add_argument("--model", default="", help="a checkpoint folder or hub name: also look at what its tokenizer and limits refuse")
    check.add_argument("--show", type=int, default=20, help="bad rows to name; 0 names all (default: %(default)s)")
    check.set_defaults(run=_check)
    stats.add(data)
    made.add(data)


def _render(args: argparse.Namespace) -> int:
    from actial_fast.data.captures.render import RenderConfig, render

    extra = [f"meshes={json.dumps(args.meshes)}"] if args.meshes else []
    done = render(args.out, _config(RenderConfig, [*args.overrides, *extra]))
    print(f"{args.out}: {done['captures']} captures, {done['images']} images")
    if done["skipped"]:
        print(f"{done['skipped']} captures were there already")
    if done["rendered"]:
        print(f"{done['rendered']} captures rendered in {_speed(done, 'images')}")
    return 0


def _viewpoint(args: argparse.Namespace) -> int:
    from actial_fast.data.captures.settings import ViewpointConfig
    from actial_fast.data.captures.viewpoint import build

    done = build(args.captures, args.out, _config(ViewpointConfig, args.overrides))
    for split, rows in done["examples"].items():
        asked = done["examples_asked"][split]
        short = f" ({asked} were asked for: more captures or pairs per object are needed)" if asked and rows < asked else ""
        print(f"{args.out / split}.jsonl: {rows} rows, {done['pairs'][split]} pairs, {_objects(done['objects'][split])}{short}")
    if done["examples"]["test"]:
        print(
            f"{args.out / 'test-centre.jsonl'}: {done['centre_examples']} of these test rows, whose first photograph is from amid the walk"
        )
    _rejected(done["rejected"], f"; each is named in {args.out / 'build.json'}")
    print(f"{sum(done['examples'].values())} rows in {_speed(done, 'examples')}")
    if skipped := done["probes"].get("skipped"):
        print(f"shortcuts were not looked for: {skipped}")
    for warning in done["warnings"]:
        print(f"warning: a shortcut: {warning}", file=sys.stderr)
    if done["warnings"]:
        hint = "; composition=balanced has fewer shortcuts" if done["config"]["composition"] == "paper" else ""
        print(f"warning: {args.out / 'build.json'} has all probes{hint}", file=sys.stderr)
    return 0


def _spatial(args: argparse.Namespace) -> int:
    from actial_fast.data.captures.spatial import SpatialConfig, spatial_questions, viewpoint_objects

    held: dict[str, set[str]] = {}
    for split, path in (("test", args.test_objects), ("validation", args.validation_objects)):
        try:
            held[split] = viewpoint_objects(path) if path else set()
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"--{split}-objects {path}: not the {split}.jsonl of a viewpoint build ({error!r})") from None
    done = spatial_questions(args.captures, args.out, _config(SpatialConfig, args.overrides), held["test"], held["validation"])
    for split in done["objects"]:
        kinds = ", ".join(f"{kind} {rows}" for kind, rows in done[split].items())
        print(f"{args.out / split}.parquet: {sum(done[split].values())} rows ({kinds}), {_objects(done['objects'][split])}")
    _rejected(done["rejected"])
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from actial_fast.data.captures.sheet import contact_sheet

    source = rows_of(args, kinds=tuple(args.kind))
    chosen = sorted(random.Random(args.seed).sample(range(len(source)), min(args.rows, len(source))))
    print(contact_sheet([source[i] for i in chosen], args.out, title=args.source))
    return 0


def _check(args: argparse.Namespace) -> int:
    from actial_fast.data.sources.source import open_source, scan
    from actial_fast.data.sources.told import told

    bad = 0
    for source, door in _doors(args):
        rows = open_source(source)
        with progress("rows", len(rows)) as advance:
            found = scan(rows, door, progress=advance)
        bad += len(found.bad)
        print(f"{source.path}: {found.rows} rows, {len(found.bad)} bad\ngood rows by question type:")
        for kind, count in sorted(found.kinds.items()):
            print(f"  {count:8}  {kind or '(none)'}")
        if found.bad:
            print("why rows are bad:")
            for reason, count in found.reasons.items():
                print(f"  {count:8}  {reason}")
            shown = found.bad[: args.show or None]
            print("bad rows:" if len(shown) == len(found.bad) else f"the first {len(shown)} bad rows (--show 0 names all):")
            for error in shown:
                print(f"  {one_line(error)}")
    if not is_recipe(args.source) and not args.model:
        print("without --model, lengths in tokens and the model's chat template were not looked at")
    told.close()
    return 1 if bad else 0


def _doors(args: argparse.Namespace) -> Iterator[tuple[SourceConfig, Callable[[Row, int], object] | None]]:
    """The sources to check, and what their rows have to pass: what a recipe's loop makes of them, or what a model's preprocessing does."""
    from actial_fast.data.sources.source import SourceConfig

    if not is_recipe(args.source) and not args.model:
        yield SourceConfig(args.source, args.format, split=args.split, task=args.task), None
        return
    from actial_fast.data.sources.stream import Example
    from actial_fast.model.processor import Processor

    settle()
    if not is_recipe(args.source):
        check_model(args.model)
        processor = Processor.load(args.model)

        def either(row: Row, index: int) -> object:
            answered = any(turn.role == "assistant" for turn in row.turns)
            return (processor.encode if answered else processor.encode_prompt)(Example(row, index))

        yield SourceConfig(args.source, args.format, split=args.split, task=args.task), either
        return
    from actial_fast.settings.config import load_recipe
    from actial_fast.train.preflight import doors, processor_of

    recipe = load_recipe(args.source, [f"model.path={json.dumps(args.model)}"] if args.model else [])
    if recipe.kind not in ("sft", "grpo"):
        raise ValueError(f"{args.source} is a recipe of kind {recipe.kind}; those of sft and grpo can be checked")
    check_model(recipe.model.path)
    for source, encode in doors(recipe, processor_of(recipe)):
        yield source, lambda row, index, encode=encode: encode(Example(row, index))  # type: ignore[misc]


def _speed(done: Mapping[str, Any], what: str) -> str:
    return f"{done['seconds']:.1f} s ({done[f'{what}_per_second']:,.0f} {what}/s)"


def _objects(count: int) -> str:
    return f"from {count} object{'s' * (count != 1)}"


def _rejected(reasons: Mapping[str, int], where: str = "") -> None:
    if reasons:
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        print(f"captures left out: {told}{where}")


def _config(cls: type, overrides: Sequence[str]) -> Any:
    from actial_fast.settings.config import config_from

    return config_from(cls, overrides)
