"""Compares a result of bench.kernels.ops with this machine's baseline, and fails on a regression.

    python -m bench.harness.compare [RESULT] [--baseline FILE] [--threshold 0.1] [--save-baseline]

Our sides are compared, by their share of the ceiling of the same rounds (so that a slower clock is nobody's regression) and by their peak
memory. Left out are times below 50 us, which are launches rather than work. Without RESULT the newest one of this machine is read. Exits
with 1 on a regression of more than the threshold, or when a side of the baseline is now wrong or fails; with 0 where there is no baseline.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1]
SHORTEST_MS = 0.05
MEMORY_SLACK_MIB = 16.0  # the allocator rounds


@dataclass(frozen=True)
class Finding:
    """What became of one side of the baseline. kind: regression, broken, improved, same or missing."""

    kind: str
    name: str
    told: str


def main(argv: list[str] | None = None) -> int:
    """Compare or save, print, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.harness.compare", description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[2]
    )
    parser.add_argument(
        "result", metavar="RESULT", type=Path, nargs="?", help="a JSON file of bench.kernels.ops (default: the newest here)"
    )
    parser.add_argument("--baseline", metavar="FILE", type=Path, help="default: bench/baselines/<machine>.json")
    parser.add_argument("--threshold", type=float, default=0.1, help="how much slower or larger is a regression (default: 0.1)")
    parser.add_argument("--save-baseline", action="store_true", help="make the result the baseline instead of comparing")
    args = parser.parse_args(argv)

    path = args.result or newest()
    if path is None:
        parser.error("no result of this machine in bench/results; run python -m bench.kernels.ops first")
    result = json.loads(path.read_text())
    baseline = args.baseline or FOLDER / "baselines" / f"{result['machine']['slug']}.json"
    if args.save_baseline:
        baseline.parent.mkdir(parents=True, exist_ok=True)
        baseline.write_text(json.dumps(baseline_of(result, path.name), indent=1) + "\n")
        print(f"saved: {baseline}")
        return 0
    if not baseline.exists():
        print(f"no baseline {baseline}: nothing compared. Make one: python -m bench.harness.compare {path} --save-baseline")
        return 0
    found = compare(json.loads(baseline.read_text()), result, args.threshold)
    for finding in found:
        if finding.kind != "same":
            print(f"{finding.kind:<10}  {finding.name}: {finding.told}")
    failed = [x for x in found if x.kind in ("regression", "broken")]
    print(f"{len(found)} sides compared with {baseline}: {len(failed)} worse by more than {args.threshold:.0%} or broken")
    return 1 if failed else 0


def newest() -> Path | None:
    """The latest result of this machine."""
    from bench.harness.timing import slug

    files = (FOLDER / "results" / slug()).glob("[0-9]*.json")
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


def baseline_of(result: dict[str, Any], source: str) -> dict[str, Any]:
    """The figures that later runs are held to: every side of ours that was measured and is long enough."""
    figures = {
        name: {"share": side["share"], "peak_mib": side["peak_mib"]}
        for name, side in _ours(result).items()
        if side["status"] == "measured" and side["ms"]["median"] >= SHORTEST_MS
    }
    machine = {key: result["machine"][key] for key in ("slug", "torch", "triton", "date", "commit")}
    return {"schema": result["schema"], "source": source, "machine": machine, "figures": figures}


def compare(baseline: dict[str, Any], result: dict[str, Any], threshold: float) -> list[Finding]:
    """One finding for every figure of the baseline, the worst kinds first."""
    if baseline["schema"] != result["schema"]:
        raise ValueError(f"schema: the baseline has {baseline['schema']}, the result {result['schema']}; save a new baseline")
    now, found = _ours(result), []
    for name, before in baseline["figures"].items():
        side = now.get(name)
        if side is None:
            found.append(Finding("missing", name, "not part of this run"))
        elif side["status"].startswith(("skipped", "not timed")):
            found.append(Finding("missing", name, side["status"]))
        elif side["status"] != "measured":
            found.append(Finding("broken", name, side["status"]))
        else:
            found += _figures(name, before, side, threshold)
    order = ("broken", "regression", "missing", "improved", "same")
    return sorted(found, key=lambda x: order.index(x.kind))


def _figures(name: str, before: dict[str, float], side: dict[str, Any], threshold: float) -> list[Finding]:
    slower = before["share"] / side["share"] - 1
    told = f"{before['share']:.1%} of the ceiling before, {side['share']:.1%} now: {abs(slower):.1%} {'slower' if slower > 0 else 'faster'}"
    kind = "regression" if slower > threshold else "improved" if slower < -threshold else "same"
    grown = side["peak_mib"] - before["peak_mib"]
    if grown > max(threshold * before["peak_mib"], MEMORY_SLACK_MIB):
        memory = f"peak {before['peak_mib']:,.0f} MiB before, {side['peak_mib']:,.0f} MiB now"
        return [Finding("regression", name, f"{told}; {memory}" if kind == "regression" else memory)]
    return [Finding(kind, name, told)]


def _ours(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    sides = ((f"{case['case']}: {side['side']}", side) for case in result["cases"] for side in case["sides"])
    return {name: side for name, side in sides if side["side"].startswith("ours")}


if __name__ == "__main__":
    sys.exit(main())
