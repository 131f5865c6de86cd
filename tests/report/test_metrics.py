"""The record of a run: nothing lost, nothing twice, whatever kills the process."""

import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from actial_fast.evaluation.statistics import Record, accuracy_table
from actial_fast.report import metrics
from actial_fast.report.metrics import MetricLog, read_events, read_metrics

ROOT = Path(__file__).resolve().parents[2]
RESULT = accuracy_table([Record("rotation", True, True, 5, "left", 3), Record("rotation", False, False, 7, "right", 3)])


def log(run, stage="sft", **options):
    return MetricLog(run, **{"stage": stage, "total": 10, "tensorboard": False, **options})


def test_steps_and_events_come_back(tmp_path):
    with log(tmp_path / "new" / "run") as record:
        record.step(1, {"loss": 2.0, "reward/format": 0.5})
        record.step(2, {"loss": math.nan, "lr": math.inf})
        record.event("eval", {"test": RESULT, "train": RESULT})
        record.event("rollouts", [{"images": ["a.png"], "prompt": "p <image>", "response": "r\u2028", "reward": 1.0, "truth": "A"}], step=1)
        # Flushed while still open: a reader (or the next process after kill -9) sees every line.
        first, second = read_metrics(tmp_path / "new" / "run")
    assert (first["stage"], first["step"], first["loss"], first["reward/format"]) == ("sft", 1, 2.0, 0.5)
    assert math.isnan(second["loss"]) and math.isnan(second["lr"])
    for line in (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # strict JSON: no NaN token
    test, train, rollouts = read_events(tmp_path / "new" / "run")
    assert (test["kind"], test["name"], test["step"], test["result"]) == ("eval", "test", 2, RESULT)
    assert train["name"] == "train"
    assert (rollouts["step"], rollouts["rollouts"][0]["response"]) == (1, "r\u2028")


def test_resume_drops_only_later_steps_of_its_own_stage(tmp_path):
    for stage in ("base", "sft"):
        with log(tmp_path, stage) as record:
            record.event("eval", {"test": RESULT}, step=0)
            for step in range(1, 6):
                record.step(step, {"loss": step})
            record.event("eval", {"test": RESULT})
    with log(tmp_path, "sft", resume_step=3) as record:
        record.step(4, {"loss": 40})
    assert [(m["stage"], m["step"], m["loss"]) for m in read_metrics(tmp_path)] == [
        *(("base", s, s) for s in range(1, 6)),
        *(("sft", s, s) for s in range(1, 4)),
        ("sft", 4, 40),
    ]
    assert [(e["stage"], e["step"]) for e in read_events(tmp_path)] == [("base", 0), ("base", 5), ("sft", 0)]
    with log(tmp_path, "sft"):  # started over
        pass
    assert {m["stage"] for m in read_metrics(tmp_path)} == {e["stage"] for e in read_events(tmp_path)} == {"base"}


def test_an_evaluation_done_again_counts_once(tmp_path):
    with log(tmp_path) as record:
        record.event("eval", {"test": {**RESULT, "kinds": {}}}, step=3)
        record.event("eval", {"test": RESULT}, step=3)
    (event,) = read_events(tmp_path)
    assert event["result"] == RESULT


@pytest.mark.parametrize("torn", [b'{"stage": "sft", "st', b'{"stage": "sft"', '{"stage": "é'.encode()[:-1], b"{}", b"3"])
def test_a_torn_last_line_is_dropped_and_the_next_line_is_whole(tmp_path, torn):
    with log(tmp_path) as record:
        record.step(1, {"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "ab") as handle:
        handle.write(torn)
    assert [m["step"] for m in read_metrics(tmp_path)] == [1]
    with log(tmp_path, resume_step=1) as record:
        record.step(2, {"loss": 2.0})
    assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_last_line_that_only_lacks_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "step": 1, "loss": 1.0}')
    with log(tmp_path, resume_step=1) as record:
        record.step(2, {"loss": 2.0})
    assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2]


def test_a_damaged_line_elsewhere_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "step": 1}\nnonsense\n{"stage": "sft", "step": 2}\n')
    for use in (read_metrics, lambda run: log(run, resume_step=2)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2.*delete that line"):
            use(tmp_path)


def test_kill_9_leaves_every_finished_step(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from actial_fast.report import metrics
from actial_fast.report.metrics import MetricLog
log = MetricLog(Path(sys.argv[1]), stage="sft", total=9, tensorboard=False)
for step in range(1, 6):
    log.step(step, {"loss": step})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_other_ranks_write_nothing(tmp_path, capsys):
    with log(tmp_path / "run", enabled=False, tensorboard=True, wandb="project") as record:
        record.step(1, {"loss": 1.0})
        record.event("eval", {"test": RESULT})
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_plain_lines_are_few_and_tell_the_eta(tmp_path, capsys):
    with log(tmp_path, "grpo", total=200) as record:
        for step in range(1, 201):
            record.step(step, {"seconds": 1.0, "kl": 0.25, "reward": step, "loss": 0.5})
            if step == 100:
                record.event("eval", {"test": RESULT})
    lines = capsys.readouterr().out.splitlines()
    assert 20 <= len(lines) <= 24
    assert lines[0].startswith("grpo 1/200  ETA ") and "loss 0.5  reward 1  kl 0.25" in lines[0]
    assert lines[-1].startswith("grpo 200/200  ETA 0:00")
    assert [line for line in lines if "eval" in line or "accuracy" in line] == [
        "grpo step 100: test accuracy rotation 50.0%, overall 50.0%; well-formed and correct 50.0%"
    ]


def test_eta_is_the_recent_pace_times_the_steps_left(tmp_path, monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    with log(tmp_path, "sft", total=400, resume_step=100) as record:
        for step in range(101, 301):
            now += 2.0 if step <= 200 else 50.0
            record.step(step, {"loss": 1.0})
    eta = dict(re.findall(r"sft (\d+)/400  ETA (\S+)", capsys.readouterr().out))
    assert (eta["200"], eta["300"]) == ("6:40", "1:23:20")
    # A slow step still shows a line a minute.
    assert len([step for step in eta if int(step) > 200]) >= 50


def test_live_progress_in_a_terminal(tmp_path):
    """On a pseudo-terminal: a bar with step, ETA and values, and the evaluation printed above it, even when the loop raises."""
    code = """
import sys
from pathlib import Path
from actial_fast.report import metrics
from actial_fast.report.metrics import MetricLog
with MetricLog(Path(sys.argv[1]), stage="sft", total=4, tensorboard=False, resume_step=1) as log:
    log.step(2, {"loss": 0.125})
    log.event("note", {"any": [1]})
    log.step(3, {"loss": 0.5})
    raise SystemExit(7)
"""
    terminal, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=side, stdout=side, stderr=side, cwd=ROOT, env=environment)
    os.close(side)
    output = b""
    try:
        while chunk := os.read(terminal, 4096):
            output += chunk
    except OSError:  # the terminal closes with the child
        pass
    os.close(terminal)
    text = output.decode()
    assert child.wait() == 7, text
    assert "sft" in text and "3/4" in text and "ETA 0:0" in text and "loss 0.5" in text
    assert text.rindex("\x1b[?25h") > text.index("\x1b[?25l")  # the cursor is shown again
    assert read_events(tmp_path)[0]["note"] == {"any": [1]}


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loaded = EventAccumulator(str(folder))
    loaded.Reload()
    return {tag: [(e.step, e.value) for e in loaded.Scalars(tag)] for tag in loaded.Tags()["scalars"]}


def test_tensorboard_has_no_step_twice_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    with log(tmp_path, tensorboard=True) as record:
        for step in range(1, 6):
            record.step(step, {"loss": step})
    with log(tmp_path, tensorboard=True, resume_step=3) as record:
        record.step(4, {"loss": 40})
        record.event("eval", {"test": RESULT})
    with log(tmp_path, "grpo", tensorboard=True) as record:
        record.step(1, {"reward": 0.5})
    sft = scalars(tmp_path / "tensorboard" / "sft")
    assert sft["sft/loss"] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert sft["sft/eval/test/rotation/accuracy"] == [(4, 0.5)]
    assert scalars(tmp_path / "tensorboard" / "grpo") == {"grpo/reward": [(1, 0.5)]}


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_before_anything_is_written(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if package == "tensorboard" else "wandb", None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        log(tmp_path / "run", tensorboard=package == "tensorboard", wandb="project" if package == "wandb" else "")
    assert not list(tmp_path.rglob("*.jsonl"))


def test_wandb_gets_the_stage_axis_and_the_same_run_after_a_resume(tmp_path, monkeypatch):
    calls = []

    class Run:
        def define_metric(self, *args, **options):
            calls.append(("define", args, options))

        def log(self, values):
            calls.append(("log", values))

        def finish(self):
            calls.append(("finish",))

    started = []
    fake = types.SimpleNamespace(init=lambda **options: started.append(options) or Run())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/recipe.yaml").write_text("steps: 3\noptim: {lr: 1e-3}\n")
    for resume in (0, 1):
        with log(tmp_path, wandb="actial", resume_step=resume) as record:
            record.step(resume + 1, {"loss": 1.5})
    assert ("log", {"sft/loss": 1.5, "sft/step": 2}) in calls and calls.count(("finish",)) == 2
    assert ("define", ("sft/*",), {"step_metric": "sft/step"}) in calls
    assert started[0]["id"] == started[1]["id"] and started[0]["project"] == "actial"
    assert (started[0]["resume"], started[1]["resume"]) == (None, "allow")
    assert started[0]["config"]["steps"] == 3, "the stage's recipe"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_names_the_file(tmp_path):
    log = MetricLog(tmp_path, stage="sft", total=3, tensorboard=False)
    for name in ("_metrics", "_events"):
        getattr(log, name).close()
        (tmp_path / "full").unlink(missing_ok=True)
        (tmp_path / "full").symlink_to("/dev/full")
        setattr(log, name, open(tmp_path / "full", "w", encoding="utf-8", buffering=1))
    for write in (lambda: log.step(1, {"loss": 1}), lambda: log.event("x", 1), log.close):
        with pytest.raises(OSError, match="No space left") as raised:
            write()
        assert raised.value.filename == str(tmp_path / "full")
