"""What a run of either loop tells of itself: phases, rates, mismatch, a profile where one is asked for, and nothing slower where not."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch
from torch.autograd.profiler import record_function

from actial_fast import grpo, sft
from actial_fast.data.sources.source import SourceConfig
from actial_fast.ops import ranges
from actial_fast.ops.spec import GRPOSpec
from actial_fast.report.metrics import read_events, read_metrics
from actial_fast.report.page import write_report
from actial_fast.rollout.embedded import Embedded
from actial_fast.settings.model import ModelConfig
from actial_fast.settings.recipe import DataConfig, EvalConfig, GRPORecipe, SFTRecipe
from actial_fast.settings.running import OptimConfig, ProfileConfig, SaveConfig
from actial_fast.settings.sampling import SamplingConfig
from actial_fast.tasks.rewards import RewardConfig
from actial_fast.train import profile
from tests.loops import ALONE

STEPS = {"sft": {"data", "plan", "update"}, "grpo": {"data", "sync", "sample", "score", "plan", "old", "reference", "update"}}
AFTER = {"save", "eval"}
TRAINS = {"sft": sft.train, "grpo": grpo.train}


def recipe_of(kind: str, lab, run: Path, **changes) -> SFTRecipe | GRPORecipe:
    """Three steps; a checkpoint after each, and an evaluation after the second and last; of GRPO with old and reference log-probs."""
    shared = {
        "run": str(run),
        "model": ModelConfig(path=str(lab.model)),
        "data": DataConfig(sources=(SourceConfig(str(lab.questions / "train.jsonl")),), workers=1),
        "optim": OptimConfig(lr=1e-3, warmup_steps=0),
        "save": SaveConfig(every=1, keep=1),
        "eval": EvalConfig(sources=(SourceConfig(str(lab.questions / "test.jsonl")),), every=2, limit=4, max_new_tokens=4),
        "steps": 3,
    }
    if kind == "sft":
        return SFTRecipe(batch_size=24, **{**shared, **changes})
    grouped = {
        "rewards": (RewardConfig("tests.helpers:short", 1.0), RewardConfig("format", 0.5)),
        "sampling": SamplingConfig(n=4, max_new_tokens=8),
        "loss": GRPOSpec(beta=0.05),
        "prompts": 8,
        "minibatch": 4,
    }
    return GRPORecipe(**{**shared, **grouped, **changes})


@pytest.fixture(scope="module", params=["sft", "grpo"])
def ran(request, lab, tmp_path_factory):
    """A run without a profile, in which nothing may be recorded."""
    run = tmp_path_factory.mktemp("seeing") / request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "_range", lambda name: pytest.fail(f"{name} is recorded, and nobody asked"))
        TRAINS[request.param](recipe_of(request.param, lab, run))
    return request.param, run


def test_the_phases_add_up_to_the_step(ran):
    kind, run = ran
    found = read_metrics(run)
    assert len(found) == 3
    for m in found:
        parts = {name.removeprefix("seconds/"): value for name, value in m.items() if name.startswith("seconds/")}
        assert parts.keys() == {*STEPS[kind], "other"} and all(value >= 0 for value in parts.values())
        assert sum(parts.values()) == pytest.approx(m["seconds"], rel=1e-6)
    assert median(m["seconds/other"] / m["seconds"] for m in found) <= 0.02, "the phases are less than 98% of a step"


def test_the_checkpoint_and_the_evaluation_are_told_behind_the_step(ran):
    kind, run = ran
    found = {e["step"]: e["phases"] for e in read_events(run) if e["kind"] == "phases"}
    names = {step: {name.removeprefix("seconds/") for name in f if name.startswith("seconds/")} for step, f in found.items()}
    beginning = {0: {"eval", "other"}} if kind == "grpo" else {}
    assert names == {**beginning, 1: {"log", "save", "other"}, 2: {"log", *AFTER, "other"}, 3: {"log", *AFTER, "other"}}
    assert found[2]["tokens_per_s/eval"] > 0


def test_speeds_memory_and_the_rate_they_are_shares_of(ran):
    kind, run = ran
    (rate,) = [e["rate"] for e in read_events(run) if e["kind"] == "rate"]
    for m in read_metrics(run):
        worked = {"update"} if kind == "sft" else {"sample", "old", "reference", "update"}
        assert {n.removeprefix("tflops/") for n in m if n.startswith("tflops/")} == worked
        for phase in worked:
            assert m[f"mfu/{phase}"] == pytest.approx(m[f"tflops/{phase}"] / rate["tflops"]) and m[f"tokens_per_s/{phase}"] > 0
        needed = sum(m[f"tflops/{phase}"] * m[f"seconds/{phase}"] for phase in worked)
        assert m["tflops"] == pytest.approx(needed / m["seconds"]) and 0 < m["mfu"] == pytest.approx(m["tflops"] / rate["tflops"])
        assert 0.1 < m["peak_gib"] < 64


def test_the_embedded_sampler_in_float32_has_the_trainers_log_probs(ran):
    kind, run = ran
    for m in read_metrics(run):
        if kind == "sft":
            assert not any(name.startswith("mismatch") for name in m)
        else:
            assert 0 < m["mismatch/mean_abs"] < 1e-5 and 1 < m["mismatch/max_ratio"] < 1 + 1e-4


def test_a_sampler_that_is_off_shows(lab, tmp_path, monkeypatch):
    """By half a nat on every token."""
    plain = Embedded.generate

    def off(self, prompts, draw, keys, watch):
        def told(groups):
            watch.drawn({i: [replace(reply, logprobs=reply.logprobs - 0.5) for reply in group] for i, group in groups.items()})

        return plain(self, prompts, draw, keys, replace(watch, drawn=told))

    monkeypatch.setattr(Embedded, "generate", off)
    grpo.train(recipe_of("grpo", lab, tmp_path, steps=2, eval=EvalConfig()))
    for m in read_metrics(tmp_path):
        assert m["mismatch/mean_abs"] == pytest.approx(0.5, abs=1e-4) and m["mismatch/max_ratio"] == pytest.approx(1.6487, rel=1e-3)
        assert m["mismatch/kl"] == pytest.approx(0.1487, rel=1e-3) and "mismatch/outside" not in m
    (told,) = [e for e in read_events(tmp_path) if e["kind"] == "mismatch"]
    assert told["step"] == 1 and "chat template" in write_report(tmp_path).read_text()


def test_tensorboard_has_them(ran):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kind, run = ran
    tags = EventAccumulator(str(run / "tensorboard" / kind)).Reload().Tags()["scalars"]
    wanted = {f"seconds/{name}" for name in STEPS[kind]} | {"mfu", "mfu/update", "peak_gib", "after/seconds/save", "after/seconds/eval"}
    assert {f"{kind}/{name}" for name in wanted} <= set(tags)


def test_the_report_has_a_bar_per_step(ran):
    kind, run = ran
    html = write_report(run).read_text()
    figure = html.split(f'aria-label="Seconds of a step, {kind}"')[1].split("</svg>")[0]
    paths = [part.split('"')[0] for part in figure.split('class="bars"')[1:]]
    assert len(paths) >= len(STEPS[kind] & {"sample", "update"}) and figure.count("z") >= 3
    for title in ("Tokens per second and device", "MFU", "Peak memory"):
        assert f'aria-label="{title}' in html
    assert ("Sampler against trainer" in html) == (kind == "grpo")
    assert "torch.mm, float32" in html and 'aria-label="seconds/' not in html


def test_no_profile_without_its_key(ran):
    assert not (ran[1] / "profile").exists()


@pytest.mark.parametrize("kind", STEPS)
def test_a_profile_has_every_phase_and_every_group_of_kernels(kind, lab, tmp_path):
    TRAINS[kind](recipe_of(kind, lab, tmp_path, profile=ProfileConfig(steps=(2, 2)), steps=2))
    assert [p.name for p in (tmp_path / "profile").iterdir()] == [f"{kind}-step-000002-rank0.json.gz"]
    with gzip.open(tmp_path / "profile" / f"{kind}-step-000002-rank0.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {e.get("name") for e in events if e.get("ph") == "X"}
    groups = set(ranges.GROUPS)
    assert names >= {f"phase {name}" for name in STEPS[kind] | AFTER} and names >= groups, groups - names
    at = {e["name"]: e for e in events if e.get("name") in ("phase update", "backward") and e.get("ph") == "X"}
    inner, outer = at["backward"], at["phase update"]
    assert outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] and "aten::mm" in names


def test_a_window_of_several_steps_and_ranks(tmp_path):
    def traces(where, **changes) -> list[str]:
        with profile.Window(ProfileConfig(steps=(2, 3), **changes), tmp_path / str(where.rank) / str(len(changes)), "s", where) as window:
            for step in range(1, 6):
                window.at(step)
                assert ranges._open == (step in (2, 3) and (where.main or bool(changes)))
                with ranges.named("optimizer"):
                    torch.ones(2).sum()
        assert not ranges._open
        return sorted(p.name for p in tmp_path.rglob("*.gz") if p.parts[-3] == str(len(changes)) and p.parts[-4] == str(where.rank))

    assert traces(ALONE) == ["s-step-000002-rank0.json.gz", "s-step-000003-rank0.json.gz"]
    assert traces(replace(ALONE, rank=1, size=2)) == []
    assert traces(replace(ALONE, rank=1, size=2), all_ranks=True) == ["s-step-000002-rank1.json.gz", "s-step-000003-rank1.json.gz"]


def test_a_window_that_an_error_ends_is_closed_and_written(tmp_path):
    with pytest.raises(KeyError), profile.Window(ProfileConfig(steps=(1, 9)), tmp_path, "s", ALONE) as window:
        window.at(1)
        raise KeyError
    assert not ranges._open and [p.name for p in (tmp_path / "profile").iterdir()] == ["s-step-000001-rank0.json.gz"]


@pytest.mark.parametrize("on", [False, True])
def test_a_compiled_caller_of_a_range_sees_one_graph_and_no_range(on, monkeypatch):
    def call(x):
        with ranges.named("head"):
            return x * 2

    def entered(name):
        raise AssertionError(f"{name} is in the graph")

    torch._dynamo.reset()
    ranges.show(on)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(ranges, "_range", entered)
            assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(torch.ones(3)), 2 * torch.ones(3))
        assert isinstance(ranges.named("head"), type(ranges._NOTHING)) != on
    finally:
        ranges.show(False)
        torch._dynamo.reset()


def test_a_range_is_a_record_function(monkeypatch):
    seen = []
    monkeypatch.setattr(ranges, "record_function", lambda name: seen.append(name) or record_function(name))
    with ranges.named("trunk"):
        pass
    ranges.show(True)
    try:
        with ranges.named("tower"):
            pass
    finally:
        ranges.show(False)
    assert seen == ["tower"]
