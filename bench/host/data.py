"""How fast data is made: images/s of `actial data render`, examples/s of `actial data viewpoint` from ready captures.

    python -m bench.host.data [--json FILE]

Both are measured through the public functions on files in a temporary folder, every process start included, and reported as measured:
nothing is extrapolated. Rendering is repeated and every repetition told; the builder reads each capture of the last one once, cold (no
cache of an earlier build), and then draws again from what it has read. Correctness is asserted before a figure is printed: the number of
files, rows that pass the full check, and questions that agree with the scenes' own azimuths.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import random
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from actial_fast.data.captures.render import RenderConfig, render
from actial_fast.data.captures.settings import ViewpointConfig
from actial_fast.data.captures.viewpoint import build
from actial_fast.data.sources.source import SourceConfig, open_source, scan


def main() -> None:
    """Measure, print, and write the JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.host.data", description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=100, help="objects per family, of four families (default: %(default)s)")
    parser.add_argument("--views", type=int, default=24, help="images per object (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=28, help="pixels along a side (default: %(default)s)")
    parser.add_argument("--supersampling", type=int, default=2, help="rays per pixel along a side (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=40, help="pairs per object (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one per core)")
    parser.add_argument("--repeats", type=int, default=3, help="how often rendering is measured (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the files go for the time of the run (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if min(args.objects, args.views, args.pairs, args.repeats) < 1:
        parser.error("sizes must be at least 1")

    machine = _machine()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        captures = Path(folder) / "captures"
        rendered = [_render(captures, args) for _ in range(args.repeats)]
        built = _build(captures, Path(folder) / "viewpoint", args)
        again = _build(captures, Path(folder) / "viewpoint", args)
        _check(captures, Path(folder) / "viewpoint", args)
    result = {"machine": machine, "render": rendered, "viewpoint": {"cold": built, "captures_read_before": again}}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    _print(result)


def _render(out: Path, args: argparse.Namespace) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    config = RenderConfig(
        objects=args.objects, views=args.views, image_size=args.image_size, supersampling=args.supersampling, workers=args.workers
    )
    done = render(out, config, progress=False)
    images = len(list(out.glob("*/*/images/*.png")))
    assert images == done["images"] == len(config.families) * args.objects * args.views, f"{images} image files, {done}"
    return {
        "objects": done["captures"],
        "images": images,
        "image_size": args.image_size,
        "supersampling": args.supersampling,
        "seconds": round(done["seconds"], 3),
        "images_per_second": round(done["images_per_second"], 1),
    }


def _build(captures: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    done = build(captures, out, ViewpointConfig(pairs_per_object=args.pairs, workers=args.workers, probes=False), progress=False)
    assert not done["rejected"], done["rejected"]
    return {
        "objects": done["captures"],
        "pairs": sum(done["pairs"].values()),
        "examples": sum(done["examples"].values()),
        "captures_reused": done["captures_reused"],
        "seconds": done["seconds"],
        "examples_per_second": done["examples_per_second"],
    }


def _check(captures: Path, built: Path, args: argparse.Namespace) -> None:
    """Every row is readable, and a sample of the angles is that of the scenes as rendered."""
    for split in ("train", "test"):
        source = open_source(SourceConfig(str(built / f"{split}.jsonl")))
        assert not scan(source, pixels=False).bad, f"{split}.jsonl has bad rows"
        for index in random.Random(0).sample(range(len(source)), min(200, len(source))):
            row = source[index]
            azimuth = json.loads((captures / row.meta["object"] / "scene.json").read_text())["azimuth_deg"]
            first, second = (azimuth[int(path.stem)] for path in row.images)
            turned = (second - first + 180) % 360 - 180
            assert math.isclose(row.meta["azimuth_change_deg"], turned, abs_tol=8), f"{row.id}: {row.meta['azimuth_change_deg']}, {turned}"


def _machine() -> dict[str, Any]:
    cpu = next((line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")), "")
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit + ("+changes" if changed else ""),
    }


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def _print(result: dict[str, Any]) -> None:
    machine = result["machine"]
    print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_before'][0]}, {machine['date']}, commit {machine['commit']}")
    for run in result["render"]:
        print(
            f"render: {run['objects']} objects, {run['images']} images of {run['image_size']}x{run['image_size']}, "
            f"{run['supersampling']}x{run['supersampling']} rays a pixel: {run['seconds']:.2f} s, {run['images_per_second']:,.0f} images/s"
        )
    for name, run in result["viewpoint"].items():
        print(
            f"viewpoint ({name.replace('_', ' ')}): {run['objects']} objects, {run['pairs']} pairs, {run['examples']} examples: "
            f"{run['seconds']:.2f} s, {run['examples_per_second']:,.0f} examples/s"
        )


if __name__ == "__main__":
    main()
