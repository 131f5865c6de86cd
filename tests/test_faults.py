"""A run that cannot be lost: every fault here, on two ranks, ends with a clear word, nothing saved is lost, no wrong "finished"."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actial_fast import sft
from actial_fast.data.sources.source import SourceConfig
from actial_fast.report.metrics import read_events, read_metrics
from actial_fast.report.page import write_report
from actial_fast.settings.config import to_yaml
from actial_fast.settings.model import ModelConfig
from actial_fast.settings.recipe import DataConfig, EvalConfig, GRPORecipe, SFTRecipe
from actial_fast.settings.running import DistConfig, OptimConfig, SaveConfig
from actial_fast.settings.sampling import SamplingConfig
from actial_fast.tasks.rewards import RewardConfig
from actial_fast.train import checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def recipes(lab, tmp_path_factory) -> dict[str, Any]:
    """Small runs of 4 steps with a checkpoint after each, sharded over two ranks."""
    train = DataConfig(sources=(SourceConfig(str(lab.questions / "train.jsonl")),), workers=0, max_prompt_tokens=220)
    common = {
        "model": ModelConfig(path=str(lab.model)),
        "data": train,
        "save": SaveConfig(every=1, keep=2, tensorboard=False),
        "dist": DistConfig(fsdp=True, timeout=2),
        "steps": 4,
        "pack_tokens": 300,
    }
    return {
        "sft": SFTRecipe(batch_size=8, optim=OptimConfig(lr=1e-3, warmup_steps=0), **common),
        "grpo": GRPORecipe(
            prompts=4,
            minibatch=2,
            sampling=SamplingConfig(n=4, max_new_tokens=8),
            rewards=(RewardConfig("tests.faults:short", workers=0),),
            optim=OptimConfig(lr=1e-3, warmup_steps=0),
            log_rollouts=0,
            **common,
        ),
    }


@pytest.fixture(scope="module")
def undisturbed(recipes, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """The final weights of the two runs when nothing goes wrong, on two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    cases = [case(folder, kind, recipe, kind) for kind, recipe in recipes.items()]
    outcomes = run_cases(folder, cases)
    assert [found["outcome"] for found in outcomes.values()] == ["finished"] * 2, outcomes
    return {kind: weights(folder / kind, kind) for kind in recipes}


def weights(run: Path, kind: str) -> dict[str, torch.Tensor]:
    return load_file(run / kind / "final" / "model" / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def case(folder: Path, name: str, recipe: Any, kind: str, faults: str = "") -> dict[str, Any]:
    path = folder / f"{name}.yaml"
    path.write_text(to_yaml(replace(recipe, run=str(folder / name))))
    return {"name": name, "kind": kind, "recipe": str(path), "overrides": [], "faults": faults}


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "tests" / "planted"), str(ROOT)])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def run_cases(folder: Path, cases: list[dict[str, Any]], seconds: float = 500) -> dict[str, dict[str, Any]]:
    """All cases on two ranks, in one process a rank; what each became on rank 0, with what rank 1 said beside it."""
    (folder / "cases.json").write_text(json.dumps(cases))
    out = folder / "outcomes.jsonl"
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "tests" / "faults.py")]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(folder / "cases.json"), str(out)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "returned a view tensor" not in done.stderr, "B17: FSDP2 warns of what a pass returns"
    first, second = ({x["name"]: x for x in map(json.loads, Path(f"{out}.{rank}").read_text().splitlines())} for rank in (0, 1))
    assert first.keys() == second.keys() == {c["name"] for c in cases}
    assert all(first[name]["outcome"] == second[name]["outcome"] for name in first), "ranks that do not end alike"
    return first


# ---- in one process a rank: evaluations, numbers, signals


@pytest.mark.ranks
def test_evaluations_of_every_size_and_numbers_that_are_not_finite(recipes, undisturbed, lab, tmp_path):
    """20 sizes of an evaluation, one that fails on one rank inside of the model, a NaN in any forward pass of a step on
    either rank, and NaNs that do not end."""
    sizes = tuple(SourceConfig(str(lab.questions / "train.jsonl"), limit=n) for n in range(1, 21))
    measured = replace(recipes["sft"], steps=1, eval=EvalConfig(sources=sizes, max_new_tokens=2))
    plants = {
        "sft nan first": "nan:update:0:3",
        "sft nan other rank": "nan:update:1:4",
        "sft nan on both": "nan:update:0:3 nan:update:1:3",
        "grpo nan first": "nan:update:0:3",
        "grpo nan other rank": "nan:update:1:4",
    }
    cases = [case(tmp_path, "sizes", measured, "sft")]
    cases += [case(tmp_path, name, recipes[name.split()[0]], name.split()[0], faults) for name, faults in plants.items()]
    evaluated = replace(
        recipes["sft"], eval=EvalConfig((SourceConfig(str(lab.questions / "test.jsonl"), limit=5),), every=2, max_new_tokens=3)
    )
    cases.append(case(tmp_path, "broken pass", evaluated, "sft", "raise:forward:1:1"))
    endless = " ".join(f"nan:update:0:{call}" for call in range(5, 40))
    limited = replace(recipes["sft"], steps=12, optim=replace(recipes["sft"].optim, max_skipped=3))
    cases.append(case(tmp_path, "endless", limited, "sft", endless))
    found = run_cases(tmp_path, cases)

    assert found["sizes"]["outcome"] == "finished"
    rows = [e["result"]["overall"]["n"] for e in read_events(tmp_path / "sizes") if e["kind"] == "eval"]
    assert rows == list(range(1, 21)), rows
    for name in plants:
        kind = name.split()[0]
        assert found[name]["outcome"] == "finished" and found[name]["finite"], (name, found[name])
        steps = read_metrics(tmp_path / name)
        assert len(steps) == 4 and sum(m["skipped_updates"] for m in steps) == 1, (name, [m["skipped_updates"] for m in steps])
        (event,) = [e for e in read_events(tmp_path / name) if e["kind"] == "skipped"]
        assert event["skipped"]["rows"] and all("train.jsonl:" in row for row in event["skipped"]["rows"])
        assert not equal(weights(tmp_path / name, kind), undisturbed[kind]), "the step was not skipped"
    assert found["broken pass"]["outcome"] == "finished"
    events = read_events(tmp_path / "broken pass")
    assert [(e["kind"], e["step"]) for e in events if "eval" in e["kind"]] == [("eval_failed", 2), ("eval", 4)]
    assert equal(weights(tmp_path / "broken pass", "sft"), undisturbed["sft"]), "a pass that broke off has left something behind"
    assert found["endless"]["outcome"] == "NonFinite" and "3 optimizer steps in a row" in found["endless"]["said"]
    folder = tmp_path / "endless" / "sft"
    assert checkpoint.final(folder) is None, 'no wrong "finished"'
    for path in folder.glob("step-*/*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values() if t.is_floating_point())


SLOW_SAMPLING = "slow:sample:0:1 slow:sample:1:1"  # half a second a token: 8 tokens, 4 steps
SLOW_UPDATE = "slow:update:0:1 slow:update:1:1"
ASKED = {
    "grpo sampling": f"{SLOW_SAMPLING} term:sample:0:20 term:sample:1:20",
    "grpo sampling, one rank is asked": "slow:sample:0:1 term:sample:1:20",
    "grpo second step": "term:sample:0:12 term:sample:1:12",
    "grpo update": f"{SLOW_UPDATE} term:update:0:6 term:update:1:6",
    "grpo save": "term:save:0:2 term:save:1:2",
    "sft update": f"{SLOW_UPDATE} term:update:0:3 term:update:1:3",
    "sft update, one rank is asked": "term:update:1:3",
    "sft save": "term:save:0:2 term:save:1:2",
    "sft eval": "term:eval:0:1 term:eval:1:1",
}


@pytest.mark.ranks
def test_whoever_is_asked_to_stop_loses_nothing(recipes, undisturbed, lab, tmp_path):
    """SIGTERM anywhere: the run ends soon with what it had, and going on gives the weights of a run that was never stopped, bit for bit."""
    cases = []
    for name, faults in ASKED.items():
        kind = name.split()[0]
        # without checkpoints by the step count, so that what is there was saved because of the stop
        recipe = recipes[kind] if "save" in name else replace(recipes[kind], save=SaveConfig(every=0, tensorboard=False))
        if name == "sft eval":
            recipe = replace(recipe, eval=EvalConfig((SourceConfig(str(lab.questions / "test.jsonl")),), every=2, max_new_tokens=4))
        cases.append(case(tmp_path, name, recipe, kind, faults))
    stopped = run_cases(tmp_path, cases)
    for name, found in stopped.items():
        assert found["outcome"] == "stopped" and "the same command goes on" in found["said"], (name, found)
        steps, folder = len(read_metrics(tmp_path / name)), tmp_path / name / name.split()[0]
        assert max(checkpoint.steps(folder), default=0) == steps, f"{name}: a step that was made is not saved"
        assert checkpoint.final(folder) is None
    gone_on = run_cases(tmp_path, [{**each, "faults": ""} for each in cases])
    for name, found in gone_on.items():
        kind = name.split()[0]
        assert found["outcome"] == "finished", (name, found)
        assert [m["step"] for m in read_metrics(tmp_path / name)] == [1, 2, 3, 4]
        assert equal(weights(tmp_path / name, kind), undisturbed[kind]), name


@pytest.mark.slow
def test_a_stop_finds_nothing_gathered_or_half_summed(recipes, tmp_path):
    """As above, where weights stay gathered and gradients wait for the end of a step."""
    cases = []
    for kind, faults in (("sft", "term:update:0:3 term:update:1:3"), ("grpo", "term:update:1:6")):
        dist = replace(recipes[kind].dist, reshard="step", reduce="step")
        recipe = replace(recipes[kind], dist=dist, save=SaveConfig(every=0, tensorboard=False))
        cases += [case(tmp_path, f"{kind} whole", recipe, kind), case(tmp_path, f"{kind} stopped", recipe, kind, faults)]
    outcomes = [found["outcome"] for found in run_cases(tmp_path, cases).values()]
    assert outcomes == ["finished", "stopped"] * 2
    gone_on = run_cases(tmp_path, [{**each, "faults": ""} for each in cases[1::2]])
    assert [found["outcome"] for found in gone_on.values()] == ["finished"] * 2
    for kind in ("sft", "grpo"):
        assert equal(weights(tmp_path / f"{kind} stopped", kind), weights(tmp_path / f"{kind} whole", kind)), kind


# ---- in processes of their own: what ends one


def start(recipe: Path, kind: str, faults: str = "", ranks: int = 2, **more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "actial_fast.cli", kind, str(recipe), *(["--gpus", str(ranks)] if ranks > 1 else [])]
    return subprocess.Popen(
        command, env=environment(ACTIAL_TEST_FAULTS=faults, **more), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


ENDS = {  # name -> kind, faults, what the last lines say, steps that must have been saved
    "a rank is killed in sampling": ("grpo", "kill:sample:1:20", "actial: rank 1 was ended by SIGKILL", 1),
    "a rank is killed in the update": ("grpo", "kill:update:1:6", "actial: rank 1 was ended by SIGKILL", 1),
    "a rank is killed while it saves": ("sft", "kill:save:1:3", "actial: rank 1 was ended by SIGKILL", 1),
    "the first rank is killed": ("sft", "kill:update:0:3", "actial: rank 0 was ended by SIGKILL", 1),
    "the disk is full": ("sft", "full:save:1:3", "the checkpoint was not written", 2),
    "the disk is full on rank 0": ("sft", "full:save:0:2", "the checkpoint was not written", 1),
    "a reward raises on one rank": ("grpo", "raise:reward:1:20", "reward 'tests.faults:short' failed on row", 1),
    "a pass raises on one rank": ("sft", "raise:update:1:3", "a fault planted by a test", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_a_run_that_ends_says_why_and_goes_on(name, recipes, undisturbed, tmp_path):
    kind, faults, says, saved = ENDS[name]
    each = case(tmp_path, "run", recipes[kind], kind)
    process = start(Path(each["recipe"]), kind, faults)
    said, _ = process.communicate(timeout=180)
    lines = [line for line in said.splitlines() if line.startswith("actial: ")]
    assert (process.returncode not in (0, None) and any(says in line for line in lines)) or says in said, said[-3000:]
    assert lines and "finished:" not in said, said[-3000:]
    found = checkpoint.steps(tmp_path / "run" / kind)
    assert found and max(found) >= saved, found
    again = start(Path(each["recipe"]), kind)
    said, _ = again.communicate(timeout=180)
    assert again.returncode == 0 and "finished:" in said, said[-3000:]
    assert equal(weights(tmp_path / "run", kind), undisturbed[kind])


@pytest.mark.slow
def test_torchrun_hands_the_signal_on_and_waits_for_the_save(recipes, tmp_path):
    """In a step of more than 80 seconds, in a forward pass of 40: torchrun's own patience is 30."""
    each = case(tmp_path, "run", recipes["sft"], "sft")
    process = start(Path(each["recipe"]), "sft", "slow:update:0:3 slow:update:1:3", ACTIAL_TEST_WAIT="40")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not read_metrics(tmp_path / "run"):
        time.sleep(0.2)
    time.sleep(4)  # into the next step's first pass
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    said, _ = process.communicate(timeout=200)
    assert 31 < time.monotonic() - began < 80 and process.returncode == 143 and "goes on from here" in said, said[-2000:]
    assert checkpoint.steps(tmp_path / "run" / "sft")[-1] == len(read_metrics(tmp_path / "run"))


@pytest.mark.slow
def test_two_runs_on_one_folder(recipes, tmp_path):
    each = case(tmp_path, "run", replace(recipes["sft"], steps=60), "sft")
    first = start(Path(each["recipe"]), "sft", "slow:update:0:1 slow:update:1:1")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not read_metrics(tmp_path / "run"):
        time.sleep(0.2)
    second = start(Path(each["recipe"]), "sft")
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 2 and "is in use by process" in said and said.count("is in use by") == 1, said[-2000:]
    said, _ = first.communicate(timeout=180)
    assert first.returncode == 0 and "finished:" in said


@pytest.mark.slow
def test_an_image_that_cannot_be_read_in_the_middle_of_a_run(recipes, lab, tmp_path):
    """Rows behind those that the preflight looks at; the run ends with the row's name, and goes on once the file is mended."""
    lines = (lab.questions / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["images"] = [os.path.abspath(lab.questions / image) for image in row["images"]]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    rows[10]["images"][0] = str(broken)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = replace(recipes["sft"], data=replace(recipes["sft"].data, sources=(SourceConfig(str(tmp_path / "rows.jsonl")),)), steps=12)
    each = case(tmp_path, "run", recipe, "sft")
    process = start(Path(each["recipe"]), "sft")
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 2 and f"rows.jsonl:11: {broken}" in said.replace("image ", ""), said[-2000:]
    broken.write_bytes(Path(rows[9]["images"][0]).read_bytes())
    again = start(Path(each["recipe"]), "sft")
    said, _ = again.communicate(timeout=180)
    assert again.returncode == 0 and "finished:" in said, said[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_kills_at_random_moments_change_nothing(kind, ranks, recipes, tmp_path):
    """kill -9 to every process of the run, again and again, at random moments from its start to its end: the weights are the same to the
    last bit. ACTIAL_TEST_KILLS: how often in each of the four cases (3)."""
    kills, rng = int(os.environ.get("ACTIAL_TEST_KILLS", 3)), random.Random(f"{kind}{ranks}")
    recipe = replace(
        recipes[kind], dist=replace(recipes[kind].dist, fsdp=ranks > 1), steps=10, save=SaveConfig(every=3, keep=2, tensorboard=False)
    )
    whole = case(tmp_path, "undisturbed", recipe, kind)
    began = time.monotonic()
    process = start(Path(whole["recipe"]), kind, ranks=ranks)
    said, _ = process.communicate(timeout=300)
    seconds = time.monotonic() - began
    assert process.returncode == 0, said[-2000:]
    done = runs = 0
    while done < kills:
        runs += 1
        each = case(tmp_path, f"run{runs}", recipe, kind)
        while done < kills:
            process = start(Path(each["recipe"]), kind, ranks=ranks)
            try:
                process.communicate(timeout=rng.uniform(0.3, 1.0) * seconds)
                break  # it has finished before
            except subprocess.TimeoutExpired:
                kill_all(each["recipe"])
                process.communicate(timeout=60)
                done += 1
        process = start(Path(each["recipe"]), kind, ranks=ranks)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and "finished:" in said, said[-2000:]
        assert equal(weights(tmp_path / f"run{runs}", kind), weights(tmp_path / "undisturbed", kind)), f"run {runs}"
        assert [m["step"] for m in read_metrics(tmp_path / f"run{runs}")] == list(range(1, 11))
    print(f"{kind}, {ranks} ranks: {done} kills, {runs} runs, all weights equal")


def kill_all(word: str) -> None:
    """SIGKILL to every process with `word` on its command line: a launcher and its ranks, which are sessions of their own."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                os.kill(int(path.parent.name), signal.SIGKILL)


# ---- what needs one rank only


def test_a_failing_evaluation_is_logged_and_the_run_goes_on(recipes, lab, tmp_path, monkeypatch):
    from actial_fast.evaluation import evaluate

    plain = evaluate._replies

    def once(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(evaluate, "_replies", plain)
        raise torch.OutOfMemoryError("CUDA out of memory (a test)")

    monkeypatch.setattr(evaluate, "_replies", once)
    sources = (SourceConfig(str(lab.questions / "test.jsonl"), limit=3),)
    recipe = replace(recipes["sft"], run=str(tmp_path / "run"), dist=DistConfig(), eval=EvalConfig(sources, every=2, max_new_tokens=2))
    sft.train(recipe)
    events = read_events(tmp_path / "run")
    (failed,) = [e for e in events if e["kind"] == "eval_failed"]
    assert failed["step"] == 2 and "OutOfMemoryError: CUDA out of memory" in failed["eval_failed"]["cause"]
    assert [e["step"] for e in events if e["kind"] == "eval"] == [4]
    assert "step 2: questions/test was not evaluated: OutOfMemoryError" in write_report(tmp_path / "run").read_text()
    monkeypatch.setattr(evaluate, "_replies", once)
    with pytest.raises(ValueError, match=r"eval.fatal: .*CUDA out of memory"):
        sft.train(replace(recipe, run=str(tmp_path / "fatal"), eval=replace(recipe.eval, fatal=True)))
    assert checkpoint.steps(tmp_path / "fatal" / "sft") == [1, 2], "the checkpoint of the step comes first"
