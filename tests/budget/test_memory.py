"""The plan's memory beside the process's, at a small size; all cases and a larger model: `python -m bench.step.memory`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.step.memory import CLOSE

ROOT = Path(__file__).parents[2]
CASES = "packed, checkpoints", "NF4", "decoding"


@pytest.mark.slow
def test_a_process_holds_what_the_plan_says(tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench.step.memory",
        "--cases",
        f"^({'|'.join(CASES)})$",
        "--layers",
        "4",
        "--json",
        str(tmp_path / "found"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "found").read_text())["cases"]
    assert [row["case"] for row in rows] == list(CASES)
    assert all(row["measured_mb"] > 100 and abs(row["off"]) <= CLOSE for row in rows), rows
