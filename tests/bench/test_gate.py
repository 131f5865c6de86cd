"""The GPU gate: every step runs and is told, whatever becomes of the others and of the gate."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gate
from bench.harness.timing import CUDA

ROOT = Path(__file__).parents[2]


def test_every_step_of_the_gate_runs_and_one_failure_fails_it(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(gate, "ROOT", tmp_path)
    run = lambda code: [sys.executable, "-c", code]  # noqa: E731
    budget = lambda s: [f"{s:.0f}"]  # noqa: E731
    todo = [
        gate.Step("bad", run("raise SystemExit(3)"), 3),
        gate.Step("slow", run("import time; print('begun', flush=True); time.sleep(60)"), 1),
        gate.Step("none", ["none"], 100, absent="it is not here"),
        gate.Step("told", run("import sys; print('budget', *sys.argv[1:])"), 10, budget=budget),
        gate.Step("last", run("import sys; print('kept', *sys.argv[1:])"), 10, budget=budget),
    ]
    assert gate.run(todo, 42) == 1
    out = capfd.readouterr().out
    assert "FAILED: exit code 3" in out and "FAILED: ran out of time" in out and "not run: it is not here" in out
    assert re.search(r"budget (18|19|20)\n", out) and re.search(r"kept (3\d|40)\n", out), "what a step leaves goes to those after it"
    (told,) = (tmp_path / "bench/results").glob("*/gate-*.json")
    steps = json.loads(told.read_text())["steps"]
    assert [each["step"] for each in steps] == [step.name for step in todo] and steps[3]["outcome"] == "passed"
    assert (tmp_path / "build/gate/slow.log").read_text() == "begun\n", "what a step printed before its end is kept"
    assert gate.run(todo[2:], 30) == 0


def test_a_gate_that_is_ended_has_told_what_it_did_and_leaves_nothing_running(tmp_path):
    code = """
import sys
from pathlib import Path
from bench import gate
gate.ROOT = Path(sys.argv[1])
run = lambda code: [sys.executable, "-c", code]
slow = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)"
gate.steps = lambda: [gate.Step("good", run(""), 1), gate.Step("cut", run(slow), 9), gate.Step("later", run(""), 1)]
gate.main(["--cpu", "--minutes", "2"])
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        pid = next(int(line.split()[1]) for line in process.stdout if line.startswith("pid "))
        process.terminate()
        assert process.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    (told,) = (tmp_path / "bench/results").glob("*/gate-*.json")
    found = [(step["step"], step["outcome"]) for step in json.loads(told.read_text())["steps"]]
    assert found == [("good", "passed"), ("cut", "FAILED: the gate was ended")]
    assert (tmp_path / "build/gate/cut.log").read_text() == f"pid {pid}\n"


def test_the_gate_holds_what_make_gpu_promises():
    found = gate.steps()
    names = ["build", "bfloat16 tests", "memcheck", "racecheck", "microbenchmarks", "one step", "accuracy", "rollout", "other tests"]
    assert [step.name for step in found] == names
    assert sum(step.share for step in found) == 7 * 60, "the shares are seconds of a gate of 7 minutes"
    for tests in (found[1].command, found[-1].command):
        assert "tests/kernels/test_linear.py" in tests and all((ROOT / x).exists() for x in tests if x.startswith("tests/"))
    assert found[4].budget(85) == ["--budget-seconds", "70"]
    small, large = ({step.name: " ".join(step.command) for step in gate.steps(cuda)} for cuda in (False, True))
    assert "--quick" in small["microbenchmarks"] and "--collect-only" in small["other tests"] and "--prompts 3 " in small["rollout"]
    assert (
        "--quick" not in large["microbenchmarks"] and "--collect-only" not in large["other tests"] and "--prompts 64 " in large["rollout"]
    )
    if not CUDA:
        with pytest.raises(SystemExit):
            gate.main([])
