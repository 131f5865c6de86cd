"""Scenes of sampling that run on ranks of their own: python -m tests.rollout.scenes SCENE FOLDER ..., with torchrun's environment."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from actial_fast.model.policy import Policy, load_policy
from actial_fast.model.processor import Processor
from actial_fast.packing.batch import Sequence
from actial_fast.rollout.decoder import Decoder
from actial_fast.settings.model import ModelConfig
from actial_fast.train.dist import World, world
from actial_fast.train.sharding import shard
from tests.faults import leave
from tests.loops import generate


class Counted(TorchDispatchMode):
    """How often each operator is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def decoding(folder: Path, where: World, model: str, rounds: str) -> Any:
    """Sharded weights beside whole ones, rank 0 with prompts and the others without: the replies, the operators of all decoding steps, and
    the least seconds of a step on the host, in turns."""
    processor = Processor.load(model, image_cache=str(folder / f"images-{where.rank}"))
    settings = ModelConfig(path=model)
    place = functools.partial(shard, where=where)
    policies = {
        "whole": load_policy(settings, where.device, 0, packed=True),
        "sharded": load_policy(settings, where.device, 0, packed=True, place=place),
    }
    prompts = [] if where.rank else [_prompt(processor, k) for k in range(5)]
    found: dict[str, Any] = {name: {"seconds": 1e9} for name in policies}
    for _ in range(int(rounds)):
        for name, policy in policies.items():
            found[name] |= _decoded(policy, processor, prompts, found[name]["seconds"])
    where.barrier()
    return found


def _prompt(processor: Processor, k: int) -> Sequence:
    from actial_fast.data.sources.row import Row, Turn
    from actial_fast.data.sources.stream import Example

    image = torch.randint(0, 256, (56, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(k)).numpy()
    return processor.encode_prompt(Example(Row((Turn("user", f"<image>{'what' * k}?"),), images=(image,), where=f"scene:{k}"), k))


def _decoded(policy: Policy, processor: Processor, prompts: list[Sequence], least: float) -> dict[str, Any]:
    plain, seconds, counted = Decoder.step, [least], Counted()

    def step(self: Decoder, rows: Any) -> Any:
        began = time.process_time()
        try:
            return plain(self, rows)
        finally:
            seconds.append(time.process_time() - began)

    Decoder.step = step  # type: ignore[method-assign]
    try:
        keys = [(k,) for k in range(len(prompts))]
        groups = generate(policy, processor, prompts, 4, keys=keys, max_new_tokens=12)
        Decoder.step = lambda self, rows: _under(counted, lambda: plain(self, rows))  # type: ignore[method-assign]
        generate(policy, processor, prompts, 4, keys=keys, max_new_tokens=12)
    finally:
        Decoder.step = plain  # type: ignore[method-assign]
    ids = [[reply.ids.tolist() for reply in group] for group in groups]
    return {"ids": ids, "calls": dict(counted.calls), "seconds": min(seconds)}


def _under(mode: TorchDispatchMode, work: Any) -> Any:
    with mode:
        return work()


if __name__ == "__main__":
    with world() as here:
        made = globals()[sys.argv[1]](Path(sys.argv[2]), here, *sys.argv[3:])
        if here.main:
            print(json.dumps(made))
    leave()
