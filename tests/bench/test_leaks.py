"""The table of leaks on the page is the rendering of the builds' own reports, and these reach what the balanced composition is for."""

import json
from pathlib import Path

from bench.host.leaks import HEAD, MORE, SETS, row

RESULTS = Path(__file__).parents[2] / "bench/results/cpu-2core"


def test_the_committed_table_is_that_of_the_reports_and_holds_the_goals():
    told = json.loads((RESULTS / "leaks-2026-11-29.json").read_text())
    assert (RESULTS / "leaks.md").read_text().splitlines() == [*HEAD, *map(row, told["sets"])]
    assert [one["set"] for one in told["sets"]] == [name for name, of, _ in SETS if of not in MORE] and told["objects"] == 640
    balanced = next(one for one in told["sets"] if one["set"] == "arc of 180 degrees, balanced")
    probes = balanced["probes"]
    assert all(abs(found["accuracy"] - found["chance"]) <= 3 for found in probes["text"].values())
    assert all(max(found["accuracy"], found["side"]) <= 55 for found in probes["image 1"].values())
    assert all(0.3 <= balanced["strata"][split]["turn_follows_move"] <= 0.7 for split in ("train", "test"))
