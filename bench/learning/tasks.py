"""Whether the tasks that ship are learned: their recipes from data to the last evaluation, with the curves of reward and held-out metric.

    python -m bench.learning.tasks [TASK ...] [--folder DIR] [--json FILE]

For each of jigsaw, jigsaw-turns, sparkle and boxes: its rows and a tiny model are made by the commands that its recipe names, then
recipes/TASK-sft.yaml and recipes/TASK-grpo.yaml are run as they are. A curve's points are the mean reward of every tenth of the GRPO steps
(replies to training prompts, sampled) and the mean score of each evaluation (greedy, on rows of other pictures). Risen: the last third of
the points is above the first one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from actial_fast.cli.main import main as actial
from actial_fast.report.metrics import read_events, read_metrics
from bench.harness.timing import machine

ROOT = Path(__file__).parents[2]
TASKS = ("jigsaw", "jigsaw-turns", "sparkle", "boxes")
PARTS = 10  # of a reward's curve


def preparation(recipe: Path) -> list[list[str]]:
    """The commands that a recipe's comment names, as arguments of `actial`."""
    line = next(line for line in recipe.read_text().splitlines() if line.startswith("#   actial "))
    return [shlex.split(command)[1:] for command in line.removeprefix("#").split("&&")]


def risen(curve: list[float]) -> bool:
    """Whether the mean of a curve's last third is above its first point."""
    return statistics.fmean(curve[-max(1, len(curve) // 3) :]) > curve[0]


def learned(task: str) -> dict[str, Any]:
    """Run a task's recipes below the working directory; their curves."""
    began = time.process_time()
    stages = [ROOT / f"recipes/{task}-{kind}.yaml" for kind in ("sft", "grpo")]
    for command in preparation(stages[0]):
        if not Path(command[command.index("-o") + 1]).exists():
            _done(command)
    for recipe in stages:
        _done([recipe.stem.rpartition("-")[2], str(recipe)])
    run = Path("runs") / task
    rewards = [record["reward"] for record in read_metrics(run) if "reward" in record]
    size = max(1, len(rewards) // PARTS)
    rewarded = [round(statistics.fmean(rewards[k : k + size]), 4) for k in range(0, len(rewards) // size * size, size)]
    evals = [event for event in read_events(run) if event["kind"] == "eval"]
    points = [
        {
            "stage": event["stage"],
            "step": event["step"],
            "score": round(event["result"]["overall"]["score"], 4),
            "interval": [round(end, 4) for end in event["result"]["overall"]["score_interval"]],
            "right": round(event["result"]["overall"]["accuracy"], 4),
            "formed": round(event["result"]["overall"]["format_rate"], 4),
            "n": event["result"]["overall"]["n"],
        }
        for event in evals
    ]
    held_out = [point["score"] for point in points if point["stage"] == "grpo"]
    return {
        "task": task,
        "reward": rewarded,
        "reward_risen": risen(rewarded),
        "held_out": points,
        "held_out_risen": risen(held_out),
        "grpo_steps": len(rewards),
        "cpu_seconds": round(time.process_time() - began, 1),
        "machine": machine(),
    }


def merged(before: list[dict[str, Any]], one: dict[str, Any]) -> list[dict[str, Any]]:
    """The tasks' curves with one put in the place of its task's, in the order of TASKS."""
    return sorted([*(each for each in before if each["task"] != one["task"]), one], key=lambda each: TASKS.index(each["task"]))


def _done(command: list[str]) -> None:
    if actial(command):
        raise SystemExit(f"actial {shlex.join(command)} failed")


def main() -> int:
    """0 when every curve has risen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)} (default: all)")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="where runs/ is made (default: here); what is done there is not done again"
    )
    parser.add_argument("--json", type=Path, help="also write the curves to this file, in the places of these tasks' former ones there")
    args = parser.parse_args()
    if unknown := [task for task in args.tasks if task not in TASKS]:
        parser.error(f"no task {unknown[0]!r}; use {', '.join(TASKS)}")
    out = args.json.resolve() if args.json else None
    args.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(args.folder)
    found = []
    for task in args.tasks:
        found.append(learned(task))
        told = {name: found[-1][name] for name in ("task", "reward", "reward_risen", "held_out_risen")}
        print(json.dumps(told | {"held_out": [point["score"] for point in found[-1]["held_out"]]}), flush=True)
        if out:
            before = json.loads(out.read_text())["tasks"] if out.exists() else []
            out.write_text(json.dumps({"command": "python -m bench.learning.tasks", "tasks": merged(before, found[-1])}, indent=1) + "\n")
    return int(not all(each["reward_risen"] and each["held_out_risen"] for each in found))


if __name__ == "__main__":
    sys.exit(main())
