"""vLLM on the families whose engine the other tests do not open: the trainer's log-probs, the embedded engine's greedy replies."""

from dataclasses import replace

import pytest

from actial_fast.rollout.embedded import Embedded
from actial_fast.rollout.protocol import Draw, awake
from actial_fast.settings.model import LoRAConfig
from tests.vllm.shared import SHAPE, create_model, furthest, opened, policy_of, processor_of, prompts_of, replied, same, train

CASES = {"Qwen2-VL": ("qwen2_vl", {}), "Qwen3-VL": ("qwen3_vl", {}), "adapters": ("qwen3_vl", {"lora": LoRAConfig(rank=4, alpha=24)})}


@pytest.mark.parametrize("name", CASES)
def test_a_family_is_drawn_from_as_it_is_trained(name, tmp_path):
    """With the weights it was opened with, and with newer ones."""
    family, options = CASES[name]
    model = create_model(tmp_path / "model", replace(SHAPE, family=family, layers=3))
    processor, policy = processor_of(model), policy_of(model, **options)
    prompts = prompts_of(processor)
    keys = [(1, k) for k in range(len(prompts))]
    with opened(policy, processor) as engine:
        for version in range(2):
            with awake(engine, version):
                groups = engine.generate(prompts, Draw(3, 1.0, 16), keys)
                greedy = engine.generate(prompts, Draw(1, 0.0, 12), [])
            assert furthest(policy, processor, prompts, groups) < 1e-5
            with awake(Embedded(policy, processor), version) as ours:
                assert same(ours.generate(prompts, Draw(1, 0.0, 12), []), greedy)
            train(policy, processor, [replied(prompt, group[0]) for prompt, group in zip(prompts, groups, strict=True)])
