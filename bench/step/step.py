"""One whole training step of Qwen2.5-VL-7B with random weights: ours beside our plain path and TRL, and where its time goes.

    python -m bench.step.step [--shape 7b|tiny] [--sides REGEX] [--rounds 3] [--budget SECONDS] [--json FILE]

A side is loop/trained weights/path. grpo: one update on policy (loss, backward, clipping, optimizer) of 2 prompts of about 800 tokens with
two images of about 320 merged tokens each, 16 completions to each, lognormal with mean 300, 40 to 1,000 tokens; sft: one step on rows of
those lengths, of which three each share what comes before the answer. lora: adapters of rank 16 on the language model, in float32, AdamW;
full: all weights, in bfloat16, 8-bit AdamW of bitsandbytes. ours: packed; plain: our padded path through the unmodified model; trl: the
installed GRPOTrainer's own `training_step` (as in bench.step.update). Weights, tokens and pixels are the same for all paths of a loop;
sampling is not in it. Without a GPU everything runs at --shape tiny in float32, to try the benchmark itself.

Each side has a process of its own, so that one that crashes, or needs more memory than there is, costs nobody else anything; out of
memory, it is tried again with micro-batches of half the size. Sides run in order of importance while the budget lasts, and the result is
written after each one. Its gradient must be that of the plain path (of ours, where that is missing), or its status is "wrong".

MFU: the FLOPs that the step needs (actial_fast.model.flops: vision, language model, attention and head; no recomputation, no padding, no
gradients of frozen weights) per second, over the best torch.mm measured in the same process. Outside kernels: 1 - (time in which a
kernel, copy or fill runs) / (the median's seconds). Parts are the device's time between marks: "other" is packing, planning, copies and
embedding, as far as the device waits for them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import table
from bench.harness.timing import CUDA, machine
from bench.step.shapes import SHAPES

ROOT = Path(__file__).parents[2]
SIDES = (  # in order of importance
    "grpo/lora/ours",
    "grpo/lora/plain",
    "grpo/lora/trl",
    "sft/lora/ours",
    "grpo/full/ours",
    "sft/lora/plain",
    "grpo/full/plain",
    "grpo/full/trl",
)
NEEDS = {"full": ("bitsandbytes",), "trl": ("trl", "datasets")}  # packages, besides those of all sides
START_SECONDS, SIDE_SECONDS = 8, 60  # what a side needs to load anything at all; what it should take
DIVISORS = (1, 2, 4)  # of the micro-batches' size, tried while memory runs out
APART = {"float32": 1e-3, "bfloat16": 0.1}  # relative difference of two paths' gradients, at most
PARTS = ("vision_forward", "vision_backward", "language_forward", "language_backward", "head", "optimizer", "other")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit code, 1 when one of our sides is wrong or fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b" if CUDA else "tiny", help="default here: %(default)s")
    parser.add_argument("--sides", metavar="REGEX", default="", help=f"those whose name has a match, of {', '.join(SIDES)}")
    parser.add_argument("--rounds", type=int, default=3, help="timed updates of a side, at most (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=240, metavar="SECONDS", help="for all sides together (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result there, and the table as .md beside it")
    parser.add_argument("--one", metavar="SIDE", help=argparse.SUPPRESS)
    parser.add_argument("--divide", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        return one(args)
    try:
        chosen = [name for name in SIDES if re.search(args.sides, name)]
    except re.error as error:
        parser.error(f"--sides: {args.sides!r} is not a regular expression: {error}")
    if not chosen or args.rounds < 1:
        parser.error("--sides must match a side and --rounds be at least 1")
    result = {
        "schema": 1,
        "machine": machine(),
        "shape": args.shape,
        "settings": {"rounds": args.rounds, "budget": args.budget, "gradients_apart": APART},
        "sides": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        run(result, chosen, args, Path(folder))
    print(markdown(result), flush=True)
    broken = [row for row in result["sides"] if row["side"].endswith("ours") and row["status"].startswith(("wrong", "failed"))]
    return int(bool(broken))


def run(result: dict[str, Any], chosen: list[str], args: argparse.Namespace, folder: Path) -> None:
    """All chosen sides, one after another; result["sides"] grows, and is written, with each."""
    deadline = time.monotonic() + args.budget
    for name in chosen:
        for divide in DIVISORS:
            left = deadline - time.monotonic()
            began = time.monotonic()
            if package := missing(name):
                row = {"side": name, "status": f"not installed: {package}"}
            elif left < START_SECONDS:
                row = {"side": name, "status": "skipped: out of time"}
            else:
                row = _start(name, args, divide, left, folder)
            row["took"] = round(time.monotonic() - began, 1)
            if not row["status"].startswith("out of memory"):
                break
        result["sides"].append(row)
        check(result["sides"], folder)
        print(line(row), flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n")
            args.json.with_suffix(".md").write_text(markdown(result))


def missing(name: str) -> str | None:
    """A package that a side needs and that is not installed."""
    wanted = ["transformers", "peft", *(package for part in name.split("/") for package in NEEDS.get(part, ()))]
    return next((package for package in wanted if importlib.util.find_spec(package) is None), None)


def _start(name: str, args: argparse.Namespace, divide: int, seconds: float, folder: Path) -> dict[str, Any]:
    """One side in a process of its own, ended after `seconds`; its row, as far as it came."""
    path = folder / "row.json"
    path.unlink(missing_ok=True)
    options = {
        "--one": name,
        "--shape": args.shape,
        "--rounds": args.rounds,
        "--budget": min(seconds, SIDE_SECONDS),
        "--divide": divide,
        "--json": path,
    }
    command = [sys.executable, "-m", "bench.step.step", *(str(x) for pair in options.items() for x in pair)]
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # trainers take all that they see
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=sys.stderr) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
    if path.exists():
        return json.loads(path.read_text())
    return {"side": name, "status": "skipped: out of time" if code is None else f"failed: exit code {code}"}


def one(args: argparse.Namespace) -> int:
    """One side, in this process; what became of it goes to args.json. Returns 0, since that says it."""

    def tell(row: dict[str, Any]) -> None:
        if "parts" in row:
            row = row | {"parts": {part: row["parts"].get(part, 0.0) for part in PARTS}}
        written = args.json.with_suffix(".part")
        written.write_text(json.dumps({"side": args.one} | row))
        written.replace(args.json)  # a process that is ended leaves a whole row or none

    try:
        from bench.step.step_side import measure

        options = {"rounds": args.rounds, "divide": args.divide, "seconds": args.budget}
        measure(args.one, SHAPES[args.shape], **options, gradient=gradient_file(args.json.parent, args.one), tell=tell)
    except torch.OutOfMemoryError as error:
        tell({"status": f"out of memory, with micro-batches of 1 / {args.divide} of the size: {first_line(error)}"})
    except ModuleNotFoundError as error:
        tell({"status": f"not installed: {error.name}"})
    except Exception as error:
        traceback.print_exc()
        tell({"status": f"failed: {type(error).__name__}: {first_line(error)}"})
    return 0


def first_line(error: Exception) -> str:
    """What an exception says, as far as it fits a table."""
    return (str(error).splitlines() or [""])[0][:200]


def check(rows: list[dict[str, Any]], folder: Path) -> None:
    """Compares each measured row's gradient, saved in `folder`, with the plain path's of its loop and weights, or ours without it."""
    found = {row["side"]: row for row in rows if "seconds" in row}
    for name, row in found.items():
        kind = name.rsplit("/", 1)[0]
        against = next((other for other in (f"{kind}/plain", f"{kind}/ours") if other in found and other != name), None)
        if against is None or name.endswith("plain"):
            continue
        mine, other = (np.load(gradient_file(folder, x)) for x in (name, against))
        apart = float(np.linalg.norm(mine - other) / max(float(np.linalg.norm(other)), 1e-30))
        row["gradient_apart"] = {"from": against, "relative": apart}
        limit = APART[row["settings"]["dtype"]]
        row["status"] = "measured" if apart <= limit else f"wrong: gradient apart from {against}'s by {apart:.1e}, relative"  # nan is wrong


def gradient_file(folder: Path, side: str) -> Path:
    """Where a side leaves the beginning of every parameter's gradient."""
    return folder / f"{side.replace('/', '-')}.npy"


def line(row: dict[str, Any]) -> str:
    """A side for the terminal, as soon as it is done."""
    return f"{row['side']:<16} {row['took']:6.1f} s  {'  '.join(x for x in figures(row) if x) or row['status']}"


def figures(row: dict[str, Any]) -> tuple[str, ...]:
    """Seconds, tokens/s, MFU, peak and share outside kernels of a measured row, as written; nothing of another."""
    if row["status"] != "measured":
        return ()
    outside = row.get("outside_kernels")
    return (
        f"{row['seconds']['median']:.3g} s",
        f"{row['tokens_per_s']:,.0f} tokens/s",
        f"{row['mfu']:.1%} MFU",
        f"{row['peak_mib'] / 1024:.1f} GiB",
        "" if outside is None else f"{outside:.1%} outside",
    )


def markdown(result: dict[str, Any]) -> str:
    """The tables: every side's figures, then where the time of those that were measured goes."""
    by_name = {row["side"]: row for row in result["sides"]}
    lines = [
        f"One step of Qwen2.5-VL, shape {result['shape']}, random weights; {table.heading(result['machine'])}; `python -m bench.step.step`",
        "",
        "| loop/weights/path | seconds (rounds) | tokens/s | MFU | peak memory | outside kernels | ours is faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in by_name.items():
        if row["status"] != "measured":
            lines.append(f"| {name} | {row['status'].replace('|', '/')} | | | | | |")
            continue
        ours = by_name.get(f"{name.rsplit('/', 1)[0]}/ours", {})
        ratio = row["seconds"]["median"] / ours["seconds"]["median"] if ours.get("status") == "measured" and ours is not row else None
        time_, rate, mfu, peak, outside = figures(row)
        cells = (f"{time_} ({row['seconds']['rounds']})", rate.split()[0], mfu.split()[0], peak, outside.split()[0] if outside else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {f'{ratio:.2f}x' if ratio else ''} |")
    measured = [row for row in result["sides"] if row["status"] == "measured"]
    if measured:
        lines += ["", f"| milliseconds | {' | '.join(part.replace('_', ' ') for part in PARTS)} |", f"|---{'|---' * len(PARTS)}|"]
        for row in measured:
            cells = [f"{1e3 * row['parts'][part]:.1f}" for part in PARTS]
            lines.append(f"| {row['side']} | {' | '.join(cells)} |")
        ceiling = measured[0]["ceiling"]
        lines += ["", f"MFU over {ceiling['what']}: {ceiling['tflops']:.4g} TFLOP/s."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
