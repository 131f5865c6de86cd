"""What the tests of vLLM and the scenes on several ranks call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from actial_fast import ops
from actial_fast.data.sources.row import Row, Turn
from actial_fast.data.sources.stream import Example
from actial_fast.model.policy import Policy, load_policy
from actial_fast.model.processor import Processor
from actial_fast.model.tiny import TinyConfig, create
from actial_fast.packing.batch import Sequence
from actial_fast.rollout.protocol import Reply
from actial_fast.rollout.vllm import VLLM
from actial_fast.settings.model import ModelConfig
from actial_fast.settings.recipe import GRPORecipe, RolloutConfig
from actial_fast.settings.sampling import SamplingConfig
from actial_fast.train.dist import World
from actial_fast.train.rounds import Pass, passes
from tests.loops import ALONE, log_probs

# heads of 32: those of 24 are refused on a CPU
SHAPE = TinyConfig(hidden=128, heads=4, layers=2, vision_hidden=128, vision_depth=2, image_size=28, window=112)
LONGEST = 300


def create_model(folder: Path, shape: TinyConfig = SHAPE) -> Path:
    """The head's rows that no token has are zero, as untrained ones are, so that greedy replies never want them."""
    create(folder, ["Which way did it go? A. left B. right", "<answer>A</answer>"] * 2, shape, seed=0)
    known = len(Processor.load(str(folder)).tokenizer)
    weights = load_file(folder / "model.safetensors")
    assert known < len(weights["lm_head.weight"])
    weights["lm_head.weight"][known:] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def processor_of(model: Path) -> Processor:
    return Processor.load(str(model), min_pixels=2 * 28**2, max_pixels=16 * 28**2)


def policy_of(model: Path, **options: object) -> Policy:
    return load_policy(ModelConfig(path=str(model), **options), ALONE.device, 0, packed=True)


def prompts_of(processor: Processor, seed: int = 0) -> list[Sequence]:
    rng = np.random.default_rng(seed)
    one, two, three = (rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((56, 28), (84, 112), (28, 220)))
    asked = [
        ("<image>Which way?", (one,)),
        ("First <image>, then <image>: which way did it go?", (two, three)),
        ("Left?", ()),
        ("<image>", (one,)),
    ]
    rows = [Row((Turn("user", question),), images) for question, images in asked]
    made = [processor.encode_prompt(Example(row, i)) for i, row in enumerate(rows)]
    assert [len(p.images) for p in made] == [1, 2, 0, 1] and sum(p.ids.tolist().count(processor.image_token) for p in made) > 10
    return made


@contextlib.contextmanager
def opened(policy: Policy, processor: Processor, where: World = ALONE, **options: object) -> Iterator[VLLM]:
    engine = VLLM(policy, processor, RolloutConfig(engine="vllm", **options), where, LONGEST)
    try:
        yield engine
    finally:
        engine.close()


def recipe_at(temperature: float = 1.0) -> GRPORecipe:
    return GRPORecipe(sampling=SamplingConfig(n=2, temperature=temperature or 1.0))


def replied(prompt: Sequence, reply: Reply) -> Sequence:
    return replace(prompt, trained=np.zeros(len(prompt), bool)).extended(reply.ids)


def furthest(policy: Policy, processor: Processor, prompts: list[Sequence], groups: list[list[Reply]], temperature: float = 1.0) -> float:
    """The largest distance of replies' log-probs from those of the trainer's packed forward pass."""
    assert len(groups) == len(prompts) and all(groups)
    told = [reply for group in groups for reply in group]
    whole = [replied(prompt, reply) for prompt, group in zip(prompts, groups, strict=True) for reply in group]
    ours = log_probs(policy, processor, whole, recipe_at(temperature))
    return max(float(np.abs(a.numpy() - b.logprobs).max()) for a, b in zip(ours, told, strict=True))


def train(policy: Policy, processor: Processor, sequences: list[Sequence], rate: float = 1e-2) -> None:
    """One step of AdamW towards the sequences, through the packed forward pass and the vision tower."""
    optimizer = torch.optim.AdamW(policy.trained().values(), lr=rate)
    for each in passes([Pass(policy, sequences, True)], recipe_at(), processor, ALONE)[0]:
        policy(each.batch, lambda hidden, head, b=each.batch: -ops.linear_logprob(hidden, head, b.targets)[0].mean()).backward()
    optimizer.step()


def same(a: list[list[Reply]], b: list[list[Reply]]) -> bool:
    return [[r.ids.tolist() for r in group] for group in a] == [[r.ids.tolist() for r in group] for group in b]
