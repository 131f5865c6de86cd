"""What a small model guesses from one part of a viewpoint question: both compositions, on rings and on arcs, of rendered objects.

    python -m bench.host.leaks [--objects N] [--more] [--json FILE] [--markdown FILE]

Renders, builds and reads build.json: the probes are those of every build (actial_fast.data.captures.probes). Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from actial_fast.data.captures.render import RenderConfig, render
from actial_fast.data.captures.settings import ViewpointConfig
from actial_fast.data.captures.viewpoint import build
from bench.harness.timing import machine

PAIRS = 9  # of an object, in all sets
ARC, RING = {"azimuths": "front"}, {"azimuths": "ring"}
SHOTS = {"shots": 6, "fov_deg": 60.0}
WIDE = {"image_size": 64, "fov_deg": 80.0}  # photographs that are cut
RENDERS: dict[str, dict[str, Any]] = {
    "arc": {**ARC, "views": 24},
    "arc, shots": {**ARC, **SHOTS, "views": 120},
    "ring": {**RING, "views": 24},
    "ring, shots": {**RING, **SHOTS, "views": 144},
    "arc, wide": {**ARC, **WIDE, "views": 36},
}
MORE = ("ring, shots", "arc, wide")  # on two cores these take longer than all others together
FEWER = {"arc, wide": 10}  # times, since looking for crops takes seconds an object
SETS: list[tuple[str, str, dict[str, Any]]] = [  # what a row of the table is called, its captures, its build
    ("arc of 180 degrees, paper", "arc", {}),
    ("arc of 180 degrees, balanced", "arc, shots", {"composition": "balanced"}),
    ("the same, anchor=either", "arc, shots", {"composition": "balanced", "anchor": "either"}),
    ("ring, paper", "ring", {}),
    ("ring, balanced", "ring, shots", {"composition": "balanced"}),
    ("arc of 180 degrees, balanced, crops=0.4", "arc, wide", {"composition": "balanced", "crops": 0.4}),
]
HEAD = (
    "| set | objects, pairs | text | image 1: move, turn | image 2: move, turn | move's side: image 1, image 2 | order | turn as move |",
    "|---|---|---|---|---|---|---|---|",
)


def main() -> None:
    """Build every set, print the table, and write what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.host.leaks", description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=640, help="of four families (default: %(default)s)")
    parser.add_argument("--more", action="store_true", help="also rings with shots, and photographs that are cut")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the files go for the time of the run (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="also write what the builds said to this file")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    if args.objects % 4 or args.objects < 40:
        parser.error("there are four families, and captures that are cut are a tenth: --objects has to be a multiple of 4, 40 at least")
    result: dict[str, Any] = {"machine": machine(), "objects": args.objects, "sets": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for captures, settings in RENDERS.items():
            if captures in MORE and not args.more:
                continue
            config = RenderConfig(objects=args.objects // 4 // FEWER.get(captures, 1), workers=args.workers, **settings)
            render(Path(folder) / captures, config, progress=False)
            for name, of, asked in SETS:
                if of == captures:
                    result["sets"].append(_set(name, Path(folder), captures, settings, asked, args.workers))
                    print(row(result["sets"][-1]), flush=True)
                    if args.json:
                        args.json.write_text(json.dumps(result, indent=1) + "\n")
                    if args.markdown:
                        args.markdown.write_text("\n".join([*HEAD, *map(row, result["sets"])]) + "\n")
            shutil.rmtree(Path(folder) / captures)


def _set(name: str, folder: Path, captures: str, rendered: dict[str, Any], asked: dict[str, Any], workers: int) -> dict[str, Any]:
    config = ViewpointConfig(pairs_per_object=PAIRS, workers=workers, **asked)
    built = build(folder / captures, folder / "rows", config, progress=False)
    shutil.rmtree(folder / "rows")
    kept = ("captures", "objects", "pairs", "examples", "centre_examples", "balance", "strata", "probes", "warnings", "rejected")
    return {"set": name, "render": rendered, "viewpoint": {"pairs_per_object": PAIRS, **asked}, **{key: built[key] for key in kept}}


def row(one: dict[str, Any]) -> str:
    """A set's row of the table: per cent right, with chance behind it."""
    probes = one["probes"]

    def told(probe: str, *kinds: str, key: str = "") -> str:
        found = [probes[probe][kind] for kind in kinds]
        told = ", ".join(f"{each[key or 'accuracy']:.1f}" for each in found)
        return f"{told} ({found[0][f'{key}_chance' if key else 'chance']:.1f})"

    move, turn = "ego_translation", "ego_rotation"
    side = "side" if "side" in probes["image 1"][move] else ""
    cells = (
        one["set"],
        f"{probes['objects']}, {probes['pairs']}",
        told("text", move, "object_translation", turn),
        told("image 1", move, turn),
        told("image 2", move, turn),
        f"{told('image 1', move, key=side)}, {told('image 2', move, key=side)}",
        told("order", move, turn),
        f"{100 * one['strata']['train']['turn_follows_move']:.0f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
