"""Times every op beside torch, torch.compile and the peers, and writes what came out. Nothing is timed before its answer is checked.

    python -m bench.kernels.ops [--only REGEX] [--sides REGEX] [--quick] [--budget-seconds N] [--json FILE] [--list]

On a GPU: bf16 at the recipe's sizes. Without one: the CPU paths in float32, at sizes that take minutes. Each line tells the median time of
rounds that the sides took in turns, the rate by the op's floor (the FLOP or bytes that it cannot do without, whatever a side executes),
its share of the ceiling measured in the same rounds (the best torch.mm at the same T, H, V, or copy), and the peak memory above inputs
and outputs. A side that could not be timed is listed with the reason. A whole run is written to bench/results/<machine>/ as
<date>-<commit>.json and .md; a part of one (--only, --sides, --quick) only where --json says. Exits with 1 when one of our sides is wrong
or fails.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # sides of very different sizes take turns
os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")  # its check waits for the GPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from bench.harness import table
from bench.harness.timing import COPY_BYTES, CUDA, machine, slug
from bench.kernels import sides
from bench.kernels.rounds import Case, Run

SCHEMA = 1
RESULTS = Path(__file__).parents[1] / "results"
QWEN_7B, QWEN_3B = (3584, 152064), (2048, 151936)  # H and V of Qwen2.5-VL


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.ops", description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[2], formatter_class=Help
    )
    parser.add_argument("--list", action="store_true", help="print the cases, in order of importance, with their sides, and stop")
    parser.add_argument(
        "--only", metavar="REGEX", type=_pattern, default="", help="cases whose name has a match: 'grpo', 'T8192-H3584', '^token_kl'"
    )
    parser.add_argument("--sides", metavar="REGEX", type=_pattern, default="", help="sides whose name has a match: '^ours', 'torch|TRL'")
    parser.add_argument("--quick", action="store_true", help="the smallest size, few rounds, no torch.compile: does everything run?")
    parser.add_argument("--budget-seconds", metavar="N", type=float, help="stop starting sides after N s; the rest is listed as skipped")
    parser.add_argument("--seconds-per-case", metavar="N", type=float, default=3.0, help="time for the rounds of a case (default: 3)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result here instead; the table goes beside it")
    args = parser.parse_args(argv)

    chosen = [case for case in cases(args.quick) if args.only.search(case.name)]
    if not chosen:
        parser.error(f"--only {args.only.pattern!r}: matches none of the cases; --list prints them")
    if args.list:
        return _list(chosen)
    whole = not (args.only.pattern or args.sides.pattern or args.quick)
    told = machine()
    target = args.json or (RESULTS / slug() / f"{told['date']}-{told['commit']}.json" if whole else None)
    result: dict[str, Any] = {"schema": SCHEMA, "machine": told, "settings": _settings(args), "cases": []}

    def after(case: dict[str, Any]) -> None:
        print(table.text(case), flush=True)
        result["cases"].append(case)
        if target:  # after every case: a run that is cut off leaves what it has
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(result, indent=1) + "\n")
            target.with_suffix(".md").write_text(table.markdown(result))

    run = Run(
        cases=chosen,
        wanted=args.sides,
        rounds=(2, 3) if args.quick else (5, 30),
        seconds=args.seconds_per_case,
        deadline=time.monotonic() + args.budget_seconds if args.budget_seconds else float("inf"),
        compile=lambda case: _left_out(case, args),
        after=after,
    )
    print(table.heading(told), flush=True)
    torch._logging.set_logs(all=logging.ERROR)  # torch.compile explains itself at length
    broken = _pytest(run)
    wrong = [f"{case['case']}: {side['side']}: {side['status']}" for case in result["cases"] for side in case["sides"] if bad(side)]
    for line in wrong:
        print(f"BROKEN  {line}", file=sys.stderr)
    if target:
        print(f"written: {os.path.relpath(target)} and {target.with_suffix('.md').name}")
    return 1 if broken or wrong else 0


def bad(side: dict[str, Any]) -> bool:
    """Whether one of our sides is wrong or fails; a peer may."""
    return side["side"].startswith("ours") and side["status"].startswith(("wrong", "failed", "out of memory"))


def cases(quick: bool = False) -> list[Case]:
    """Every case, the most important first: all ops at one shape, then the next shape."""
    if CUDA:
        shapes = [(rows, *head) for head in (QWEN_7B, QWEN_3B) for rows in (8192, 2048, 32768)]
        dtype, rows = torch.bfloat16, (8192, 1 << 24)
    else:
        shapes, dtype, rows = [(256, 256, 8192), (512, 256, 8192)], torch.float32, (8192, 1 << 20)
    if quick:
        shapes, rows = [(2048, *QWEN_7B) if CUDA else (256, 128, 4096)], rows[:1]
    found = []
    for index, shape in enumerate(shapes):
        found += _head_cases(*shape, dtype)
        if index == 0:
            for n in rows:
                found.append(Case("group_advantages", "forward", n, 0, 0, torch.float32, sides.group_advantages, bytes_per_row=4 + 8 + 4))
                found.append(Case("token_kl", "forward", n, 0, 0, torch.float32, sides.token_kl, bytes_per_row=4 + 4 + 4))
    return found


def _head_cases(rows: int, hidden: int, vocab: int, dtype: torch.dtype) -> list[Case]:
    """The floor of a gradient is one product for each operand, that of a value one; from logits, each of them is touched once."""
    size, element = (rows, hidden, vocab, dtype), vocab * dtype.itemsize
    return [
        Case("linear_grpo_loss", "trainable", *size, lambda: sides.linear_grpo_loss(frozen=False), gemms=3),
        Case("linear_grpo_loss", "frozen", *size, lambda: sides.linear_grpo_loss(frozen=True), gemms=2),
        Case("linear_logprob", "no grad", *size, lambda: sides.linear_logprob(gradients=False), gemms=1),
        Case("linear_grpo_loss", "zero rows", *size, sides.zero_rows, gemms=3),
        Case("linear_logprob", "trainable", *size, lambda: sides.linear_logprob(gradients=True), gemms=3),
        Case("linear_cross_entropy", "trainable", *size, sides.linear_cross_entropy, gemms=3),
        Case("linear_logprob", "64 targets", *size, sides.selected_logprob, gemms=1),
        Case("logprob_from_logits", "no grad", *size, sides.logprob_from_logits, bytes_per_row=element),
        Case("grpo_loss_from_logits", "with gradient", *size, sides.grpo_loss_from_logits, bytes_per_row=2 * element),
        Case("linear_kl", "no grad", *size, lambda: sides.linear_kl(gradients=False), gemms=2),
        Case("linear_kl", "trainable", *size, lambda: sides.linear_kl(gradients=True), gemms=4),
    ]


def _left_out(case: Case, args: argparse.Namespace) -> str | None:
    """Compiling takes longer than everything else together, so that it has to be rationed."""
    if args.quick:
        return "skipped: --quick"
    first = cases()[0]
    if (args.budget_seconds or not CUDA) and case.vocab and case.shape != first.shape:
        return f"skipped: compiled at {first.shape} only, {'on a CPU' if not CUDA else 'under a budget'}"
    return None


def _pytest(run: Run) -> bool:
    """Runs bench/kernels/rounds.py under pytest-benchmark with our clock and no other plugin; True = the harness itself failed."""
    arguments = f"-c {os.devnull} -p pytest_benchmark.plugin -p no:cacheprovider -qq --no-summary --capture=no --tb=short".split()
    arguments += ["--benchmark-timer=bench.harness.timing.clock", "--benchmark-disable-gc", "--benchmark-quiet"]
    here = Path(__file__).parent
    with mock.patch.dict(os.environ, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"):
        os.environ.pop("PYTEST_XDIST_WORKER", None)  # started from a test: this process is not one of its workers
        return bool(pytest.main([*arguments, f"--rootdir={here.parent}", str(here / "rounds.py")], [run]))


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "only": args.only.pattern,
        "sides": args.sides.pattern,
        "quick": args.quick,
        "budget_seconds": args.budget_seconds,
        "seconds_per_case": args.seconds_per_case,
        "clock": "cuda events" if CUDA else "wall",
        "copy_bytes": COPY_BYTES,
    }


def _list(chosen: list[Case]) -> int:
    for case in chosen:
        print(case.name)
        for side in case.sides():
            reason = side.unavailable()
            print(f"    {side.name}{f'  ({reason})' if reason else ''}")
    return 0


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


class Help(argparse.HelpFormatter):
    """Wide enough for the options."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=110)


if __name__ == "__main__":
    sys.exit(main())
