"""The embedded sampler against the trainer's own forward pass and against transformers' generate."""

import numpy as np
import pytest
import torch

from actial_fast.model.policy import load_policy
from actial_fast.model.processor import Processor
from actial_fast.ops.reference import linear_logprob
from actial_fast.packing.batch import collate
from actial_fast.rollout.embedded import _draw
from actial_fast.settings.recipe import ModelConfig
from tests.loops import generate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setup(lab):
    return load_policy(ModelConfig(path=str(lab.model)), CPU, seed=0), Processor.load(str(lab.model), max_pixels=28 * 28 * 16)


@pytest.fixture
def prompts(setup, example):
    rows = [
        example("<image><image>How did it move?", sizes=[(28, 28), (56, 28)], seed=1),
        example("short", seed=2),
        example("<image>A question that is spelt in bytes, and so is long?", sizes=[(84, 56)], seed=3),
    ]
    return [setup[1].encode_prompt(row) for row in rows]


KEYS = [(0, 1), (0, 2), (0, 3)]


def trainer_logprobs(policy, processor, prompt, reply):
    batch = collate([prompt.extended(reply.ids)], processor.pad, processor.store)
    with torch.no_grad():
        return policy(
            {**batch.model_inputs(), "use_cache": False},
            lambda out, head: linear_logprob(out.last_hidden_state.flatten(0, 1)[batch.loss_rows], head, batch.targets)[0],
        ).numpy()


def test_logprobs_are_the_trainers(setup, prompts):
    """Left-padded prefill, expanded cache, compaction and decoding give what one plain forward pass gives."""
    policy, processor = setup
    for prompt, group in zip(prompts, generate(policy, processor, prompts, 6, keys=KEYS, max_new_tokens=24), strict=True):
        for reply in group:
            np.testing.assert_allclose(reply.logprobs, trainer_logprobs(policy, processor, prompt, reply), atol=2e-5)


def test_greedy_equals_transformers_generate(setup, prompts):
    policy, processor = setup
    for prompt, (reply,) in zip(prompts, generate(policy, processor, prompts, 1, temperature=0, max_new_tokens=16), strict=True):
        batch = collate([prompt], processor.pad, processor.store)
        images = {name: batch.model_inputs()[name] for name in ("pixel_values", "image_grid_thw")} if prompt.images else {}
        theirs = policy.base.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            mm_token_type_ids=(batch.input_ids == processor.image_token).int(),
            **images,
            do_sample=False,
            max_new_tokens=16,
            suppress_tokens=list(processor.banned_tokens),
            eos_token_id=list(processor.stop_tokens),
        )
        assert theirs[0, len(prompt) :].tolist() == reply.ids.tolist()


def test_replies_do_not_depend_on_the_batch(setup, prompts):
    policy, processor = setup
    together = generate(policy, processor, prompts, 3, keys=KEYS, max_new_tokens=12)
    apart = [generate(policy, processor, [p], 3, keys=[k], max_new_tokens=12)[0] for p, k in zip(prompts, KEYS, strict=True)]
    assert [[r.ids.tolist() for r in g] for g in together] == [[r.ids.tolist() for r in g] for g in apart]


def test_keys_decide_the_replies(setup, prompts):
    policy, processor = setup
    one, same, other = (
        [r.ids.tolist() for r in generate(policy, processor, prompts[:1], 4, keys=[k], max_new_tokens=12)[0]] for k in ((1,), (1,), (2,))
    )
    assert one == same != other
    assert len({tuple(ids) for ids in one}) > 1, "the replies of a group are all the same"


def test_vision_tokens_are_never_sampled(setup):
    """Even where the model wants nothing else."""
    _, processor = setup
    banned = torch.tensor(processor.banned_tokens)
    logits = torch.full((64, len(processor.tokenizer)), -20.0)
    logits[:, banned] = 20.0
    for uniform in (None, torch.linspace(0, 1 - 1e-12, 64, dtype=torch.float64)):
        token, _ = _draw(logits, uniform, 1.0, banned)
        assert not torch.isin(token, banned).any()


def test_sampling_follows_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 12)
    uniform = torch.rand(40_000, dtype=torch.float64)
    token, logp = _draw(logits.expand(len(uniform), -1), uniform, 0.7, torch.tensor([3]))
    expected = (logits[0] / 0.7).softmax(0)
    expected[3] = 0
    expected /= expected.sum()
    observed = token.bincount(minlength=12) / len(uniform)
    assert (observed - expected).abs().max() < 0.01
    # the log-prob kept is the trainer's: over the whole vocabulary
    assert torch.allclose(logp, (logits[0] / 0.7).log_softmax(0)[token], atol=1e-6)


def test_a_reply_ends_with_its_stop_token_or_at_the_limit(setup, prompts):
    policy, processor = setup
    with torch.no_grad():  # a head that likes to stop
        weight = policy.base.lm_head.weight
        before = weight.clone()
        weight *= 0.01
    try:
        replies = [r for g in generate(policy, processor, prompts, 32, keys=KEYS, max_new_tokens=60) for r in g]
    finally:
        with torch.no_grad():
            weight.copy_(before)
    stopped = [r for r in replies if r.finished]
    assert stopped and len(stopped) < len(replies)
    for reply in replies:
        ends = np.isin(reply.ids, processor.stop_tokens)
        assert ends[:-1].sum() == 0 and ends[-1] == reply.finished
        assert len(reply.ids) == len(reply.logprobs) and (reply.finished or len(reply.ids) == 60)


def test_the_mode_of_the_policy_is_kept(setup, prompts):
    policy, processor = setup
    policy.train()
    generate(policy, processor, prompts[:1], 1, temperature=0, max_new_tokens=2)
    assert policy.training
