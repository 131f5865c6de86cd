"""The GPU gate, `make gpu`: build, kernel tests in bfloat16, memcheck and racecheck, ops beside the peers, one 7B step, errors, rollouts,
the other GPU tests; the most telling first, 12 minutes, no network.

    python -m bench.gate [--minutes 12] [--cpu]

Every step runs, whatever became of the one before it, and is ended when its time is up; what one leaves goes to those after it. Results go
to bench/results/<gpu>/, every figure as soon as it is there, and gate-<date>-<commit>.json tells each step's outcome and seconds; what the
steps print is kept in build/gate/. The exit code is 1 when a step failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bench.harness.timing import CUDA, commit, machine, slug, today

ROOT = Path(__file__).parent.parent
LAST_SECONDS = 15  # what the last case of the microbenchmarks needs to finish


@dataclass(frozen=True)
class Step:
    """One command. `share`: its part, among those of the steps that are still to run, of the time that is left. `absent`: why it cannot run
    here."""

    name: str
    command: list[str]
    share: float
    absent: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    budget: Callable[[float], list[str]] = lambda seconds: []  # arguments that tell it its time


def main(argv: list[str] | None = None) -> int:
    """Run the steps and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=12, help="for everything together (default: 12)")
    parser.add_argument("--cpu", action="store_true", help="the same steps at small sizes without a GPU, to try the gate itself")
    args = parser.parse_args(argv)
    if not CUDA and not args.cpu:
        parser.error("torch sees no CUDA device; make test runs the CPU tests, make bench the CPU benchmarks")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running, and what was cut off is told
    return run(steps(), 60 * args.minutes)


def steps(cuda: bool = CUDA) -> list[Step]:
    """What the gate does, in order; the shares are seconds of a gate of 7 minutes. Without CUDA sizes are small, and the other tests, which
    `make test` runs there, are only collected."""
    python, results = sys.executable, ROOT / "bench" / "results" / slug()
    kernels = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    others = [x for x in sorted((ROOT / "tests").rglob("test_*.py")) if x not in kernels and re.search(r"mark\.gpu\b", x.read_text())]
    workers = ["-n", str(min(8, len(os.sched_getaffinity(0))))] if importlib.util.find_spec("xdist") else []
    pytest = [python, "-m", "pytest", "-q", *workers, "-m", "not slow and not ranks"]
    sanitizer = shutil.which("compute-sanitizer")
    accuracy, step, rollout, ops = (str(results / f"{n}-{today()}-{commit()}.json") for n in ("accuracy", "step", "rollout", "ops"))
    replies = ("--prompts 64 --n 16 --mean 200 --limit 600" if cuda else "--prompts 3 --n 4 --mean 8 --limit 16 --rounds 2").split()
    missing = next((f"{name} is not installed" for name in ("transformers", "peft") if importlib.util.find_spec(name) is None), None)

    def sanitized(tool: str, *arguments: str) -> Step:
        command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "1", python, "-m", "bench.kernels.memcheck"]
        absent = None if sanitizer else "compute-sanitizer is not on the PATH"
        return Step(tool, [*command, *arguments], 30, absent, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    return [
        Step("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 40),
        Step("bfloat16 tests", [*pytest, "-k", "bfloat16", *_named(kernels)], 90),
        sanitized("memcheck", "--one"),
        sanitized("racecheck", "--one"),
        Step(
            "microbenchmarks",
            [python, "-m", "bench.kernels.ops", *([] if cuda else ["--quick", "--json", ops])],
            85,
            budget=lambda seconds: ["--budget-seconds", f"{max(1, seconds - LAST_SECONDS):.0f}"],
        ),
        Step(
            "one step",
            [python, "-m", "bench.step.step", "--json", step],
            85,
            missing,
            budget=lambda s: ["--budget", f"{max(1, s - 10):.0f}"],
        ),
        Step("accuracy", [python, "-m", "bench.kernels.accuracy", "--json", accuracy], 20),
        Step(
            "rollout",
            [python, "-m", "bench.step.rollout", *replies, "--json", rollout],
            20,
            missing,
        ),
        Step("other tests", [*pytest, *([] if cuda else ["--collect-only"]), "-k", "not bfloat16", *_named(kernels + others)], 20),
    ]


def _named(tests: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in tests]


def run(todo: list[Step], seconds: float) -> int:
    """The steps one after another; returns 1 when one failed or ran out of time."""
    told = ROOT / "bench" / "results" / slug() / f"gate-{today()}-{commit()}.json"
    told.parent.mkdir(parents=True, exist_ok=True)
    deadline, outcomes = time.monotonic() + seconds, []

    def tell(step: Step, took: float, outcome: str) -> None:
        outcomes.append({"step": step.name, "seconds": round(took, 1), "outcome": outcome})
        told.write_text(json.dumps({"machine": machine(), "minutes": seconds / 60, "steps": outcomes}, indent=1) + "\n")

    for index, step in enumerate(todo):
        if step.absent:
            tell(step, 0.0, f"not run: {step.absent}")
            continue
        shares = sum(later.share for later in todo[index:] if not later.absent)
        allowed = max(1.0, (deadline - time.monotonic()) * step.share / shares)
        print(f"== {step.name}, {allowed:.0f} s: {' '.join(step.command)}", flush=True)
        began = time.monotonic()
        try:
            code = _call(step, allowed)
        except BaseException:
            tell(step, time.monotonic() - began, "FAILED: the gate was ended")
            raise
        why = "ran out of time" if code is None else f"exit code {code}"
        tell(step, time.monotonic() - began, "passed" if code == 0 else f"FAILED: {why}")
    lines = [f"{each['step']:<16}  {each['seconds']:6.0f} s  {each['outcome']}" for each in outcomes]
    print("== make gpu", *lines, sep="\n", flush=True)
    return int(any(str(each["outcome"]).startswith("FAILED") for each in outcomes))


def _call(step: Step, seconds: float) -> int | None:
    """The exit code; None when it had to be ended, with everything it had started. What it prints is shown and kept."""
    command, environment = [*step.command, *step.budget(seconds)], os.environ | step.environment
    log = ROOT / "build" / "gate" / f"{step.name.replace(' ', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, text=True, **streams) as process:
        show = threading.Thread(target=_show, args=(process.stdout, log), daemon=True)
        show.start()
        try:
            return process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return None
            raise
        finally:
            show.join(5)


def _show(lines: IO[str], log: Path) -> None:
    with log.open("w") as kept:
        for line in lines:
            print(line, end="", flush=True)
            kept.write(line)
            kept.flush()


if __name__ == "__main__":
    sys.exit(main())
