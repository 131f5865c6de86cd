"""Replies in turns from vLLM, with pictures between them: the trainer's log-probs, and the embedded engine's episodes."""

from dataclasses import replace

import numpy as np
import pytest

from actial_fast.data.sources.row import Row, Turn
from actial_fast.data.sources.stream import Example
from actial_fast.data.sources.task import Observation, Task
from actial_fast.rollout.embedded import Embedded
from actial_fast.rollout.episodes import play, whole
from actial_fast.rollout.protocol import Draw, awake
from tests.vllm.shared import log_probs, opened, policy_of, recipe_at

CLOSE = 1e-5


class Show:
    """Answers every reply with a picture whose size depends on the reply."""

    def __init__(self, row: Row):
        self.asked = 0

    def step(self, reply: str) -> Observation | None:
        self.asked += 1
        size = 28 * (1 + len(reply) % 3), 28 * (1 + self.asked)
        return Observation("<image>next?", (np.random.default_rng(len(reply)).integers(0, 256, (*size, 3), dtype=np.uint8),))


SHOW = Task(metric=lambda response, row: 1.0, environment=Show, turns=3)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_episodes(model, processor, temperature):
    policy, often = policy_of(model), replace(processor, ends=tuple(range(0, len(processor.tokenizer), 3)))
    rng = np.random.default_rng(0)
    examples = []
    for n in range(3):
        pixels = rng.integers(0, 256, (28 * (n + 1), 56, 3), dtype=np.uint8)
        example = Example(Row((Turn("user", "<image>which?"),), (pixels,), where=f"rows:{n}", task=f"{__name__}:SHOW"), n)
        examples.append(replace(example, encoded=often.encode_prompt(example)))
    draw, keys = Draw(3 if temperature else 1, temperature, 7), [(0, n) for n in range(3)]
    with opened(policy, often) as engine, awake(engine, 0):
        groups = play(engine, often, examples, draw, keys)
    replies = [reply for group in groups for reply in group]
    sequences = [whole(e.encoded, reply, often) for e, group in zip(examples, groups, strict=True) for reply in group]
    assert max(len(reply.turns) for reply in replies) == 3 and any(reply.images for reply in replies)
    for ours, reply in zip(log_probs(policy, often, sequences, recipe_at(temperature)), replies, strict=True):
        np.testing.assert_allclose(reply.logprobs[reply.own], ours.numpy(), atol=CLOSE)
    if not temperature:
        with awake(Embedded(policy, often), 0) as embedded:
            theirs = play(embedded, often, examples, draw, keys)
        assert [[r.ids.tolist() for r in group] for group in theirs] == [[r.ids.tolist() for r in group] for group in groups]
        assert [[r.images for r in group] for group in theirs] == [[r.images for r in group] for group in groups]
