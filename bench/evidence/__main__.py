"""Measures what can be known without a GPU, and compares it with the results that are committed.

    python -m bench.evidence [--only machine ledger l2 peers] [--quick] [--write]

Exits with 1 where a figure is worse than the committed one by more than 5% (instructions, cycles, bytes), a streaming kernel touches more
than 1.02 of its least bytes, or a kernel spills; of the peers' kernels those count that quack's compiler makes of our epilogue. --write
puts the figures into bench/results/evidence instead, and draws the page's tables and plots. --quick compiles the plain bf16 cases for sm_90
alone. Peers that are not installed keep their committed figures. Compile time only: nothing is run or timed on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton

RESULTS = Path(__file__).parents[1] / "results" / "evidence"
SLACK = 1.05
Records = list[dict[str, Any]]


def machine(quick: bool = False) -> Records:
    from bench.evidence.machine import measure
    from bench.kernels.cases import CASES

    if quick:
        return measure([case for case in CASES if case.dtype == "bf16" and (case.op, case.label) in QUICK], 90)
    return [one for arch in (80, 90, 100) for one in measure(CASES, arch)]


def ledger() -> Records:
    """In a process of its own: the interpreter is on or off for a whole process."""
    command = [sys.executable, "-c", "import json; from bench.evidence import ledger; print(json.dumps(ledger.measure()))"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def l2() -> Records:
    from bench.evidence.l2 import measure

    return measure()


def peers() -> Records:
    from bench.evidence.peers import measure

    return measure()


QUICK = {
    ("linear_logprob", "no grad"),
    ("linear_logprob", "trainable"),
    ("linear_grpo_loss", "grpo"),
    ("logprob_from_logits", ""),
    ("grpo_loss_from_logits", "grpo"),
}
PARTS: dict[str, Callable[[], Records]] = {"machine": machine, "ledger": ledger, "l2": l2, "peers": peers}


def committed(part: str) -> Records:
    """The records of bench/results/evidence; none where nothing was committed yet."""
    path = RESULTS / f"{part}.json"
    return json.loads(path.read_text())["records"] if path.exists() else []


def worse(part: str, found: Records, before: Records) -> list[str]:
    """What is over its limit, a line each."""
    from bench.evidence.budget import TOUCHED_LIMIT
    from bench.evidence.machine import key

    if part == "ledger":
        return [
            f"{one['kernel']}: touches {one['touched_over_least']} of its least bytes"
            for one in found
            if one["touched_over_least"] > TOUCHED_LIMIT
        ]
    names = ("epilogue_cycles", "loop_cycles", "issue_share", "instructions_per_16_bytes", "shipped")
    if part == "peers":  # of which those are ours that another package's compiler makes of our epilogue
        found, before = ([one for one in some if one.get("variant", "").startswith("head=")] for some in (found, before))
    labels: dict[str, Callable[[dict[str, Any]], str]] = {
        "machine": key,
        "l2": lambda one: one["product"],
        "peers": lambda one: f"{one['peer']}: {one['kernel']}, {one['variant']}",
    }
    label = labels[part]
    known, wrong = {label(one): one for one in before}, []
    for one in found:
        if one.get("spills"):
            wrong.append(f"{label(one)}: {one['spills']} instructions on local memory")
        then = known.get(label(one))
        if then is None:
            wrong.append(f"{label(one)}: no committed figure, run python -m bench.evidence --write")
            continue
        wrong += [
            f"{label(one)}: {name} {one[name]:g}, committed {then[name]:g}"
            for name in names
            if name in one and one[name] > SLACK * then[name]
        ]
    return wrong


def main() -> None:
    """Measure, compare or write."""
    parser = argparse.ArgumentParser(prog="python -m bench.evidence", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure (default: all)")
    parser.add_argument("--write", action="store_true", help="replace the committed results, and draw the page")
    parser.add_argument("--quick", action="store_true", help="of the machine code, the plain bf16 cases on sm_90 alone")
    args = parser.parse_args()
    if args.quick and args.write:
        parser.error("--quick: only complete results are written")
    wrong = []
    for part in args.only:
        found = machine(quick=True) if part == "machine" and args.quick else PARTS[part]()
        before = committed(part)
        if part == "peers":
            found = _kept(found, before)
        if args.write:
            about = {"triton": triton.__version__, "measured": "compile time, interpreter and replay: no GPU ran anything"}
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / f"{part}.json").write_text(json.dumps({"about": about, "records": found}, indent=1) + "\n")
            before = found
        wrong += worse(part, found, before)
        print(f"{part}: {len(found)} records")
    if args.write:
        from bench.evidence.page import draw

        draw()
    print(*(wrong or ["nothing is over its limit"]), sep="\n")
    sys.exit(bool(wrong))


def _kept(found: Records, before: Records) -> Records:
    """The peers measured, and of those not installed here what was committed."""
    kept = []
    for one in found:
        old = [known for known in before if known["peer"] == one["peer"] and "missing" not in known]
        kept += old if one.get("missing") == "not installed" and old else [one]
    return kept


if __name__ == "__main__":
    main()
