"""Which engine a recipe asks for."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

import torch

from actial_fast.model.policy import Policy, load_policy
from actial_fast.model.processor import Processor
from actial_fast.model.weights import resolve
from actial_fast.rollout.embedded import Embedded
from actial_fast.rollout.protocol import Engine, Reader
from actial_fast.settings.model import ModelConfig
from actial_fast.settings.recipe import GRPORecipe, RolloutConfig, SFTRecipe
from actial_fast.train.dist import World
from actial_fast.train.offload import Offload


def open_engine(
    recipe: SFTRecipe | GRPORecipe,
    policy: Policy,
    processor: Processor,
    where: World,
    stack: contextlib.ExitStack,
    optimizer: torch.optim.Optimizer | None = None,
    reference: Policy | None = None,
) -> Engine:
    """The engine that replies with the policy's weights, asleep, closed with `stack`. Every rank calls.

    optimizer, reference: what need not be on the device meanwhile (optim.offload).
    """
    engine: Engine
    vllm, moves = recipe.rollout.engine == "vllm", recipe.optim.offload
    states = optimizer if moves == "sampling" else None  # always: they are on the host as it is
    beside = vllm and recipe.rollout.ahead > 0  # the update, which needs the reference
    models = [reference] if reference is not None and not beside else []
    offload = Offload(states, *models, enabled=moves != "none")
    if vllm:
        from actial_fast.rollout.vllm import VLLM

        engine = VLLM(policy, processor, recipe.rollout, where, longest_of(recipe), offload)
    else:
        engine = Embedded(policy, processor, offload)
    stack.callback(engine.close)
    return engine


def open_checkpoint(model: Path | str, where: World, seed: int = 0) -> tuple[Embedded, Processor]:
    """The engine that replies with a checkpoint folder or hub name as it is, and what makes its prompts."""
    weights = ModelConfig(path=str(model), dtype=usual_dtype(where))
    resolve(weights.path)  # of another family its files say nothing that could be understood
    processor = Processor.load(weights.path)
    return Embedded(load_policy(weights, where.device, seed).eval(), processor), processor


def usual_dtype(where: World) -> Literal["float32", "bfloat16"]:
    """The dtype of the computation, for weights that are not trained, so that nothing is cast again for every token."""
    return "bfloat16" if where.device.type == "cuda" else "float32"


def open_model(
    weights: ModelConfig, rollout: RolloutConfig, where: World, stack: contextlib.ExitStack, *, max_prompt: int, longest_reply: int
) -> tuple[Engine, Reader]:
    """The engine that `rollout` names, asleep, with weights that are not trained, closed with `stack`, and what makes its prompts.

    weights: of embedded and vllm; a server is sent pictures of at most their max_pixels. max_prompt: tokens of the longest prompt,
    longest_reply: of the longest reply; a server has its own. vLLM's copy is filled from one on the host, which stays there, because a
    sleep on CUDA loses vLLM's.
    """
    if rollout.engine == "server":
        from actial_fast.rollout.client import Client
        from actial_fast.rollout.server import Rows, Server

        return Server(Client(rollout.url, rollout.model), rollout.workers, weights.max_pixels), Rows()
    resolve(weights.path)  # as above
    processor = Processor.load(weights.path, min_pixels=weights.min_pixels, max_pixels=weights.max_pixels, max_prompt=max_prompt)
    engine: Engine
    if rollout.engine == "vllm":
        from actial_fast.rollout.vllm import VLLM

        policy = load_policy(weights, torch.device("cpu"), seed=0).eval()
        policy.compute_dtype = torch.bfloat16 if where.device.type == "cuda" else torch.float32
        engine = VLLM(policy, processor, rollout, where, max_prompt + longest_reply)
    else:
        engine = Embedded(load_policy(weights, where.device, seed=0).eval(), processor)
    stack.callback(engine.close)
    return engine, processor


def longest_of(recipe: SFTRecipe | GRPORecipe) -> int:
    """Tokens of the longest prompt with the longest reply that a recipe allows, in training and in evaluation."""
    replies = [recipe.eval.max_new_tokens] if recipe.eval.sources else []
    replies += [recipe.sampling.max_new_tokens] if isinstance(recipe, GRPORecipe) else []
    return recipe.data.max_prompt_tokens + max(replies, default=1)
