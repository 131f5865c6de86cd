"""The GPU gate, `make gpu`: build, GPU tests, memcheck, errors, rollouts, microbenchmarks, one 7B step; 12 minutes, no network.

    python -m bench.gate [--minutes 12] [--cpu]

Every step runs, whatever became of the one before it; the last lines tell each one's outcome and seconds, and the exit code is 1 when
one failed. The 7B step and the microbenchmarks have time of their own, and get what the others leave of theirs. Results go to
bench/results/<gpu>/.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.harness.timing import CUDA, commit, slug, today

ROOT = Path(__file__).parent.parent
LAST_SECONDS = 40  # what the last case of the microbenchmarks needs to finish


@dataclass(frozen=True)
class Step:
    """One command; `most` bounds its seconds, None = all that is left, `least` is what earlier steps leave it. `absent`: why it cannot run
    here."""

    name: str
    command: list[str]
    most: float | None = None
    least: float = 0
    absent: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    budget: Callable[[float], list[str]] = lambda seconds: []  # arguments that tell it its time


def main(argv: list[str] | None = None) -> int:
    """Run the steps and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=12, help="for everything together (default: 12)")
    parser.add_argument("--cpu", action="store_true", help="the same steps on a machine without a GPU, to try the gate itself")
    args = parser.parse_args(argv)
    if not CUDA and not args.cpu:
        parser.error("torch sees no CUDA device; make test runs the CPU tests, make bench the CPU benchmarks")
    return run(steps(), 60 * args.minutes)


def steps() -> list[Step]:
    """What the gate does, in order."""
    python, results = sys.executable, ROOT / "bench" / "results" / slug()
    tests = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    tests += [x for x in sorted((ROOT / "tests").rglob("test_*.py")) if x not in tests and re.search(r"mark\.gpu\b", x.read_text())]
    workers = ["-n", str(min(8, len(os.sched_getaffinity(0))))] if importlib.util.find_spec("xdist") else []
    sanitizer = shutil.which("compute-sanitizer")
    accuracy, step, rollout = (str(results / f"{name}-{today()}-{commit()}.json") for name in ("accuracy", "step", "rollout"))
    missing = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
    return [
        Step("build", [python, "setup.py", "-q", "build_ext", "--inplace"]),
        Step("tests", [python, "-m", "pytest", "-q", *workers, "-m", "not slow", *(str(x.relative_to(ROOT)) for x in tests)], most=210),
        Step(
            "memcheck",
            [sanitizer or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", python, "-m", "bench.kernels.memcheck"],
            most=60,
            absent=None if sanitizer else "compute-sanitizer is not on the PATH",
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
        Step("accuracy", [python, "-m", "bench.kernels.accuracy", "--json", accuracy], most=45),
        Step(
            "rollout",
            [python, "-m", "bench.step.rollout", "--prompts", "64", "--n", "16", "--mean", "200", "--limit", "600", "--json", rollout],
            most=60,
            absent=f"{missing[0]} is not installed" if missing else None,
        ),
        Step(
            "microbenchmarks",
            [python, "-m", "bench.kernels.ops"],
            least=150,
            budget=lambda seconds: ["--budget-seconds", f"{max(1, seconds - LAST_SECONDS):.0f}"],
        ),
        Step(
            "one step",
            [python, "-m", "bench.step.step", "--json", step],
            least=250,
            absent=f"{missing[0]} is not installed" if missing else None,
            budget=lambda seconds: ["--budget", f"{max(1, seconds - 10):.0f}"],
        ),
    ]


def run(todo: list[Step], seconds: float) -> int:
    """The steps one after another; returns 1 when one failed or ran out of time."""
    (ROOT / "bench" / "results" / slug()).mkdir(parents=True, exist_ok=True)
    deadline, told, failed = time.monotonic() + seconds, [], False
    for index, step in enumerate(todo):
        left = deadline - time.monotonic() - sum(later.least for later in todo[index + 1 :] if not later.absent)
        allowed = left if step.most is None else min(left, step.most)
        outcome, took = step.absent or "", 0.0
        if not outcome and allowed <= 0:
            outcome, failed = "FAILED: no time was left", True
        if not outcome:
            print(f"== {step.name}: {' '.join(step.command)}", flush=True)
            began = time.monotonic()
            code = _call(step, allowed)
            took = time.monotonic() - began
            outcome = "passed" if code == 0 else f"FAILED: {'ran out of time' if code is None else f'exit code {code}'}"
            failed = failed or code != 0
        told.append(f"{step.name:<16}  {took:6.0f} s  {outcome if not step.absent else f'not run: {step.absent}'}")
    print("== make gpu", *told, sep="\n", flush=True)
    return int(failed)


def _call(step: Step, seconds: float) -> int | None:
    """The exit code; None when it had to be ended, with everything it had started."""
    command, environment = [*step.command, *step.budget(seconds)], os.environ | step.environment
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            return process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return None
            raise


if __name__ == "__main__":
    sys.exit(main())
