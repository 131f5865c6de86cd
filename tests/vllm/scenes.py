"""Scenes that several ranks play, each a process of its own with an engine of its own.

python -m tests.vllm.scenes SCENE MODEL ...    with torchrun's environment; rank 0 prints what was found as JSON
"""

from __future__ import annotations

import functools
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actial_fast.model.policy import load_policy
from actial_fast.model.weights import local
from actial_fast.rollout import handover
from actial_fast.rollout.protocol import Draw, Watch, awake
from actial_fast.settings.model import ModelConfig
from actial_fast.train.dist import World, world
from actial_fast.train.sharding import shard
from tests.faults import leave
from tests.train.saved import _peak
from tests.vllm import shared


def sharded(where: World, model: str) -> Any:
    """Two syncs out of shards, the second of trained weights; each rank replies to another number of prompts."""
    policy = load_policy(ModelConfig(path=model), where.device, 0, packed=True, place=functools.partial(shard, where=where))
    processor = shared.processor_of(Path(model))
    prompts = shared.prompts_of(processor)
    mine = prompts[: 2 + where.rank]
    found: dict[str, Any] = {"far": []}
    with shared.opened(policy, processor, where) as engine:
        for step in range(2):
            with awake(engine, step):
                drawn = engine.generate(mine, Draw(3, 1.0, 12), [(0, i) for i in range(len(mine))])
            everyone = where.gather([drawn])
            # both ranks go through the trainer's forward pass with the same sequences, which is collective
            for groups in everyone:
                found["far"].append(shared.furthest(policy, processor, prompts[: len(groups)], groups))
            with torch.no_grad():
                for parameter in policy.parameters():
                    local(parameter).mul_(1.1)
    return where.gather([found])


def together(where: World, model: str) -> Any:
    """One engine on two ranks against one on each: the same replies; one that is dropped ends on both, a stop on one rank stops both."""
    policy = load_policy(ModelConfig(path=model), where.device, 0, packed=True)
    processor = shared.processor_of(Path(model))
    prompts = shared.prompts_of(processor)
    mine, keys = prompts[where.rank :], [(where.rank, i) for i in range(len(prompts) - where.rank)]
    draw, found = Draw(2, 1.0, 24), {}
    with shared.opened(policy, processor, where) as alone, awake(alone, 0):
        expected = alone.generate(mine, draw, keys)
    with shared.opened(policy, processor, where, tensor_parallel=2) as engine:
        with awake(engine, 0):
            told: list[int] = []
            drawn = engine.generate(mine, draw, keys, Watch(drawn=told.extend))
            found["same"] = shared.same(drawn, expected)
            found["told"] = sorted(told) == list(range(len(mine)))
            found["far"] = shared.furthest(policy, processor, mine, drawn)
            dropped = engine.generate(mine, draw, keys, Watch(dropped=lambda i: where.rank == 1 and i == 0))
            found["dropped"] = [i for i, group in enumerate(dropped) if not group]
            looks = iter(range(10**6))
            stopped = engine.generate(mine, draw, keys, Watch(asked=lambda: where.rank == 0 and next(looks) > 4))
            found["stopped"] = not any(stopped)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.1)
        with awake(engine, 1):
            found["far after a sync"] = shared.furthest(policy, processor, mine, engine.generate(mine, draw, keys))
    return where.gather([found])


def memory(where: World, model: str) -> Any:
    """How far resident memory rises in a sync, beside the sizes of what a rank holds."""
    policy = load_policy(ModelConfig(path=model), where.device, 0, packed=True, place=functools.partial(shard, where=where))
    processor = shared.processor_of(Path(model))
    prompts = shared.prompts_of(processor)[:1]
    blocks = [*policy.base.model.visual.blocks, *policy.base.model.language_model.layers]
    found: dict[str, Any] = {
        "shard": sum(local(p).nbytes for p in policy.parameters()),
        "model": sum(p.numel() * p.element_size() for p in policy.parameters()),
        "block": max(sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks),
    }
    with shared.opened(policy, processor, where) as engine:
        with awake(engine, 0):  # what is allocated once
            engine.generate(prompts, Draw(1, 1.0, 4), [(0, 0)])
        with torch.no_grad():
            for parameter in policy.parameters():
                local(parameter).mul_(1.01)
        living = _living(found)
        engine.wake()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(handover, "_whole", living)
            _, found["sync"] = _peak(lambda: engine.sync(1))
        groups = engine.generate(prompts, Draw(1, 1.0, 4), [(0, 0)])
        engine.sleep()
        found["far"] = shared.furthest(policy, processor, prompts, groups)
        found["scale"] = float(np.abs(groups[0][0].logprobs).max())
    return where.gather([found])


def _living(found: dict[str, Any]) -> Callable[..., torch.Tensor]:
    """The handover's `_whole`, which notes in found["whole"] how many bytes of whole tensors were alive at a time."""
    plain, handed = handover._whole, []

    def whole(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        value = plain(parameter, dtype)
        handed.append((weakref.ref(value), value.nbytes))
        found["whole"] = max(found.get("whole", 0), sum(size for reference, size in handed if reference() is not None))
        return value

    return whole


if __name__ == "__main__":
    torch.set_num_threads(1)
    with world() as where:
        result = {"sharded": sharded, "together": together, "memory": memory}[sys.argv[1]](where, *sys.argv[2:])
        if where.main:
            print(json.dumps(result))
    leave()
