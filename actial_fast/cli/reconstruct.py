"""`actial data reconstruct`: captures from photographs of your own."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import Any

from actial_fast.cli.shared import Commands, add_overrides


def add(data: Commands) -> None:
    """The command, a part of `actial data`."""
    made = data.add_parser(
        "reconstruct",
        help="captures from your own photographs, a folder for each object, by COLMAP",
        fields="actial_fast.data.captures.sfm:ReconstructConfig",
    )
    made.add_argument("photos", type=Path, help="folder that has a folder of photographs for each object (or the photographs of one)")
    made.add_argument("-o", "--out", type=Path, required=True, help="folder for the captures; run again, it goes on with what is new")
    add_overrides(made, "max_side=1600", "the end of this help")
    made.set_defaults(run=_reconstruct)


def _reconstruct(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from actial_fast.data.captures.reconstruct import find_objects, reconstruct
    from actial_fast.data.captures.sfm import ReconstructConfig
    from actial_fast.settings.config import config_from

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    total = len(find_objects(args.photos))
    with Progress(*columns, console=Console(stderr=True), disable=bool(os.environ.get("ACTIAL_QUIET"))) as bar:
        task = bar.add_task("objects", total=total)

        def told(name: str, phase: str, entry: dict[str, Any] | None) -> None:
            bar.update(task, description=f"{name}: {phase}", advance=0 if entry is None else 1)
            if entry is not None and phase == "done":
                bar.console.print(f"{name}: {_said(entry)}", markup=False, highlight=False, soft_wrap=True)

        entries = reconstruct(args.photos, args.out, config_from(ReconstructConfig, args.overrides), told)
        bar.update(task, description="objects")
    good = [entry for entry in entries.values() if not entry["reason"]]
    print(f"{args.out}: {len(good)} captures of {len(entries)} objects, {sum(entry['registered'] for entry in good)} pictures")
    for reason, count in Counter(entry["reason"] for entry in entries.values() if entry["reason"]).most_common():
        print(f"  {count:6}  left out: {reason}")
    if len(good) < len(entries):
        print(f"each is named with its reason in {args.out / 'reconstruct.json'}; it is tried again once its photographs change")
    if good:
        print(f"questions about them: actial data viewpoint {args.out} -o {args.out.parent / 'viewpoint'}")
    return 0 if good else 1


def _said(entry: dict[str, Any]) -> str:
    if entry["reason"]:
        return f"left out, {entry['reason']}" + (f" ({entry['detail']})" if entry["detail"] else "")
    more = [f"of {len(entry['models'])} models the largest"] if len(entry["models"]) > 1 else []
    more += [f"{len(entry['unread'])} cannot be read, as {': '.join(next(iter(entry['unread'].items())))}"] if entry["unread"] else []
    more += [f"but data viewpoint would leave it out: {entry['viewpoint']}"] if entry["viewpoint"] else []
    found = f"{entry['registered']} of {entry['given']} photographs, {entry['points']:,} points, off by {entry['error']:.2f} pixels"
    return "; ".join([found, *more])
