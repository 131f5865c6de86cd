"""The planner beside TRL's best-fit-decreasing packing and the binpacking package: seconds, fill, and how even the ranks are.

    python -m bench.host.planner [--json FILE] [--sizes 10000 100000 1000000]

Lengths are lognormal with mean 1,017 (mu 6.8, sigma 0.5), cut off at the capacity of 8,192 tokens; fill is tokens over micro-batches times
capacity. TRL plans in `trl.data_utils._pack_bfd`, which gets a table of nulls in place of tokens, and what it spends on filtering and
gathering that table is not counted. binpacking is left out above 10,000 lengths, because its time grows with their square. Ranks: 512
rollout groups (two images, 16 completions) over 8 ranks, max over mean of the cost model's total per rank; round robin is what a
distributed sampler does. Seconds are of the processor and of the wall; on a machine that others use only the first means much. Every plan
is checked before its figure is told.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from actial_fast.packing import native
from actial_fast.packing.layout import Part
from actial_fast.packing.planning import Capacity, Costs
from bench.harness.timing import machine

CAPACITY = 8192
SLOW_ABOVE = 10_000
IMAGE = 0


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.host.planner", description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to this file")
    parser.add_argument("--sizes", metavar="N", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="how many lengths")
    parser.add_argument("--rounds", type=int, default=3, help="rounds whose median is told (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(*args.sizes, args.rounds) < 1:
        parser.error("sizes and rounds must be at least 1")

    result = {"schema": 1, "machine": machine(), "settings": {"capacity": CAPACITY, "rounds": args.rounds}}
    result |= {"lengths": [row for n in args.sizes for row in lengths(n, args.rounds)], "ranks": ranks(), "layout": layout(args.rounds)}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(told(result))


class Clock:
    """Seconds of the processor and of the wall since it was made, less those spent in functions it leaves out."""

    def __init__(self):
        self.started = np.array([time.thread_time(), time.perf_counter()])

    def taken(self) -> np.ndarray:
        return np.array([time.thread_time(), time.perf_counter()]) - self.started

    def without(self, function: Callable) -> Callable:
        """The function, whose time does not count."""

        def call(*args):
            before = self.taken()
            result = function(*args)
            self.started += self.taken() - before
            return result

        return call


def lengths(n: int, rounds: int) -> list[dict[str, Any]]:
    """One row per side for n plain sequences."""
    drawn = np.random.default_rng(0).lognormal(6.8, 0.5, n).clip(1, CAPACITY).astype(np.int64)
    sides: list[tuple[str, Callable[[Clock], list[int]] | str]] = []
    sides += [("ours", lambda _: _ours(drawn, 1)), ("ours, 8 ranks", lambda _: _ours(drawn, 8))]
    sides.append(("TRL bfd", _trl(drawn) if importlib.util.find_spec("trl") else "not installed"))
    if importlib.util.find_spec("binpacking") is None:
        sides.append(("binpacking", "not installed"))
    else:
        sides.append(("binpacking", (lambda _: _binpacking(drawn)) if n <= SLOW_ABOVE else "skipped: quadratic"))
    return [{"lengths": n, "side": name, **_measured(call, drawn, rounds)} for name, call in sides]


def _measured(call: Callable[[Clock], list[int]] | str, drawn: np.ndarray, rounds: int) -> dict[str, Any]:
    if isinstance(call, str):
        return {"status": call}
    taken = []
    for _ in range(rounds):
        clock = Clock()
        packed = call(clock)
        taken.append(clock.taken())
    assert sum(packed) == drawn.sum() and max(packed) <= CAPACITY, "a plan that loses tokens or overfills"
    return {
        "status": "measured",
        "cpu_seconds": round(statistics.median(cpu for cpu, _ in taken), 4),
        "seconds": round(statistics.median(wall for _, wall in taken), 4),
        "micro_batches": len(packed),
        "fill": round(sum(packed) / (len(packed) * CAPACITY), 5),
    }


def _ours(drawn: np.ndarray, ranks: int) -> list[int]:
    n, none = len(drawn), np.empty(0, np.int64)
    zeros = np.zeros(n + 1, np.int64)
    plan = native.plan(drawn, none, zeros, zeros[:n], capacity=Capacity(CAPACITY, 1), costs=Costs(), ranks=ranks)
    return plan.totals("tokens").ravel().tolist()


def _trl(drawn: np.ndarray) -> Callable[[Clock], list[int]]:
    import pyarrow as pa
    import pyarrow.compute as pc
    from trl.data_utils import _pack_bfd

    offsets = pa.array(np.concatenate([[0], np.cumsum(drawn)]), pa.int64())
    table = pa.table({"input_ids": pa.LargeListArray.from_arrays(offsets, pa.nulls(int(drawn.sum())))})

    def call(clock: Clock) -> list[int]:
        with mock.patch.object(pc, "filter", clock.without(pc.filter)), mock.patch.object(pc, "take", clock.without(pc.take)):
            return pc.list_value_length(_pack_bfd(table, CAPACITY)["input_ids"]).to_pylist()

    return call


def _binpacking(drawn: np.ndarray) -> list[int]:
    import binpacking

    return [sum(group) for group in binpacking.to_constant_volume(drawn.tolist(), CAPACITY)]


def rollouts(rng: np.random.Generator, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """native.plan's arrays of groups with prompts of about 800 tokens, two images of about 320 merged tokens each in them, and 16
    completions, lognormal with mean 300, 40 to 1,000."""
    images = rng.integers(250, 391, (groups, 2)).sum(1)
    replies = rng.lognormal(math.log(300) - 0.32, 0.8, groups * 16).clip(40, 1000).astype(np.int64)
    return images + rng.integers(100, 220, groups), replies, 16 * np.arange(groups + 1), 4 * images


def ranks(groups: int = 512, count: int = 8) -> list[dict[str, Any]]:
    """One row per side: the most loaded rank over the mean, on the cost model."""
    drawn = rollouts(np.random.default_rng(0), groups)
    plan = native.plan(*drawn, capacity=Capacity(16_384, 16_384), costs=Costs(), ranks=count)
    cost = np.bincount(plan.pieces["group"], plan.pieces["cost"], groups)
    rows = [("ours", plan.totals("cost").sum(1)), ("round robin", [cost[r::count].sum() for r in range(count)])]
    if importlib.util.find_spec("binpacking"):
        import binpacking

        rows.append(("binpacking", [sum(share) for share in binpacking.to_constant_bin_number(cost.tolist(), count)]))
    found = [{"side": side, "status": "measured", "imbalance": round(float(np.max(load) / np.mean(load)), 6)} for side, load in rows]
    if len(rows) == 2:
        found.append({"side": "binpacking", "status": "not installed"})
    together = plan.totals("cost")
    found[0]["step_imbalance"] = round(float(together.max(0).sum() / together.sum(1).mean()), 6)
    return found


def layout(rounds: int) -> dict[str, Any]:
    """How long one micro-batch of three rollout groups takes to lay out."""
    rng = np.random.default_rng(0)
    prefix, replies, offsets, patches = rollouts(rng, 3)
    parts = []
    for g in range(3):
        tokens = int(patches[g]) // 4
        ids = np.concatenate([np.full(tokens, IMAGE), rng.integers(1, 1000, prefix[g] - tokens)])
        suffixes = [rng.integers(1, 1000, n) for n in replies[offsets[g] : offsets[g + 1]]]
        trained = tuple((ids, np.ones(len(ids), bool)) for ids in suffixes)
        parts.append(Part(f"row {g}", ids, np.zeros(len(ids), bool), None, trained, (g,), ((1, 2, 2 * tokens),), 16 * g))
    seconds = []
    for _ in range(20 * rounds):
        start = time.thread_time()
        made = native.layout(parts, image_token=IMAGE, merge=2)
        seconds.append(time.thread_time() - start)
    return {"rows": len(made.input_ids), "loss_rows": len(made.loss_rows), "cpu_seconds": round(statistics.median(seconds), 6)}


def told(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    about = result["machine"]
    lines = [f"{about['cpu']}, {about['cores']} cores, load {about['load_before'][0]}, {about['date']}, commit {about['commit']}"]
    for row in result["lengths"]:
        lines.append(f"{row['lengths']:>9,} lengths  {row['side']:<14} {_figures(row)}")
    for row in result["ranks"]:
        step = f"; micro-batches that run together {row['step_imbalance']:.5f}" if "step_imbalance" in row else ""
        lines.append(
            f"512 groups, 8 ranks  {row['side']:<12} " + (f"{row['imbalance']:.5f}{step}" if "imbalance" in row else row["status"])
        )
    row = result["layout"]
    return "\n".join([*lines, f"layout of {row['rows']:,} rows, {row['loss_rows']:,} with loss: {1e3 * row['cpu_seconds']:.2f} ms"])


def _figures(row: dict[str, Any]) -> str:
    if row["status"] != "measured":
        return row["status"]
    seconds = f"{row['cpu_seconds']:>8.3f} s of the processor {row['seconds']:>8.3f} s"
    return f"{seconds}  {row['micro_batches']:>7,} micro-batches  fill {row['fill']:.2%}"


if __name__ == "__main__":
    main()
