"""Which engine a recipe asks for."""

from __future__ import annotations

import contextlib

from actial_fast.model.policy import Policy
from actial_fast.model.processor import Processor
from actial_fast.rollout.embedded import Embedded
from actial_fast.rollout.protocol import Engine
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe
from actial_fast.train.dist import World


def open_engine(recipe: SFTRecipe | GRPORecipe, policy: Policy, processor: Processor, where: World, stack: contextlib.ExitStack) -> Engine:
    """The engine that replies with the policy's weights, asleep, closed with `stack`. Every rank calls."""
    engine = Embedded(policy, processor)
    stack.callback(engine.close)
    return engine
