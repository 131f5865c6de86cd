"""The groups of a step: the same whenever and by how many ranks they are drawn, found on the disk, drawn ahead or beside an update."""

import copy
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actial_fast import grpo
from actial_fast.data.sources.stream import Stream
from actial_fast.model.policy import load_policy
from actial_fast.model.processor import Processor
from actial_fast.ops.spec import GRPOSpec
from actial_fast.report.metrics import read_events, read_metrics
from actial_fast.report.page import write_report
from actial_fast.rollout import choosing
from actial_fast.rollout.embedded import Embedded
from actial_fast.rollout.groups import Groups, settled
from actial_fast.rollout.kept import Kept
from actial_fast.settings.running import DistConfig, OptimConfig, SaveConfig
from actial_fast.settings.sampling import GateConfig, OverlongConfig
from actial_fast.tasks.rewards import RewardConfig, Scorer
from actial_fast.train import checkpoint
from tests.faults import plant
from tests.loops import ALONE
from tests.test_faults import case, equal, run_cases, weights


def late(response: str, row) -> float:
    """As fifth, told a moment later."""
    time.sleep(0.01)
    return float(len(response) % 5 == 0)


def mute(response: str, row) -> None:
    """Scores nothing."""


@pytest.fixture
def base(grpo_recipe):
    """Three steps of four groups in two mini-batches, of which about four in ten have equal rewards."""
    return replace(
        grpo_recipe,
        data=replace(grpo_recipe.data, workers=0, max_prompt_tokens=280),
        optim=OptimConfig(lr=1e-3, eps=1e-4, warmup_steps=0),  # an epsilon that keeps rounding of tiny gradients small
        rewards=(RewardConfig("tests.helpers:fifth", workers=0),),
        save=SaveConfig(every=1, keep=3, tensorboard=False),
        pack_tokens=300,
        log_rollouts=0,
        steps=3,
    )


def dynamic(recipe, oversample=1.5, **more):
    return replace(recipe, sampling=replace(recipe.sampling, oversample=oversample, **more))


def ahead(recipe):
    return replace(recipe, rollout=replace(recipe.rollout, ahead=1))


def gated(recipe):
    return replace(recipe, sampling=replace(recipe.sampling, gate=GateConfig(0.1, 0.15, "tests.helpers:fifth", window=3, retry=3)))


def overlong(recipe):
    return replace(recipe, overlong=OverlongConfig(mask=True, buffer=4, penalty=0.3))


VARIANTS = {
    "dynamic": dynamic,
    "dynamic, one draw too few": lambda recipe: dynamic(recipe, 1.0, max_draws=1),
    "gates": gated,
    "overlong": overlong,
    "ahead": ahead,
    "all of them": lambda recipe: overlong(gated(dynamic(ahead(recipe)))),
}
TOLD = ("sampling/drawn", "sampling/kept", "sampling/given_up", "sampling/draws", "sampling/closed_sources", "masked_replies")


def told(run: Path) -> list[dict[str, float]]:
    return [{name: m[name] for name in m if name in TOLD or name.startswith("pass_rate/")} for m in read_metrics(run)]


def cursors(run: Path) -> list[dict]:
    return [json.loads((run / "grpo" / f"step-{step:06d}" / "state.json").read_text())["state"] for step in (1, 2, 3)]


@pytest.mark.ranks
def test_one_rank_equals_two_whatever_is_chosen(base, tmp_path):
    """The same positions, the same figures, the same place in the stream and pass rates to the last bit, the same update; on two ranks with
    whole weights, and sharded."""
    recipes = {name: change(base) for name, change in VARIANTS.items()}
    recipes |= {f"{name}, sharded": replace(recipe, dist=DistConfig(fsdp=True)) for name, recipe in recipes.items()}
    found = run_cases(tmp_path, [case(tmp_path, name, recipe, "grpo") for name, recipe in recipes.items()])
    assert {each["outcome"] for each in found.values()} == {"finished"}, found
    ends = {}
    for name in VARIANTS:
        one = tmp_path / "one" / name
        ends[name] = load_file(grpo.train(replace(recipes[name], run=str(one))) / "model.safetensors")
        for two in (tmp_path / name, tmp_path / f"{name}, sharded"):
            assert told(two) == told(one) and cursors(two) == cursors(one), name
            for key, value in weights(two, "grpo").items():
                assert torch.allclose(value, ends[name][key], rtol=0, atol=2e-6), (two, key, (value - ends[name][key]).abs().max())
    for name, end in ends.items():  # that each changes something
        assert all(not equal(end, other) for key, other in ends.items() if key != name), name
    assert any(m["sampling/draws"] > 1 for m in told(tmp_path / "dynamic")) and all(
        m["sampling/kept"] == 4 for m in told(tmp_path / "dynamic")
    )
    assert any(m["sampling/closed_sources"] for m in told(tmp_path / "gates")) and cursors(tmp_path / "gates")[2]["position"] > 12
    few = tmp_path / "dynamic, one draw too few"
    short = [e for e in read_events(few) if e["kind"] == "short"]
    assert short and [e["step"] for e in short] == [k for k, m in enumerate(told(few), 1) if m["sampling/kept"] < 4]
    assert {m["sampling/drawn"] for m in told(few)} == {4}


# ---- an engine that gives up, in an order of its own


class Picky(Embedded):
    """Draws one prompt after another in a random order, and stops where `dropped` says so."""

    def __init__(self, policy, processor, seed):
        super().__init__(policy, processor)
        self.rng, self.gave_up, self.drew = np.random.default_rng(seed), 0, 0

    def generate(self, prompts, draw, keys, watch):
        out = [[] for _ in prompts]
        for i in self.rng.permutation(len(prompts)).tolist():
            if watch.asked():
                break
            if i not in (watch.have or {}) and watch.dropped(i):
                self.gave_up += 1
                continue
            self.drew += i not in (watch.have or {})
            part = replace(
                watch,
                have={0: watch.have[i]} if i in (watch.have or {}) else {},
                drawn=lambda groups, i=i: watch.drawn({i: groups[0]}),
                dropped=lambda _, i=i: watch.dropped(i),
            )
            (out[i],) = super().generate([prompts[i]], draw, [keys[i]], part)
        return out


@pytest.mark.parametrize("reward", ["tests.helpers:fifth", "tests.rollout.test_groups:late"])
def test_what_is_chosen_does_not_depend_on_the_order_of_drawing_nor_on_what_is_given_up(reward, base, lab, monkeypatch):
    monkeypatch.setattr(choosing, "LOOK", 0.0)
    recipe = dynamic(replace(base, rewards=(RewardConfig(reward, workers=0 if "fifth" in reward else 2),)), 6.0)
    policy, processor = load_policy(recipe.model, torch.device("cpu"), 0, packed=True), Processor.load(str(lab.model))
    found, gave_up = [], 0
    for seed in range(4):
        engine = Picky(policy, processor, seed) if seed else Embedded(policy, processor)
        stream = Stream(recipe.data.sources, seed=0, workers=0, encode=processor.encode_prompt)
        with Scorer(recipe.rewards) as scorer:
            groups = Groups(engine, processor, stream, recipe, ALONE, scorer)
            found.append([groups.of(step) for step in (1, 2)])
        assert stream.position == 48
        gave_up += engine.gave_up if seed else 0
    assert gave_up > 5, "nothing was given up"
    for each in found[1:]:
        for a, b in zip(each, found[0], strict=True):
            assert [e.position for e in a.examples] == [e.position for e in b.examples] and a.figures == b.figures
            assert len(a.samples) == 16 and [s.minibatch for s in a.samples[::4]] == [0, 1, 0, 1]
            for x, y in zip(a.samples, b.samples, strict=True):
                assert np.array_equal(x.sequence.ids, y.sequence.ids) and (x.advantage, x.reward) == (y.advantage, y.reward)
    first = found[0][0]
    assert first.figures["sampling/drawn"] == first.examples[-1].position + 1 < 24
    assert all(any(s.advantage for s in first.samples[g : g + 4]) for g in range(0, 16, 4))


def test_mini_batches_are_as_without_a_choice_where_all_differ(base, lab, tmp_path):
    every = replace(base, rewards=(RewardConfig("tests.helpers:short", workers=0),))
    plain = grpo.train(replace(every, run=str(tmp_path / "plain")))
    choosy = grpo.train(dynamic(replace(every, run=str(tmp_path / "choosy")), 1.0))
    assert {m["zero_variance_groups"] for m in read_metrics(tmp_path / "plain")} == {0.0}
    assert equal(load_file(plain / "model.safetensors"), load_file(choosy / "model.safetensors"))


def test_groups_given_up_are_not_looked_for_on_the_disk(base, lab, tmp_path, monkeypatch):
    """A step that goes on finds the groups that it needs, and draws no other anew once these are read."""
    monkeypatch.setattr(choosing, "LOOK", 0.0)
    recipe = dynamic(base, 6.0)
    policy, processor = load_policy(recipe.model, torch.device("cpu"), 0, packed=True), Processor.load(str(lab.model))
    out, engines = [], [Picky(policy, processor, seed) for seed in (1, 2)]
    for engine in engines:
        stream = Stream(recipe.data.sources, seed=0, workers=0, encode=processor.encode_prompt)
        with Scorer(recipe.rewards) as scorer:
            out.append(Groups(engine, processor, stream, recipe, ALONE, scorer, replies=Kept(tmp_path, "d")).of(1))
    assert engines[0].drew and engines[0].gave_up and not engines[1].drew and engines[1].gave_up == engines[0].gave_up
    assert [s.advantage for s in out[0].samples] == [s.advantage for s in out[1].samples] and out[0].figures == out[1].figures


# ---- replies that are too long


def test_masked_replies_leave_the_loss_and_its_normaliser(base, tmp_path):
    """Against the same step with the cut replies taken out by hand; where all are cut the weights stay."""
    recipe = replace(base, steps=1, loss=GRPOSpec(beta=0.0), skip_zero_variance=False)
    recipe = replace(recipe, rewards=(RewardConfig("tests.helpers:short", workers=0),))
    masked = replace(recipe, overlong=OverlongConfig(mask=True))
    ends = {}
    for name, each in {"plain": recipe, "masked": masked}.items():
        ends[name] = load_file(grpo.train(replace(each, run=str(tmp_path / name))) / "model.safetensors")
    (plain,), (found,) = read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "masked")
    assert found["masked_replies"] == round(16 * (1 - found["finished"])) > 0 and "masked_replies" not in plain
    assert found["reward"] == plain["reward"] and not equal(ends["plain"], ends["masked"])
    with pytest.MonkeyPatch.context() as patch:  # by hand
        of = Groups.of

        def without(self, step):
            drawn = of(self, step)
            return replace(drawn, samples=[s for s in drawn.samples if s.finished])

        patch.setattr(Groups, "of", without)
        hand = load_file(grpo.train(replace(recipe, run=str(tmp_path / "hand"))) / "model.safetensors")
    assert equal(ends["masked"], hand)
    allcut = replace(masked, sampling=replace(masked.sampling, max_new_tokens=1), run=str(tmp_path / "all"), steps=2)
    before = load_file(Path(recipe.model.path) / "model.safetensors")
    after = load_file(grpo.train(allcut) / "model.safetensors")
    assert read_metrics(tmp_path / "all")[1]["finished"] < 1
    if read_metrics(tmp_path / "all")[0]["finished"] == 0:
        assert equal(before, after)


def test_the_fine_is_a_reward_of_its_own(base, tmp_path):
    recipe = replace(base, steps=1, overlong=OverlongConfig(buffer=4, penalty=0.3), run=str(tmp_path / "fined"))
    samples = []
    with pytest.MonkeyPatch.context() as patch:
        of = Groups.of
        patch.setattr(Groups, "of", lambda self, step: samples.append(of(self, step)) or samples[-1])
        grpo.train(recipe)
    (found,) = read_metrics(tmp_path / "fined")
    fines = [-min(1.0, max(0.0, (len(s) - 4) / 4)) for s in samples[0].samples]
    assert found["reward/overlong"] == pytest.approx(np.mean(fines)) and min(fines) == -1
    assert found["reward"] == pytest.approx(found["reward/tests.helpers:fifth"] + 0.3 * np.mean(fines))
    for s, fine in zip(samples[0].samples, fines, strict=True):
        assert s.reward == pytest.approx(float(len(s.text) % 5 == 0) + 0.3 * fine)


def test_a_reward_that_scores_nothing_in_a_step_is_told(base, tmp_path, capsys):
    silent = RewardConfig("tests.rollout.test_groups:mute", workers=0)
    recipe = replace(base, rewards=(*base.rewards, silent, replace(silent, weight=0.0)), run=str(tmp_path / "mute"))
    grpo.train(recipe)
    found = [event for event in read_events(tmp_path / "mute") if event["kind"] == "unscored"]
    assert [event["step"] for event in found] == [1, 2]  # of three: in the first, the second, the fourth, ...
    said = "reward tests.rollout.test_groups:mute scored none of 16 replies and counts nothing; steps of this kind so far: 2"
    assert found[1]["unscored"] == {"reward": "tests.rollout.test_groups:mute", "replies": 16, "steps": 2, "text": said}
    assert said in capsys.readouterr().out and said in write_report(tmp_path / "mute").read_text()


# ---- one step ahead


class Apart(Embedded):
    """An engine with weights of its own, a copy in the same process, which takes its time."""

    own = False

    def __init__(self, policy, processor):
        super().__init__(copy.deepcopy(policy), processor)
        self._theirs, self.threads = policy, set()

    def sync(self, version):
        if version != self.version:
            self._policy.load_state_dict(self._theirs.state_dict())
        super().sync(version)

    def generate(self, *args, **kwargs):
        self.threads.add(threading.current_thread().name.split("_")[0])
        assert self.version >= 0
        time.sleep(0.05)
        return super().generate(*args, **kwargs)


@pytest.mark.parametrize("chosen", [False, True], ids=["all", "dynamic"])
def test_what_is_drawn_beside_the_update_is_what_is_drawn_before_it(chosen, base, tmp_path, monkeypatch):
    recipe = ahead(dynamic(base) if chosen else base)
    before = load_file(grpo.train(replace(recipe, run=str(tmp_path / "before"))) / "model.safetensors")
    engines = []

    def apart(recipe, policy, processor, *_):
        engines.append(Apart(policy, processor))
        return engines[-1]

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "open_engine", apart)
        beside = load_file(grpo.train(replace(recipe, run=str(tmp_path / "beside"))) / "model.safetensors")
    assert equal(before, beside) and "sampling" in engines[0].threads
    assert not equal(before, load_file(grpo.train(replace(recipe, rollout=base.rollout, run=str(tmp_path / "now"))) / "model.safetensors"))
    assert not list((tmp_path / "before" / "grpo" / "replies").glob("step-*"))


def test_a_stop_while_replies_are_drawn_beside_the_update_loses_nothing(base, tmp_path, monkeypatch):
    """Before the step's first optimizer step the step is given up and the drawing left; after it the drawing is waited for."""
    monkeypatch.setattr(grpo, "open_engine", lambda recipe, policy, processor, *_: Apart(policy, processor))
    recipe = ahead(replace(base, save=SaveConfig(every=0, tensorboard=False)))
    whole = load_file(grpo.train(replace(recipe, run=str(tmp_path / "whole"))) / "model.safetensors")
    said = set()
    for call in range(3, 7):
        stopped = replace(recipe, run=str(tmp_path / f"stopped {call}"))
        with plant(f"term:update:0:{call}", 0), pytest.raises(SystemExit) as asked:
            grpo.train(stopped)
        said.add("the replies drawn since are kept" in str(asked.value))
        assert equal(load_file(grpo.train(stopped) / "model.safetensors"), whole), call
        assert not [e for e in read_events(Path(stopped.run)) if e["kind"] == "redrawn"], call
    assert said == {True, False}, "the step was given up each time, or never"


def test_an_error_beside_the_update_ends_the_run_with_its_words(base, monkeypatch):
    class Broken(Apart):
        def generate(self, prompts, draw, keys, watch):
            if threading.current_thread() is not threading.main_thread():
                raise ValueError("the engine is gone")
            return super().generate(prompts, draw, keys, watch)

    monkeypatch.setattr(grpo, "open_engine", lambda recipe, policy, processor, *_: Broken(policy, processor))
    with pytest.raises(ValueError, match="the engine is gone"):
        grpo.train(ahead(base))


def test_replies_drawn_ahead_are_weighed_and_older_than_the_policy(base, tmp_path):
    recipe = ahead(replace(base, run=str(tmp_path / "run"), optim=OptimConfig(lr=3e-3, warmup_steps=0)))
    grpo.train(recipe)
    first, *later = read_metrics(tmp_path / "run")
    assert first["mismatch/mean_abs"] < 1e-5 and first["importance"] == pytest.approx(1, abs=1e-4)
    for m in later:
        assert m["mismatch/mean_abs"] > 1e-3 and m["importance"] != 1 and "mismatch/outside" in m
    assert not [e for e in read_events(tmp_path / "run") if e["kind"] in ("mismatch", "redrawn")], "older weights are no bug"


@pytest.mark.parametrize(
    ("setting", "own", "behind", "is_on"),
    [("auto", True, 0, False), ("auto", False, 0, True), ("auto", True, 1, True), ("on", True, 0, True), ("off", False, 0, False)],
)
def test_importance_correction_is_left_to_the_engine(setting, own, behind, is_on, base):
    recipe = replace(base, importance_correction=setting, rollout=replace(base.rollout, ahead=behind))
    engine = type("Engine", (), {"own": own})()
    assert settled(recipe, engine).importance_correction == ("on" if is_on else "off")


def test_replies_drawn_ahead_stay_as_long_as_a_checkpoint_needs_them(base, tmp_path):
    """Weights are gone that drew what the step behind a checkpoint learns from: at every step's end the replies are there of the next step
    and of the one behind every checkpoint, and of no other."""
    recipe = ahead(replace(base, run=str(tmp_path / "run"), steps=7, save=SaveConfig(every=3, keep=1, tensorboard=False)))
    there = {}
    forget = Groups.forget

    def looked(self, needed):
        forget(self, needed)
        folder = tmp_path / "run" / "grpo"
        there[len(there)] = {int(p.name.split("-")[1]) for p in (folder / "replies").glob("step-*")}, checkpoint.steps(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Groups, "forget", looked)
        grpo.train(recipe)
    assert there.pop(0) == (set(), []) and there.pop(8)[0] == set(), "before the first step and after the last"
    for step, (replies, saved) in there.items():
        assert replies >= {*range(step + 1, min(step + 2, 8)), *(s + 1 for s in saved if s < 7)}, (step, replies, saved)
        assert replies <= {step + 1, *(s + 1 for s in (3, 6))}, (step, replies)


def test_replies_that_the_disk_lost_are_drawn_with_newer_weights_and_told(base, tmp_path):
    import shutil

    recipe = ahead(replace(base, run=str(tmp_path / "run")))
    grpo.train(recipe)
    folder = tmp_path / "run" / "grpo"
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "step-000003")
    assert checkpoint.steps(folder) == [1, 2] and not list((folder / "replies").glob("step-*"))
    grpo.train(recipe)
    (event,) = [e for e in read_events(tmp_path / "run") if e["kind"] == "redrawn"]
    assert event["step"] == 3 and event["redrawn"]["groups"] == 4
    assert "4 groups drawn ahead were not on the disk" in write_report(tmp_path / "run").read_text()


# ---- stopped and killed


STOPS = {
    "dynamic, in sampling": (dynamic, "term:sample:0:20 term:sample:1:20"),
    "dynamic, in the update": (dynamic, "term:update:0:6"),
    "ahead, in sampling": (ahead, "term:sample:0:30 term:sample:1:30"),
    "ahead, in the first sampling": (ahead, "term:sample:0:3"),
    "ahead, in the update": (ahead, "term:update:0:5 term:update:1:5"),
    "ahead, in the save": (ahead, "term:save:0:2"),
    "all of them, in sampling": (VARIANTS["all of them"], "term:sample:1:40"),
}


@pytest.mark.ranks
def test_whoever_is_asked_to_stop_goes_on_bit_for_bit(base, tmp_path):
    """Stopped on two ranks while groups are drawn, chosen or drawn ahead, with a checkpoint because of the stop only."""
    base = replace(base, dist=DistConfig(fsdp=True), steps=4)
    whole = {name: change for name, (change, _) in STOPS.items()}
    undisturbed = {change: case(tmp_path, f"whole {k}", change(base), "grpo") for k, change in enumerate(dict.fromkeys(whole.values()))}
    cases = []
    for name, (change, faults) in STOPS.items():
        recipe = change(base) if "save" in name else replace(change(base), save=SaveConfig(every=0, tensorboard=False))
        cases.append(case(tmp_path, name, recipe, "grpo", faults))
    found = run_cases(tmp_path, [*undisturbed.values(), *cases])
    for each in cases:
        name = each["name"]
        assert found[name]["outcome"] == "stopped", (name, found[name])
        assert max(checkpoint.steps(tmp_path / name / "grpo"), default=0) == len(read_metrics(tmp_path / name))
    gone_on = run_cases(tmp_path, [{**each, "faults": ""} for each in cases])
    for name, each in gone_on.items():
        assert each["outcome"] == "finished", (name, each)
        other = tmp_path / undisturbed[whole[name]]["name"]
        found, wanted = weights(tmp_path / name, "grpo"), weights(other, "grpo")
        # replies that are drawn again beside others may have log-probs with other last bits, which importance weights bring into the update
        drawn_again = name in ("ahead, in sampling", "ahead, in the first sampling", "all of them, in sampling")
        assert all(torch.allclose(found[k], wanted[k], rtol=0, atol=2e-6 if drawn_again else 0) for k in wanted), name
        assert [m["step"] for m in read_metrics(tmp_path / name)] == [1, 2, 3, 4] and told(tmp_path / name) == told(other)
        assert not [e for e in read_events(tmp_path / name) if e["kind"] == "redrawn"], name


@pytest.mark.parametrize("variant", ["ahead", "all of them"])
def test_kill_and_resume_is_bit_for_bit(variant, base, tmp_path):
    """kill -9 two steps behind the newest checkpoint: what was drawn ahead of it is still there."""
    import signal

    from actial_fast.settings.config import to_yaml
    from tests.test_training import launch

    recipe = replace(VARIANTS[variant](base), steps=6, save=SaveConfig(every=2, keep=1, tensorboard=False))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = load_file(grpo.train(replace(recipe, run=str(tmp_path / "whole"))) / "model.safetensors")
        broken = replace(recipe, run=str(tmp_path / "broken"))
        (tmp_path / "recipe.yaml").write_text(to_yaml(broken))
        process = launch("grpo", tmp_path / "recipe.yaml", env={"ACTIAL_TEST_KILL_AT": "4"})
        assert process.wait(timeout=240) == -signal.SIGKILL
        assert checkpoint.steps(tmp_path / "broken" / "grpo") == [2]
        assert equal(load_file(grpo.train(broken) / "model.safetensors"), whole)
    finally:
        torch.set_num_threads(threads)
    assert told(tmp_path / "broken") == told(tmp_path / "whole")
    assert not [e for e in read_events(tmp_path / "broken") if e["kind"] == "redrawn"]
