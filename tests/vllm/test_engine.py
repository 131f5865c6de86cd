"""What vLLM draws, against the packed trainer's log-probs and the embedded engine's replies, on a CPU in float32."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from vllm import LLM

from actial_fast.rollout.embedded import Embedded
from actial_fast.rollout.kept import Kept
from actial_fast.rollout.protocol import Draw, Watch, awake
from actial_fast.rollout.vllm import VLLM
from tests.loops import ALONE
from tests.vllm.shared import LONGEST, furthest, log_probs, opened, policy_of, recipe_at, replied, same, train

CLOSE = 1e-5


@pytest.fixture(scope="module")
def policy(model):
    return policy_of(model)


@pytest.fixture(scope="module")
def engine(policy, processor):
    with opened(policy, processor) as engine:
        yield engine


@pytest.fixture
def weights(policy):
    """What a test does to them is undone."""
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    yield
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(before[name])


versions = itertools.count(1)  # of weights: each test has its own


def test_log_probs_are_the_trainers_and_follow_a_trained_tower(engine, policy, processor, prompts, keys, weights):
    """Before and after three syncs, over the same images, whose features vLLM would gladly remember."""
    told = []
    for _ in range(4):
        with awake(engine, next(versions)):
            groups = engine.generate(prompts, Draw(4, 1.0, 24), keys)
        assert furthest(policy, processor, prompts, groups) < CLOSE
        told.append(groups)
        fixed = [replied(prompt, group[0]) for prompt, group in zip(prompts, told[0], strict=True)]
        tower = [p.clone() for p in policy.base.model.visual.parameters()]
        before = log_probs(policy, processor, fixed, recipe_at())
        train(policy, processor, fixed)
        assert not any(torch.equal(a, b) for a, b in zip(tower, policy.base.model.visual.parameters(), strict=True))
        after = log_probs(policy, processor, fixed, recipe_at())
        assert all((a - b).abs().max() > 1e3 * CLOSE for a, b in zip(before, after, strict=True)), "the step changed too little to be seen"
    assert not same(told[0], told[-1])


def test_features_of_older_weights_are_not_used_again(engine, policy, processor, prompts, keys, weights):
    """Nothing but the tower changes."""
    with awake(engine, next(versions)):
        engine.generate(prompts, Draw(1, 1.0, 4), keys)
    with torch.no_grad():
        for parameter in policy.base.model.visual.parameters():
            parameter.mul_(1.3)
    with awake(engine, next(versions)):
        assert furthest(policy, processor, prompts, engine.generate(prompts, Draw(1, 1.0, 4), keys)) < CLOSE


@pytest.mark.parametrize("temperature", [0.7, 1.6, 0.0])
def test_log_probs_are_at_the_sampling_temperature(temperature, engine, policy, processor, prompts, keys):
    with awake(engine, 0):
        groups = engine.generate(prompts, Draw(3 if temperature else 1, temperature, 16), keys)
    assert furthest(policy, processor, prompts, groups, temperature) < CLOSE


def test_greedy_replies_are_the_embedded_engines(engine, policy, processor, prompts, keys):
    with awake(engine, 0):
        ours = engine.generate(prompts, Draw(1, 0.0, 40), [])
    with awake(Embedded(policy, processor), 0) as embedded:
        theirs = embedded.generate(prompts, Draw(1, 0.0, 40), [])
    assert same(ours, theirs) and max(len(group[0].ids) for group in ours) > 5
    for (a,), (b,) in zip(ours, theirs, strict=True):
        assert a.finished == b.finished and np.abs(a.logprobs - b.logprobs).max() < 2 * CLOSE


def test_what_is_banned_is_never_drawn(engine, policy, processor, prompts, keys, weights):
    """Ten thousand tokens and more from a model that wants hardly anything else, sampled and greedy; their log-probs say how unlikely they
    were."""
    rows = len(policy.base.lm_head.weight)
    banned = [*processor.banned_tokens, *range(len(processor.tokenizer), rows)]
    assert len(banned) > len(processor.banned_tokens)
    with torch.no_grad():  # whichever way a hidden state points, it points along every other one of these
        along = torch.ones(policy.base.lm_head.weight.shape[1]) * 2
        for i, token in enumerate(banned):
            policy.base.lm_head.weight[token] = along if i % 2 else -along
    with awake(engine, next(versions)):
        drawn = engine.generate(prompts, Draw(64, 1.0, 64), keys)
        greedy = engine.generate(prompts, Draw(1, 0.0, 64), [])
    ids = np.concatenate([reply.ids for group in drawn for reply in group])
    assert len(ids) >= 10_000 and not np.isin(ids, banned).any()
    assert not any(np.isin(group[0].ids, banned).any() for group in greedy)
    few = [group[:4] for group in drawn]
    assert np.median(np.concatenate([r.logprobs for group in few for r in group])) < -10, "the model did not want the banned ones"
    largest = max(float(np.abs(r.logprobs).max()) for group in few for r in group)
    assert furthest(policy, processor, prompts, few) < CLOSE * largest


def test_a_reply_ends_with_its_stop_token_or_at_the_limit(engine, policy, processor, prompts, keys, weights):
    with torch.no_grad():
        policy.base.lm_head.weight.mul_(0.05)  # anything, an end among it
    with awake(engine, next(versions)):
        replies = [reply for group in engine.generate(prompts, Draw(32, 1.0, 60), keys) for reply in group]
    assert 0 < sum(reply.finished for reply in replies) < len(replies)
    for reply in replies:
        ends = np.isin(reply.ids, processor.stop_tokens)
        assert not ends[:-1].any() and ends[-1] == reply.finished and len(reply.logprobs) == len(reply.ids)
        assert reply.finished or len(reply.ids) == 60


def test_keys_decide_the_replies(engine, prompts, keys):
    with awake(engine, 0):
        together = engine.generate(prompts, Draw(3, 1.0, 12), keys)
        apart = [engine.generate([prompt], Draw(3, 1.0, 12), [key])[0] for prompt, key in zip(prompts, keys, strict=True)]
        others = engine.generate(prompts, Draw(3, 1.0, 12), [(1, *key) for key in keys])
    assert same(together, apart) and not same(together, others)
    assert all(len({tuple(reply.ids) for reply in group}) == 3 for group in together), "replies of a group are alike"


def test_a_stop_in_the_middle_and_going_on_give_what_an_uninterrupted_step_does(policy, engine, prompts, weights, tmp_path, monkeypatch):
    draw, positions, version = Draw(2, 1.0, 200), list(range(40, 48)), next(versions)
    many, named = [*prompts, *prompts], [(7, position) for position in positions]
    with torch.no_grad():
        policy.base.lm_head.weight.mul_(0.05)  # replies of many lengths
    with awake(engine, version):
        whole = engine.generate(many, draw, named)
        kept = Kept(tmp_path, "d").at(1)
        finished: list[int] = []

        def drawn(groups):
            kept.add({positions[i]: group for i, group in groups.items()})
            finished.extend(groups)

        lengths = [max(len(r.ids) for r in group) for group in whole]
        assert len(set(lengths)) > 1, "all groups end at the same token: a stop finds none or all"
        cut = engine.generate(many, draw, named, Watch(drawn=drawn, asked=lambda: bool(finished)))
    assert 0 < len(finished) < len(many) and [bool(group) for group in cut] == [i in finished for i in range(len(many))]
    asked: list[int] = []
    plain = LLM.enqueue
    monkeypatch.setattr(LLM, "enqueue", lambda self, *a, **k: asked.append(1) or plain(self, *a, **k))
    there = Kept(tmp_path, "d").at(1).load(positions, 2)
    have = {i: there[position] for i, position in enumerate(positions) if position in there}
    with awake(engine, version):
        again = engine.generate(many, draw, named, Watch(have=have, drawn=drawn))
    assert len(asked) == len(many) - len(have) and sorted(finished) == list(range(len(many)))
    assert same(again, whole)


def test_groups_are_told_as_they_finish_and_dropped_ones_end(engine, prompts, keys):
    rounds, long = [], Draw(2, 1.0, 120)
    with awake(engine, 0):
        whole = engine.generate(prompts, long, keys)
        first = min(range(len(prompts)), key=lambda i: max(len(r.ids) for r in whole[i]))
        last = max(range(len(prompts)), key=lambda i: max(len(r.ids) for r in whole[i]))
        assert max(len(r.ids) for r in whole[first]) < max(len(r.ids) for r in whole[last])
        found = engine.generate(prompts, long, keys, Watch(drawn=rounds.append, dropped=lambda i: i == last and bool(rounds)))
    assert first in rounds[0] and len(rounds) > 1 and found[last] == []
    rest = [i for i in range(len(prompts)) if i != last]
    assert same([found[i] for i in rest], [whole[i] for i in rest]) and sorted(i for each in rounds for i in each) == rest


def test_the_same_version_is_taken_over_once(engine, prompts, keys, monkeypatch):
    with awake(engine, 0):
        engine.generate(prompts, Draw(1, 0.0, 2), [])
    asked = []
    plain = LLM.collective_rpc
    monkeypatch.setattr(LLM, "collective_rpc", lambda self, method, *a, **k: asked.append(method) or plain(self, method, *a, **k))
    with awake(engine, 0):
        pass
    assert not asked and engine.version == 0
    with awake(engine, next(versions)):
        assert asked == ["reload_weights"]


def test_after_a_failure_it_goes_on(engine, prompts, keys):
    def fail(groups):
        raise ValueError("the disk is full")

    with awake(engine, 0):
        whole = engine.generate(prompts, Draw(2, 1.0, 12), keys)
        with pytest.raises(ValueError, match="the disk is full"):
            engine.generate(prompts, Draw(2, 1.0, 12), keys, Watch(drawn=fail))
        engine.recover()
        assert same(engine.generate(prompts, Draw(2, 1.0, 12), keys), whole)


def test_prompts_that_are_read_otherwise_are_refused(engine, prompts, keys, monkeypatch):
    plain = VLLM._asked

    def longer(self, prompt):
        asked = plain(self, prompt)
        return {**asked, "prompt_token_ids": [*asked["prompt_token_ids"], 5]}

    monkeypatch.setattr(VLLM, "_asked", longer)
    ours = len(prompts[1])
    with (
        awake(engine, 0),
        pytest.raises(ValueError, match=rf"prompt 0 \(key \(0, 1\)\): vLLM reads {ours + 1} tokens where ours are {ours}"),
    ):
        engine.generate(prompts[1:2], Draw(1, 1.0, 2), keys[1:2])


def test_what_does_not_fit_is_named(engine, prompts, keys):
    with awake(engine, 0), pytest.raises(ValueError, match=rf"prompt 1: its {len(prompts[1])} tokens and {LONGEST} of a reply are more"):
        engine.generate(prompts[1:2] * 2, Draw(1, 1.0, LONGEST), keys[:2], Watch(have={0: []}))
    many = replace(prompts[0], images=prompts[0].images * 9, grids=prompts[0].grids * 9)
    with awake(engine, 0), pytest.raises(ValueError, match=r"prompt 0: 9 images, over rollout.max_images=8"):
        engine.generate([many], Draw(1, 0.0, 2), [])
    with pytest.raises(ValueError, match=r"rollout.tensor_parallel: 2 does not divide the 1 ranks"), opened(None, None, tensor_parallel=2):
        pass


def test_the_trainers_random_numbers_and_mode_are_left_alone(policy, processor, prompts, keys, engine):
    engine.close()  # one at a time
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = random.random(), np.random.random(), torch.rand(1)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    policy.train()
    again = VLLM(policy, processor, engine._config, ALONE, LONGEST)
    with awake(again, 0):
        groups = again.generate(prompts, Draw(2, 1.0, 6), keys)
    assert (random.random(), np.random.random(), torch.rand(1)) == expected
    assert policy.training and furthest(policy, processor, prompts, groups) < CLOSE, "an engine closed and another opened in one process"
    engine._llm = again._llm  # for the fixture to close
